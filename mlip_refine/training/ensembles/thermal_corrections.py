"""What temperature adds to a property of the potential itself: frames that are drawn now and then.

A `PotentialLoss` follows the current model exactly and the thermal part of its property only from draw to
draw. Its frames are not reweighted: each draw is averaged once, under the parameters that drew it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mlip_refine.errors import InputError
from mlip_refine.losses import EnsembleSource, Frames, PotentialLoss
from mlip_refine.potential import Potential
from mlip_refine.training.ensembles.ensemble import Draw, Ensemble
from mlip_refine.training.ensembles.sampler import EnsembleSampler
from mlip_refine.training.gradients.streaming import further_probes, wanted_by


class ThermalCorrections:
    """Draws frames for losses on the potential itself.

    Attributes:
        stages: Where the newest draw of every loss lies in the store, and the parameters that drew it.
    """

    def __init__(self, sampler: EnsembleSampler) -> None:
        """Draw with a sampler; nothing has been drawn yet."""
        self.sampler = sampler
        self.stages: dict[str, tuple[str, Mapping[str, Tensor]]] = {}
        self._ends: dict[str, dict[EnsembleSource, tuple[Tensor, Tensor]]] = {}

    def follow(self, potential: Potential, loss: PotentialLoss, step: int) -> None:
        """Draw the sources of a loss with the potential as it is, if that is due at this update.

        Raises:
            SamplingError: If a phase does not survive.
            StatisticsError: If the frames are too few or too correlated.
        """
        if not loss.sources or step % loss.every != 0:
            return
        stage = f"{loss.name}-{step:04d}"
        start = {self.sampler.points[s].name: ends for s, ends in self._ends.get(loss.name, {}).items()}
        drawn = self.sampler.draw(potential, loss.sources, stage, start=start or None)
        self.stages[loss.name] = stage, potential.parameters()
        self._show(potential, loss, drawn)

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint; the frames stay in the store."""
        return {name: {"stage": stage, "reference": dict(p)} for name, (stage, p) in self.stages.items()}

    def load_state_dict(
        self, potential: Potential, losses: Sequence[PotentialLoss], state: Mapping[str, Any]
    ) -> None:
        """Show every loss the frames that it saw last.

        Raises:
            InputError: If frames are gone.
        """
        for loss in losses:
            if loss.name not in state:
                continue
            stage, reference = state[loss.name]["stage"], state[loss.name]["reference"]
            drawn = self.sampler.stored(potential, loss.sources, stage, reference)
            if drawn is None:
                raise InputError(
                    f"the frames of the stage {stage!r} are gone",
                    where=str(self.sampler.store.folder),
                    fix="bring the folder back, or start again under another name",
                )
            self.stages[loss.name] = stage, reference
            with potential.holding(reference):
                self._show(potential, loss, drawn)

    def _show(self, potential: Potential, loss: PotentialLoss, drawn: Mapping[EnsembleSource, Draw]) -> None:
        wanted = wanted_by(loss)
        frames: dict[EnsembleSource, Frames] = {}
        for source, draw in drawn.items():
            probes = further_probes(potential, draw.structures, wanted)
            frames[source] = Ensemble.of(draw).frames({"energy": draw.energy, **probes})
        self._ends[loss.name] = {source: draw.ends for source, draw in drawn.items()}
        loss.follow(potential, frames)
