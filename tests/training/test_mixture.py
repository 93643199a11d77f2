"""Many references at one state: exact free energies, honest errors, what is dropped and what is lent."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mlip_refine.errors import StatisticsError
from mlip_refine.quantities import GPA, KB, Measured
from mlip_refine.statistics import exp_estimate
from mlip_refine.testing import sigma_bound
from mlip_refine.training.ensemble import Ensemble, joined, pruned, without

T = 500.0
KT = KB * T


@pytest.fixture
def energies(wells):
    """Energies under a reference."""
    return lambda reference, structures: wells(*map(float, reference.parameters.values())).energies(
        structures
    )


def _followed(wells, energies, chain, draws, most):
    """Draw after draw along a chain of models, as a run does, keeping `most` references."""
    ensemble = draws[0]
    for model, draw in zip(chain[1:], draws[1:], strict=True):
        grown = joined(ensemble, draw, model.energies(ensemble.structures), energies)
        ensemble, _ = pruned(grown, grown.energies[-1], most)
    return ensemble


def _measured(ensemble, model) -> Measured:
    """ΔF from the initial model as a loss finds it: exponential averaging and the shift, eV."""
    frames = ensemble.frames({"energy": model.energies(ensemble.structures)})
    change = exp_estimate(frames.work, frames.inefficiency)
    return frames.shift + Measured(float(change.value), change.se, "eV").scaled(1 / frames.beta)


@pytest.mark.statistical
@pytest.mark.parametrize("most", [1, 2, 6])
def test_chain_of_references_is_the_exact_free_energy(wells, energies, most):
    """k 2.0 → 2.3 → 2.7 with an offset: ΔF = offset + (3/2) N kT ln(k1/k0), to its error."""
    chain = [wells(2.0), wells(2.3, 0.01), wells(2.7, -0.02)]
    draws = [model.draw(seed) for seed, model in enumerate(chain, start=10)]
    ensemble = _followed(wells, energies, chain, draws, most)
    assert len(ensemble.references) == min(most, 3)
    assert ensemble.latest.stage == "seed-12"
    current = wells(2.8, 0.03)
    exact = current.free_energy(T) - chain[0].free_energy(T)
    found = _measured(ensemble, current)
    assert 0 < found.se < 0.02 * exact
    assert abs(found.value - exact) < sigma_bound() * found.se


def test_two_draws_agree_with_pymbar(wells, energies):
    """Uncorrelated draws: f, its error and the error of a third model, to rounding and to 1e-3."""
    import pymbar

    chain, current = [wells(2.0), wells(2.4)], wells(2.6)
    draws = [m.draw(seed, 100, inefficiency=1.0) for seed, m in enumerate(chain)]
    ensemble = _followed(wells, energies, chain, draws, 6)
    energy = current.energies(ensemble.structures)
    u_kn = torch.cat([ensemble.energies, energy[None]]).numpy() / KT
    theirs = pymbar.MBAR(u_kn, [400, 400, 0], relative_tolerance=1e-12).compute_free_energy_differences()
    change = ensemble.change(energy)
    assert float(change.value) == pytest.approx(theirs["Delta_f"][0, 2], abs=1e-7)
    assert change.se == pytest.approx(theirs["dDelta_f"][0, 2], rel=1e-3)
    assert ensemble.error(energy) / KT == pytest.approx(theirs["dDelta_f"][0, 2], rel=0.1)


RUNS = 400

CHAINS = {
    "shorter and more correlated": ([2.0, 2.3, 2.6], [50, 25, 25], [0.0, 0.6, 0.8], 2.7),
    "far away": ([2.0, 2.2, 2.4, 2.6, 2.8, 3.0], [25] * 6, [0.5] * 6, 3.1),
    "and back": ([2.0, 2.3, 2.6, 2.3], [25] * 4, [0.5] * 4, 2.15),
}


@pytest.mark.statistical
@pytest.mark.slow
@pytest.mark.parametrize("most", [1, 3, 6])
@pytest.mark.parametrize("which", CHAINS)
def test_intervals_cover_the_truth(wells, energies, which, most):
    """95 % intervals of ΔF and of ⟨U + PV⟩ cover it in 90 % of 400 runs or more, within 2σ of that count.

    A hundred frames a draw tell g, which is measured on each, to a quarter. At most 99 % cover the truth, but
    for ΔF on the way back: there the error that a loss sees is bounded from below by
    that of exponential averaging over the mixture.
    """
    stiffness, sizes, rhos, last = CHAINS[which]
    chain, current = [wells(k) for k in stiffness], wells(last)
    exact = current.free_energy(T) - chain[0].free_energy(T)
    hits = np.zeros(2)
    for run in range(RUNS):
        draws = [
            m.draw(10 * run + i, n, rho=rho)
            for i, (m, n, rho) in enumerate(zip(chain, sizes, rhos, strict=True))
        ]
        ensemble = _followed(wells, energies, chain, draws, most)
        free, mean = (
            _measured(ensemble, current),
            ensemble.enthalpy(current.energies(ensemble.structures)),
        )
        enthalpy = 0.5 * wells.modes * KT + 3.0 * GPA * 64
        hits += [abs(free.value - exact) < 1.96 * free.se, abs(mean.value - enthalpy) < 1.96 * mean.se]
    least = 0.9 * RUNS - 2 * (RUNS * 0.9 * 0.1) ** 0.5
    assert least <= hits[1] <= 0.99 * RUNS
    assert least <= hits[0] <= (0.99 if which != "and back" else 1.0) * RUNS


@pytest.mark.statistical
def test_old_frames_count(wells, energies):
    """Two equal draws under nearly equal models are two whole draws; far from both, fewer."""
    chain = [wells(2.0), wells(2.02)]
    ensemble = _followed(wells, energies, chain, [m.draw(s) for s, m in enumerate(chain)], 6)
    assert ensemble.n_eff(ensemble.energies[1]) == pytest.approx(2.0, rel=0.05)
    assert ensemble.n_eff(wells(4.0).energies(ensemble.structures)) < 1.0


@pytest.mark.statistical
def test_useless_references_are_dropped(wells, energies):
    """From k = 2 to 16 in five steps, the first references say nothing about the last model any more."""
    chain = [wells(2.0 * 1.5**i) for i in range(6)]
    draws = [m.draw(s) for s, m in enumerate(chain)]
    ensemble = _followed(wells, energies, chain, draws, 6)
    kept = [int(r.stage.removeprefix("seed-")) for r in ensemble.references]
    assert 0 not in kept
    assert kept[-1] == 5
    assert 2 <= len(kept) <= 5
    assert ensemble.energies.shape == (len(kept), 2000 * len(kept))
    exact = chain[kept[0]].free_energy(T) - chain[0].free_energy(T)
    error = math.hypot(ensemble.shift.se, ensemble.stratified(ensemble.shift_influence))
    assert 0 < ensemble.shift.se < error
    assert abs(ensemble.shift.value - exact) < sigma_bound() * error


def test_no_more_references_than_allowed(wells, energies):
    chain = [wells(2.0 + 0.01 * i) for i in range(5)]
    draws = [m.draw(s, 100) for s, m in enumerate(chain)]
    ensemble = _followed(wells, energies, chain, draws, 3)
    assert len(ensemble.references) == 3
    assert ensemble.latest.stage == "seed-4"
    drawn = {draw.latest.stage: draw.energies[0] for draw in draws}
    own = ensemble.energies.split([400] * 3, dim=1)
    for row, reference in enumerate(ensemble.references):
        assert torch.equal(own[row][row], drawn[reference.stage])


@pytest.mark.statistical
def test_dropping_the_anchor_changes_no_estimate_by_more_than_its_error(wells, energies):
    chain, current = [wells(2.0), wells(2.2), wells(2.4)], wells(2.5)
    draws = [m.draw(s) for s, m in enumerate(chain, start=20)]
    whole = _followed(wells, energies, chain, draws, 6)
    less = without(whole, 0)
    assert [r.stage for r in less.references] == ["seed-21", "seed-22"]
    before, after = _measured(whole, current), _measured(less, current)
    assert abs(after.value - before.value) < before.se
    assert after.se == pytest.approx(before.se, rel=0.25)


def test_a_chain_without_overlap_is_refused(wells, energies):
    chain = [wells(2.0), wells(20.0)]
    draws = [m.draw(s, 50) for s, m in enumerate(chain)]
    with pytest.raises(StatisticsError, match="the chain of references of wells-500K: the states overlap by"):
        _followed(wells, energies, chain, draws, 6)


@pytest.mark.statistical
def test_frames_of_another_temperature_are_lent(wells, energies):
    """450 K and 560 K lend to 500 K: exact ΔF of a new model, and more effective frames than alone."""
    start, current = wells(2.0), wells(2.3)
    alone = start.draw(1, 100)
    helped = alone
    for seed, temperature in ((2, 450.0), (3, 560.0)):
        lent = start.draw(seed, 200, temperature=temperature)
        helped = joined(helped, lent, start.energies(helped.structures), energies)
    assert helped.latest.stage == "seed-1"
    sizes = [e.n_eff(current.energies(e.structures)) for e in (alone, helped)]
    assert sizes[1] > 1.5 * sizes[0]
    exact = current.free_energy(T) - start.free_energy(T)
    found = _measured(helped, current)
    assert abs(found.value - exact) < sigma_bound() * found.se
    assert found.se < _measured(alone, current).se
    mean = helped.enthalpy(helped.energies[0])
    assert abs(mean.value - (0.5 * wells.modes * KT + 3.0 * GPA * 64)) < sigma_bound(2) * mean.se


def _ideal(wells, seed: int, pressure: float, n: int) -> Ensemble:
    """NPT of four ideal particles in wells that move with the cell: V^4 exp(-βPV), exact."""
    draw = wells(2.0).draw(seed, n, inefficiency=1.0)
    point = replace(draw.point, name=f"{pressure:g}", pressure=pressure)
    volume = np.random.default_rng(seed).gamma(5, KT / (pressure * GPA), len(draw))
    references = (replace(draw.latest, point=point),)
    return replace(draw, point=point, references=references, volume=torch.from_numpy(volume))


@pytest.mark.statistical
def test_frames_of_another_pressure_are_lent(wells, energies):
    """β(G_6 - G_5) = 5 ln(6/5) from the mixture, ⟨V⟩ = 5kT/P."""
    low, high = _ideal(wells, 1, 5.0, 200), _ideal(wells, 2, 6.0, 400)
    ensemble = joined(low, high, low.energies[0], energies)
    value, se = ensemble.mixture.difference(0, 1)
    assert abs(value - 5 * math.log(1.2)) < sigma_bound(2) * se
    assert se < 0.06
    volume, error = ensemble.mixture.average(ensemble.volume, (ensemble.energies[0] + ensemble.pv) / KT)
    assert abs(volume - 5 * KT / (5.0 * GPA)) < sigma_bound(2) * error
    assert ensemble.n_eff(ensemble.energies[0]) > 2.0
