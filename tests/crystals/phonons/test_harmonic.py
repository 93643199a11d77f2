"""Crystals in supercells: exact springs, any cell, references, at rest, both methods."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk

from mlip_refine import testing
from mlip_refine.crystals.phonons.harmonic import HarmonicCrystal, forces
from mlip_refine.crystals.phonons.thermodynamics import phonon_properties
from mlip_refine.crystals.relaxation import Rest
from mlip_refine.potential import Potential

SALT = bulk("NaCl", "rocksalt", a=5.64)
HCP = bulk("Ti", "hcp", a=2.93, c=4.65)


@pytest.fixture(scope="module")
def titanium() -> Potential:
    """Titanium in float64; tests must leave it as it is."""
    return Potential.load("titanium-compact")


def test_springs_between_neighbours_have_the_frequencies_of_chains(springs):
    """Every ion has two springs K along each axis, so that ω² = 2K (1/m + 1/M) in the optical mode at Γ."""
    crystal = HarmonicCrystal.of_cell(SALT, np.diag([2, 2, 2]))
    constants = crystal.force_constants(springs(SALT, {2.9: (2.5, 2.82)}))
    found, _ = phonon_properties(crystal.phonopy(constants), (4, 4, 4), 300.0)
    inverse_mass = (1 / SALT.get_masses()).sum()
    assert found.max_THz == pytest.approx(15.633302 * (2 * 2.5 * inverse_mass) ** 0.5, rel=1e-6)
    assert found.imaginary == 0.0


def test_a_hot_crystal_has_the_heat_capacity_of_classical_oscillators(springs):
    crystal = HarmonicCrystal.of_cell(SALT, np.diag([2, 2, 2]))
    constants = crystal.force_constants(springs(SALT, {2.9: (2.5, 2.82), 4.1: (0.5, 5.64 / 2**0.5)}))
    found, _ = phonon_properties(crystal.phonopy(constants), (9, 9, 9), 1e5)
    without_three_at_gamma = 6 - 3 / 9**3
    expected = without_three_at_gamma * 8.314462618
    assert found.heat_capacity_J_K_mol == pytest.approx(expected, rel=1e-5)


def test_any_cell_of_the_crystal_has_the_same_phonons(titanium):
    """A primitive cell, and a skew one of four atoms, in supercells of one shape."""
    skew = HCP.copy()
    skew = Atoms(
        "Ti4",
        cell=np.array([[1, 0, 0], [0, 2, 0], [0, 0, 1]]) @ HCP.cell.array,
        positions=np.concatenate([HCP.positions, HCP.positions + HCP.cell.array[1]]),
        pbc=True,
    )
    one = HarmonicCrystal.of_cell(HCP, np.diag([2, 2, 2]))
    other = HarmonicCrystal.of_cell(skew, np.array([[2, 0, 0], [0, 1, 0], [0, 0, 2]]))
    assert len(other.primitive) == 2
    values = [
        phonon_properties(c.phonopy(c.force_constants(titanium)), (4, 4, 4), 300.0)[0] for c in (one, other)
    ]
    assert values[0].max_THz == pytest.approx(values[1].max_THz, abs=1e-6)
    assert values[0].entropy_J_K_mol == pytest.approx(values[1].entropy_J_K_mol, abs=1e-5)


def test_both_methods_have_the_same_force_constants(titanium):
    crystal = HarmonicCrystal.of_cell(HCP, np.diag([3, 3, 2])).at_rest(titanium, Rest("cell"))
    exact = crystal.force_constants(titanium)
    errors = [
        float((crystal.force_constants(titanium, "displacements", h) - exact).abs().max())
        for h in (0.04, 0.02)
    ]
    assert errors[1] < 2e-3
    assert errors[1] / errors[0] == pytest.approx(0.25, rel=0.1)


def test_a_crystal_at_rest_keeps_order_and_symmetry(titanium):
    crystal = HarmonicCrystal.of_cell(HCP, np.diag([2, 2, 2]))
    rested = crystal.at_rest(titanium, Rest("cell", 5.0))
    assert np.abs(forces(titanium, [rested.supercell])).max() < 1e-8
    structure = rested.structure(titanium)
    stress = titanium.evaluate(titanium.graphs.collate([structure]), ("stress",))["stress"][0].detach()
    assert torch.allclose(stress * 160.2176634, -5.0 * torch.eye(3).double(), atol=1e-6)
    assert len(rested.symmetry.rotations) == len(crystal.symmetry.rotations)
    np.testing.assert_array_equal(rested.translations.permutations, crystal.translations.permutations)


def test_a_moved_crystal_follows_its_primitive_cell():
    crystal = HarmonicCrystal.of_cell(SALT, np.diag([2, 2, 2]))
    primitive = crystal.primitive
    primitive.set_cell(1.01 * primitive.cell.array, scale_atoms=True)
    primitive.positions[1] += 0.05
    moved = crystal.moved(primitive)
    np.testing.assert_allclose(moved.primitive.positions, primitive.positions, atol=1e-12)
    np.testing.assert_allclose(moved.primitive.cell.array, primitive.cell.array, atol=1e-12)
    apart = moved.supercell.positions - 1.01 * crystal.supercell.positions
    kinds = crystal.translations.primitive_index.numpy()
    apart[kinds == 1] -= 0.05
    whole = apart @ np.linalg.inv(moved.supercell.cell.array)  # phonopy wraps atoms into the cell
    np.testing.assert_allclose(whole, np.rint(whole), atol=1e-10)


def test_the_crystal_of_a_reference_has_its_phonons(phonons_of):
    reference = phonons_of(SALT, (2, 2, 2), lambda atoms: testing.bond_springs(atoms, {2.9: 2.5}))
    crystal = HarmonicCrystal.of_reference(reference)
    phonon = crystal.phonopy(reference.force_constants)
    np.testing.assert_array_equal(phonon.primitive.p2s_map, reference.primitive_atoms)
    found, on_mesh = phonon_properties(phonon, (2, 2, 2), 300.0)
    inverse_mass = (1 / SALT.get_masses()).sum()
    assert found.max_THz == pytest.approx(15.633302 * (2 * 2.5 * inverse_mass) ** 0.5, rel=1e-6)
    assert on_mesh.distance(on_mesh) == 0.0


def test_imaginary_modes_are_counted(springs):
    crystal = HarmonicCrystal.of_cell(SALT, np.diag([2, 2, 2]))
    constants = crystal.force_constants(springs(SALT, {2.9: (2.5, 2.82), 4.1: (0.5, 5.64 / 2**0.5)}))
    found, _ = phonon_properties(crystal.phonopy(-constants), (2, 2, 2), 300.0)
    assert found.imaginary == pytest.approx(1 - 3 / 48)  # all but three at Γ
    assert found.min_THz < -1
