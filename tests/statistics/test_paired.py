"""Reductions of paired errors: exact values, coverage, refusals."""

import pytest
import torch

from mlip_refine.errors import StatisticsError
from mlip_refine.statistics.paired import paired_reduction


def test_errors_that_all_fall_alike_have_no_spread():
    before = torch.tensor([[1.0, 4.0], [2.0, 1.0], [3.0, 2.0], [4.0, 9.0], [0.5, 3.0]])
    found = paired_reduction(before, before * torch.tensor([0.5, 0.2]))
    assert found.value == pytest.approx(0.65)
    assert found.low == pytest.approx(0.65)
    assert found.high == pytest.approx(0.65)
    assert found.of_quantities[0] == pytest.approx((0.5, 0.5, 0.5))
    assert found.of_quantities[1] == pytest.approx((0.8, 0.8, 0.8))


def test_the_reduction_is_of_means_and_not_the_mean_of_reductions():
    before, after = torch.full((6, 1), 1.0), torch.full((6, 1), 0.5)
    before[0], after[0] = 100.0, 100.0
    assert paired_reduction(before, after).value == pytest.approx(1 - 102.5 / 105)


def test_intervals_hold_the_true_reduction_as_often_as_they_say():
    generator = torch.Generator().manual_seed(3)
    hits = 0
    for _ in range(100):
        before = torch.empty(44, 1).exponential_(generator=generator)
        after = before * torch.rand(44, 1, generator=generator)
        found = paired_reduction(before, after)
        hits += found.low < 0.5 < found.high
    assert 88 <= hits <= 99


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (torch.ones(4, 2), torch.ones(4, 2), "at least 5 cases"),
        (torch.ones(6, 2), torch.ones(6, 1), "the same"),
        (torch.zeros(6, 1), torch.ones(6, 1), "none before"),
        (torch.ones(6, 1), torch.full((6, 1), float("nan")), "not finite"),
    ],
)
def test_what_carries_no_reduction_is_refused(before, after, message):
    with pytest.raises(StatisticsError, match=message):
        paired_reduction(before, after)
