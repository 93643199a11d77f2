"""Ensembles that follow the model: sample a state point anew and chain its free energy."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from mlip_refine.losses import EnsembleSource
from mlip_refine.potential import Potential
from mlip_refine.quantities import Measured
from mlip_refine.sampling import FrameStore, Length, MDSettings, StatePoint, Trajectory, sample
from mlip_refine.training.ensembles import Ensemble

Start = Mapping[str, tuple[Tensor, Tensor]]


def stage_seed(seed: int, stage: str) -> int:
    """A seed of its own for every stage of a run."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stage}".encode()).digest()[:4], "big")


@dataclass(frozen=True)
class EnsembleSampler:
    """Draws ensembles of the current model for the sources of the losses.

    Attributes:
        points: State point of every source, in its cell.
        settings: How to integrate.
        length: How long to sample.
        store: Where frames are kept.
        seed: Of the run.
        sampling_dtype: Precision of the sampling copy.
        min_effective: Independent frames below which an ensemble is refused.
    """

    points: Mapping[EnsembleSource, StatePoint]
    settings: MDSettings
    length: Length
    store: FrameStore
    seed: int
    sampling_dtype: str
    min_effective: float

    def draw(
        self, potential: Potential, sources: list[EnsembleSource], stage: str, start: Start | None = None
    ) -> dict[EnsembleSource, Ensemble]:
        """Sample the sources in one batch with a frozen copy of the potential.

        Raises:
            SamplingError: If a phase does not survive.
            StatisticsError: If the frames are too few or too correlated.
        """
        points = [self.points[s] for s in sources]
        seed = stage_seed(self.seed, stage)
        frozen = potential.frozen_copy(self.sampling_dtype)
        runs = sample(
            frozen, points, self.settings, self.length, seed=seed, stage=stage, store=self.store, start=start
        )
        return {s: self._ensemble(potential, runs[self.points[s].name], stage) for s in sources}

    def _ensemble(self, potential: Potential, run: Trajectory, stage: str) -> Ensemble:
        ensemble = Ensemble.from_trajectory(potential, run, stage)
        ensemble.require_frames(self.min_effective)
        return ensemble

    def redraw(
        self, potential: Potential, old: Mapping[EnsembleSource, Ensemble], stage: str
    ) -> dict[EnsembleSource, Ensemble]:
        """Sample sources anew from their last frames, and chain the free energies by BAR."""
        start = {self.points[s].name: e.ends for s, e in old.items()}
        fresh = self.draw(potential, list(old), stage, start)
        return {s: _chained(potential, old[s], fresh[s]) for s in old}

    def restore(self, potential: Potential, saved: list[dict[str, Any]]) -> dict[EnsembleSource, Ensemble]:
        """Ensembles of a checkpoint, their frames from the store."""
        stages: dict[str, list[EnsembleSource]] = {}
        references = {}
        for entry in saved:
            stages.setdefault(entry["stage"], []).append(EnsembleSource(**entry["source"]))
            references[entry["stage"]] = entry["reference"]
        found: dict[EnsembleSource, Ensemble] = {}
        for stage, sources in stages.items():
            with potential.holding(references[stage]):
                found |= self._reopened(potential, sources, stage)
        restored = {}
        for entry in saved:
            source, (value, se) = EnsembleSource(**entry["source"]), entry["shift"]
            restored[source] = replace(found[source], shift=Measured(value, se, "eV"))
        return restored

    def _reopened(
        self, potential: Potential, sources: list[EnsembleSource], stage: str
    ) -> dict[EnsembleSource, Ensemble]:
        """Ensembles of one stage from the store; drawn anew if their files are gone."""
        runs = {s: self._stored(self.points[s], stage) for s in sources}
        kept = {s: run for s, run in runs.items() if run is not None}
        if len(kept) < len(runs):
            return self.draw(potential, sources, stage)
        return {s: self._ensemble(potential, run, stage) for s, run in kept.items()}

    def _stored(self, point: StatePoint, stage: str) -> Trajectory | None:
        """Frames of a point; a stage with several kinds of ensemble has a file for each."""
        for label in (stage, f"{stage}-{point.ensemble}-{point.cell_freedom}"):
            found = self.store.read(label, 0, {point.name: point}, None)
            if found is not None:
                return found[0][point.name]
        return None


def saved_ensembles(ensembles: Mapping[EnsembleSource, Ensemble]) -> list[dict[str, Any]]:
    """What a checkpoint keeps of ensembles: their origin; the frames stay in the store."""
    return [
        {
            "source": {"phase": s.phase, "temperature": s.temperature, "pressure": s.pressure},
            "stage": e.stage,
            "reference": dict(e.reference),
            "shift": [e.shift.value, e.shift.se],
        }
        for s, e in ensembles.items()
    ]


def _chained(potential: Potential, old: Ensemble, fresh: Ensemble) -> Ensemble:
    here = potential.energies(old.structures)
    with potential.holding(old.reference):
        there = potential.energies(fresh.structures)
    return old.continued_by(fresh, here, there)


def needs_redraw(ensemble: Ensemble, energy: Tensor, threshold: float) -> bool:
    """Whether too few of the frames still count under the current model."""
    return ensemble.n_eff(energy) < threshold * len(ensemble.structures)
