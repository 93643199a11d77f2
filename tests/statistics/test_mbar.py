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
    stratified_error,
)
from mlip_refine.statistics.mbar_solver import log_mixture, solve_free_energies
from mlip_refine.testing import sigma_bound

COUNTS = [300, 200, 0, 400, 100]


def _sample(ladder, normal, counts):
    return torch.cat([ladder.place(k, normal(n)) for k, n in enumerate(counts)])


@pytest.fixture
def solved(ladder, normal):
    return mbar(ladder.potentials(_sample(ladder, normal, COUNTS)), COUNTS)


@pytest.mark.statistical
def test_harmonic_ladder_is_exact_to_its_error(ladder, normal):
    counts = [1600] * 5
    result = mbar(ladder.potentials(_sample(ladder, normal, counts)), counts)
    for j in range(1, 5):
        value, se = result.difference(0, j)
        assert abs(value - ladder.f_k[j].item()) < sigma_bound(4) * se
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


@pytest.mark.statistical
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


@pytest.mark.statistical
def test_all_states_serve_a_new_one(ladder, normal):
    """Mean of a well between two others: right to its error, with more samples than from one neighbour."""
    counts = [2000] * 5
    x = _sample(ladder, normal, counts)
    u_kn = ladder.potentials(x)
    u_new = 0.5 * 1.5 * (x - 0.75) ** 2
    log_w = mbar(u_kn, counts).log_weights(u_new)
    mean = torch.sum(log_w.exp() * x).item()
    error = torch.sum((log_w.exp() * (x - mean)) ** 2).sqrt().item()
    assert abs(mean - 0.75) < sigma_bound() * error
    assert kish_size(log_w) > kish_size((u_kn[1] - u_new)[2000:4000])


def test_inefficiency_scales_the_covariance(ladder, normal, solved):
    u_kn = ladder.potentials(_sample(ladder, normal, COUNTS))
    plain, uniform = mbar(u_kn, COUNTS), mbar(u_kn, COUNTS, 4.0)
    assert torch.allclose(uniform.theta, 4.0 * plain.theta, atol=1e-12)
    assert torch.equal(uniform.f_k, plain.f_k)
    one_slow = mbar(u_kn, COUNTS, [1.0, 1.0, 1.0, 4.0, 1.0])
    assert plain.difference(0, 4)[1] < one_slow.difference(0, 4)[1] < uniform.difference(0, 4)[1]


RUNS = 600


def _hits(ladder, results):
    """Number of 95 % intervals that hold the truth."""
    exact = ladder.f_k[4].item()
    return sum(abs(value - exact) < 1.96 * se for value, se in (one.difference(0, 4) for one in results))


@pytest.mark.statistical
def test_coverage(ladder, normal, require_coverage):
    """95 % intervals of 600 experiments."""
    counts = [60, 40, 80, 50, 70]
    results = (mbar(ladder.potentials(_sample(ladder, normal, counts)), counts) for _ in range(RUNS))
    require_coverage(_hits(ladder, results), RUNS)


@pytest.mark.statistical
def test_coverage_with_unequal_correlation(ladder, autoregressive, require_coverage):
    """AR(1) wells with g from 1 to 9: measured on the samples, and the plain error falls short."""
    series = [autoregressive(RUNS, 500, rho) for rho in (0.0, 0.8, 0.3, 0.8, 0.5)]
    corrected, plain = [], []
    for unit in zip(*series, strict=True):
        u_kn = ladder.potentials(torch.cat([ladder.place(k, one) for k, one in enumerate(unit)]))
        corrected.append(mbar(u_kn, [500] * 5, [statistical_inefficiency(one) for one in unit]))
        plain.append(mbar(u_kn, [500] * 5))
    require_coverage(_hits(ladder, corrected), RUNS)
    assert _hits(ladder, plain) < 0.85 * RUNS


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


def test_independent_samples_decide(ladder, normal):
    """Samples of state 1 twice and of state 3 thrice, with g = 2 and 3: as the samples once each."""
    counts = [60, 40, 0, 50, 30]
    parts = torch.split(_sample(ladder, normal, counts), counts)
    repeats = [1, 2, 1, 3, 1]
    repeated = torch.cat([part.repeat_interleave(r) for part, r in zip(parts, repeats, strict=True)])
    once = mbar(ladder.potentials(torch.cat(parts)), counts)
    again = mbar(
        ladder.potentials(repeated),
        [n * r for n, r in zip(counts, repeats, strict=True)],
        [float(r) for r in repeats],
        by_independence=True,
    )
    assert torch.allclose(again.f_k, once.f_k, atol=1e-10)
    assert torch.allclose(again.theta, once.theta, atol=1e-12)
    assert torch.allclose(again.overlap, once.overlap, atol=1e-10)
    u_once, u_again = (0.7 * (x - 0.3) ** 2 for x in (torch.cat(parts), repeated))
    few, many = once.perturb(u_once), again.perturb(u_again)
    for name in ("value", "se", "n_eff", "overlap"):
        assert float(getattr(many, name)) == pytest.approx(float(getattr(few, name)), rel=1e-9)
    assert again.average(repeated, u_again) == pytest.approx(once.average(torch.cat(parts), u_once), rel=1e-9)


