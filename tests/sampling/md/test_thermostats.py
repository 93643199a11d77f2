"""Thermostats and barostats on an anharmonic crystal: distributions of energies.

Kinetic energies have a known distribution. Of configurational ones only ratios are known: between two state
points the logarithm of the ratio of densities is linear, with a known slope (Shirts 2013).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ase.build import bulk
from scipy import stats
from torch import Tensor

from mlip_refine import testing
from mlip_refine.quantities import GPA, KB
from mlip_refine.sampling import MolecularDynamics, StatePoint
from mlip_refine.statistics import statistical_inefficiency

pytestmark = [pytest.mark.slow, pytest.mark.statistical]

COLD, WARM, LOW, HIGH, REPLICAS = 300.0, 400.0, 0.0, 1.5, 40

KINDS: dict[str, dict[str, Any]] = {
    "Langevin": {},
    "Nosé-Hoover": {"thermostat": "nose_hoover"},
    "NPT isotropic": {"ensemble": "npt"},
    "NPT triclinic": {"ensemble": "npt", "cell_freedom": "triclinic"},
}


@pytest.fixture(scope="module")
def series(
    open_guards: Callable[..., Any], observe: Callable[..., Any]
) -> dict[tuple[str, float, float], dict[str, Tensor]]:
    """Energies and volumes `[replicas, frames]` by kind, temperature and pressure; one batch has all."""
    atoms = bulk("Al", "fcc", a=4.0, cubic=True) * (2, 1, 1)
    cases = [(kind, temperature, LOW) for kind in KINDS for temperature in (COLD, WARM)]
    cases += [("NPT isotropic", COLD, HIGH)]
    points = [
        StatePoint(repr(case), atoms, *case[1:], replicas=REPLICAS, identity="none", **KINDS[case[0]])
        for case in cases
    ]
    settings = open_guards(timestep=4.0, friction=15.0, barostat_time=250.0)
    dynamics = MolecularDynamics.prepare(
        testing.LennardJones([13], 0.25, 2.56, 4.4), points, settings, seed=51
    )
    found = observe(dynamics, frames=130, every=10, equilibration=200)
    parts = {name: values.split(REPLICAS) for name, values in found.items()}
    return {case: {name: part[i] for name, part in parts.items()} for i, case in enumerate(cases)}


def _independent(values: Tensor) -> np.ndarray:
    """Values so far apart that they are independent, of all replicas: correlated by about exp(-4)."""
    stride = int(np.ceil(2 * statistical_inefficiency(values)))
    return values[:, ::stride].flatten().numpy()


@pytest.mark.parametrize("temperature", [COLD, WARM])
@pytest.mark.parametrize("kind", KINDS)
def test_kinetic_energies_have_the_gamma_distribution(series: Any, kind: str, temperature: float) -> None:
    """Mean dof/2 kT, width √(dof/2) kT, and Kolmogorov-Smirnov; BAOAB's own error is below 0.5 % here."""
    dof = 3 * 8 - (3 if kind == "Nosé-Hoover" else 0)
    kinetic = _independent(series[kind, temperature, LOW]["kinetic"]) / (KB * temperature)
    n, shape = len(kinetic), dof / 2
    assert n > 250
    bound = testing.sigma_bound(3)
    mean = (kinetic.mean() - shape) / (shape / n) ** 0.5
    assert abs(mean) < bound, f"mean {kinetic.mean():.3f}, exact {shape}: {mean:.1f} sigma of {n} samples"
    # The fourth central moment of the gamma distribution is 3 k² + 6 k.
    spread = ((3 * shape**2 + 6 * shape - shape**2) / n) ** 0.5
    width = (np.mean((kinetic - shape) ** 2) - shape) / spread
    assert abs(width) < bound, f"variance off by {width:.1f} sigma of {n} samples"
    assert stats.kstest(kinetic, "gamma", args=(shape,)).pvalue > testing.FALSE_ALARM / 3


