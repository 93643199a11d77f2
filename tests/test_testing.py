"""The analytic potentials against the calculators of ASE."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.lj import LennardJones as AseLennardJones
from ase.units import kB

from mlip_refine.sampling import MDSettings, MolecularDynamics, StatePoint
from mlip_refine.sampling.monitoring.guards import GuardSettings
from mlip_refine.testing import LennardJonesTS


def _liquid_like() -> Atoms:
    atoms = bulk("Ar", "fcc", a=5.6, cubic=True) * 2
    atoms.set_cell(np.array(atoms.cell) @ (np.eye(3) + 0.08 * np.triu(np.ones((3, 3)), 1)), scale_atoms=True)
    atoms.positions += np.random.default_rng(1).normal(scale=0.25, size=atoms.positions.shape)
    return atoms


def test_the_truncated_and_shifted_fluid_is_that_of_ase() -> None:
    """ASE shifts the energy to zero at the cutoff, and leaves the forces."""
    atoms, potential = _liquid_like(), LennardJonesTS()
    atoms.calc = AseLennardJones(epsilon=potential.epsilon, sigma=potential.sigma, rc=2.5 * potential.sigma)
    graphs = potential.graphs.collate([potential.graphs.from_atoms(atoms)])
    energy, forces, stress = potential.parts(graphs)
    assert energy.item() == pytest.approx(atoms.get_potential_energy(), rel=1e-12)
    np.testing.assert_allclose(forces.numpy(), atoms.get_forces(), atol=1e-12)
    np.testing.assert_allclose(stress[0].numpy(), atoms.get_stress(voigt=False), atol=1e-14)


def test_the_shift_is_the_published_one() -> None:
    potential = LennardJonesTS(epsilon=1.0, sigma=1.0)
    minimum, _ = potential.pair(torch.tensor([2 ** (1 / 6)], dtype=torch.float64))
    assert minimum.item() == pytest.approx(-1 + 0.016316891, abs=1e-9)
    u, du = potential.pair(torch.tensor([2.5 - 1e-9, 2.5 + 1e-9], dtype=torch.float64))
    assert u.tolist() == pytest.approx([0.0, 0.0], abs=1e-9)
    assert du.tolist() == pytest.approx([0.039, 0.0], abs=1e-4)


def test_units_are_those_of_argon() -> None:
    potential = LennardJonesTS()
    assert 0.8 * potential.epsilon / kB == pytest.approx(95.84, abs=1e-9)
    assert potential.graphs.cutoff == pytest.approx(8.5125)


def test_dynamics_conserves_the_energy_of_the_shifted_fluid() -> None:
    """Pairs cross the cutoff all the time, where forces jump: energies must not."""
    atoms = _liquid_like()
    settings = MDSettings(timestep=4.0, friction=1.0, guards=GuardSettings(1e6, 1e6))
    point = StatePoint("argon", atoms, 120.0, ensemble="nve", identity="none")
    dynamics = MolecularDynamics.prepare(LennardJonesTS(), [point], settings, 1)
    before, energies = dynamics.integrator.conserved().item(), []
    for _ in range(40):
        dynamics.advance(10)
        energies.append(dynamics.integrator.conserved().item() - before)
    assert max(map(abs, energies)) < 0.1 * kB * 120.0
