import math

import pytest
import torch

from mlip_refine.errors import StatisticsError
from mlip_refine.statistics import kish_size, log_weights, weighted_error, weighted_mean
from mlip_refine.testing import sigma_bound


def test_weights_are_normalised_where_exponentials_overflow():
    log_w = log_weights([5000.0, 5000.0 + math.log(3.0), -5000.0])
    assert log_w.dtype == torch.float64
    assert torch.allclose(log_w.exp(), torch.tensor([0.25, 0.75, 0.0], dtype=torch.float64), atol=1e-11)


def test_sizes_of_equal_and_of_single_weights():
    equal = torch.zeros(50, dtype=torch.float64)
    single = torch.tensor([0.0] + [-900.0] * 49, dtype=torch.float64)
    assert kish_size(equal).item() == pytest.approx(50.0, rel=1e-12)
    assert kish_size(single).item() == pytest.approx(1.0, rel=1e-12)


@pytest.mark.statistical
def test_kish_size_of_shifted_gaussian(normal):
    """N(0,1) to N(c,1): Kish / n -> exp(-c^2), 0.5 here; 200k samples, relative sigma 0.6 %, 5 sigma."""
    shift = math.sqrt(math.log(2.0))
    x = normal(200_000)
    assert kish_size(shift * x).item() / len(x) == pytest.approx(0.5, rel=0.03)


@pytest.mark.statistical
def test_reweighted_moments_of_shifted_gaussian(normal):
    """Mean and second moment of N(c,1) from N(0,1), each to its own standard error."""
    x = normal(40_000)
    log_w = log_weights(0.5 * x)
    moments = torch.stack([x, x**2], dim=1)
    deviation = weighted_mean(moments, log_w) - torch.tensor([0.5, 1.25], dtype=torch.float64)
    assert deviation.shape == (2,)
    assert bool((deviation.abs() < sigma_bound(2) * weighted_error(moments, log_w)).all())


def test_equal_weights_give_the_textbook_error(normal):
    x = normal(30, 2, 3)
    log_w = torch.zeros(30)
    assert torch.allclose(weighted_mean(x, log_w), x.mean(0), atol=1e-14)
    assert torch.allclose(weighted_error(x, log_w), x.std(0) / math.sqrt(30), atol=1e-14)


def test_error_grows_with_inefficiency_and_is_infinite_without_two_samples(normal):
    x, log_w = normal(4000), torch.zeros(4000)
    assert weighted_error(x, log_w, 9.0) / weighted_error(x, log_w) == pytest.approx(3.0, rel=2e-3)
    assert weighted_error(x[:5], log_w[:5], 5.0).item() == math.inf


@pytest.mark.statistical
def test_coverage_of_reweighted_mean(normal, require_coverage):
    """95 % intervals of 1000 experiments."""
    hits = 0
    for x in normal(1000, 400):
        log_w = 0.4 * x
        error = abs(weighted_mean(x, log_w).item() - 0.4) / weighted_error(x, log_w).item()
        hits += error < 1.96
    require_coverage(hits, 1000)


@pytest.mark.statistical
def test_coverage_with_correlation(autoregressive, require_coverage):
    """As above for AR(1) samples and the exact g = 9."""
    hits = 0
    for x in autoregressive(600, 1000, 0.8):
        log_w = 0.4 * x
        hits += abs(weighted_mean(x, log_w).item() - 0.4) < 1.96 * weighted_error(x, log_w, 9.0).item()
    require_coverage(hits, 600)


@pytest.mark.parametrize("size", [log_weights, kish_size])
def test_gradients_of_weights_and_sizes(size, normal):
    assert torch.autograd.gradcheck(size, normal(7).requires_grad_())


def test_gradients_of_mean_and_error(normal):
    inputs = (normal(7, 2).requires_grad_(), normal(7).requires_grad_())
    assert torch.autograd.gradcheck(weighted_mean, inputs)
    assert torch.autograd.gradcheck(weighted_error, inputs)


def test_gradient_is_the_covariance_form(normal):
    """d<O> = <dO> - (<O du> - <O><du>): here with O fixed and u = theta x."""
    x, values = normal(50), normal(50)
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    mean = weighted_mean(values, log_weights(-theta * x))
    (gradient,) = torch.autograd.grad(mean, theta)
    w = log_weights(-0.3 * x).exp()
    covariance = (w * values * x).sum() - (w * values).sum() * (w * x).sum()
    assert gradient.item() == pytest.approx(-covariance.item(), rel=1e-10)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_refuses_what_is_not_finite(bad):
    with pytest.raises(StatisticsError, match=r"log weight ratio holds 1 values .* index \[2\]"):
        log_weights(torch.tensor([0.0, 1.0, bad]))
    with pytest.raises(StatisticsError, match="weighted values"):
        weighted_mean([[0.0], [bad]], [0.0, 0.0])


def test_refuses_no_samples_and_lengths_that_differ():
    with pytest.raises(StatisticsError, match="no samples"):
        kish_size(torch.zeros(0))
    with pytest.raises(StatisticsError, match="3 values came with 2 weights"):
        weighted_mean(torch.zeros(3), torch.zeros(2))
    with pytest.raises(StatisticsError, match=r"inefficiency is 0\.5"):
        weighted_error(torch.zeros(3), torch.zeros(3), 0.5)
    with pytest.raises(StatisticsError, match="2 dimensions"):
        log_weights(torch.zeros(3, 2))
