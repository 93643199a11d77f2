"""Frequencies of chains that are known in closed form, of phonopy, and their derivatives."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from phonopy import Phonopy
from phonopy.structure.atoms import PhonopyAtoms

from mlip_refine import testing
from mlip_refine.crystals.phonons.dynamical_matrix import (
    TERAHERTZ,
    BlochSums,
    commensurate_points,
    frequencies,
    squared_frequencies,
)
from mlip_refine.crystals.phonons.harmonic import HarmonicCrystal
from mlip_refine.crystals.symmetry import mesh_points

F64 = torch.float64
SALT = bulk("NaCl", "rocksalt", a=5.64)


def _primitive(reference):
    return HarmonicCrystal.of_reference(reference).primitive


@pytest.fixture(scope="module")
def salt(phonons_of):
    """Springs of 2.5 eV/Å² between nearest neighbours: along every axis a chain of two kinds of atoms."""
    return phonons_of(SALT, (2, 2, 2), lambda atoms: testing.bond_springs(atoms, {2.9: 2.5}))


def _sums(reference, points) -> BlochSums:
    cell = _primitive(reference).cell.array
    return BlochSums.of(reference.supercell, reference.translations, cell, points)


def _hermitian(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(*shape, 2, generator=generator, dtype=F64)
    complex_matrix = torch.view_as_complex(matrix)
    return (complex_matrix + complex_matrix.mH) / 2


def test_rock_salt_of_springs_is_three_chains(salt):
    """ω² = K(1/m + 1/M) ± K √[(1/m + 1/M)² - 4 sin²(q d)/(m M)] along every axis (Born and von Kármán)."""
    primitive = _primitive(salt)
    points = commensurate_points(salt.supercell.cell.array, primitive.cell.array)
    assert len(points) == 8
    found = squared_frequencies(_sums(salt, points).matrices(salt.force_constants))
    light, heavy = 1 / primitive.get_masses()
    waves = 2 * np.pi * points @ np.linalg.inv(primitive.cell.array).T
    root = np.sqrt((light + heavy) ** 2 - 4 * np.sin(waves * 2.82) ** 2 * light * heavy)
    expected = np.sort(2.5 * np.concatenate([light + heavy - root, light + heavy + root], axis=1), axis=1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)
    assert float(frequencies(found).max()) == pytest.approx(expected.max() ** 0.5 * TERAHERTZ, rel=1e-12)


def test_matrices_and_a_mesh_are_those_of_phonopy(salt):
    masses = {"masses": SALT.get_masses(), "numbers": SALT.numbers}
    cell = PhonopyAtoms(cell=SALT.cell.array, positions=SALT.positions, **masses)
    phonons = Phonopy(cell, np.diag([2, 2, 2]), log_level=0)
    generator = torch.Generator().manual_seed(1)
    # Something for every pair: images at equal distances count in equal parts.
    constants = salt.force_constants + 0.01 * torch.randn(2, 16, 3, 3, generator=generator, dtype=F64)
    phonons.force_constants = constants.numpy()
    points = np.random.default_rng(0).random((5, 3))
    phonons.run_qpoints(points, with_dynamical_matrices=True)
    theirs = phonons.get_qpoints_dict()
    mine = _sums(salt, points).matrices(constants)
    np.testing.assert_allclose(mine.numpy(), theirs["dynamical_matrices"], rtol=0, atol=1e-14)
    found = frequencies(squared_frequencies(mine)).numpy()
    np.testing.assert_allclose(found, theirs["frequencies"], rtol=1e-6, atol=1e-6)


def test_a_reduced_mesh_has_the_mean_of_the_whole(salt):
    points, weights = mesh_points(_primitive(salt), (4, 4, 4))
    every = np.stack(np.meshgrid(*[np.arange(4) / 4] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    assert len(points) == 8
    means = [
        squared_frequencies(_sums(salt, q).matrices(salt.force_constants)).square().mean(1)
        for q in (points, every)
    ]
    assert weights @ means[0].numpy() == pytest.approx(float(means[1].mean()), rel=1e-12)


def test_derivatives_of_eigenvalues_that_differ():
    start, change = _hermitian(1, 4, 6, 6), _hermitian(2, 4, 6, 6)
    weights = torch.randn(4, 6, generator=torch.Generator().manual_seed(3), dtype=F64)
    x = torch.zeros((), dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad((weights * squared_frequencies(start + x * change)).sum(), x)
    h = 1e-4
    ends = [(weights * torch.linalg.eigvalsh(start + s * h * change)).sum() for s in (2, 1, -1, -2)]
    difference = (8 * (ends[1] - ends[2]) - (ends[0] - ends[3])) / (12 * h)
    assert float(slope) == pytest.approx(float(difference), rel=1e-8)


def test_degenerate_eigenvalues_share_their_derivatives():
    """In any basis of the subspace the gradient is the same, and exact for changes that keep it whole."""
    values = torch.tensor([0.5, 2.0, 2.0, 2.0, 3.0], dtype=F64)
    _, basis = torch.linalg.eigh(_hermitian(4, 5, 5))
    weights = torch.tensor([1.0, -2.0, 0.3, 5.0, 0.7], dtype=F64)
    matrix = ((basis * values) @ basis.mH).requires_grad_()
    (gradient,) = torch.autograd.grad(weights @ squared_frequencies(matrix), matrix)
    shared = torch.tensor([1.0, 1.1, 1.1, 1.1, 0.7], dtype=F64)
    torch.testing.assert_close(gradient, (basis * shared) @ basis.mH, rtol=0, atol=1e-12)


def test_frequencies_have_a_finite_derivative_at_zero():
    squares = torch.tensor([-4.0, -1e-8, 0.0, 1e-8, 4.0], dtype=F64, requires_grad=True)
    plain, soft = frequencies(squares.detach()), frequencies(squares, 0.1)
    torch.testing.assert_close(plain, torch.tensor([-2.0, -1e-4, 0, 1e-4, 2.0], dtype=F64) * TERAHERTZ)
    torch.testing.assert_close(soft[[0, 4]], plain[[0, 4]], rtol=1e-8, atol=0)
    (slope,) = torch.autograd.grad(soft.sum(), squares)
    assert float(slope[2]) == pytest.approx(TERAHERTZ**2 / 0.1)
    assert bool(slope.isfinite().all())
    assert torch.autograd.gradcheck(lambda x: frequencies(x, 0.1), (squares * 1e-4,))


def test_primitive_cells_of_cubic_ones(phonons_of):
    """The conventional cell of rock salt has four primitive ones, and the same frequencies."""
    cubic = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    made = phonons_of(
        cubic,
        (1, 1, 1),
        lambda atoms: testing.bond_springs(atoms, {2.9: 2.5}),
        primitive=[[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]],
    )
    crystal = _primitive(made)
    assert isinstance(crystal, Atoms)
    assert crystal.cell.volume == pytest.approx(5.64**3 / 4)
    points = commensurate_points(made.supercell.cell.array, crystal.cell.array)
    assert len(points) == 4
    squares = squared_frequencies(_sums(made, points).matrices(made.force_constants))
    # No atom is its own neighbour: the trace is that of an Einstein crystal at every wave vector.
    total = 2 * 2.5 * (1 / crystal.get_masses()).sum()
    torch.testing.assert_close(squares.sum(1), torch.full((4,), 3 * total, dtype=F64))


def test_moments_lower_the_symmetry_of_the_mesh():
    """Cu3Au with one spin against the two others, beside phonopy, whose symmetry knows moments."""
    places, moments = [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]], [0, 2, 2, -2]
    crystal = Atoms("AuCu3", scaled_positions=places, cell=[3.75] * 3, pbc=True)
    assert len(mesh_points(crystal, [6, 6, 6])[0]) == 20
    crystal.set_initial_magnetic_moments(moments)
    points, weights = mesh_points(crystal, [6, 6, 6])
    phonon = HarmonicCrystal.of_cell(crystal, 2 * np.eye(3, dtype=int)).phonopy()
    phonon.force_constants = np.zeros((4, 32, 3, 3))
    phonon.run_mesh([6, 6, 6], is_gamma_center=True)
    assert len(points) == len(phonon.mesh.qpoints) == 40
    assert weights.sum() == pytest.approx(1)
    assert np.allclose(np.sort(weights * 216), np.sort(phonon.mesh.weights))
