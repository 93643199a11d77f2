"""Harmonic references against closed formulas, finite differences and exact samples."""

import math

import numpy as np
import pytest
import spglib
import torch
from ase import Atoms
from ase.build import bulk
from ase.units import _amu, _e, _hbar
from scipy.constants import physical_constants

from mlip_refine import testing
from mlip_refine.errors import SamplingError
from mlip_refine.quantities import KB
from mlip_refine.sampling import HarmonicReference, einstein, fit_einstein, fit_harmonic
from mlip_refine.sampling.references import symmetrise

HBAR_SI, KB_SI = _hbar, KB * _e


def _einstein_free_energy(k: np.ndarray, masses: np.ndarray, temperature: float, volume: float) -> float:
    """F_E + F_CM of physics.md, in SI units and by hand, eV."""
    kt, m, spring = KB_SI * temperature, masses * _amu, k * _e * 1e20
    vibrations = 3 * kt * np.log(HBAR_SI * np.sqrt(spring / m) / kt).sum()
    width = (m**2 / spring).sum() / m.sum() ** 2
    centre = kt * math.log(len(k) / (volume * 1e-30) * (2 * math.pi * kt * width) ** 1.5)
    return (vibrations + centre) / _e


@pytest.mark.parametrize("temperature", [300.0, 1200.0])
def test_einstein_crystal_of_one_species_equals_the_closed_formula(temperature: float) -> None:
    atoms = bulk("Ti", "bcc", a=3.25, cubic=True) * 3
    k = np.full(54, 3.1)
    found = einstein(atoms, torch.from_numpy(k)).free_energy(temperature, atoms.cell.volume)
    exact = _einstein_free_energy(k, atoms.get_masses(), temperature, atoms.cell.volume)
    assert found == pytest.approx(exact, rel=1e-10)


def test_einstein_crystal_of_two_species_equals_the_closed_formula() -> None:
    atoms = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    k = np.where(atoms.numbers == 11, 1.7, 2.9)
    found = einstein(atoms, torch.from_numpy(k)).free_energy(450.0, atoms.cell.volume)
    exact = _einstein_free_energy(k, atoms.get_masses(), 450.0, atoms.cell.volume)
    assert found == pytest.approx(exact, rel=1e-10)


def test_constants_are_those_of_codata() -> None:
    assert pytest.approx(physical_constants["Boltzmann constant in eV/K"][0], rel=1e-6) == KB


def test_two_atoms_on_a_spring_have_the_reduced_mass_frequency() -> None:
    atoms = Atoms("NaCl", positions=[[0, 0, 0], [1.5, 1.5, 1.5]], cell=np.eye(3) * 3, pbc=True)
    masses, k = torch.from_numpy(atoms.get_masses()), 2.0
    laplacian = torch.tensor([[k, -k], [-k, k]], dtype=torch.float64)
    constants = torch.kron(laplacian, torch.eye(3, dtype=torch.float64))
    found = HarmonicReference(torch.from_numpy(atoms.positions), constants, masses).frequencies()
    reduced = (masses.prod() / masses.sum()).item() * _amu
    exact = math.sqrt(k * _e * 1e20 / reduced) * 1e-15
    assert found.tolist() == pytest.approx([exact] * 3, rel=1e-9)


def test_forces_are_the_derivative_of_the_energy() -> None:
    atoms, reference = testing.harmonic_crystal("NaCl")
    generator = torch.Generator().manual_seed(1)
    x = torch.from_numpy(atoms.positions) + 0.1 * torch.randn(8, 3, generator=generator, dtype=torch.float64)
    forces = reference.energy_forces(x[None], reference.projected)[1][0]
    h = 1e-4
    for i, axis in [(0, 0), (3, 1), (7, 2)]:
        plus, minus = x.clone(), x.clone()
        plus[i, axis] += h
        minus[i, axis] -= h
        slope = (reference.energy(plus[None]) - reference.energy(minus[None])) / (2 * h)
        assert forces[i, axis].item() == pytest.approx(-slope.item(), abs=1e-9)


def test_drift_costs_nothing_and_forces_do_not_push_the_centre_of_mass() -> None:
    atoms = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    generator = torch.Generator().manual_seed(2)
    springs = 1 + torch.rand(8, generator=generator, dtype=torch.float64)
    reference = einstein(atoms, springs)
    x = torch.from_numpy(atoms.positions) + 0.1 * torch.randn(
        5, 8, 3, generator=generator, dtype=torch.float64
    )
    moved = x + torch.tensor([3.0, -7.0, 0.4], dtype=torch.float64)
    torch.testing.assert_close(reference.energy(moved), reference.energy(x), rtol=1e-10, atol=1e-12)
    forces = reference.energy_forces(x, reference.projected)[1]
    assert forces.sum(1).abs().max() < 1e-12


def _draw(reference: HarmonicReference, n: int, temperature: float, seed: int) -> torch.Tensor:
    """Exact samples of a harmonic crystal, with the centre of mass anywhere."""
    root = reference.masses.repeat_interleave(3).sqrt()
    values, vectors = torch.linalg.eigh(reference.projected / root[:, None] / root)
    widths = (KB * temperature / values[3:]).sqrt()
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(n, len(widths), generator=generator, dtype=torch.float64) * widths
    drift = torch.randn(n, 1, 3, generator=generator, dtype=torch.float64)
    return reference.sites + (q @ vectors[:, 3:].T / root).view(n, -1, 3) + drift


