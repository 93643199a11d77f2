"""Time correlations of unwrapped trajectories: diffusion, viscosity and vibrational spectra.

For evaluation only: a reweighted trajectory is not one of the new potential, so these make no loss.
Frames hold no momenta; velocities are displacements between frames over their interval Δ. Their
autocorrelation is the true one averaged over 2Δ with a triangle, which a spectrum takes back exactly
(`vibrational_spectrum`) and which leaves the diffusion coefficient untouched.

Leading dimensions are blocks, whose scatter gives the errors. Times are fs, lengths Å.
"""

from math import pi

import torch
from ase import units
from torch import Tensor

from mlip_refine.observables.base import portions
from mlip_refine.quantities import KB

AMU: float = float(units.fs) ** -2
"""One amu (Å/fs)² in eV."""

# Lattice sum of a cubic box (Yeh and Hummer 2004, eq. 12).
_XI = 2.837297


def autocorrelation(series: Tensor, lags: int) -> Tensor:
    """Return ⟨x(0) x(t)⟩, averaged over all origins.

    Args:
        series: Evenly spaced values `[..., n]`; their mean is not subtracted.
        lags: Longest lag, below n.

    Returns:
        Correlation at every lag `[..., lags + 1]`.
    """
    return _lagged_sums(series, lags) / _origins(series, lags)


def mean_square_displacement(positions: Tensor, lags: int) -> Tensor:
    """Return ⟨|r(t) - r(0)|²⟩ over all origins and atoms, by Fourier transforms (Calandrini et al. 2011).

    Args:
        positions: Unwrapped positions in a fixed cell `[..., n, n_atoms, 3]`, Å.
        lags: Longest lag, below n.

    Returns:
        Mean square displacement at every lag `[..., lags + 1]`, Å².
    """
    # Digits: a trajectory may be far from the origin, and displacements are small.
    coordinates = (positions - positions[..., :1, :, :]).flatten(-2).movedim(-1, 0)
    total = positions.new_zeros(*coordinates.shape[1:-1], lags + 1)
    for some in portions(len(coordinates), 6 * coordinates[0].numel()):
        series = coordinates[some]
        squares = series.square()
        ends = squares + squares.flip(-1)
        left_out = torch.nn.functional.pad(ends.cumsum(-1), (1, 0))[..., : lags + 1]
        sums = 2 * squares.sum(-1, keepdim=True) - left_out - 2 * _lagged_sums(series, lags)
        total += (sums / _origins(series, lags)).sum(0)
    return total / positions.shape[-2]


def _lagged_sums(series: Tensor, lags: int) -> Tensor:
    """Return Σ x_i x_(i + lag) of series `[..., n]`: `[..., lags + 1]`."""
    n = series.shape[-1]
    spectrum = torch.fft.rfft(series, n=2 * n)
    sums: Tensor = torch.fft.irfft(spectrum.abs().square(), n=2 * n)[..., : lags + 1]
    return sums


def _origins(series: Tensor, lags: int) -> Tensor:
    """Return the number of pairs at every lag `[lags + 1]`."""
    n = series.shape[-1]
    return torch.arange(n, n - lags - 1, -1, dtype=series.dtype, device=series.device)


def without_drift(positions: Tensor, masses: Tensor) -> Tensor:
    """Return positions relative to the centre of mass `[..., n, n_atoms, 3]`; masses `[n_atoms]`."""
    weights = (masses / masses.sum()).to(positions)
    return positions - torch.einsum("...ax,a->...x", positions, weights)[..., None, :]


def in_mean_cell(positions: Tensor, cells: Tensor) -> Tensor:
    """Return positions of a moving cell carried affinely into its mean, for displacements.

    Args:
        positions: Unwrapped positions `[..., n, n_atoms, 3]`, Å.
        cells: Cell vectors as rows `[..., n, 3, 3]`, Å.

    Returns:
        Unwrapped positions in the mean cell of each series `[..., n, n_atoms, 3]`, Å.
    """
    mean = cells.mean(-3, keepdim=True).expand_as(cells)
    carried: Tensor = positions @ torch.linalg.solve(cells, mean)
    return carried


def velocities(positions: Tensor, interval: float) -> Tensor:
    """Return displacements over the interval between frames `[..., n - 1, n_atoms, 3]`, Å/fs."""
    return positions.diff(dim=-3) / interval


def velocity_autocorrelation(velocity: Tensor, weights: Tensor, lags: int) -> Tensor:
    """Return Σ_i w_i ⟨v_i(0)·v_i(t)⟩, averaged over all origins.

    Args:
        velocity: Velocities `[..., n, n_atoms, 3]`.
        weights: Weights of the atoms `[n_atoms]`, not negative, such as masses.
        lags: Longest lag, below n.

    Returns:
        Correlation at every lag `[..., lags + 1]`.
    """
    scaled = velocity * weights.to(velocity).sqrt()[:, None]
    series = scaled.flatten(-2).movedim(-1, 0)
    total = velocity.new_zeros(*series.shape[1:-1], lags + 1)
    for some in portions(len(series), 6 * series[0].numel()):
        total += autocorrelation(series[some], lags).sum(0)
    return total


