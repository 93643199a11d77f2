"""NPT ladders and boundaries of crystals whose free energy is known in closed form."""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq

from mlip_refine.errors import StatisticsError
from mlip_refine.quantities import GPA, KB, MEV
from mlip_refine.statistics import statistical_inefficiency
from mlip_refine.statistics.boundary import PhaseState, boundary_point, difference
from mlip_refine.statistics.gibbs_ladder import (
    BLOCKS,
    GibbsLadder,
    LadderState,
    Rung,
    blocks_of,
    jackknife_error,
)
from mlip_refine.testing import chi_squared_bounds, sigma_bound

N_ATOMS = 32
TEMPERATURES = (800.0, 1000.0, 1200.0, 1400.0)
PRESSURES = (0.0, 2.5, 5.0)


@dataclass(frozen=True)
class GrueneisenCrystal:
    """U = N [E + ½ K (v - v₀)²/v₀] + ½ k(v) Σ x² with k ∝ v^(-2γ): harmonic at every volume v per atom."""

    energy: float
    volume: float
    bulk: float
    spring: float
    gamma: float

    def static(self, v: np.ndarray) -> np.ndarray:
        return N_ATOMS * (self.energy + 0.5 * self.bulk * (v - self.volume) ** 2 / self.volume)

    def log_density(self, v: np.ndarray, t: float, p: float) -> np.ndarray:
        """Log of the density of the volume, all vibrations integrated, but for a constant."""
        pv = N_ATOMS * v * p
        springs = 1.5 * N_ATOMS * (2 * self.gamma * np.log(v / self.volume) - math.log(self.spring))
        return springs - (self.static(v) + pv) / (KB * t) + 1.5 * N_ATOMS * math.log(KB * t)

    def draw(self, t: float, p: float, n: int, rng: np.random.Generator) -> Rung:
        grid = np.linspace(0.85 * self.volume, 1.15 * self.volume, 20001)
        log_p = self.log_density(grid, t, p)
        cumulative = np.cumsum(np.exp(log_p - log_p.max()))
        v = np.interp(rng.random(n), cumulative / cumulative[-1], grid)
        energy = self.static(v) + KB * t * rng.gamma(1.5 * N_ATOMS, size=n)
        volume = torch.from_numpy(N_ATOMS * v)
        return Rung(t, p, torch.from_numpy(energy), volume, volume.log()[:, None], blocks_of(n))

    def reduced_gibbs(self, t: float, p: float) -> float:
        """βG of the cell at its mean volume per atom, as `LadderState` has it, but for a constant."""
        v = np.linspace(0.85 * self.volume, 1.15 * self.volume, 200001)
        log_p = self.log_density(v, t, p)
        weights = np.exp(log_p - log_p.max())
        mean = (weights * v).sum() / weights.sum()
        variance = (weights * np.log(v / mean) ** 2).sum() / weights.sum()
        variance -= ((weights * np.log(v / mean)).sum() / weights.sum()) ** 2
        f = -log_p.max() - math.log(weights.sum() * (v[1] - v[0]))
        return f + 0.5 * math.log(variance) + math.log(mean) - 1.5 * N_ATOMS * math.log(t)

    def mean(self, t: float, p: float) -> tuple[float, float]:
        """⟨U + PV⟩ of the cell, eV, and its mean volume, Å³."""
        ends = 0.85 * self.volume, 1.15 * self.volume
        top = self.log_density(np.linspace(*ends, 20001), t, p).max()

        def integral(of) -> float:
            return quad(lambda v: of(v) * math.exp(self.log_density(v, t, p) - top), *ends, limit=200)[0]

        norm = integral(lambda _: 1.0)
        static = integral(lambda v: self.static(v) + N_ATOMS * v * p) / norm
        return static + 1.5 * N_ATOMS * KB * t, N_ATOMS * integral(lambda v: v) / norm

    def ladder(self, n: int, rng: np.random.Generator) -> GibbsLadder:
        return GibbsLadder([self.draw(t, p * GPA, n, rng) for t in TEMPERATURES for p in PRESSURES], N_ATOMS)


LOW = GrueneisenCrystal(energy=0.0, volume=17.2, bulk=0.70, spring=1.0, gamma=1.2)
HIGH = GrueneisenCrystal(energy=0.055, volume=16.9, bulk=0.66, spring=0.69, gamma=1.5)
"""The second crystal is softer and denser: it is stable at high temperature, the lower under pressure."""