def _slope(one: np.ndarray, two: np.ndarray) -> tuple[float, float]:
    """Slope of ln p_two(x)/p_one(x), linear in x, of largest likelihood, and its error (Shirts 2013, eq. 12).

    That of the Fermi function that tells whether a sample is of the first or of the second ensemble.
    """
    x = np.concatenate([one, two])
    design = np.stack([np.ones_like(x), (x - x.mean()) / x.std()], axis=1)
    label, weights = np.repeat([0.0, 1.0], [len(one), len(two)]), np.zeros(2)
    for _ in range(50):
        chance = 1 / (1 + np.exp(-design @ weights))
        information = (design * (chance * (1 - chance))[:, None]).T @ design
        weights = weights + np.linalg.solve(information, design.T @ (label - chance))
    return weights[1] / x.std(), np.linalg.inv(information)[1, 1] ** 0.5 / x.std()


def _require_slope(one: Tensor, two: Tensor, exact: float) -> None:
    slope, error = _slope(_independent(one), _independent(two))
    z = (slope - exact) / error
    bound = testing.sigma_bound()
    assert abs(z) < bound, f"{slope:.4g}({error:.2g}), exact {exact:.4g}: {z:.1f} sigma"
    assert abs(exact) > 1.5 * bound * error, "the slope cannot be told from none"


@pytest.mark.parametrize("kind", KINDS)
def test_two_temperatures_have_the_ratio_of_boltzmann_factors(series: Any, kind: str) -> None:
    """Of the potential energy, or of U + PV in NPT: slope β_cold - β_warm."""
    cold, warm = (series[kind, temperature, LOW] for temperature in (COLD, WARM))
    exact = 1 / (KB * COLD) - 1 / (KB * WARM)
    energies = [run["potential"] + LOW * GPA * run["volume"] for run in (cold, warm)]
    _require_slope(*energies, exact)


def test_two_pressures_have_the_ratio_of_boltzmann_factors(series: Any) -> None:
    """Of the volume: slope β (P_low - P_high)."""
    low, high = (series["NPT isotropic", COLD, pressure]["volume"] for pressure in (LOW, HIGH))
    _require_slope(low, high, (LOW - HIGH) * GPA / (KB * COLD))


def test_langevin_and_nose_hoover_agree_in_energy_and_heat_capacity(
    series: Any, require_means: Callable[..., None]
) -> None:
    """The two share nothing but the forces."""
    for temperature in (COLD, WARM):
        one, two = (series[kind, temperature, LOW]["potential"] for kind in ("Langevin", "Nosé-Hoover"))
        centre = (one.mean() + two.mean()) / 2
        squares = (one - centre).square() - (two - centre).square()
        require_means({"U": (one - two, 0.0), "U²": (squares, 0.0)})


def test_nose_hoover_keeps_the_canonical_ensemble_of_a_harmonic_crystal(
    open_guards: Callable[..., Any],
    observe: Callable[..., Any],
    require_means: Callable[..., None],
) -> None:
    """Exact samples stay exact samples: ⟨U⟩, ⟨K⟩ and their variances after some periods.

    A chain carries no energy from one harmonic mode to another, so that it does not lead there by itself.
    """
    atoms, reference = testing.harmonic_crystal("NaCl")
    n, kt, generator = 256, KB * 500.0, torch.Generator().manual_seed(53)
    root = reference.masses.repeat_interleave(3).sqrt()
    values, vectors = torch.linalg.eigh(reference.projected / root[:, None] / root)
    q = torch.randn(n, len(values) - 3, generator=generator, dtype=torch.float64) * (kt / values[3:]).sqrt()
    places = reference.sites + (q @ vectors[:, 3:].T / root).view(n, -1, 3)
    start = {"salt": (places, torch.from_numpy(atoms.cell.array).expand(n, 3, 3))}
    point = StatePoint("salt", atoms, 500.0, thermostat="nose_hoover", replicas=n, identity="none")
    potential = testing.HarmonicCrystals([reference], atoms.numbers)
    dynamics = MolecularDynamics.prepare(potential, [point], open_guards(timestep=1.5), 52, start)
    draws = torch.randn(dynamics.state.chain_velocities.shape, generator=generator, dtype=torch.float64)
    dynamics.state.chain_velocities.copy_(draws * (kt / dynamics.integrator.chains.masses).sqrt())
    found = observe(dynamics, frames=15, every=13, equilibration=130)
    exact = 1.5 * (len(atoms) - 1) * kt
    comparisons = {}
    for name, energy in (("U", found["potential"]), ("K", found["kinetic"])):
        comparisons[name] = energy, exact
        comparisons[f"var {name}"] = (energy - exact).square(), exact * kt
    require_means(comparisons)
