"""How often the systems of a batch were set back: few faults at a time are forgiven, many end a system."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_SAVED = ("total", "counted", "shortenings", "last_fault")


class Restarts:
    """Restarts of every system; time without a fault makes up for them, so a rare one ends no long run.

    Attributes:
        total: How often each system was set back: the number of its noise stream.
        counted: Those restarts that are not forgiven.
        allowed: How many of these each system may have.
        shortenings: How often the time step of each system is shortened.
    """

    def __init__(self, allowed: Sequence[int], forgiving_steps: int) -> None:
        """Count from none.

        Args:
            allowed: Of every system.
            forgiving_steps: Steps without a fault for which one restart is forgiven.
        """
        self.allowed, self._forgiving_steps = tuple(allowed), forgiving_steps
        self.total, self.counted, self.shortenings, self._last_fault = ([0] * len(allowed) for _ in _SAVED)

    @property
    def given_up(self) -> list[int]:
        """Systems that failed too often."""
        return [i for i, n in enumerate(self.counted) if n > self.allowed[i]]

    def add(self, system: int, step: int) -> None:
        """Count a restart, after what the time since the last one makes up for.

        A time step that was shortened is only made longer together with a restart: never in a system that
        goes well with it.
        """
        forgiven = (step - self._last_fault[system]) // self._forgiving_steps
        self.counted[system] = max(0, self.counted[system] - forgiven) + 1
        self.shortenings[system] = max(0, self.shortenings[system] - forgiven)
        self.total[system] += 1
        self._last_fault[system] = step

    def snapshot(self) -> dict[str, Tensor]:
        """What `restore` goes on from."""
        counts = (self.total, self.counted, self.shortenings, self._last_fault)
        return {f"restarts.{k}": torch.tensor(v) for k, v in zip(_SAVED, counts, strict=True)}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from a snapshot."""
        counts = (saved[f"restarts.{name}"].tolist() for name in _SAVED)
        self.total, self.counted, self.shortenings, self._last_fault = counts
