import math

import pymbar
import pytest
import torch

from mlip_refine.errors import StatisticsError
from mlip_refine.statistics import bar_estimate, exp_estimate, kish_size, statistical_inefficiency
from mlip_refine.testing import sigma_bound

EXACT = 0.5 * math.log(1.5)


def _works(pair, normal, n0, n1):
    return pair.work(pair.place(0, normal(n0))), pair.work(pair.place(1, normal(n1)))


def _overlap_by_quadrature(pair):
    x = torch.linspace(-12.0, 12.0, 20001, dtype=torch.float64)
    p0, p1 = torch.exp(-pair.potentials(x)) * torch.sqrt(pair.stiffness / (2.0 * math.pi))[:, None]
    return torch.trapezoid(2.0 * p0 * p1 / (p0 + p1), x).item()


@pytest.mark.statistical
@pytest.mark.parametrize(("n0", "n1"), [(8000, 8000), (8000, 1000), (600, 8000), (8000, 0)])
def test_two_gaussians_are_exact_to_their_error(pair, normal, n0, n1):
    estimate = bar_estimate(*_works(pair, normal, n0, n1))
    assert abs(estimate.value.item() - EXACT) < sigma_bound() * estimate.se
    assert estimate.se < 0.05


@pytest.mark.statistical
def test_samples_of_the_second_state_alone_are_exact_to_their_error(reversed_pair, normal):
    """From the wide well to the narrow one: the other way round, weights have no fourth moment."""
    estimate = bar_estimate(*_works(reversed_pair, normal, 0, 8000))
    assert abs(estimate.value.item() + EXACT) < sigma_bound() * estimate.se
    assert estimate.se < 0.05


@pytest.mark.statistical
def test_exponential_average_is_exact_to_its_error(pair, normal):
    forward, _ = _works(pair, normal, 8000, 1)
    estimate = exp_estimate(forward)
    assert abs(estimate.value.item() - EXACT) < sigma_bound() * estimate.se
    assert estimate.n_eff == pytest.approx(kish_size(-forward).item(), rel=1e-12)


@pytest.mark.statistical
def test_overlap_is_that_of_the_densities(pair, reversed_pair, normal):
    """Whatever the numbers of samples; 20k samples, sigma 0.001 (measured), ten sigma."""
    exact = _overlap_by_quadrature(pair)
    forward, reverse = _works(pair, normal, 20_000, 20_000)
    _, wide = _works(reversed_pair, normal, 0, 20_000)
    for estimate in (
        exp_estimate(forward),
        bar_estimate(forward, reverse),
        bar_estimate(forward, reverse[:500]),
        bar_estimate(forward[:0], wide),
    ):
        assert estimate.overlap == pytest.approx(exact, abs=0.01)


def test_equal_states_are_known_exactly():
    zero = torch.zeros(20)
    for estimate in (exp_estimate(zero), bar_estimate(zero, zero[:7])):
        assert estimate.value.item() == pytest.approx(0.0, abs=1e-14)
        assert estimate.se == 0.0
        assert estimate.overlap == pytest.approx(1.0, rel=1e-12)
    assert bar_estimate(zero, zero[:7]).n_eff == pytest.approx(27.0, rel=1e-12)


def test_constant_work_shifts_the_value(pair, normal):
    forward, reverse = _works(pair, normal, 300, 200)
    low, high = bar_estimate(forward, reverse), bar_estimate(forward + 3e4, reverse + 3e4)
    assert high.value.item() - low.value.item() == pytest.approx(3e4, rel=1e-14)
    assert high.se == pytest.approx(low.se, rel=1e-6)


def test_exchange_of_states_changes_the_sign(pair, normal):
    forward, reverse = _works(pair, normal, 300, 200)
    there, back = bar_estimate(forward, reverse, (2.0, 3.0)), bar_estimate(-reverse, -forward, (3.0, 2.0))
    assert back.value.item() == pytest.approx(-there.value.item(), rel=1e-12)
    assert back.se == pytest.approx(there.se, rel=1e-10)
    assert back.n_eff == pytest.approx(there.n_eff, rel=1e-10)
    assert back.overlap == pytest.approx(there.overlap, rel=1e-10)


def test_one_sided_limits_are_exponential_averages(pair, normal):
    forward, reverse = _works(pair, normal, 300, 200)
    assert bar_estimate(forward, reverse[:0]).value.item() == exp_estimate(forward).value.item()
    assert bar_estimate(forward[:0], reverse).value.item() == -exp_estimate(-reverse).value.item()
    crowd = bar_estimate(forward.repeat(2_000), reverse[:1])
    assert crowd.value.item() == pytest.approx(exp_estimate(forward).value.item(), abs=1e-3)


