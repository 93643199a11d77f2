import math

import pymbar
import pytest
import torch

from mlip_refine.errors import StatisticsError
from mlip_refine.statistics import (
    bar_estimate,
    exp_estimate,
    kish_size,
    log_weights,
    mbar,
    require_estimate,
    statistical_inefficiency,
)

COUNTS = [300, 200, 0, 400, 100]


def _sample(ladder, normal, counts):
    return torch.cat([ladder.place(k, normal(n)) for k, n in enumerate(counts)])


@pytest.fixture
def solved(ladder, normal):
    return mbar(ladder.potentials(_sample(ladder, normal, COUNTS)), COUNTS)


def test_harmonic_ladder_within_three_sigma(ladder, normal):
    counts = [800] * 5
    result = mbar(ladder.potentials(_sample(ladder, normal, counts)), counts)
    for j in range(1, 5):
        value, se = result.difference(0, j)
        assert abs(value - ladder.f_k[j].item()) < 3.0 * se
    assert result.difference(4, 0)[0] == pytest.approx(-value, rel=1e-14)
    assert result.difference(3, 3) == (0.0, 0.0)


def test_equations_hold_to_rounding(ladder, normal, solved):
    """The self-consistent right-hand side returns f to 1e-12, unsampled states included."""
    again = -torch.logsumexp(solved.log_p - solved.f_k[:, None] - solved.log_q, dim=1)
    assert torch.allclose(again - again[0], solved.f_k, atol=1e-12)
    assert torch.allclose(solved.overlap.sum(dim=1), torch.ones(5, dtype=torch.float64), atol=1e-11)


@pytest.mark.parametrize("counts", [[500] * 5, COUNTS])
def test_agrees_with_pymbar(ladder, normal, counts):
    u_kn = ladder.potentials(_sample(ladder, normal, counts))
    ours = mbar(u_kn, counts)
    oracle = pymbar.MBAR(u_kn.numpy(), counts, solver_protocol="robust", relative_tolerance=1e-12)
    theirs = oracle.compute_free_energy_differences()
    for i in range(5):
        for j in range(5):
            value, se = ours.difference(i, j)
            assert value == pytest.approx(theirs["Delta_f"][i, j], abs=1e-6)
            assert se == pytest.approx(theirs["dDelta_f"][i, j], rel=1e-3, abs=1e-7)
    overlap = oracle.compute_overlap()
    assert ours.overlap.numpy() == pytest.approx(overlap["matrix"], abs=1e-6)
    assert ours.second_eigenvalue == pytest.approx(overlap["eigenvalues"][1], abs=1e-6)


def test_perturbation_agrees_with_an_unsampled_state(ladder, normal, solved):
    x = _sample(ladder, normal, COUNTS)
    u_kn = ladder.potentials(x)
    u_new = 0.7 * (x - 0.3) ** 2
    augmented = mbar(torch.cat([u_kn, u_new[None]]), [*COUNTS, 0])
    estimate = mbar(u_kn, COUNTS).perturb(u_new, start=1)
    assert (estimate.value.item(), estimate.se) == pytest.approx(augmented.difference(1, 5), rel=1e-9)


def test_large_offsets_do_no_harm(ladder, normal):
    u_kn = ladder.potentials(_sample(ladder, normal, COUNTS))
    offsets = torch.tensor([0.0, -4e3, 1e3, 2e4, 7e3], dtype=torch.float64)
    plain, moved = mbar(u_kn, COUNTS), mbar(u_kn + offsets[:, None] + 1e5 * torch.sin(u_kn[0]), COUNTS)
    assert torch.allclose(moved.f_k - offsets, plain.f_k, atol=1e-9)
    assert torch.allclose(moved.theta, plain.theta, atol=1e-9)


@pytest.mark.parametrize(("n0", "n1"), [(500, 500), (900, 60)])
def test_two_states_are_bar(pair, normal, n0, n1):
    x = _sample(pair, normal, [n0, n1])
    work = pair.work(x)
    estimate, result = (
        bar_estimate(work[:n0], work[n0:], (4.0, 1.5)),
        mbar(pair.potentials(x), [n0, n1], [4.0, 1.5]),
    )
    value, se = result.difference(0, 1)
    assert value == pytest.approx(estimate.value.item(), abs=1e-10)
    assert se == pytest.approx(estimate.se, rel=0.1)
    if n0 == n1:
        assert 1.0 - result.second_eigenvalue == pytest.approx(estimate.overlap, abs=1e-9)


def test_one_sampled_state_is_the_exponential_average(pair, normal):
    x = pair.place(0, normal(400))
    estimate, result = exp_estimate(pair.work(x), 3.0), mbar(pair.potentials(x), [400, 0], 3.0)
    value, se = result.difference(0, 1)
    assert value == pytest.approx(estimate.value.item(), abs=1e-11)
    assert se == pytest.approx(estimate.se, rel=5e-3)
    alone = mbar(pair.potentials(x)[:1], [400], 3.0).perturb(pair.potentials(x)[1])
    assert alone.value.item() == pytest.approx(value, abs=1e-11)
    assert alone.se == pytest.approx(se, rel=1e-9)
    assert alone.n_eff == pytest.approx(estimate.n_eff, rel=1e-9)
    assert alone.overlap == pytest.approx(estimate.overlap, rel=1e-9)


