"""The finite-size term of crystals: published digits, closed forms of the infinite crystal, and refusals."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import neighbor_list
from ase.units import _amu, _e, _hbar
from numpy.typing import NDArray
from torch import Tensor

from mlip_refine import testing
from mlip_refine.crystals.phonons.dynamical_matrix import commensurate_points
from mlip_refine.crystals.phonons.size_limit import (
    BLOCKS,
    InterpolatedPhonons,
    harmonic_size_term,
    sampled_size_term,
)
from mlip_refine.errors import InputError, StatisticsError
from mlip_refine.quantities import KB, Measured
from mlip_refine.sampling import HarmonicReference

ARGON = {"epsilon": 119.8 * KB, "sigma": 3.405}
"""Lennard-Jones parameters of argon, eV and Å."""


def _lennard_jones(n: int, density: float) -> tuple[Atoms, Tensor]:
    """An fcc crystal of 4 n³ atoms and its Hessian, pairs cut at 2.5 σ; the shift has no derivatives."""
    sigma, epsilon = ARGON["sigma"], ARGON["epsilon"]
    atoms = bulk("Ar", "fcc", a=sigma * (4 / density) ** (1 / 3), cubic=True) * (n, n, n)
    i, j, vectors = neighbor_list("ijD", atoms, 2.5 * sigma)
    r = np.linalg.norm(vectors, axis=1) / sigma
    along = np.einsum("na,nb->nab", vectors, vectors) / (r * sigma)[:, None, None] ** 2
    slope = -24 * (2 * r**-13 - r**-7) / r
    curvature = 24 * (26 * r**-14 - 7 * r**-8)
    blocks = curvature[:, None, None] * along + slope[:, None, None] * (np.eye(3) - along)
    blocks *= epsilon / sigma**2
    hessian = np.zeros((len(atoms), len(atoms), 3, 3))
    np.add.at(hessian, (i, i), blocks)
    np.add.at(hessian, (i, j), -blocks)
    size = 3 * len(atoms)
    return atoms, torch.from_numpy(hessian.transpose(0, 2, 1, 3).reshape(size, size).copy())


def _check_lennard_jones(n: int, expected: float, constant: float) -> None:
    atoms, hessian = _lennard_jones(n, 0.9731)
    found = harmonic_size_term(atoms, hessian, 0.8 * ARGON["epsilon"] / KB)
    assert found == pytest.approx(expected, abs=0.006)
    assert found + 0.5 * math.log(len(atoms)) == pytest.approx(constant, abs=0.0055)


@pytest.mark.parametrize(("n", "expected", "constant"), [(3, -6.99, -4.65), (4, -7.40, -4.632)])
def test_lennard_jones_crystals_at_coexistence(n: int, expected: float, constant: float) -> None:
    """T* = 0.8, ρ* = 0.9731 (Pedersen 2013): two numbers of an independent program, as it printed them."""
    _check_lennard_jones(n, expected, constant)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "expected", "constant"), [(5, -7.73, -4.626), (6, -8.01, -4.625)])
def test_large_lennard_jones_crystals_at_coexistence(n: int, expected: float, constant: float) -> None:
    _check_lennard_jones(n, expected, constant)


def _log_det(bonds: Sequence[tuple[int, int, float, NDArray[np.float64]]], masses: Sequence[float]) -> float:
    """⟨½ ln det D(q)⟩ of a crystal of springs, D in eV/Å²/amu, extrapolated from two meshes of its own.

    Args:
        bonds: Atom, other atom, spring constant, and vector in units of the orthogonal axes of the mesh;
            every bond from both of its ends.
        masses: Masses of the atoms of the cell, amu.
    """
    means = []
    for m in (32, 64):
        axis = (np.arange(m) + 0.5) / m
        q = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)[: m**3 // 2]
        d = np.zeros((len(q), len(masses), 3, len(masses), 3), dtype=complex)
        for one, two, k, vector in bonds:
            matrix = k * np.outer(vector, vector) / (vector @ vector)
            d[:, one, :, one] += matrix / masses[one]
            wave = np.exp(2j * np.pi * q @ vector)[:, None, None]
            d[:, one, :, two] -= wave * matrix / math.sqrt(masses[one] * masses[two])
        size = 3 * len(masses)
        means.append(0.5 * float(np.linalg.slogdet(d.reshape(len(q), size, size))[1].mean()))
    return means[1] + (means[1] - means[0]) / 7


def _of_cell(atoms: Atoms, force_constants: Tensor, temperature: float) -> float:
    """Classical F/kT of a harmonic crystal whose centre of mass moves in V/N, in SI units."""
    kt, masses = KB * _e * temperature, atoms.get_masses() * _amu
    root = np.repeat(np.sqrt(masses), 3)
    squares = np.linalg.eigvalsh(force_constants.numpy() * _e * 1e20 / np.outer(root, root))[3:]
    volume = atoms.cell.volume * 1e-30 / len(atoms)
    centre = math.log(volume * (masses.sum() * kt / (2 * math.pi * _hbar**2)) ** 1.5)
    return float(np.log(_hbar * np.sqrt(squares) / kt).sum()) - centre


def _of_infinite(mean: float, n_modes: int, temperature: float) -> float:
    """F/kT of a cell of the infinite crystal from its mean ½ ln det D."""
    unit = _hbar * math.sqrt(_e * 1e20 / _amu) / (KB * _e * temperature)
    return mean + n_modes * math.log(unit)


@pytest.fixture(scope="module")
def nearest_neighbours() -> float:
    """⟨½ ln det D⟩ of fcc with springs of 2 eV/Å² to the 12 nearest neighbours, mass 26.98 amu.

    In simple cubic wave vectors of the lattice of half the cubic cell, over which q runs more than once.
    """
    signs = [(s, t) for s in (-1.0, 1.0) for t in (-1.0, 1.0)]
    vectors = [v for s, t in signs for v in ((0, s, t), (s, 0, t), (s, t, 0))]
    mass = bulk("Al").get_masses()[0]
    return _log_det([(0, 0, 2.0, np.array(v)) for v in vectors], [mass])


@pytest.mark.parametrize("n", [2, 3, 4, pytest.param(5, marks=pytest.mark.slow)])
def test_nearest_neighbour_crystals_have_the_free_energy_of_the_infinite_one(
    nearest_neighbours: float, n: int
) -> None:
    """32, 108, 256 and 500 atoms: F(N) by diagonalisation minus N f∞ in closed form, to 1e-3 kT."""
    atoms, temperature = bulk("Al", "fcc", a=4.05, cubic=True) * (n, n, n), 600.0
    force_constants = testing.bond_springs(atoms, {3.2: 2.0})
    exact = _of_cell(atoms, force_constants, temperature)
    exact -= len(atoms) * _of_infinite(nearest_neighbours, 3, temperature)
    assert harmonic_size_term(atoms, force_constants, temperature) == pytest.approx(exact, abs=1e-3)


@pytest.fixture(scope="module")
def unequal_masses() -> float:
    """⟨½ ln det D⟩ of CsCl with springs of 1.5 between unlike neighbours and 0.7 eV/Å² between like ones."""
    signs = (-0.5, 0.5)
    unlike = [np.array([x, y, z]) for x in signs for y in signs for z in signs]
    like = [s * v for v in np.eye(3) for s in (-1.0, 1.0)]
    bonds = [(i, 1 - i, 1.5, v) for v in unlike for i in (0, 1)]
    bonds += [(i, i, 0.7, v) for v in like for i in (0, 1)]
    return _log_det(bonds, _salt(1).get_masses().tolist())


def _salt(n: int) -> Atoms:
    return bulk("CsCl", "cesiumchloride", a=4.12, cubic=True) * (n, n, n)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_crystals_of_unequal_masses_have_the_free_energy_of_the_infinite_one(
    unequal_masses: float, n: int
) -> None:
    """16, 54, 128 and 250 atoms; in the smallest two images of like neighbours are equally near."""
    atoms, temperature = _salt(n), 400.0
    assert atoms.get_masses().max() > 3 * atoms.get_masses().min()
    force_constants = testing.bond_springs(atoms, {3.6: 1.5, 4.2: 0.7})
    exact = _of_cell(atoms, force_constants, temperature)
    exact -= n**3 * _of_infinite(unequal_masses, 6, temperature)
    assert harmonic_size_term(atoms, force_constants, temperature) == pytest.approx(exact, abs=1e-3)


def test_cells_of_any_shape_lead_to_one_infinite_crystal() -> None:
    """hcp, whose mesh has fewer symmetries than it: long, flat and compact cells, to 1e-3 kT each."""
    limits = []
    for repetitions in ((3, 3, 3), (6, 3, 2), (3, 3, 2)):
        atoms = bulk("Ti", "hcp", a=2.93, c=4.65) * repetitions
        force_constants = testing.bond_springs(atoms, {3.1: 2.4, 4.3: 0.5})
        term = harmonic_size_term(atoms, force_constants, 1000.0)
        limits.append((_of_cell(atoms, force_constants, 1000.0) - term) / len(atoms))
    assert np.ptp(limits) < 1e-3 / 108


@pytest.mark.parametrize("kind", ["fcc", "hcp", "NaCl"])
def test_the_wave_vectors_of_the_supercell_have_its_own_eigenvalues(kind) -> None:
    atoms, reference = testing.harmonic_crystal(kind)
    phonons = InterpolatedPhonons.of(atoms, reference.force_constants)
    points = commensurate_points(atoms.cell.array, phonons.primitive)
    assert len(points) == phonons.n_cells > 1
    root = torch.from_numpy(atoms.get_masses()).repeat_interleave(3).sqrt()
    own = torch.linalg.eigvalsh(reference.force_constants / root[:, None] / root)
    found = phonons.squares(points).flatten().sort().values
    torch.testing.assert_close(found, own, rtol=0, atol=1e-12 * float(own.max()) * len(own))


def test_the_term_depends_on_temperature_as_the_centre_of_mass_does() -> None:
    """3N - 3 vibrations and a free particle against 3N vibrations: 3/2 ln T for constant force constants."""
    atoms, reference = testing.harmonic_crystal("hcp")
    cold, hot = (harmonic_size_term(atoms, reference.force_constants, t) for t in (200.0, 1600.0))
    assert hot - cold == pytest.approx(1.5 * math.log(8), abs=1e-9)


def _unstable_between() -> tuple[Atoms, Tensor]:
    """A simple cubic crystal of 64 atoms, stable as it is, and with imaginary modes of long waves.

    Along every axis λ = 2 k₁(1 - cos q) + 2 k₂(1 - cos 2q) with k₂ = -0.3 k₁: 0.8 k₁ at q = π/2 and 4 k₁ at
    π, which are all that the cell has, but -0.2 k₁q² about zero.
    """
    atoms = bulk("Po", "sc", a=3.0, cubic=True) * (4, 4, 4)
    found = np.zeros((64, 64))
    for i, j, distance in zip(*neighbor_list("ijd", atoms, 6.1), strict=True):
        k = 1.0 if distance < 3.1 else -0.3 if distance > 5.9 else 0.0
        found[i, i] += k
        found[i, j] -= k
    return atoms, torch.from_numpy(np.kron(found, np.eye(3)))


def test_imaginary_modes_between_the_wave_vectors_of_the_cell_are_refused() -> None:
    atoms, force_constants = _unstable_between()
    assert torch.linalg.eigvalsh(force_constants)[3] > 0.1
    with pytest.raises(StatisticsError, match=r"between its wave vectors, at \[.*THz") as caught:
        harmonic_size_term(atoms, force_constants, 300.0)
    assert "finite_size: cells" in str(caught.value)
    assert "a larger cell" in str(caught.value)


def _sites(atoms: Atoms, springs: Tensor) -> Tensor:
    return springs + torch.eye(3 * len(atoms), dtype=torch.float64)


def _one_bond(_: Atoms, springs: Tensor) -> Tensor:
    changed = springs.clone()
    for i, j, sign in ((0, 0, 1), (3, 3, 1), (0, 3, -1), (3, 0, -1)):
        changed[i, j] += sign * 0.5
    return changed


@pytest.mark.parametrize(
    ("change", "message"), [(_sites, "the sum rule of translations"), (_one_bond, "the lattice translations")]
)
def test_force_constants_without_translations_are_refused(
    change: Callable[[Atoms, Tensor], Tensor], message: str
) -> None:
    """An Einstein crystal has no phonons; one stiffer bond is no crystal that repeats."""
    atoms, reference = testing.harmonic_crystal("fcc")
    with pytest.raises(InputError, match=message):
        harmonic_size_term(atoms, change(atoms, reference.force_constants), 300.0)


def _draw(reference: HarmonicReference, n: int, temperature: float, seed: int) -> Tensor:
    """Exact samples of a harmonic crystal `[n, N, 3]`."""
    root = reference.masses.repeat_interleave(3).sqrt()
    values, vectors = torch.linalg.eigh(reference.projected / root[:, None] / root)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, len(values) - 3, generator=generator, dtype=torch.float64)
    modes = noise * (KB * temperature / values[3:]).sqrt()
    return reference.sites + (modes @ vectors[:, 3:].T / root).view(n, -1, 3)


@pytest.mark.statistical
def test_sampled_terms_are_those_of_the_force_constants_with_their_errors() -> None:
    """Ten draws of 200 frames of 16 atoms: no bias, and errors of the size that the draws differ by."""
    atoms = bulk("Ti", "bcc", a=3.25, cubic=True) * 2
    reference = testing.harmonic_reference(atoms, {2.9: 2.0, 3.4: 0.8})
    exact = harmonic_size_term(atoms, reference.force_constants, 900.0)
    draws: list[Measured] = [
        sampled_size_term(atoms, _draw(reference, 200, 900.0, seed), 900.0) for seed in range(10)
    ]
    values, errors = (np.array([getattr(d, name) for d in draws]) for name in ("value", "se"))
    mean_error = math.sqrt(float(np.mean(errors**2)) / len(draws))
    assert abs(values.mean() - exact) < testing.sigma_bound(dof=len(draws) - 1) * mean_error
    assert mean_error < 0.08
    # The ratio of two variances, of 9 and of nearly 10 · 9 degrees of freedom.
    low, high = testing.chi_squared_bounds(len(draws) - 1)
    assert low / 9 / 2 < values.var(ddof=1) / np.mean(errors**2) < 2 * high / 9


def test_frames_that_do_not_determine_the_covariance_are_refused() -> None:
    atoms, reference = testing.harmonic_crystal("NaCl")
    with pytest.raises(StatisticsError, match=f"{BLOCKS - 1} frames do not determine"):
        sampled_size_term(atoms, _draw(reference, BLOCKS - 1, 600.0, seed=1), 600.0)
