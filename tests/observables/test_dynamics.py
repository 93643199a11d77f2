"""Brownian motion, the Ornstein-Uhlenbeck process and harmonic crystals have known time correlations."""

import math

import pytest
import torch
from ase import units
from torch import Tensor

from mlip_refine.observables import dynamics
from mlip_refine.quantities import KB
from mlip_refine.testing import sigma_bound


def test_correlations_are_those_of_plain_loops(gaussian) -> None:
    positions = 50 + gaussian(2, 30, 3, 3).cumsum(1)
    msd = dynamics.mean_square_displacement(positions, 20)
    velocity = dynamics.velocities(positions, 2.0)
    weights = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    vacf = dynamics.velocity_autocorrelation(velocity, weights, 20)
    for lag in (0, 1, 7, 20):
        moved = positions[:, lag:] - positions[:, : 30 - lag]
        torch.testing.assert_close(msd[:, lag], moved.square().sum(-1).mean((1, 2)))
        products = (velocity[:, lag:] * velocity[:, : 29 - lag]).sum(-1)
        torch.testing.assert_close(vacf[:, lag], (products * weights).sum(-1).mean(1))


def test_positions_in_the_mean_cell(gaussian) -> None:
    """What moves with the cell stands still there, and the volume is the mean one."""
    cells = 8 * torch.eye(3, dtype=torch.float64) + 0.3 * gaussian(2, 6, 3, 3)
    fractional = 5 * gaussian(2, 1, 4, 3)
    still = dynamics.in_mean_cell(fractional @ cells, cells)
    torch.testing.assert_close(still, (fractional @ cells.mean(1, keepdim=True)).expand(2, 6, 4, 3))


def test_portions_of_atoms_change_nothing(gaussian, monkeypatch: pytest.MonkeyPatch) -> None:
    positions = gaussian(3, 20, 4, 3)
    whole = dynamics.mean_square_displacement(positions, 9)
    ones = torch.ones(4, dtype=torch.float64)
    correlation = dynamics.velocity_autocorrelation(positions, ones, 9)
    monkeypatch.setattr("mlip_refine.observables.base._NUMBERS", 1)
    torch.testing.assert_close(dynamics.mean_square_displacement(positions, 9), whole)
    torch.testing.assert_close(dynamics.velocity_autocorrelation(positions, ones, 9), correlation)


@pytest.mark.statistical
def test_brownian_motion_diffuses_by_einstein(gaussian) -> None:
    """Steps of variance 2 D Δ; the spread over 40 blocks tells the error."""
    D, interval = 0.3, 2.0
    positions = (gaussian(40, 400, 10, 3) * math.sqrt(2 * D * interval)).cumsum(1)
    msd = dynamics.mean_square_displacement(positions, 50)
    found = dynamics.einstein_diffusion(msd, interval, 25)
    error = float(found.std()) / math.sqrt(40)
    assert error < 0.01
    assert abs(float(found.mean()) - D) < sigma_bound(dof=39) * error


def test_green_kubo_is_the_slope_of_the_displacement(gaussian) -> None:
    """The trapezoid over displacements per interval is the slope of ⟨r²⟩ there, for a stationary series."""
    theta = torch.arange(400, dtype=torch.float64) * (2 * math.pi / 50)
    # A circle is stationary over whole periods.
    positions = torch.stack([theta.cos(), theta.sin(), 0 * theta], dim=-1)[:, None]
    msd = dynamics.mean_square_displacement(positions, 20)
    exact = 2 * (1 - torch.cos(torch.arange(21, dtype=torch.float64) * (2 * math.pi / 50)))
    torch.testing.assert_close(msd, exact)
    velocity = dynamics.velocities(positions, 1.5)
    vacf = dynamics.velocity_autocorrelation(velocity, torch.ones(1), 19)
    integral = dynamics.running_integral(vacf, 1.5) / 3
    torch.testing.assert_close(
        integral[1:], (exact[2:] - exact[:-2])[: len(integral) - 1] / (6 * 1.5 * 2), rtol=0, atol=2e-3
    )


def ornstein_uhlenbeck(gaussian, blocks: int, n: int, decay: float) -> Tensor:
    """Velocities of unit variance with ⟨v(0) v(t)⟩ = decay^t, ten atoms, from equilibrium on."""
    noise = gaussian(blocks, n, 10, 3)
    series = noise.clone()
    for t in range(1, n):
        series[:, t] = decay * series[:, t - 1] + math.sqrt(1 - decay**2) * noise[:, t]
    return series


@pytest.mark.statistical
def test_ornstein_uhlenbeck_diffuses_by_green_kubo(gaussian) -> None:
    """C(t) = exp(-t/τ): D = Σ C = (1 + ρ)/(1 - ρ)/2 in steps, also from the positions that they sum to."""
    velocity, rho = ornstein_uhlenbeck(gaussian, 40, 500, 0.8), 0.8
    ones = torch.ones(10, dtype=torch.float64)
    vacf = dynamics.velocity_autocorrelation(velocity, ones, 60) / 10
    by_velocity = dynamics.running_integral(vacf, 1.0)[:, -1] / 3
    msd = dynamics.mean_square_displacement(velocity.cumsum(1), 60)
    by_position = dynamics.einstein_diffusion(msd, 1.0, 30)
    for found in (by_velocity, by_position):
        error = float(found.std()) / math.sqrt(40)
        assert error < 0.2
        assert abs(float(found.mean()) - (1 + rho) / (1 - rho) / 2) < sigma_bound(2, 39) * error