def exact_difference(t: float, p: float) -> float:
    """ΔG of the two crystals, meV/atom."""
    return KB * t * (HIGH.reduced_gibbs(t, p) - LOW.reduced_gibbs(t, p)) / N_ATOMS / MEV


def state_of(ladder: GibbsLadder, t: float, p: float) -> PhaseState:
    found: LadderState = ladder.at(t, p)
    per_atom = 1 / (N_ATOMS * MEV)
    return PhaseState(
        found.reduced_gibbs * KB * t * per_atom,
        found.enthalpy * per_atom,
        found.volume / N_ATOMS,
        0.0,
        found.n_eff,
    )


def anchored(ladder: GibbsLadder, crystal: GrueneisenCrystal, t0: float, p0: float):
    """Return the ladder with its constant from the exact value at one state."""
    offset = crystal.reduced_gibbs(t0, p0) - ladder.at(t0, p0).reduced_gibbs

    def at(t: float, p: float, *, errors: bool = True) -> PhaseState:
        state = state_of(ladder, t, p)
        return PhaseState(
            state.gibbs + offset * KB * t / (N_ATOMS * MEV),
            state.enthalpy,
            state.volume,
            state.anchor_se,
            state.n_eff,
        )

    return at


@pytest.mark.statistical
def test_ladder_is_exact():
    rng = np.random.default_rng(3)
    ladder = LOW.ladder(1200, rng)
    origin = ladder.at(800.0, 0.0)
    bound = sigma_bound(5 * 3, BLOCKS - 1)
    for t, p in ((900.0, 1.0), (1000.0, 2.5), (1100.0, 3.7), (1300.0, 0.2), (1400.0, 5.0)):
        found = ladder.at(t, p * GPA)
        exact = LOW.reduced_gibbs(t, p * GPA) - LOW.reduced_gibbs(800.0, 0.0)
        rows = found.reduced_gibbs - origin.reduced_gibbs
        assert abs(float(rows[0]) - exact) < bound * jackknife_error(rows)
        assert jackknife_error(rows) < 0.5
        enthalpy, volume = LOW.mean(t, p * GPA)
        assert abs(float(found.enthalpy[0]) - enthalpy) < bound * jackknife_error(found.enthalpy)
        assert abs(float(found.volume[0]) - volume) < bound * jackknife_error(found.volume)
        assert found.n_eff > 500


@pytest.mark.statistical
def test_errors_of_the_jackknife_are_those_of_repetition():
    rng = np.random.default_rng(4)
    values, errors = [], []
    for _ in range(12):
        ladder = LOW.ladder(200, rng)
        rows = ladder.at(1300.0, 4 * GPA).reduced_gibbs - ladder.at(850.0, 0.0).reduced_gibbs
        values.append(float(rows[0]))
        errors.append(jackknife_error(rows))
    chi_squared = 11 * np.var(values, ddof=1) / np.mean(np.square(errors))
    low, high = chi_squared_bounds(11)
    # The errors themselves are known to a twentieth.
    assert 0.8 * low < chi_squared < 1.2 * high


@pytest.mark.statistical
def test_boundary_of_two_crystals():
    rng = np.random.default_rng(5)
    low, high = (anchored(c.ladder(1500, rng), c, 1000.0, 0.0) for c in (LOW, HIGH))
    bound = sigma_bound(4, BLOCKS - 1)
    for p in (1.0, 4.0):
        exact = brentq(lambda t, p=p: exact_difference(t, p * GPA), 800.0, 1400.0)
        point, note = boundary_point(partial(low, p=p * GPA), partial(high, p=p * GPA), 800.0, 1400.0)
        assert point is not None, note
        assert abs(point.temperature.value - exact) < bound * point.temperature.se
        assert point.temperature.se < 10.0
        assert point.common == 0.0
        steps = [
            brentq(lambda t, q=q: exact_difference(t, q * GPA), 700.0, 1500.0) for q in (p - 0.2, p + 0.2)
        ]
        slope = (steps[1] - steps[0]) / 0.4
        assert abs(point.slope.value - slope) < bound * point.slope.se
        assert point.slope.se < 0.2 * abs(slope)


