"""Batches of labelled frames and of materials, in orders that a seed settles.

Frames of the replay buffer come a fixed number at a time; materials too, or as many as a budget of edges
holds. A batch follows from the seed and its number, whatever ran before; nothing else is kept to resume.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, TypedDict

import numpy as np

from mlip_refine.errors import InputError

_LIMITS = 16
"""How many fillings below the budget may be chosen from: their steps are what batches are uneven by."""


class ReplayState(TypedDict):
    """Position in the sequence of batches, as plain numbers that any format can hold."""

    seed: int
    epoch: int
    position: int
    n_frames: int
    batch_size: int


class ReplayBuffer[T]:
    """Frames in batches, every frame once per epoch, in an order that seed and epoch settle.

    The order of an epoch depends on nothing but seed and epoch, so a resumed run deals the same batches.
    Batches run on across epochs: none is shorter than the others.

    Attributes:
        frames: The frames, in whatever form the caller trains on.
        batch_size: Frames per batch; at most the number of frames.

    Raises:
        InputError: There are no frames, or the batch size is not positive.
    """

    def __init__(
        self, frames: Sequence[T], batch_size: int, seed: int = 0, max_frames: int | None = None
    ) -> None:
        """Take the frames, or `max_frames` of them drawn once with the seed."""
        if not frames:
            raise InputError("the replay buffer has no frames", where="replay.train")
        if batch_size < 1:
            raise InputError("must be positive", where="replay.batch_size", found=batch_size)
        if max_frames is not None and max_frames < 1:
            raise InputError("must be positive", where="replay.max_frames", found=max_frames)
        chosen = list(range(len(frames)))
        if max_frames is not None and max_frames < len(frames):
            random = np.random.default_rng([seed, len(frames)])
            chosen = sorted(random.permutation(len(frames))[:max_frames].tolist())
        self.frames = tuple(frames[i] for i in chosen)
        self.batch_size = min(batch_size, len(self.frames))
        self._seed = seed
        self._epoch = 0
        self._position = 0
        self._order = self._shuffled(0)

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.frames)

    def next_indices(self) -> list[int]:
        """Return the indices of the next batch and move on."""
        taken: list[int] = []
        while len(taken) < self.batch_size:
            wanted = self.batch_size - len(taken)
            part = self._order[self._position : self._position + wanted]
            taken += part
            self._position += len(part)
            if self._position == len(self.frames):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._shuffled(self._epoch)
        return taken

    def next_batch(self) -> list[T]:
        """Return the next batch and move on."""
        return [self.frames[i] for i in self.next_indices()]

    def state_dict(self) -> ReplayState:
        """Return the position in the sequence of batches."""
        return ReplayState(
            seed=self._seed,
            epoch=self._epoch,
            position=self._position,
            n_frames=len(self.frames),
            batch_size=self.batch_size,
        )

    def load_state_dict(self, state: ReplayState) -> None:
        """Continue where another buffer over the same frames stopped.

        Raises:
            InputError: The state belongs to a buffer of another seed or size.
        """
        given = (state["seed"], state["n_frames"], state["batch_size"])
        own = (self._seed, len(self.frames), self.batch_size)
        if given != own:
            what = "seed, frames and batch size"
            raise InputError("state of another replay buffer", found=f"{what} {given}", expected=f"{own}")
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._shuffled(self._epoch)

    def _shuffled(self, epoch: int) -> list[int]:
        order: list[int] = np.random.default_rng([self._seed, epoch]).permutation(len(self.frames)).tolist()
        return order


class Batch(NamedTuple):
    """Materials of one update.

    Attributes:
        members: Indices of the materials.
        weight: Factor on their mean: their number over the mean number per batch of the epoch.
    """

    members: list[int]
    weight: float = 1.0


def dealt(n: int, size: int, seed: int, step: int) -> Batch:
    """Return the members of a batch: all n once before any comes again, in orders that the seed settles.

    Args:
        n: Number of materials.
        size: Members of a batch; at most n of them.
        seed: Random seed of the orders.
        step: Number of the batch, from 0.
    """
    size = min(size, n)
    found: list[int] = []
    for place in range(step * size, (step + 1) * size):
        epoch, index = divmod(place, n)
        found.append(int(np.random.default_rng([seed, epoch]).permutation(n)[index]))
    return Batch(found)


class BudgetedBatches:
    """Batches up to a budget: in every epoch all members once, in company that the seed settles.

    Batches have different numbers of members. With n members in B batches, batch b of n_b has the weight
    n_b B/n. So the mean of weight times mean over the batch, taken over the B updates of an epoch, is the
    mean over all members exactly; unweighted, members of small batches would count more.
    """

    def __init__(self, costs: Sequence[int], budget: int, seed: int) -> None:
        """Store costs, budget and seed; batches are packed when they are asked for.

        Args:
            costs: Cost of every member, such as its edges.
            budget: The most that the members of a batch cost together; one that costs more comes alone.
            seed: Random seed of the batches.
        """
        self._costs, self._budget, self._seed = tuple(costs), budget, seed
        self._starts = [0]
        self._batches = lru_cache(maxsize=2)(self._packed)

    def batch(self, step: int) -> Batch:
        """Return the batch of an update, counted from 0; epochs before it are packed once, to be counted."""
        while self._starts[-1] <= step:
            self._starts.append(self._starts[-1] + len(self._batches(len(self._starts) - 1)))
        epoch = bisect_right(self._starts, step) - 1
        batches = self._batches(epoch)
        members = batches[step - self._starts[epoch]]
        return Batch(members, len(members) * len(batches) / len(self._costs))

    def _packed(self, epoch: int) -> list[list[int]]:
        random = np.random.default_rng([self._seed, epoch])
        batches = evenly_packed(self._costs, random.permutation(len(self._costs)).tolist(), self._budget)
        # The last batches are made of what the others had no room for: they should not come last each time.
        return [batches[i] for i in random.permutation(len(batches))]


def evenly_packed(costs: Sequence[int], order: Sequence[int], budget: int) -> list[list[int]]:
    """Pack members into as few batches as first-fit needs, all filled about as far.

    First-fit fills batches up to the budget and leaves the last ones nearly empty. So the budget is lowered
    as long as that takes no further batch.

    Args:
        costs: Cost of every member.
        order: Indices of the members in the order in which they are packed.
        budget: The most that a batch of several members costs.
    """
    batches = first_fit(costs, order, budget)
    lowest = min(sum(costs) // len(batches), budget)
    limits = range(lowest, budget, -(-(budget - lowest) // _LIMITS) or 1)

    def suffices(limit: int) -> bool:
        return len(first_fit(costs, order, limit)) <= len(batches)

    # Now and then first-fit needs more batches at a larger limit: what is found suffices all the same.
    place = bisect_left(limits, True, key=suffices)
    return first_fit(costs, order, limits[place]) if place < len(limits) else batches


def first_fit(costs: Sequence[int], order: Sequence[int], limit: int) -> list[list[int]]:
    """Put every member into the first batch that has room for it, or into a new one (Johnson 1973).

    Args:
        costs: Cost of every member.
        order: Indices of the members in the order in which they are packed.
        limit: The most that a batch of several members costs.
    """
    batches: list[list[int]] = []
    filled: list[int] = []
    for member in order:
        cost = costs[member]
        place = next((k for k, fill in enumerate(filled) if fill + cost <= limit), len(batches))
        if place == len(batches):
            batches.append([])
            filled.append(0)
        batches[place].append(member)
        filled[place] += cost
    return batches