@pytest.mark.parametrize(("n0", "n1"), [(2000, 2000), (3000, 700)])
def test_agrees_with_pymbar(pair, normal, n0, n1):
    forward, reverse = _works(pair, normal, n0, n1)
    ours, theirs = bar_estimate(forward, reverse), pymbar.bar(forward.numpy(), -reverse.numpy())
    assert ours.value.item() == pytest.approx(theirs["Delta_f"], abs=1e-6)
    assert ours.se == pytest.approx(theirs["dDelta_f"], rel=1e-3)
    ours, theirs = exp_estimate(forward), pymbar.exp(forward.numpy())
    assert ours.value.item() == pytest.approx(theirs["Delta_f"], abs=1e-10)
    assert ours.se == pytest.approx(theirs["dDelta_f"], rel=1e-3)


def test_states_without_overlap_still_have_a_root():
    """Works of 2000 +- 1 and -2000 +- 1: by symmetry the root is zero, and it says not to believe it."""
    spread = torch.linspace(-1.0, 1.0, 9, dtype=torch.float64)
    estimate = bar_estimate(2000.0 + spread, -2000.0 - spread)
    assert estimate.value.item() == pytest.approx(0.0, abs=1e-9)
    assert estimate.overlap < 1e-300
    swapped = bar_estimate(-2000.0 - spread, 2000.0 + spread[:3])
    assert math.isfinite(swapped.value.item())


def test_inefficiency_scales_error_and_size(pair, normal):
    forward, reverse = _works(pair, normal, 5000, 5000)
    once, nine = bar_estimate(forward, reverse), bar_estimate(forward, reverse, (9.0, 9.0))
    assert nine.se / once.se == pytest.approx(3.0, rel=2e-3)
    assert nine.n_eff * 9.0 == pytest.approx(once.n_eff, rel=1e-12)
    assert exp_estimate(forward[:20], 20.0).se == math.inf


def _hits(estimates):
    """Number of 95 % intervals that hold the truth."""
    return sum(abs(one.value.item() - EXACT) < 1.96 * one.se for one in estimates)


@pytest.mark.statistical
def test_coverage_of_both_estimators(pair, normal, require_coverage):
    """95 % intervals of 600 experiments."""
    forward, reverse = pair.work(pair.place(0, normal(600, 300))), pair.work(pair.place(1, normal(600, 150)))
    require_coverage(_hits(exp_estimate(one) for one in forward), 600)
    require_coverage(_hits(bar_estimate(*both) for both in zip(forward, reverse, strict=True)), 600)


@pytest.mark.statistical
def test_coverage_with_measured_correlation(pair, autoregressive, require_coverage):
    """AR(1) samples, g near 9 and 2, each measured on its own work series."""
    forward = pair.work(pair.place(0, autoregressive(600, 1500, 0.8)))
    reverse = pair.work(pair.place(1, autoregressive(600, 600, 0.3)))
    estimates = [
        bar_estimate(f, r, (statistical_inefficiency(f), statistical_inefficiency(r)))
        for f, r in zip(forward, reverse, strict=True)
    ]
    require_coverage(_hits(estimates), 600)


def _exp_value(work):
    return exp_estimate(work).value


def _bar_value(forward, reverse):
    return bar_estimate(forward, reverse).value


def test_gradients(pair, normal):
    forward, reverse = (one.requires_grad_() for one in _works(pair, normal, 8, 5))
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(_exp_value, (forward,))
        assert check(_bar_value, (forward, reverse))


def test_gradients_are_weights_that_sum_to_one(pair, normal):
    forward, reverse = (one.requires_grad_() for one in _works(pair, normal, 80, 50))
    (weights,) = torch.autograd.grad(_exp_value(forward), forward)
    assert torch.allclose(weights, torch.softmax(-forward, 0), atol=1e-14)
    both = torch.cat(torch.autograd.grad(_bar_value(forward, reverse), (forward, reverse)))
    assert both.sum().item() == pytest.approx(1.0, rel=1e-12)
    assert bool((both > 0.0).all())


def test_single_precision_works_are_treated_in_double(pair, normal):
    forward, reverse = _works(pair, normal, 50, 50)
    estimate = bar_estimate(forward.float(), reverse.float().numpy())
    assert estimate.value.dtype == torch.float64
    assert estimate.value.item() == pytest.approx(_bar_value(forward, reverse).item(), abs=1e-6)


def test_refuses_bad_input():
    good = torch.zeros(3)
    with pytest.raises(StatisticsError, match="work holds 1 values that are not finite"):
        exp_estimate([0.0, math.nan])
    with pytest.raises(StatisticsError, match="reverse work"):
        bar_estimate(good, [math.inf])
    with pytest.raises(StatisticsError, match="neither state has samples"):
        bar_estimate(good[:0], good[:0])
    with pytest.raises(StatisticsError, match=r"inefficiency of state 1 is 0\.2"):
        bar_estimate(good, good, (1.0, 0.2))
    with pytest.raises(StatisticsError, match="no samples"):
        exp_estimate(good[:0])
