"""Automatic time steps, frictions and barostats against the exact vibrations of the crystal."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from scipy.optimize import brentq

from mlip_refine import testing
from mlip_refine.potential import Potential
from mlip_refine.quantities import GPA
from mlip_refine.sampling import MDSettings, MolecularDynamics, StatePoint, suitable_timestep
from mlip_refine.sampling.md.settings import (
    FS,
    MAX_TIMESTEP,
    barostat_time,
    bulk_modulus,
    friction,
    shortest_period,
    timestep,
)


def _exact_period(potential: Any, atoms: Atoms) -> float:
    """Of the largest eigenvalue of the whole mass-weighted Hessian by central differences, fs."""
    h, columns = 1e-3, []
    for i in range(3 * len(atoms)):
        forces = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[i // 3, i % 3] += sign * h
            graphs = potential.graphs.collate([potential.graphs.from_atoms(moved)])
            forces.append(potential.evaluate(graphs, ("forces",))["forces"].detach().double().numpy().ravel())
        columns.append((forces[1] - forces[0]) / (2 * h))
    root = np.repeat(np.sqrt(atoms.get_masses()), 3)
    highest = np.linalg.eigvalsh(np.array(columns) / root[:, None] / root)[-1]
    return 2 * math.pi / math.sqrt(highest) / FS


@pytest.fixture(scope="module")
def titanium() -> Any:
    return Potential.load("titanium-compact").frozen_copy("float64")


CRYSTALS = {
    "Al": lambda: bulk("Al", "fcc", a=4.0, cubic=True) * (2, 2, 1),
    "hcp": lambda: bulk("Ti", "hcp", a=2.93, c=4.66) * (2, 2, 1),
    "bcc": lambda: bulk("Ti", "bcc", a=3.27, cubic=True) * (2, 2, 1),
}


@pytest.mark.parametrize("kind", CRYSTALS)
def test_the_shortest_period_is_that_of_the_highest_frequency(titanium: Any, kind: str) -> None:
    """Power iteration comes from below; 5 % of the frequency are a sixth of a percent of a step's error."""
    atoms = CRYSTALS[kind]()
    potential = testing.LennardJones([13], 0.25, 2.56, 4.4) if kind == "Al" else titanium
    found, exact = shortest_period(potential, atoms), _exact_period(potential, atoms)
    assert found == pytest.approx(exact, rel=0.05)


def test_values_follow_the_period() -> None:
    assert timestep(120.0) == 4.0
    assert timestep(math.inf) == MAX_TIMESTEP
    assert friction(100.0) == pytest.approx(0.1 * 2 * math.pi / 0.1, rel=0.05)
    assert barostat_time(120.0) == 480.0
    assert math.isfinite(barostat_time(math.inf))
    assert math.isfinite(friction(math.inf))


def test_a_gas_has_an_endless_period_and_the_longest_step() -> None:
    gas, atoms = testing.IdealGas([13], 0.1), CRYSTALS["Al"]()
    assert shortest_period(gas, atoms) == math.inf
    assert suitable_timestep(gas, [atoms]) == MAX_TIMESTEP


def test_every_phase_has_its_own_step_unless_told() -> None:
    potential = testing.LennardJones([13], 0.25, 2.56, 4.4)
    tight, loose = (bulk("Al", "fcc", a=a, cubic=True) * 2 for a in (3.7, 4.1))
    settings = MDSettings(timestep=None, friction=None, barostat_time=None)
    points = [
        StatePoint("tight", tight, 300.0),
        StatePoint("loose", loose, 300.0),
        StatePoint("told", tight, 300.0, timestep=1.0, friction=2.0, barostat_time=333.0),
    ]
    resolved = MolecularDynamics.prepare(potential, points, settings, seed=1).points
    assert resolved[0].timestep < resolved[1].timestep
    for point in resolved[:2]:
        period = shortest_period(potential, point.atoms)
        assert point.timestep == pytest.approx(period / 30, rel=0.05)
        assert (point.friction, point.barostat_time) == (friction(period), barostat_time(period))
    told = resolved[2]
    assert (told.timestep, told.friction, told.barostat_time) == (1.0, 2.0, 333.0)


def test_the_bulk_modulus_is_the_curvature_of_the_energy() -> None:
    """K = V d²U/dV², here from energies."""
    potential, atoms = testing.LennardJones([13], 0.25, 2.56, 4.4), bulk("Al", "fcc", a=3.9, cubic=True) * 2
    volume, step = atoms.cell.volume, 0.01

    def energy(ratio: float) -> float:
        scaled = atoms.copy()
        scaled.set_cell(atoms.cell.array * ratio ** (1 / 3), scale_atoms=True)
        return float(potential.energies([potential.graphs.from_atoms(scaled)])[0])

    second = (energy(1 + step) - 2 * energy(1.0) + energy(1 - step)) / step**2 / volume
    found = bulk_modulus(potential, StatePoint("Al", atoms, 300.0))
    assert found == pytest.approx(second, rel=0.02)
    assert found > 10 * GPA


def _relaxed(potential: Any) -> Atoms:
    """Fcc crystal without pressure."""

    def pull(a: float) -> float:
        graphs = potential.graphs.collate(
            [potential.graphs.from_atoms(bulk("Al", "fcc", a=a, cubic=True) * 2)]
        )
        return float(potential.evaluate(graphs, ("stress",))["stress"][0].trace())

    return bulk("Al", "fcc", a=brentq(pull, 3.7, 4.1), cubic=True) * 2


def test_volume_oscillates_with_the_wanted_period(open_guards: Any) -> None:
    """NPH of a cold crystal, its cell pulled a little: zero crossings of the volume."""
    potential = testing.LennardJones([13], 0.25, 2.56, 4.4)
    atoms = _relaxed(potential)
    atoms.set_cell(atoms.cell.array * 1.001, scale_atoms=True)
    point = StatePoint("cold", atoms, 1e-3, 0.0, "nph", barostat_time=400.0)
    dynamics = MolecularDynamics.prepare(potential, [point], open_guards(timestep=5.0), seed=1)
    volumes = []
    for _ in range(300):
        dynamics.advance(1)
        volumes.append(float(torch.linalg.det(dynamics.state.cell)[0]))
    around = np.array(volumes) - (max(volumes) + min(volumes)) / 2
    ups = np.flatnonzero((around[1:] > 0) & (around[:-1] <= 0))
    assert np.diff(ups).mean() * 5.0 == pytest.approx(400.0, rel=0.05)