@pytest.fixture
def oscillators():
    """Two atoms, each swinging in x with its own frequency and mass, every 16 fs."""
    times = torch.arange(4000, dtype=torch.float64) * 16.0
    frequencies, masses = torch.tensor([5.0, 9.0]) / 1e3, torch.tensor([10.0, 40.0], dtype=torch.float64)
    # Equal energies: m (A ω)² is the same.
    amplitudes = 0.1 / (2 * math.pi * frequencies * masses.sqrt())
    x = amplitudes * torch.cos(2 * math.pi * frequencies * times[:, None] + torch.tensor([0.3, 1.1]))
    return torch.nn.functional.pad(x[..., None].double(), (0, 2)), masses


def test_spectrum_of_a_harmonic_crystal(oscillators) -> None:
    """Equal peaks at 5 and 9 THz, though displacements over 16 fs take 7 % of the higher one."""
    positions, masses = oscillators
    vacf = dynamics.velocity_autocorrelation(dynamics.velocities(positions, 16.0), masses, 250)
    frequency, density = dynamics.vibrational_spectrum(vacf, 16.0)
    assert float(torch.trapezoid(density, frequency)) == pytest.approx(1.0)
    assert float(frequency[-1]) == pytest.approx(1e3 / 32)
    for peak in (5.0, 9.0):
        near = (frequency - peak).abs() < 1.0
        assert float(frequency[near][density[near].argmax()]) == pytest.approx(peak, abs=0.13)
        assert float(torch.trapezoid(density[near], frequency[near])) == pytest.approx(0.5, abs=0.002)


def test_masses_have_ase_units() -> None:
    """Equipartition: an atom of one amu at 300 K moves with √(kT/m) = 0.01579 Å/fs in each direction."""
    speed = math.sqrt(KB * 300 / dynamics.AMU)
    assert speed == pytest.approx(math.sqrt(units._k * 300 / units._amu) * 1e-5)


def test_drift_of_the_centre_of_mass_is_no_diffusion(gaussian) -> None:
    positions = gaussian(1, 100, 5, 3)
    masses = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    still = dynamics.without_drift(positions, masses)
    torch.testing.assert_close(torch.einsum("bnax,a->bnx", still, masses), torch.zeros(1, 100, 3).double())
    pushed = positions + torch.arange(100)[None, :, None, None] * 0.3
    torch.testing.assert_close(dynamics.without_drift(pushed, masses), still)


@pytest.mark.statistical
def test_viscosity_of_a_stress_that_forgets(gaussian) -> None:
    """Maxwell fluid: five independent components of variance s² that decay as ρ^t; η = V s²/kT Σ C."""
    rho, s, volume, temperature, interval = 0.7, 0.01, 800.0, 2000.0, 4.0
    series = ornstein_uhlenbeck(gaussian, 40, 500, rho)[:, :, :2].flatten(2)[..., :5] * s
    a, b, xy, xz, yz = series.unbind(-1)
    # An orthonormal frame of traceless tensors: S:S = 2 (the five squares).
    diagonal = torch.stack([a - b / math.sqrt(3), -a - b / math.sqrt(3), 2 * b / math.sqrt(3)], dim=-1)
    stress = torch.diag_embed(diagonal)
    for (i, j), values in {(0, 1): xy, (0, 2): xz, (1, 2): yz}.items():
        stress[..., i, j] = stress[..., j, i] = values
    # A pressure is no shear, however large.
    stress = stress + 3 * torch.eye(3, dtype=torch.float64)
    found = dynamics.running_viscosity(stress, volume, temperature, interval, 40)[:, -1]
    exact = volume * s**2 / (KB * temperature) * interval * (1 + rho) / (1 - rho) / 2
    error = float(found.std()) / math.sqrt(40)
    assert error < 0.1 * exact
    assert abs(float(found.mean()) - exact) < sigma_bound(dof=39) * error


def test_momentum_flux_of_a_free_atom(gaussian) -> None:
    """An atom that flies straight carries -m v⊗v/V, whatever the configuration adds."""
    velocity, cell = torch.tensor([0.01, 0.02, -0.03], dtype=torch.float64), 10.0 * torch.eye(3).double()
    positions = torch.arange(6)[:, None, None] * 4.0 * velocity
    stress = gaussian(6, 3, 3)
    total = dynamics.stress_with_kinetic_part(stress, positions, cell, torch.tensor([20.0]), 4.0)
    flux = 20.0 * dynamics.AMU * velocity[:, None] * velocity / 1000.0
    torch.testing.assert_close(total, stress[1:-1] - flux)


def test_correction_for_the_size_of_the_box() -> None:
    """Water at 298 K (Yeh and Hummer 2004): η = 0.85 mPa s, L = 20 Å gives 0.37e-9 m²/s."""
    viscosity = 0.85e-3 / float(units._e * 1e30 * 1e-15)
    found = dynamics.finite_size_correction(298.0, viscosity, 20.0) * 1e-5
    exact = 2.837297 * units._k * 298 / (6 * math.pi * 0.85e-3 * 20e-10)
    assert found == pytest.approx(exact)
    assert found == pytest.approx(0.364e-9, rel=5e-3)
