"""Compact force constants are the whole Hessian: analytic crystals and real ones."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from phonopy import Phonopy
from phonopy.structure.atoms import PhonopyAtoms

from mlip_refine.data.phonons.force_constants import estimated_residual_forces
from mlip_refine.data.phonons.formats import Calculation
from mlip_refine.data.phonons.reader import read_phonons
from mlip_refine.data.phonons.reference import PhononReference
from mlip_refine.data.phonons.spacegroups import CrystalSymmetry, Translations, crystal_symmetry
from mlip_refine.errors import InputError

DATA = Path(__file__).parent

REAL = {
    "rock salt": DATA / "set" / "materials-id-1000-bate-fm-3m-225.tar.lzma",
    "polar orthorhombic": DATA / "phonopy_params_TiPN3.yaml.xz",
    "wurtzite": DATA / "set" / "materials-id-1070-cdse-p6-3mc-186.tar.lzma",
    "rhombohedral, cell of nine digits": DATA / "set" / "materials-id-28395-b6p-r-3m-166.tar.lzma",
}
COLUMNS = {
    "rock salt": 2,
    "polar orthorhombic": 12,
    "wurtzite": 4,
    "rhombohedral, cell of nine digits": 8,
}


@cache
def _reference(kind: str) -> PhononReference:
    return read_phonons(REAL[kind])


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


every_crystal = pytest.mark.parametrize("kind", REAL)


def _matrix(reference: PhononReference) -> torch.Tensor:
    return reference.dense().reshape(3 * reference.n_atoms, 3 * reference.n_atoms)


@every_crystal
def test_columns_and_products_are_those_of_the_whole_matrix(kind):
    reference = _reference(kind)
    matrix = _matrix(reference)
    v = _random(2, 3, reference.n_atoms, 3)
    product = reference.product(v)
    assert product.shape == v.shape
    assert torch.allclose(product.flatten(-2), v.flatten(-2) @ matrix.T, atol=1e-12)
    atom = reference.n_atoms - 2
    column = reference.columns(atom, 1)
    assert torch.equal(column.flatten(), matrix[:, 3 * atom + 1])
    one_hot = torch.zeros(reference.n_atoms, 3, dtype=torch.float64)
    one_hot[atom, 1] = 1
    assert torch.allclose(reference.product(one_hot), column, atol=1e-14)


@every_crystal
def test_force_constants_are_symmetric_translate_and_obey_the_sum_rule(kind):
    reference = _reference(kind)
    matrix, dense = _matrix(reference), reference.dense()
    assert torch.allclose(matrix, matrix.T, atol=1e-12)
    assert reference.product(torch.ones(reference.n_atoms, 3, dtype=torch.float64)).abs().max() < 1e-11
    for t in reference.permutations[:5]:
        assert torch.allclose(dense[t][:, :, t], dense, atol=1e-12)
    operation = len(reference.symmetry.rotations) - 1
    rotation, moved = reference.symmetry.rotations[operation], reference.symmetry.permutations[operation]
    turned = torch.einsum("ab,ibjc,dc->iajd", rotation, dense, rotation)
    assert torch.allclose(dense[moved][:, :, moved], turned, atol=1e-11)
    assert sorted(reference.permutations[:, reference.primitive_atoms].flatten().tolist()) == list(
        range(reference.n_atoms)
    )


@every_crystal
def test_permutations_are_translations_of_the_atoms(kind):
    reference = _reference(kind)
    scaled = reference.supercell.get_scaled_positions()
    for t in reference.permutations.numpy():
        shift = scaled[t] - scaled
        shift -= np.rint(shift - shift[0])
        assert np.allclose(shift, shift[0], atol=1e-6)
        assert (reference.supercell.numbers[t] == reference.supercell.numbers).all()


@every_crystal
def test_irreducible_columns_weigh_as_much_as_all(kind):
    reference = _reference(kind)
    columns = reference.irreducible()
    assert len(columns) == COLUMNS[kind]
    assert sum(c.weight for c in columns) == pytest.approx(3 * reference.n_atoms, rel=1e-12)
    squares = _matrix(reference).square().sum(0)
    weighted = sum(c.weight * reference.columns(c.atom, c.axis).square().sum() for c in columns)
    assert float(weighted / squares.sum() - 1) == pytest.approx(0, abs=1e-10)


@every_crystal
def test_irreducible_columns_weigh_a_difference_of_two_hessians(kind):
    reference = _reference(kind)
    other = _random(*reference.force_constants.shape)
    moves = reference.translations
    model = moves.symmetrised(reference.symmetry.symmetrised(moves, other))
    difference = replace(reference, force_constants=model - reference.force_constants)
    weighted = sum(
        c.weight * difference.columns(c.atom, c.axis).square().sum() for c in reference.irreducible()
    )
    assert float(weighted / _matrix(difference).square().sum() - 1) == pytest.approx(0, abs=1e-10)


@every_crystal
def test_irreducible_columns_are_completed_to_all_force_constants(kind):
    reference = _reference(kind)
    columns = reference.irreducible()
    values = torch.stack([reference.columns(c.atom, c.axis) for c in columns])
    completed = reference.symmetry.complete(reference.translations, columns, values)
    assert torch.allclose(completed, reference.force_constants, atol=1e-11)


def test_one_product_of_the_wrong_sign_would_be_seen():
    """Rotations that do not belong to the permutations leave no force constants alone."""
    reference = _reference("wurtzite")
    wrong = CrystalSymmetry(reference.symmetry.rotations.flip(0), reference.symmetry.permutations)
    mean = wrong.symmetrised(reference.translations, reference.force_constants)
    assert (mean - reference.force_constants).abs().max() > 0.1


def _springs(matrix: list[int]) -> tuple[Phonopy, np.ndarray]:
    """A cubic cell of atoms with springs of 2 eV/Å² to nearest neighbours: force constants by hand."""
    cell = PhonopyAtoms(["Ti"], cell=np.eye(3) * 3.0, scaled_positions=[[0, 0, 0]])
    phonon = Phonopy(cell, np.diag(matrix))
    scaled = phonon.supercell.scaled_positions * matrix
    n = len(scaled)
    full = np.zeros((n, n, 3, 3))
    for i in range(n):
        for axis in range(3):
            for side in (1, -1):
                apart = scaled - scaled[i] - side * np.eye(3)[axis]
                apart -= np.rint(apart / matrix) * matrix
                j = int(np.abs(apart).max(axis=1).argmin())
                full[i, j, axis, axis] -= 2.0
                full[i, i, axis, axis] += 2.0
    return phonon, full


@pytest.mark.filterwarnings("ignore:Warning. Point group symmetries:UserWarning")
@pytest.mark.parametrize(("matrix", "n_columns"), [([3, 3, 3], 1), ([3, 3, 4], 2), ([3, 4, 5], 3)])
def test_springs_are_exact_and_a_longer_supercell_has_more_columns(matrix, n_columns):
    phonon, full = _springs(matrix)
    moves = Translations(
        torch.from_numpy(phonon.primitive.atomic_permutations), torch.from_numpy(phonon.primitive.p2s_map)
    )
    operations = phonon.symmetry.symmetry_operations["rotations"]
    symmetry = crystal_symmetry(phonon.supercell.cell, operations, phonon.symmetry.atomic_permutations, moves)
    compact = torch.from_numpy(full[phonon.primitive.p2s_map])
    assert torch.allclose(moves.expand(compact).transpose(1, 2), torch.from_numpy(full))
    assert torch.allclose(moves.symmetrised(symmetry.symmetrised(moves, compact)), compact, atol=1e-14)
    assert len(symmetry.irreducible(moves)) == n_columns


def _rotation(axis: list[float], turns: float) -> np.ndarray:
    x, y, z = np.array(axis) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = 2 * np.pi * turns
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


@pytest.mark.parametrize(
    ("axis", "weights"),
    [([0, 0, 1], {0: 2.0, 2: 1.0}), ([1, 1, 1], {0: 3.0}), ([1, 2, 3], None), ([0.3, -0.2, 0.9], None)],
)
def test_axes_of_a_site_with_a_threefold_axis(axis, weights):
    """Along z a column across counts twice; along [111] one column is all; elsewhere two or three are."""
    rotations = torch.from_numpy(np.stack([_rotation(axis, k / 3) for k in range(3)]))
    moves = Translations(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    symmetry = CrystalSymmetry(rotations, torch.zeros(3, 1, dtype=torch.int64))
    found = {c.axis: c.weight for c in symmetry.irreducible(moves)}
    assert weights is None or found == pytest.approx(weights)
    unit = np.array(axis) / np.linalg.norm(axis)
    for along in (np.outer(unit, unit), np.eye(3)):
        assert sum(w * along[a, a] for a, w in found.items()) == pytest.approx(np.trace(along), rel=1e-9)


def test_residual_forces_are_found_again():
    """Forces at rest along the free coordinate of wurtzite, beneath those of single displaced atoms."""
    reference = _reference("wurtzite")
    rest = np.zeros((reference.n_atoms, 3))
    rest[:, 2] = np.where(reference.supercell.numbers == 48, 0.02, -0.02)
    moved = np.zeros((3, reference.n_atoms, 3))
    moved[[0, 1, 2], [0, 0, 80], [0, 2, 2]] = 0.01
    forces = rest - reference.product(torch.from_numpy(moved)).numpy()
    cell = PhonopyAtoms(["Ti"], cell=np.eye(3), scaled_positions=[[0, 0, 0]])
    calculation = Calculation(cell, displacements=moved, forces=forces)
    found = estimated_residual_forces(
        reference.translations, reference.symmetry, reference.force_constants, calculation
    )
    assert np.abs(found.numpy() - rest).max() < 1e-12


def test_references_without_force_constants_say_so():
    reference = replace(_reference("rock salt"), force_constants=None)
    with pytest.raises(InputError, match="has displacements but no force constants"):
        reference.columns(0, 0)


def test_multiplied_in_another_precision():
    reference = _reference("rock salt")
    v = torch.randn(reference.n_atoms, 3, generator=torch.Generator().manual_seed(2))
    assert reference.product(v).dtype == torch.float32
    assert torch.allclose(reference.product(v).double(), reference.product(v.double()), atol=1e-5)
