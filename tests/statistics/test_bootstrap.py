"""Bootstrap errors against exact ones; reductions of paired errors: exact values, coverage, refusals."""

import math

import pytest
import torch

from mlip_refine.errors import StatisticsError
from mlip_refine.statistics import bar_estimate, block_bootstrap, block_length, paired_reduction


def _mean(series):
    return series[0].mean()


@pytest.mark.statistical
def test_mean_of_independent_samples(normal):
    """Averaged over 20 samples: 2 % too large, for g is measured and at least 1; sigma 1.2 % (measured)."""
    ratios = [block_bootstrap(_mean, [x]) * math.sqrt(500) / x.std().item() for x in normal(20, 500)]
    assert sum(ratios) / 20 == pytest.approx(1.02, abs=0.08)


@pytest.mark.statistical
def test_mean_of_correlated_samples(autoregressive):
    """Averaged over 60 AR(1) series with g = 9: sqrt(9 / n), within 15 % (5 sigma and a small bias)."""
    measured = [block_bootstrap(_mean, [one]) for one in autoregressive(60, 2000, 0.8)]
    assert sum(measured) / 60 == pytest.approx(math.sqrt(9.0 / 2000), rel=0.15)


@pytest.mark.statistical
def test_free_energy_agrees_with_the_asymptotic_error(pair, normal):
    works = [pair.work(pair.place(k, normal(600))) for k in (0, 1)]
    ones = [1.0, 1.0]
    se = block_bootstrap(lambda both: bar_estimate(*both).value, works, 800, inefficiencies=ones)
    assert se == pytest.approx(bar_estimate(*works).se, rel=0.2)


def test_columns_are_resampled_together(normal):
    x = normal(300)
    paired = torch.stack([x, x], dim=1)
    se = block_bootstrap(lambda one: (one[0][:, 0] - one[0][:, 1]).mean(), [paired], inefficiencies=[2.0])
    assert se == 0.0


def test_seed_decides(normal):
    x = normal(100)
    assert block_bootstrap(_mean, [x], 20, seed=1) == block_bootstrap(_mean, [x], 20, seed=1)
    assert block_bootstrap(_mean, [x], 20, seed=1) != block_bootstrap(_mean, [x], 20, seed=2)


def test_block_length_grows_with_correlation_and_stays_short():
    assert block_length(1000, 1.0) == 1
    assert block_length(1000, 9.0) == 31
    assert block_length(40, 30.0) == 10
    assert block_length(2, 1.0) == 1


def test_refusals(normal):
    x = normal(10)
    with pytest.raises(StatisticsError, match="1 resamples of 1 series"):
        block_bootstrap(_mean, [x], n_resamples=1)
    with pytest.raises(StatisticsError, match="200 resamples of 0 series"):
        block_bootstrap(_mean, [])
    with pytest.raises(StatisticsError, match="several columns"):
        block_bootstrap(_mean, [normal(10, 2)])
    with pytest.raises(StatisticsError, match="2 inefficiencies for 1 series"):
        block_bootstrap(_mean, [x], inefficiencies=[1.0, 1.0])
    with pytest.raises(StatisticsError, match="resampled statistic"):
        block_bootstrap(lambda _: math.nan, [x])
    with pytest.raises(StatisticsError, match="series 0"):
        block_bootstrap(_mean, [x * math.inf])


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


@pytest.mark.statistical
def test_intervals_hold_the_true_reduction_as_often_as_they_say(require_coverage):
    generator = torch.Generator().manual_seed(3)
    hits = 0
    for _ in range(400):
        before = torch.empty(44, 1).exponential_(generator=generator)
        after = before * torch.rand(44, 1, generator=generator)
        found = paired_reduction(before, after)
        hits += found.low < 0.5 < found.high
    require_coverage(hits, 400)


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
