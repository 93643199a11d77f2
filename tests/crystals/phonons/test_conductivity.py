"""Thermal conductivity: of DFT forces as phono3py has it, of atoms in any order, and what it consists of."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk

from mlip_refine.crystals.phonons.conductivity import (
    INTERACTION,
    ConductivitySettings,
    ThermalConductivity,
    thermal_conductivity,
)
from mlip_refine.crystals.phonons.harmonic import HarmonicCrystal
from mlip_refine.crystals.phonons.third_order import (
    permutation_symmetrised,
    third_order_constants,
    without_translations,
)
from mlip_refine.errors import InputError, MlipRefineError

SALT = Path(__file__).parents[2] / "data" / "phonons" / "phono3py_params_NaCl222.yaml.xz"
SETTINGS = ConductivitySettings(temperatures=(100.0, 300.0), mesh=(3, 3, 3))
UNIT = 1.602176634e-19 * 1e6 * 1e-12 / 1e-30
"""eV/K km²/s² ps / Å³ in W/(m K)."""


@pytest.fixture(scope="module")
def salt() -> Any:
    """NaCl by phono3py from its own example of displaced pairs, PBE, without non-analytical correction."""
    phono3py = pytest.importorskip("phono3py")
    found = phono3py.load(SALT, is_nac=False, log_level=0)
    found.mesh_numbers = SETTINGS.mesh
    return found


@pytest.fixture(scope="module")
def crystal(salt) -> HarmonicCrystal:
    cell = salt.supercell
    atoms = Atoms(cell.symbols, cell=cell.cell, scaled_positions=cell.scaled_positions, pbc=True)
    atoms.set_masses(cell.masses)
    primitive = np.linalg.solve(salt.supercell_matrix, salt.primitive_matrix)
    return HarmonicCrystal.of(atoms, primitive)


@pytest.fixture(scope="module")
def constants(salt, crystal) -> tuple[torch.Tensor, torch.Tensor]:
    """With all symmetries, as those of a potential have them; phono3py gets the same."""
    translations = crystal.translations
    second = crystal.symmetry.symmetrised(translations, torch.from_numpy(salt.fc2.copy()))
    third = permutation_symmetrised(translations, torch.from_numpy(salt.fc3.copy()))
    salt.fc2 = translations.symmetrised(second).numpy()
    salt.fc3 = without_translations(translations, third).numpy()
    salt.init_phph_interaction(**INTERACTION)
    return torch.from_numpy(salt.fc2), torch.from_numpy(salt.fc3)


@pytest.fixture(scope="module")
def found(crystal, constants) -> ThermalConductivity:
    return thermal_conductivity(crystal, *constants, SETTINGS)


def test_forces_of_dft_give_what_phono3py_finds(salt, found):
    salt.run_thermal_conductivity(temperatures=SETTINGS.temperatures)
    expected = salt.thermal_conductivity.kappa[0]
    assert found.mesh == (3, 3, 3)
    np.testing.assert_allclose(found.temperatures, SETTINGS.temperatures)
    np.testing.assert_allclose(np.diagonal(found.kappa, axis1=1, axis2=2), expected[:, :3], rtol=1e-6)
    np.testing.assert_allclose(found.mean, expected[:, 0], rtol=1e-6)


def test_modes_carry_the_heat(crystal, found):
    """κ = Σ C v v τ / V, in the units that are told."""
    modes, volume = found.modes, crystal.primitive.cell.volume
    np.testing.assert_allclose(modes.weights.sum(), 1.0)
    np.testing.assert_allclose(modes.conductivities.sum((1, 2)), found.kappa, rtol=1e-10, atol=1e-12)
    squares = np.square(modes.velocities).sum(-1)
    carried = np.where(squares > 0, modes.heat_capacities * squares, 0.0)
    lifetimes = np.where(np.isfinite(modes.lifetimes), modes.lifetimes, 0.0)
    total = np.einsum("q,tqm->t", modes.weights, carried * lifetimes) * UNIT / volume
    np.testing.assert_allclose(total / 3, found.mean, rtol=1e-5)


def test_isotopes_scatter(crystal, constants, found):
    natural = thermal_conductivity(crystal, *constants, ConductivitySettings((100.0, 300.0), (3, 3, 3), True))
    assert natural.isotopes
    cold, warm = natural.mean / found.mean
    assert cold < warm < 0.99
    assert (natural.modes.lifetimes <= found.modes.lifetimes).all()


def test_second_order_may_come_from_a_larger_supercell(springs):
    """Nothing changes for springs that end half way to an image; tension makes them anharmonic."""
    cell = bulk("NaCl", "rocksalt", a=5.64)
    potential = springs(cell, {2.9: (2.5, 2.7), 4.1: (0.8, 4.1)})
    small, large = (HarmonicCrystal.of_cell(cell, np.diag([n, n, n])) for n in (2, 3))
    third = third_order_constants(small, potential)
    own = thermal_conductivity(small, small.force_constants(potential), third, SETTINGS)
    second = large.force_constants(potential)
    found = thermal_conductivity(small, second, third, SETTINGS, harmonic=large)
    np.testing.assert_allclose(found.kappa, own.kappa, rtol=1e-5, atol=1e-6)
    assert 1 < own.mean[1] < own.mean[0]


def test_the_order_of_atoms_does_not_matter(crystal, constants, found):
    """Constants of a shuffled and shifted supercell, whose primitive cell has other atoms."""
    shuffle = np.random.default_rng(1).permutation(len(crystal.supercell))
    atoms = crystal.supercell[shuffle]
    atoms.positions += atoms.cell.array[0] / 4
    moved = HarmonicCrystal.of(atoms, crystal.primitive_matrix)
    first = torch.from_numpy(shuffle)[moved.translations.primitive_atoms]
    homes = crystal.translations.primitive_index[first]
    seen = crystal.translations.inverse[crystal.translations.translation_index[first]][:, shuffle]
    second = constants[0][homes[:, None], seen]
    third = constants[1][homes[:, None, None], seen[:, :, None], seen[:, None]]
    again = thermal_conductivity(moved, second, third, SETTINGS)
    np.testing.assert_allclose(again.kappa, found.kappa, rtol=1e-5, atol=1e-6)


def test_crystals_that_are_not_the_same_are_refused(crystal, constants):
    cell = crystal.primitive
    cell.set_cell(1.01 * cell.cell.array, scale_atoms=True)
    with pytest.raises(InputError, match="different crystals"):
        thermal_conductivity(crystal, *constants, SETTINGS, harmonic=crystal.moved(cell))


def test_unstable_crystals_are_refused(crystal, constants):
    with pytest.raises(MlipRefineError, match="lowest frequency is -"):
        thermal_conductivity(crystal, -constants[0], constants[1], SETTINGS)


def test_the_extra_is_named_where_phono3py_is_missing(crystal, monkeypatch):
    monkeypatch.setitem(sys.modules, "phono3py", None)
    nothing = torch.zeros(0, dtype=torch.float64)
    with pytest.raises(InputError, match=r"mlip-refine\[conductivity\]"):
        thermal_conductivity(crystal, nothing, nothing)
