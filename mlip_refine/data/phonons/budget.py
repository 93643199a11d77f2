"""Batches of materials: so many at a time, or as many as a budget of edges holds.

Either way a batch follows from seed and number of the update, whatever ran before: nothing has to be kept to
resume.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

_LIMITS = 16
"""How many fillings below the budget may be chosen from: their steps are what batches are uneven by."""


class Batch(NamedTuple):
    """Materials of one update.

    Attributes:
        members: Their numbers.
        weight: Of their mean: how many they are, over how many a batch of the epoch has on average.
    """

    members: list[int]
    weight: float = 1.0


def dealt(n: int, size: int, seed: int, step: int) -> Batch:
    """The members of a batch: all n once before any comes again, in orders that the seed settles.

    Args:
        n: How many there are.
        size: Of a batch; at most n of them.
        seed: Of the orders.
        step: Number of the batch, from 0.
    """
    size = min(size, n)
    found: list[int] = []
    for place in range(step * size, (step + 1) * size):
        epoch, index = divmod(place, n)
        found.append(int(np.random.default_rng([seed, epoch]).permutation(n)[index]))
    return Batch(found)


class Epochs:
    """Batches up to a budget: in every epoch all members once, in company that the seed settles.

    Batches have different numbers of members. With n members in B batches, batch b of n_b has the weight
    n_b B/n. So the mean of weight times mean over the batch, taken over the B updates of an epoch, is the
    mean over all members exactly; unweighted, members of small batches would count more.
    """

    def __init__(self, costs: Sequence[int], budget: int, seed: int) -> None:
        """Know the members.

        Args:
            costs: Of every member.
            budget: The most that the members of a batch cost together; one that costs more comes alone.
            seed: Of the batches.
        """
        self._costs, self._budget, self._seed = tuple(costs), budget, seed
        self._starts = [0]
        self._batches = lru_cache(maxsize=2)(self._packed)

    def batch(self, step: int) -> Batch:
        """The batch of an update, counted from 0; epochs before it are packed once, to be counted."""
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
        costs: Of all members, by number.
        order: In which they are packed.
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
        costs: Of all members, by number.
        order: In which they are packed.
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
