"""Schedules: which losses act at an update.

Losses fall into two groups. Those of experiments (`EnsembleLoss`, `PotentialLoss`) pull the potential towards
measurements, those of replay (`BatchLoss`) hold it to its labels. `joint` sums the gradients of both in every
update; the other schedules let the groups act in turn, as Röcken and Zavadlav (npj Comput. Mater. 2024) do.
A schedule is a function of the number of the update alone: nothing of it has to be kept to resume.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import ceil

from mlip_refine.config import Training
from mlip_refine.data import ReplayBuffer
from mlip_refine.errors import InputError
from mlip_refine.losses import BatchLoss, Loss
from mlip_refine.training.replay import LabelledFrame

FOR_GOOD = sys.maxsize
"""Updates of a turn that does not end."""


class Group(StrEnum):
    """Losses that act together."""

    REPLAY = "replay"
    EXPERIMENT = "experiment"

    @classmethod
    def of(cls, loss: Loss) -> "Group":
        """The group of a loss."""
        return cls.REPLAY if isinstance(loss, BatchLoss) else cls.EXPERIMENT


@dataclass(frozen=True)
class Turn:
    """Updates in a row in which the same groups act."""

    groups: frozenset[Group]
    updates: int


@dataclass(frozen=True)
class Schedule:
    """Turns that follow each other, again and again.

    Attributes:
        turns: In order, from update 0.
    """

    turns: tuple[Turn, ...]

    @classmethod
    def joint(cls) -> "Schedule":
        """Both groups in every update."""
        return cls((Turn(frozenset(Group), 1),))

    @classmethod
    def in_turn(cls, *turns: tuple[Group, int]) -> "Schedule":
        """One group after the other, each for so many updates."""
        return cls(tuple(Turn(frozenset({group}), updates) for group, updates in turns))

    @property
    def period(self) -> int:
        """Updates after which the turns begin again."""
        return sum(turn.updates for turn in self.turns)

    def acting(self, step: int) -> frozenset[Group]:
        """The groups that act at an update, counted from 0."""
        end, place = 0, step % self.period
        for turn in self.turns:
            end += turn.updates
            if place < end:
                break
        return turn.groups

    def acted(self, group: Group, step: int) -> int:
        """In how many of the updates before this one a group has acted."""
        cycles, left = divmod(step, self.period)
        count = 0
        for turn in self.turns:
            mine = min(left, turn.updates)
            count += (cycles * turn.updates + mine) * (group in turn.groups)
            left -= mine
        return count


def make_schedule(
    settings: Training,
    losses: Sequence[Loss],
    buffer: ReplayBuffer[LabelledFrame] | None,
    where: str | None = None,
) -> Schedule:
    """The schedule of a training.

    Args:
        settings: What it is, and how many updates there are.
        losses: All losses.
        buffer: What batches are dealt from: says how many updates a pass over its frames takes.
        where: Place of the schedule in the config, for messages.

    Raises:
        InputError: If a group that should take its turn has no losses, or never comes to act.
    """
    if settings.schedule == "joint":
        return Schedule.joint()
    found = {Group.of(loss) for loss in losses}
    if found != set(Group) or buffer is None:
        lacking = "experiments" if found == {Group.REPLAY} else "labelled frames, such as replay"
        raise InputError(
            f"the schedule {settings.schedule} has no turns to take",
            where=where,
            found=f"no loss of {lacking}",
            expected="losses of experiments and of labelled frames",
            fix="Add one, or leave training.schedule out.",
        )
    epochs = settings.epochs
    if epochs is None:
        schedule = Schedule.in_turn((Group.EXPERIMENT, 1), (Group.REPLAY, 1))
    else:
        one_pass = ceil(len(buffer) / (buffer.batch_size * settings.replay_batches))
        replay = one_pass if epochs.replay == "pass" else epochs.replay
        schedule = Schedule.in_turn((Group.REPLAY, replay), (Group.EXPERIMENT, epochs.experiment or FOR_GOOD))
    if not schedule.acted(Group.EXPERIMENT, settings.steps):
        raise InputError(
            "the experiments never come to act",
            where=where,
            found=f"{schedule.turns[0].updates} updates of replay first, and training.steps {settings.steps}",
            fix="Make training.epochs.replay smaller, or training.steps larger.",
        )
    return schedule
