"""Equations of motion: what they conserve, how they err with the time step, and that they run backwards."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ase import Atoms
from ase.build import bulk

from mlip_refine import testing
from mlip_refine.quantities import KB
from mlip_refine.sampling import Hamiltonian, MolecularDynamics, StatePoint, einstein
from mlip_refine.sampling.md.settings import FS

CONSERVING = {
    "NVE": {"ensemble": "nve"},
    "NPH, isotropic": {"ensemble": "nph", "cell_freedom": "isotropic"},
    "NPH, hexagonal": {"ensemble": "nph", "cell_freedom": "hexagonal"},
    "NPH, triclinic": {"ensemble": "nph", "cell_freedom": "triclinic"},
    "Nosé-Hoover": {"ensemble": "nvt", "thermostat": "nose_hoover"},
}


def _crystal() -> Atoms:
    return bulk("Al", "fcc", a=3.9, cubic=True) * (2, 2, 1)


def _dynamics(settings: Any, replicas: int = 1, start: Any = None) -> Any:
    """A small crystal in every ensemble that conserves something."""
    points = [
        StatePoint(name, _crystal(), 600.0, 1.0, replicas=replicas, identity="none", **kind)  # type: ignore[arg-type]
        for name, kind in CONSERVING.items()
    ]
    potential = testing.LennardJones([13], 0.25, 2.56, 4.4)
    return MolecularDynamics.prepare(potential, points, settings, seed=41, start=start)


@pytest.fixture(scope="module")
def conserved(open_guards: Callable[..., Any], observe: Callable[..., Any]) -> dict[float, torch.Tensor]:
    """What is conserved, by time step, from equilibrium on every 4 fs `[ensembles, replicas, n]`.

    The barostat and the chain are those of the longer step, so that only the step differs.
    """
    settings = open_guards(timestep=4.0, friction=20.0, barostat_time=200.0)
    al = bulk("Al", "fcc", a=3.9, cubic=True) * (2, 2, 1)
    warm = MolecularDynamics.prepare(
        testing.LennardJones([13], 0.25, 2.56, 4.4),
        [StatePoint("warm", al, 600.0, replicas=4)],
        settings,
        40,
    )
    warm.advance(100)
    places = warm.state.positions.view(4, -1, 3), warm.state.row_vector_cell
    series = {}
    for shorter in (1, 2):
        dynamics = _dynamics(settings, 4, dict.fromkeys(CONSERVING, places))
        dynamics.integrator.set_timestep(dynamics.integrator.timestep / shorter)
        found = observe(
            dynamics, frames=400 if shorter == 1 else 150, every=shorter, equilibration=10 * shorter
        )
        series[4.0 / shorter] = found["conserved"].view(len(CONSERVING), 4, -1)
    return series


@pytest.mark.slow
@pytest.mark.statistical
@pytest.mark.parametrize("name", CONSERVING)
def test_the_error_of_what_is_conserved_goes_with_the_square_of_the_step(
    conserved: dict[float, torch.Tensor], name: str
) -> None:
    """Root-mean-square fluctuations, four to one within 15 %."""
    i = list(CONSERVING).index(name)
    long, short = (conserved[h][i, :, :150].std(1).square().mean().sqrt().item() for h in (4.0, 2.0))
    assert long / short == pytest.approx(4.0, rel=0.15), f"{long:.3g} eV at 4 fs, {short:.3g} eV at 2 fs"
    assert short < 1e-2 * KB * 600.0 * 24**0.5


@pytest.mark.slow
@pytest.mark.statistical
@pytest.mark.parametrize("name", CONSERVING)
def test_what_is_conserved_does_not_drift(conserved: dict[float, torch.Tensor], name: str) -> None:
    """The last quarter of 1.6 ps has the mean of the first, within the fluctuations: no trend adds up."""
    series = conserved[4.0][list(CONSERVING).index(name)]
    first, last = series[:, :100].mean(), series[:, -100:].mean()
    assert abs(last - first) < series.std(1).mean(), f"{last - first:.2g} eV, {series.std(1).mean():.2g} eV"


def test_total_momentum_stays_zero_without_noise(open_guards: Any) -> None:
    dynamics = _dynamics(open_guards(timestep=4.0, barostat_time=200.0))
    dynamics.advance(100)
    total = dynamics.state.momenta.view(len(CONSERVING), -1, 3).sum(1)
    assert total.abs().max() < 1e-12 * dynamics.state.momenta.abs().max() * 100


def test_without_noise_everything_runs_backwards(open_guards: Any) -> None:
    """All velocities turned round lead back to the start: every splitting is symmetric in time."""
    dynamics = _dynamics(open_guards(timestep=4.0, barostat_time=200.0))
    state, first = dynamics.state, dynamics.state.snapshot()
    dynamics.advance(60)
    assert (state.positions - first["positions"]).abs().max() > 0.05
    for velocity in (state.momenta, state.strain_rate, state.chain_velocities):
        velocity.neg_()
    dynamics.advance(60)
    torch.testing.assert_close(state.positions, first["positions"], rtol=0, atol=1e-8)
    torch.testing.assert_close(state.cell, first["cell"], rtol=0, atol=1e-9)
    torch.testing.assert_close(-state.momenta, first["momenta"], rtol=0, atol=1e-7)


@pytest.mark.statistical
@pytest.mark.parametrize("angle", [0.4, 1.2])
def test_baoab_errs_in_momenta_and_not_in_positions(
    open_guards: Callable[..., Any],
    observe: Callable[..., Any],
    require_means: Callable[..., None],
    angle: float,
) -> None:
    """One frequency ω, step h, ωh the angle: ⟨U⟩ is exact, and the kinetic energy short by (ωh)²/4.

    Leimkuhler and Matthews 2013. The centre of mass is free, so that its kinetic energy is exact.
    """
    kt, n, spring = KB * 500.0, 4, 3.0
    atoms = bulk("Al", "fcc", a=4.05, cubic=True)
    reference = einstein(atoms, torch.full((n,), spring, dtype=torch.float64))
    omega = math.sqrt(spring / float(reference.masses[0]))
    timestep = angle / omega / FS
    hamiltonian = Hamiltonian(0.0, 1.0, reference)
    point = StatePoint("one", atoms, 500.0, replicas=96, hamiltonian=hamiltonian, identity="none")
    settings = open_guards(timestep=timestep, friction=1e3 * 0.5 * omega * FS)
    dynamics = MolecularDynamics.prepare(testing.IdealGas([13], 0.1), [point], settings, seed=42)
    # No frame falls into the same phase of the vibration as the one before.
    found = observe(dynamics, frames=70, every=round(4.2 / angle), equilibration=round(15 / angle))
    kinetic = 1.5 * kt * (1 + (n - 1) * (1 - angle**2 / 4))
    require_means(
        {
            "U": (found["potential"], 1.5 * (n - 1) * kt),
            "var U": ((found["potential"] - 1.5 * (n - 1) * kt).square(), 1.5 * (n - 1) * kt**2),
            "K": (found["kinetic"], kinetic),
        }
    )
    error = found["kinetic"].mean(1).std() / 96**0.5
    bound = testing.sigma_bound(3, 95)
    assert 1.5 * bound * error < 1.5 * kt * n - kinetic or angle < 1, "the error of K cannot be seen"