def test_exact_surfaces_give_exact_boundaries():
    def surface(crystal: GrueneisenCrystal, p: float):
        def at(t: float, *, errors: bool = True) -> PhaseState:
            h, v = crystal.mean(t, p)
            gibbs = crystal.reduced_gibbs(t, p) * KB * t / N_ATOMS / MEV
            rows = (
                torch.full((1 + BLOCKS,), x, dtype=torch.float64)
                for x in (gibbs, h / N_ATOMS / MEV, v / N_ATOMS)
            )
            return PhaseState(*rows, anchor_se=0.1, n_eff=100.0)

        return at

    p = 2 * GPA
    exact = brentq(lambda t: exact_difference(t, p), 800.0, 1400.0)
    point, _ = boundary_point(surface(LOW, p), surface(HIGH, p), 800.0, 1400.0)
    assert point is not None
    assert point.temperature.value == pytest.approx(exact, abs=2e-3)
    assert point.common == pytest.approx(point.temperature.se)
    assert point.common == pytest.approx(0.1 * math.sqrt(2) / abs(point.difference.delta_s.value))
    steps = [brentq(lambda t, q=q: exact_difference(t, p + q * GPA), 800.0, 1400.0) for q in (-0.1, 0.1)]
    # The volume at the boundary is a mean, the exact one that of the free energy: they differ by 1/N.
    assert point.slope.value == pytest.approx((steps[1] - steps[0]) / 0.2, rel=2e-3)


def test_no_boundary_is_refused():
    rows = torch.zeros(1 + BLOCKS, dtype=torch.float64)
    one = PhaseState(rows, rows, rows, 0.0, 100.0)
    two = PhaseState(rows + 3.0, rows + 5.0, rows, 0.0, 100.0)
    point, note = boundary_point(lambda _, **__: one, lambda _, **__: two, 300.0, 600.0)
    assert point is None
    assert "300 K (+3.00 meV/atom) to 600 K" in note
    noisy = torch.linspace(-20, 20, 1 + BLOCKS, dtype=torch.float64)
    noisy[0] = 0.0
    point, note = boundary_point(
        lambda t, **_: PhaseState(rows + t, rows + 1.0, rows, 0.0, 9.0),
        lambda _, **__: PhaseState(rows + 450.0, rows + noisy, rows, 0.0, 9.0),
        300.0,
        600.0,
    )
    assert point is None
    assert "not known to 3 σ" in note


def test_difference_adds_both_ladders_and_the_anchors():
    noise = torch.linspace(-1, 1, 1 + BLOCKS, dtype=torch.float64)
    noise[0] = 0.0
    rows = torch.zeros(1 + BLOCKS, dtype=torch.float64)
    one = PhaseState(rows + noise, rows, rows, 0.3, 50.0)
    two = PhaseState(rows + 2.0 + 2 * noise, rows + 7.0, rows + 0.5, 0.4, 80.0)
    found = difference(one, two, 500.0)
    ladder = jackknife_error(noise)
    assert found.delta_g.value == 2.0
    assert found.delta_g.se == pytest.approx(math.sqrt(5 * ladder**2 + 0.25))
    assert found.delta_g_common == pytest.approx(0.5)
    assert (found.delta_h.value, found.delta_v.value) == (7.0, 0.5)
    assert found.delta_s.value == pytest.approx(5.0 / 500.0)
    assert found.n_eff == 50.0


def test_short_runs_are_refused():
    rng = np.random.default_rng(1)
    with pytest.raises(StatisticsError, match="independent frames"):
        GibbsLadder([LOW.draw(900.0, 0.0, 40, rng)], N_ATOMS)
    with pytest.raises(StatisticsError, match="without rungs"):
        GibbsLadder([], N_ATOMS)


@pytest.mark.statistical
def test_correlated_frames_have_larger_errors():
    rng = np.random.default_rng(8)
    rung = LOW.draw(1000.0, 0.0, 300, rng)
    repeated = {name: getattr(rung, name).repeat_interleave(4, 0) for name in ("energy", "volume", "strains")}
    slow = Rung(1000.0, 0.0, **repeated, block=blocks_of(1200), inefficiency=4.0)
    assert statistical_inefficiency(slow.energy) > 2.5
    fast = GibbsLadder([rung], N_ATOMS).at(1020.0, 0.0).enthalpy
    assert jackknife_error(GibbsLadder([slow], N_ATOMS).at(1020.0, 0.0).enthalpy) == pytest.approx(
        jackknife_error(fast), rel=0.05
    )