def test_averages_agree_with_pymbar(ladder, normal):
    """Mean and error of x and x² in an unsampled state, values of either sign."""
    x = _sample(ladder, normal, COUNTS)
    u_kn, u_new = ladder.potentials(x), 0.6 * (x - 0.4) ** 2
    oracle = pymbar.MBAR(u_kn.numpy(), COUNTS, solver_protocol="robust", relative_tolerance=1e-12)
    for values in (x, x**2, x - 30.0):
        theirs = oracle.compute_expectations(values.numpy(), u_kn=u_new.numpy(), state_dependent=False)
        mean, se = mbar(u_kn, COUNTS).average(values, u_new)
        assert mean == pytest.approx(float(theirs["mu"][0]), abs=1e-7)
        assert se == pytest.approx(float(theirs["sigma"][0]), rel=1e-3)
    assert mbar(u_kn, COUNTS).average(torch.full_like(x, 3.0), u_new) == pytest.approx((3.0, 0.0))


@pytest.mark.statistical
def test_influences_add_up_to_the_error(ladder, normal):
    """Within 10 % of the asymptotic one for 4000 samples; of mean zero over the samples of every state."""
    counts = [1000, 800, 0, 1200, 1000]
    x = _sample(ladder, normal, counts)
    result, u_new = mbar(ladder.potentials(x), counts), 0.6 * (x - 0.4) ** 2
    influence = result.influence(u_new, start=1)
    for part in torch.split(influence, counts):
        assert float(part.sum()) == pytest.approx(0.0, abs=1e-12)
    found = stratified_error(influence, counts, [1.0] * 5)
    assert found == pytest.approx(result.perturb(u_new, start=1).se, rel=0.1)
    assert stratified_error(influence, counts, [4.0] * 5) == pytest.approx(2.0 * found, rel=0.01)
    assert stratified_error(influence[:2], [2], [3.0]) == math.inf


def test_influence_is_the_derivative(ladder, normal):
    """Counting one sample more often, in the equations themselves, moves f by its influence."""
    counts = [30, 20]
    x = torch.cat([ladder.place(k, normal(n)) for k, n in enumerate(counts)])
    u_kn, u_new = ladder.potentials(x)[:2], 0.6 * (x - 0.4) ** 2
    influence = mbar(u_kn, counts).influence(u_new)
    for i in (3, 41):
        draw = slice(0, 30) if i < 30 else slice(30, 50)
        values = []
        for step in (1e-4, -1e-4):
            multiplicity = torch.ones(50, dtype=torch.float64)
            multiplicity[draw] -= step / counts[int(i >= 30)]
            multiplicity[i] += step
            n_k = torch.tensor(counts, dtype=torch.float64)
            f = solve_free_energies(u_kn, n_k, multiplicity)
            mixture = log_mixture(f[:, None] - u_kn, n_k) - torch.log(multiplicity)
            values.append(float(-torch.logsumexp(-u_new - mixture, dim=0) - f[0]))
        assert (values[0] - values[1]) / 2e-4 == pytest.approx(float(influence[i]), rel=1e-4, abs=1e-9)


@pytest.mark.statistical
def test_coverage_of_an_average_from_correlated_samples(ladder, autoregressive, require_coverage):
    """⟨x⟩ of an unsampled well from wells with g from 1 to 9, g measured: 95 % intervals."""
    series = [autoregressive(RUNS, 500, rho) for rho in (0.0, 0.8, 0.3, 0.8, 0.5)]
    hits = {"average": 0, "free energy": 0}
    exact_f = 0.5 * math.log(1.9)
    for unit in zip(*series, strict=True):
        x = torch.cat([ladder.place(k, one) for k, one in enumerate(unit)])
        u_kn, u_new = ladder.potentials(x), 0.5 * 1.9 * (x - 1.2) ** 2
        g = [statistical_inefficiency(one) for one in unit]
        result = mbar(u_kn, [500] * 5, g, by_independence=True)
        mean, se = result.average(x, u_new)
        hits["average"] += abs(mean - 1.2) < 1.96 * se
        estimate = result.perturb(u_new)
        hits["free energy"] += abs(float(estimate.value) - exact_f) < 1.96 * estimate.se
    for count in hits.values():
        require_coverage(count, RUNS)