def einstein_diffusion(displacement: Tensor, interval: float, first: int) -> Tensor:
    """Return the self-diffusion coefficient by the slope of the mean square displacement (Einstein 1905).

    D is a sixth of the slope.

    Args:
        displacement: Mean square displacement from lag zero on `[..., lags + 1]`, Å².
        interval: Time between lags, fs.
        first: First lag of the fitted line.

    Returns:
        D `[...]`, Å²/fs.
    """
    lags = torch.arange(displacement.shape[-1]).to(displacement)[first:]
    offset = (lags - lags.mean()) / (lags - lags.mean()).square().sum()
    return (displacement[..., first:] * offset).sum(-1) / (6 * interval)


def running_integral(correlation: Tensor, interval: float) -> Tensor:
    """Return ∫₀ᵗ C dt' by the trapezoidal rule, for Green-Kubo relations `[..., lags + 1]`."""
    steps = (correlation[..., 1:] + correlation[..., :-1]) * (interval / 2)
    return torch.nn.functional.pad(steps.cumsum(-1), (1, 0))


def vibrational_spectrum(correlation: Tensor, interval: float) -> tuple[Tensor, Tensor]:
    """Return the vibrational density of states.

    It is the cosine transform of the mass-weighted velocity autocorrelation. Its end is smoothed
    by a Hann window (resolution about one over the longest lag). What displacements over an interval Δ take
    from a frequency ν, a factor sin²(πνΔ)/(πνΔ)², is given back.

    Args:
        correlation: Σ m ⟨v(0)·v(t)⟩ `[..., lags + 1]`, any unit.
        interval: Time between lags, over which the displacements were taken, fs.

    Returns:
        Frequencies `[lags + 1]`, THz, up to one half over the interval, and the density `[..., lags + 1]`,
        1/THz, with the integral one.
    """
    lags = correlation.shape[-1] - 1
    steps = torch.arange(lags + 1).to(correlation)
    smooth = correlation * torch.cos(pi / 2 * steps / lags).square()
    spectrum = torch.fft.rfft(torch.cat([smooth, smooth[..., 1:-1].flip(-1)], dim=-1)).real
    frequency = steps / (2 * lags * interval)
    density = spectrum / torch.sinc(frequency * interval).square()
    frequency = 1e3 * frequency
    return frequency, density / torch.trapezoid(density, frequency)[..., None]


def stress_with_kinetic_part(
    stress: Tensor, positions: Tensor, cell: Tensor, masses: Tensor, interval: float
) -> Tensor:
    """Return the stress with the momentum flux, σ - Σ m v⊗v/V, of all frames but the first and the last.

    Args:
        stress: Stress of the configurations `[..., n, 3, 3]`, eV/Å³, tensile positive.
        positions: Unwrapped positions without drift `[..., n, n_atoms, 3]`, Å.
        cell: Cell vectors as rows `[3, 3]`, Å.
        masses: Masses `[n_atoms]`, amu.
        interval: Time between frames, fs; velocities are central differences.

    Returns:
        Stress `[..., n - 2, 3, 3]`, eV/Å³.
    """
    velocity = (positions[..., 2:, :, :] - positions[..., :-2, :, :]) / (2 * interval)
    flux = torch.einsum("a,...ai,...aj->...ij", masses.to(velocity) * AMU, velocity, velocity)
    total: Tensor = stress[..., 1:-1, :, :] - flux / torch.linalg.det(cell).abs()
    return total


def running_viscosity(
    stress: Tensor, volume: float, temperature: float, interval: float, lags: int
) -> Tensor:
    """Return the shear viscosity V/(10 kT) ∫₀ᵗ ⟨S(0):S(t')⟩ dt' (Daivis and Evans 1994).

    S is the traceless stress.

    Args:
        stress: Total stress `[..., n, 3, 3]`, eV/Å³.
        volume: Volume, Å³.
        temperature: Temperature, K.
        interval: Time between frames, fs.
        lags: Longest lag.

    Returns:
        Viscosity by integration up to every lag `[..., lags + 1]`, eV fs/Å³.
    """
    eye = torch.eye(3).to(stress)
    trace = stress.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    traceless = (stress + stress.mT) / 2 - trace * eye
    correlation = autocorrelation(traceless.flatten(-2).movedim(-1, 0), lags).sum(0)
    return running_integral(correlation, interval) * (volume / (10 * KB * temperature))


def finite_size_correction(temperature: float, viscosity: float, length: float) -> float:
    """Return what a cubic periodic box takes from D, ξ kT/(6π η L) (Yeh and Hummer 2004).

    Args:
        temperature: Temperature, K.
        viscosity: Viscosity η, eV fs/Å³.
        length: Length of the box, Å.

    Returns:
        Diffusion coefficient of the bulk minus that of the box, Å²/fs.
    """
    return _XI * KB * temperature / (6 * pi * viscosity * length)