@pytest.mark.statistical
def test_fit_harmonic_recovers_the_force_constants_of_exact_samples() -> None:
    """8 atoms, 40,000 frames: the largest element is off by 0.3(1) % (measured; 4,000 frames: up to 2.4)."""
    atoms, reference = testing.harmonic_crystal("NaCl")
    fitted = fit_harmonic(atoms, _draw(reference, 40_000, 600.0, seed=3), 600.0)
    scale = reference.projected.abs().max()
    assert ((fitted.projected - reference.projected).abs().max() / scale).item() < 0.02
    exact, found = (r.free_energy(600.0, atoms.cell.volume) for r in (reference, fitted))
    n_modes, samples = 21, 40_000
    assert (
        abs(found - exact)
        < testing.sigma_bound() * KB * 600 * math.sqrt(n_modes / (2 * samples)) + KB * 600 * 0.01
    )


@pytest.mark.statistical
def test_fit_einstein_gives_every_species_its_spring() -> None:
    """Exact samples of an Einstein crystal: springs to sqrt(2 / (3 n_atoms n_frames))."""
    atoms = bulk("NaCl", "rocksalt", a=5.64, cubic=True) * (2, 2, 1)
    k = torch.where(torch.from_numpy(atoms.numbers) == 11, 1.7, 2.9).double()
    reference = einstein(atoms, k)
    fitted = fit_einstein(atoms, _draw(reference, 2000, 500.0, seed=4), 500.0)
    found = torch.diagonal(fitted.force_constants)[::3]
    assert len(found.unique()) == 2
    sigma = math.sqrt(2 / (3 * 16 * 2000))
    # Displacements leave out the centre of mass, weighted by masses, and with it a share of every variance.
    root = reference.masses.repeat_interleave(3).sqrt()
    covariance = torch.linalg.pinv(reference.projected / root[:, None] / root) / root[:, None] / root
    exact = 3 / torch.diagonal(covariance).view(-1, 3).sum(1)
    assert ((found / exact - 1).abs() < testing.sigma_bound(2) * sigma).all()


@pytest.mark.parametrize("kind", ["fcc", "hcp", "NaCl"])
def test_symmetrise_leaves_symmetric_force_constants_alone(kind: str) -> None:
    atoms, reference = testing.harmonic_crystal(kind)
    k = reference.force_constants
    torch.testing.assert_close(symmetrise(k, atoms), k, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["bcc", "hcp", "NaCl"])
def test_symmetrise_is_the_mean_over_all_operations(kind: str) -> None:
    """Also in a cell that has fewer rotations than the crystal, and with screws and glides."""
    atoms = {
        "bcc": lambda: bulk("Ti", "bcc", a=3.25, cubic=True) * (2, 2, 1),
        "hcp": lambda: bulk("Ti", "hcp", a=2.93, c=4.65) * (2, 2, 1),
        "NaCl": lambda: bulk("NaCl", "rocksalt", a=5.64, cubic=True),
    }[kind]()
    n, cell, scaled = len(atoms), atoms.cell.array, atoms.get_scaled_positions()
    noise = np.random.default_rng(8).normal(size=(3 * n, 3 * n))
    data = spglib.get_symmetry((cell, scaled, atoms.numbers), symprec=1e-3)
    mean = np.zeros_like(noise)
    for w, t in zip(data["rotations"], data["translations"], strict=True):
        operation = np.zeros_like(noise)
        for i, moved in enumerate(scaled @ w.T + t):
            away = moved - scaled
            (j,) = np.flatnonzero(np.abs(away - np.rint(away)).max(1) < 1e-6)
            operation[3 * j : 3 * j + 3, 3 * i : 3 * i + 3] = cell.T @ w @ np.linalg.inv(cell.T)
        mean += operation.T @ noise @ operation
    found = symmetrise(torch.from_numpy(noise), atoms)
    assert len(data["rotations"]) > len(np.unique(data["rotations"], axis=0)) > 4
    np.testing.assert_allclose(found.numpy(), mean / len(data["rotations"]), rtol=0, atol=1e-12)


def test_symmetrise_projects() -> None:
    atoms, _ = testing.harmonic_crystal("hcp")
    n = 3 * len(atoms)
    noise = torch.randn(n, n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    once = symmetrise(noise + noise.T, atoms)
    torch.testing.assert_close(symmetrise(once, atoms), once, rtol=0, atol=1e-10)
    torch.testing.assert_close(once, once.T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("stiffness", [-0.5, 0.0])
def test_a_reference_with_an_imaginary_or_zero_mode_is_refused(stiffness: float) -> None:
    """One bad mode hides between the three translations when they are only counted."""
    atoms = bulk("Ti", "bcc", a=3.25, cubic=True)
    springs = torch.eye(6, dtype=torch.float64)
    relative = torch.tensor([1.0, 0, 0, -1.0, 0, 0], dtype=torch.float64) / math.sqrt(2)
    springs += (stiffness - 1) * torch.outer(relative, relative)
    masses = torch.from_numpy(atoms.get_masses())
    reference = HarmonicReference(torch.from_numpy(atoms.positions), springs, masses)
    with pytest.raises(SamplingError, match="unstable"):
        reference.free_energy(300.0, atoms.cell.volume)


def test_too_few_frames_for_a_covariance_are_refused() -> None:
    atoms = bulk("Ti", "bcc", a=3.25, cubic=True) * 3
    atoms.positions[0] += 0.2  # no symmetry left to help
    frames = torch.from_numpy(atoms.positions) + 0.05 * torch.randn(
        6, 54, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64
    )
    with pytest.raises(SamplingError, match="einstein"):
        fit_harmonic(atoms, frames, 300.0)
