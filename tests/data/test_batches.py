"""Batches of materials: all once in an epoch, within the budget, even, and known from the seed alone."""

from itertools import pairwise

import numpy as np
import pytest

from mlip_refine.data.batches import Batch, BudgetedBatches, dealt, evenly_packed, first_fit

COSTS = np.random.default_rng(0).lognormal(8.5, 0.8, 200).astype(int).tolist()
"""Edges of supercells: half of them between 3,000 and 8,000, a few above the budget."""

BUDGET = 20_000


def epochs_of(batches: list[Batch], n: int) -> list[list[Batch]]:
    """Cut updates where n members have come."""
    ends = np.cumsum([len(batch.members) for batch in batches])
    cuts = [0, *(np.flatnonzero(ends % n == 0) + 1).tolist()]
    return [batches[start:stop] for start, stop in pairwise(cuts)]


@pytest.fixture(scope="module")
def epochs() -> list[list[Batch]]:
    """Several epochs of updates."""
    dealer = BudgetedBatches(COSTS, BUDGET, seed=3)
    return epochs_of([dealer.batch(step) for step in range(300)], len(COSTS))


def test_an_epoch_has_every_material_once(epochs):
    assert len(epochs) >= 3
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch.members) == list(range(len(COSTS)))


def test_batches_stay_below_the_budget_and_what_is_larger_comes_alone(epochs):
    for epoch in epochs:
        costs = [sum(COSTS[i] for i in batch.members) for batch in epoch]
        over = [batch.members for batch, cost in zip(epoch, costs, strict=True) if cost > BUDGET]
        assert sorted(over) == [[i] for i in range(len(COSTS)) if COSTS[i] > BUDGET]
        assert over
        assert len(epoch) < 1.1 * sum(min(cost, BUDGET) for cost in COSTS) / BUDGET
        others = [c for c in costs if c <= BUDGET]
        assert np.std(others) < 0.1 * np.mean(others)


def test_epochs_differ_and_so_do_seeds(epochs):
    company = [{frozenset(batch.members) for batch in epoch if len(batch.members) > 1} for epoch in epochs]
    assert len(company[0] & company[1]) <= 1
    assert BudgetedBatches(COSTS, BUDGET, 4).batch(0) != BudgetedBatches(COSTS, BUDGET, 3).batch(0)
    # What is packed last must not always come last, either.
    assert len({epoch[-1].members[0] for epoch in epochs}) > 1


def test_a_batch_follows_from_seed_and_step_alone(epochs):
    updates = [batch for epoch in epochs for batch in epoch]
    for step in (150, 7, 90, 0):
        assert BudgetedBatches(COSTS, BUDGET, 3).batch(step) == updates[step]
    used = BudgetedBatches(COSTS, BUDGET, 3)
    assert [used.batch(step) for step in (150, 7, 90, 7)] == [updates[step] for step in (150, 7, 90, 7)]


def test_weighted_means_over_an_epoch_are_the_mean_of_all(epochs):
    """Of a property that grows with the size: unweighted, large cells in small company count too much."""
    values = np.array(COSTS, float)
    for epoch in epochs:
        means = np.array([values[batch.members].mean() for batch in epoch])
        weights = np.array([batch.weight for batch in epoch])
        assert np.mean(weights * means) == pytest.approx(values.mean(), rel=1e-12)
        assert np.mean(weights) == pytest.approx(1.0, rel=1e-12)
        assert np.mean(means) > 1.05 * values.mean()


def test_few_batches_are_as_full_as_each_other():
    """First-fit fills two batches of three; packed evenly, they differ by a few hundredths."""
    costs = np.random.default_rng(1).integers(1000, 7000, 30).tolist()
    budget = int(0.42 * sum(costs))
    filled = [
        [sum(costs[i] for i in batch) for batch in pack(costs, range(30), budget)]
        for pack in (first_fit, evenly_packed)
    ]
    assert len(filled[0]) == len(filled[1]) == 3
    assert min(filled[0]) < 0.5 * max(filled[0])
    assert min(filled[1]) > 0.85 * max(filled[1])


@pytest.mark.parametrize("costs", [[5], [50], [5] * 7, [50] * 7, [10, 10, 10, 50, 1, 1]], ids=str)
def test_a_budget_of_few_or_equal_materials(costs):
    dealer = BudgetedBatches(costs, 10, 0)
    batches = [dealer.batch(step) for step in range(14)]
    for epoch in epochs_of(batches, len(costs)):
        assert sorted(i for batch in epoch for i in batch.members) == list(range(len(costs)))
        assert all(sum(costs[i] for i in b.members) <= 10 or len(b.members) == 1 for b in epoch)
        assert len(epoch) == len(first_fit(costs, sorted(range(len(costs)), key=lambda i: -costs[i]), 10))


def test_every_material_comes_once_before_any_comes_again():
    for n, size in ((7, 3), (4, 4), (2, 5)):
        batches = [dealt(n, size, 1, step) for step in range(2 * n)]
        places = [i for batch in batches for i in batch.members]
        for epoch in range(len(places) // n):
            assert sorted(places[epoch * n : (epoch + 1) * n]) == list(range(n))
        assert {batch.weight for batch in batches} == {1.0}
    assert dealt(50, 50, 1, 0) != dealt(50, 50, 2, 0)
    assert dealt(50, 50, 1, 0) != dealt(50, 50, 1, 1)
