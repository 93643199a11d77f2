import math

import numpy as np
import pytest
import torch
from pymbar import timeseries

from mlip_refine.errors import StatisticsError
from mlip_refine.statistics import detect_equilibration, statistical_inefficiency


def _independent(replicas: torch.Tensor) -> float:
    """Number of independent samples in all replicas."""
    return replicas.numel() / statistical_inefficiency(replicas)


@pytest.mark.statistical
@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_autoregressive_series(autoregressive, rho):
    """Mean over 20 series of 20k samples: relative sigma of one below 8 %, of the mean 2 %, 5 sigma."""
    exact = (1.0 + rho) / (1.0 - rho)
    measured = [statistical_inefficiency(one) for one in autoregressive(20, 20_000, rho)]
    assert sum(measured) / 20 == pytest.approx(exact, rel=0.1)


def test_agrees_with_pymbar(autoregressive):
    for one in autoregressive(5, 700, 0.8):
        assert statistical_inefficiency(one) == pytest.approx(
            timeseries.statistical_inefficiency(one.numpy()), rel=1e-9
        )


def test_replicas_agree_with_pymbar(autoregressive):
    """The correlation is long enough for the oracle's minimum lag of 10 not to matter."""
    replicas = autoregressive(4, 2000, 0.95)
    theirs = timeseries.statistical_inefficiency_multiple(replicas.numpy())
    assert statistical_inefficiency(replicas) == pytest.approx(theirs, rel=1e-9)
    assert _independent(replicas) == pytest.approx(8000 / theirs, rel=1e-9)


@pytest.mark.statistical
def test_replicas_measure_better_than_one(autoregressive):
    """Median over 31 draws of eight replicas of 500 samples: 8.96 with a scatter of 0.27 (measured).

    One draw has 9.2(14) with a long tail to the right, up to 20 in 4,000 draws.
    """
    measured = [statistical_inefficiency(autoregressive(8, 500, 0.8)) for _ in range(31)]
    assert np.median(measured) == pytest.approx(9.0, rel=0.25)


def test_stuck_replicas_raise_the_inefficiency(autoregressive):
    replicas = autoregressive(4, 500, 0.5)
    stuck = replicas + torch.tensor([[0.0], [0.0], [0.0], [8.0]], dtype=torch.float64)
    assert _independent(stuck) < 20.0 < _independent(replicas)


def test_anticorrelation_and_short_series_give_one(normal):
    assert statistical_inefficiency(torch.arange(200) % 2) == 1.0
    assert statistical_inefficiency(normal(2)) == 1.0
    assert statistical_inefficiency([4.0]) == 1.0


def test_constant_series():
    constant = torch.full((3, 50), -412.123456789)
    assert statistical_inefficiency(constant) == 1.0
    assert detect_equilibration(constant) == (0, 1.0, 1.0)


def test_scale_and_offset_do_not_matter(autoregressive):
    one = autoregressive(1, 400, 0.7)[0]
    g = statistical_inefficiency(one)
    assert statistical_inefficiency(1e-5 * one - 4e3) == pytest.approx(g, rel=1e-4)


def test_equilibration_agrees_with_pymbar(autoregressive):
    series = autoregressive(1, 400, 0.6)[0] + 8.0 * torch.exp(-torch.arange(400) / 25.0)
    t0, g, n_eff = timeseries.detect_equilibration(series.numpy(), fast=False, nskip=4)
    ours = detect_equilibration(series, n_origins=100)
    assert abs(ours.t0 - t0) <= 4
    assert ours.g == pytest.approx(g, rel=0.05)
    assert ours.n_eff == pytest.approx(n_eff, rel=0.05)


def test_equilibration_cuts_the_approach_and_keeps_the_rest(autoregressive):
    replicas = autoregressive(4, 1000, 0.5)
    approach = replicas + 10.0 * torch.exp(-torch.arange(1000) / 30.0)
    assert 60 <= detect_equilibration(approach).t0 <= 400
    assert detect_equilibration(replicas).t0 <= 200
    assert detect_equilibration(approach).n_eff > _independent(approach)


def test_frozen_tail_is_not_mistaken_for_equilibrium(autoregressive):
    series = torch.cat([autoregressive(1, 300, 0.5)[0], torch.full((200,), 1.5)])
    assert detect_equilibration(series).t0 < 300


def test_numpy_series_and_refusals():
    assert statistical_inefficiency(np.array([1, 2, 1, 3, 1, 2])) >= 1.0
    with pytest.raises(
        StatisticsError, match=r"series holds 1 values that are not finite, the first at index \[1, 2\]"
    ):
        statistical_inefficiency([[0.0, 1.0, 2.0], [0.0, 1.0, math.nan]])
    with pytest.raises(StatisticsError, match="3 dimensions"):
        statistical_inefficiency(torch.zeros(2, 2, 2))
    with pytest.raises(StatisticsError, match="no samples"):
        detect_equilibration([])
    with pytest.raises(StatisticsError, match="0 cuts"):
        detect_equilibration([1.0, 2.0], n_origins=0)
