"""Held-out frames decide when a training may stop, and which parameters it delivers.

Targets that are far away are met after a few large steps, which throw back what labelled frames say: energies
above all, whose errors are the smallest beside what the model knows. Replay takes them back in the updates
that follow. A run that stopped at once would deliver the moment of the greatest damage. And replay of few
frames, or of one kind of frames, goes on to fit these at the expense of all others. Both show in errors on
frames that are not trained on, as in early stopping (Prechelt 1998).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mlip_refine.potential import Potential
from mlip_refine.training.replay import HeldOutErrors, LabelledFrame, held_out_errors

MOST = 200
"""Most frames that are looked at, evenly spaced."""

EVERY = 5
"""Updates between two looks in a run without targets."""

STALLED = 10
"""Looks in a row without a fall of the errors after which a run that meets its targets stops all the same."""

FALL = 0.1
"""Least fall of the excess that counts as one."""

LEAST = {"energy_mae_mev_per_atom": 1.0, "forces_mae_mev_per_A": 5.0}
"""Errors that are allowed in any case, meV/atom and meV/Å: labels of the initial model have none at first."""


@dataclass(frozen=True)
class Kept:
    """Parameters that may be delivered.

    Attributes:
        step: Number of updates before them.
        excess: Growth of the held-out errors over the allowed one (see `HeldOutGuard.look`).
        parameters: The parameters, by name.
    """

    step: int
    excess: float
    parameters: Mapping[str, Tensor]


@dataclass
class HeldOutGuard:
    """Looks at errors on held-out frames, and keeps parameters under which they are as they should be.

    Attributes:
        frames: Frames that are not trained on.
        before: Errors of the initial potential on them.
        limit: Growth of the errors of energies and forces that is allowed, as a share of them. Errors of
            stresses are not judged: another lattice at zero pressure is another stress at the same cell.
        names: Errors that are judged, fields of `HeldOutErrors`.
        kept: The newest parameters within the limit; as long as there are none, those of least growth.
        lowest: Least excess seen.
        stalled: Looks since then.
    """

    frames: Sequence[LabelledFrame]
    before: HeldOutErrors
    limit: float
    names: Sequence[str] = tuple(LEAST)
    kept: Kept | None = None
    lowest: float = field(default=math.inf)
    stalled: int = 0

    @classmethod
    def of(
        cls, initial: Potential, frames: Sequence[LabelledFrame], limit: float, *, energies: bool = True
    ) -> "HeldOutGuard":
        """Measure the initial potential on held-out frames, or on `MOST` of them.

        Args:
            initial: The initial potential.
            frames: Frames that are not trained on.
            limit: Growth of an error that is allowed, as a share of it.
            energies: Whether energies are judged, too; not if their zero is shifted after training.

        Raises:
            MlipRefineError: If memory runs out for a single system.
        """
        places = torch.linspace(0, len(frames) - 1, min(MOST, len(frames))).round().long().tolist()
        chosen = [frames[i] for i in places]
        names = [name for name in LEAST if energies or not name.startswith("energy")]
        return cls(chosen, held_out_errors(initial, chosen), limit, names)

    def start(self, parameters: Mapping[str, Tensor]) -> None:
        """Let the initial parameters be delivered where no others are within the limit."""
        self.kept = Kept(0, 0.0, _copied(parameters))

    def begin_anew(self) -> None:
        """Forget what was seen: from now on targets count, which parameters before did not meet."""
        self.kept, self.lowest, self.stalled = None, math.inf, 0

    def look(self, potential: Potential, parameters: Mapping[str, Tensor], step: int) -> float:
        """Measure parameters, and keep them if none before them are better.

        Args:
            potential: The potential, whatever its parameters.
            parameters: What is measured.
            step: Number of updates before them.

        Returns:
            The largest growth of an error over the allowed one: up to 1 all is well.

        Raises:
            MlipRefineError: If memory runs out for a single system.
        """
        with potential.holding(parameters):
            errors = held_out_errors(potential, self.frames)
        excess = 0.0
        for name in self.names:
            old, new = getattr(self.before, name), getattr(errors, name)
            if old is not None and new is not None:
                # What is not finite is no small growth.
                growth = (new - old) / max(self.limit * old, LEAST[name] - old)
                excess = max(excess, growth) if math.isfinite(growth) else math.inf
        if excess < self.lowest - FALL:
            self.lowest, self.stalled = excess, 0
        else:
            self.stalled += 1
        if self.kept is None or excess <= max(1.0, self.kept.excess):
            self.kept = Kept(step, excess, _copied(parameters))
        return excess

    def lets_stop(self, potential: Potential, parameters: Mapping[str, Tensor], step: int) -> bool:
        """Whether a run that meets its targets may stop here: errors are within the limit or fall no more.

        Arguments and errors are those of `look`.
        """
        return self.look(potential, parameters, step) <= 1.0 or self.stalled >= STALLED

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        kept = self.kept
        return {
            "kept": kept and {"step": kept.step, "excess": kept.excess, "parameters": dict(kept.parameters)},
            "lowest": self.lowest,
            "stalled": self.stalled,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.kept = state["kept"] and Kept(**state["kept"])
        self.lowest, self.stalled = state["lowest"], state["stalled"]


def _copied(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.detach().clone() for name, values in parameters.items()}