def test_weights_of_one_reference_are_boltzmann_ratios(pair, normal):
    x = pair.place(0, normal(50))
    u_0, u_1 = pair.potentials(x)
    assert torch.allclose(mbar(u_0[None], [50]).log_weights(u_1), log_weights(u_0 - u_1), atol=1e-12)


def test_all_states_serve_a_new_one(ladder, normal):
    """Mean of a well between two others: right within 3 sigma, with more samples than from one neighbour."""
    counts = [1000] * 5
    x = _sample(ladder, normal, counts)
    u_kn = ladder.potentials(x)
    u_new = 0.5 * 1.5 * (x - 0.75) ** 2
    log_w = mbar(u_kn, counts).log_weights(u_new)
    mean = torch.sum(log_w.exp() * x).item()
    error = torch.sum((log_w.exp() * (x - mean)) ** 2).sqrt().item()
    assert abs(mean - 0.75) < 3.0 * error
    assert kish_size(log_w) > kish_size((u_kn[1] - u_new)[1000:2000])


def test_inefficiency_scales_the_covariance(ladder, normal, solved):
    u_kn = ladder.potentials(_sample(ladder, normal, COUNTS))
    plain, uniform = mbar(u_kn, COUNTS), mbar(u_kn, COUNTS, 4.0)
    assert torch.allclose(uniform.theta, 4.0 * plain.theta, atol=1e-12)
    assert torch.equal(uniform.f_k, plain.f_k)
    one_slow = mbar(u_kn, COUNTS, [1.0, 1.0, 1.0, 4.0, 1.0])
    assert plain.difference(0, 4)[1] < one_slow.difference(0, 4)[1] < uniform.difference(0, 4)[1]


def _hits(ladder, results):
    exact = ladder.f_k[4].item()
    return sum(abs(value - exact) < 1.96 * se for value, se in (one.difference(0, 4) for one in results))


def test_coverage(ladder, normal):
    """95 % intervals of 200 experiments cover 90 to 99 % (3.2 and 2.6 binomial sigma)."""
    counts = [60, 40, 80, 50, 70]
    results = (mbar(ladder.potentials(_sample(ladder, normal, counts)), counts) for _ in range(200))
    assert 180 <= _hits(ladder, results) <= 198


def test_coverage_with_unequal_correlation(ladder, autoregressive):
    """AR(1) wells with g from 1 to 9: measured on the samples, and the plain error falls short."""
    series = [autoregressive(200, 500, rho) for rho in (0.0, 0.8, 0.3, 0.8, 0.5)]
    corrected, plain = [], []
    for unit in zip(*series, strict=True):
        u_kn = ladder.potentials(torch.cat([ladder.place(k, one) for k, one in enumerate(unit)]))
        corrected.append(mbar(u_kn, [500] * 5, [statistical_inefficiency(one) for one in unit]))
        plain.append(mbar(u_kn, [500] * 5))
    assert 180 <= _hits(ladder, corrected) <= 198
    assert _hits(ladder, plain) < 170


def test_gradients(ladder, normal):
    x = _sample(ladder, normal, [4, 3, 0, 2, 3])
    result = mbar(ladder.potentials(x), [4, 3, 0, 2, 3])
    u_new = (0.6 * x**2).requires_grad_()
    assert torch.autograd.gradcheck(result.log_weights, (u_new,))
    assert torch.autograd.gradcheck(lambda u: result.perturb(u).value, (u_new,))
    (gradient,) = torch.autograd.grad(result.perturb(u_new).value, u_new)
    assert torch.allclose(gradient, result.log_weights(u_new).exp(), atol=1e-13)


def test_states_apart_have_infinite_error():
    x = torch.tensor([-0.5, 0.1, 0.6, 99.5, 100.2, 100.4], dtype=torch.float64)
    result = mbar(torch.stack([50.0 * x**2, 50.0 * (x - 100.0) ** 2]), [3, 3])
    assert result.difference(0, 1)[1] == math.inf
    assert result.second_eigenvalue == pytest.approx(1.0, abs=1e-12)
    far = result.perturb(50.0 * (x - 300.0) ** 2)
    with pytest.raises(StatisticsError, match="third well"):
        require_estimate(far, "third well")


def test_refuses_bad_input():
    u_kn = torch.zeros(2, 5)
    for counts, message in [
        ([2, 2], "sum to 4, but there are 5"),
        ([5], "shape"),
        ([6, -1], "whole numbers"),
        ([2.5, 2.5], "whole numbers"),
    ]:
        with pytest.raises(StatisticsError, match=message):
            mbar(u_kn, counts)
    with pytest.raises(StatisticsError, match="not finite"):
        mbar(u_kn + math.nan, [2, 3])
    with pytest.raises(StatisticsError, match="inefficiency of state 1 is 0"):
        mbar(u_kn, [2, 3], [1.0, 0.0])
    with pytest.raises(StatisticsError, match="1 inefficiencies"):
        mbar(u_kn, [2, 3], [1.0])
    with pytest.raises(StatisticsError, match="4 potentials of the new state for 5 samples"):
        mbar(u_kn, [2, 3]).log_weights(torch.zeros(4))
