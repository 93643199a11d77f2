"""Harmonic reference crystals: the known end of a Frenkel-Ladd path.

The reference energy is U_ref = ½ uᵀ K u with u the displacements from the lattice sites minus the
mass-weighted displacement of the centre of mass, so that a drifting crystal costs nothing. An Einstein
crystal has a diagonal K; an effective harmonic crystal has the K that reproduces the sampled covariance of
the displacements, symmetrised over the space group, and makes the path to it much shorter.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import spglib
import torch
from ase import Atoms
from ase.units import _amu, _e
from torch import Tensor

from mlip_refine.errors import SamplingError
from mlip_refine.quantities import HBAR, KB
from mlip_refine.sampling.biases import BatchBias, BiasValues

# 1 amu Å²/fs² in eV
AMU_A2_FS2 = _amu * 1e10 / _e

SYMMETRY_TOLERANCE = 1e-3

# Squared frequencies below this fraction of the largest are zero: the three translations, to rounding.
ZERO_MODE = 1e-10


class _HarmonicBatch(BatchBias):
    """A harmonic crystal on the device of a batch.

    Attributes:
        reference: The crystal, its sites on the device.
        force_constants: Its projected force constants there.
    """

    def __init__(self, reference: "HarmonicReference", device: torch.device, dtype: torch.dtype) -> None:
        # Sites that lie elsewhere would be copied to the device at every step.
        self.reference = replace(reference, sites=reference.sites.to(device, dtype))
        self.force_constants = reference.projected.to(device, dtype)

    def energy_forces(
        self,
        positions: Tensor,
        cells: Tensor,  # noqa: ARG002 - the sites are fixed
        *,
        virial: bool = False,  # noqa: ARG002 - there is none
    ) -> BiasValues:
        return BiasValues(*self.reference.energy_forces(positions, self.force_constants))


@dataclass(frozen=True)
class HarmonicReference:
    """A harmonic crystal about fixed sites: a bias of fixed cells, without a virial.

    Attributes:
        sites: Lattice sites `[n_atoms, 3]`, Å, float64.
        force_constants: Force constants `[3 n_atoms, 3 n_atoms]`, eV/Å², float64, symmetric;
            they act on displacements without their centre of mass.
        masses: Masses `[n_atoms]`, amu, float64.
    """

    sites: Tensor
    force_constants: Tensor
    masses: Tensor

    @property
    def moves_with_cell(self) -> bool:
        """Never: the sites are fixed."""
        return False

    def key(self) -> bytes:
        """Return the bytes of the force constants; a state point has its sites and masses."""
        return bytes(self.force_constants.numpy().tobytes())

    def on(self, device: torch.device, dtype: torch.dtype) -> BatchBias:
        """Return what evaluates the crystal in a batch."""
        return _HarmonicBatch(self, device, dtype)

    @cached_property
    def projected(self) -> Tensor:
        """Pᵀ K P, P the removal of the mass-weighted centre of mass: acts on bare displacements."""
        n, share = len(self.masses), self.masses / self.masses.sum()
        centred = torch.eye(n, dtype=torch.float64) - share.expand(n, n)
        p = torch.kron(centred, torch.eye(3, dtype=torch.float64))
        projected: Tensor = p.T @ self.force_constants @ p
        return projected

    def energy_forces(self, positions: Tensor, force_constants: Tensor) -> tuple[Tensor, Tensor]:
        """Return energies `[n]`, eV, and forces `[n, n_atoms, 3]`, eV/Å, of positions `[n, n_atoms, 3]`.

        `force_constants` is `projected` in the dtype and on the device of the positions.
        """
        u = (positions - self.sites.to(positions)).flatten(1)
        restoring = u @ force_constants
        return 0.5 * (u * restoring).sum(-1), -restoring.view_as(positions)

    def energy(self, positions: Tensor) -> Tensor:
        """Return energies `[n]`, eV, float64."""
        return self.energy_forces(positions.double(), self.projected)[0]

    def frequencies(self) -> Tensor:
        """Return the 3N - 3 angular frequencies, rad/fs, ascending.

        Raises:
            SamplingError: If the crystal is not stable.
        """
        inv_root = self.masses.repeat_interleave(3).rsqrt()
        dynamical = self.projected * inv_root[:, None] * inv_root / AMU_A2_FS2
        squares = torch.linalg.eigvalsh(dynamical)
        zero = ZERO_MODE * squares[-1]
        if squares[0] < -zero or squares[3] <= zero:
            raise SamplingError("the harmonic reference is unstable: it has imaginary or zero frequencies")
        frequencies: Tensor = squares[3:].sqrt()
        return frequencies

    def free_energy(self, temperature: float, volume: float) -> float:
        """Return the absolute classical free energy of the whole cell, eV.

        F = kT Σ ln(ħω_i/kT) over the 3N - 3 vibrations, minus kT ln[(V/N)/Λ_M³], Λ_M the thermal wavelength
        of the total mass: the centre of mass moves in the volume per atom. For an Einstein crystal this is
        F_E + F_CM of Freitas, Asta and de Koning, Comput. Mater. Sci. 112, 333 (2016), Eqs. 13, 16.

        Args:
            temperature: Temperature, K.
            volume: Volume of the cell, Å³.
        """
        kt = KB * temperature
        vibrations = kt * torch.log(HBAR * self.frequencies() / kt).sum().item()
        total_mass = self.masses.sum().item() * AMU_A2_FS2
        wavelength_cubed = (2 * math.pi * HBAR**2 / (total_mass * kt)) ** 1.5
        return vibrations - kt * math.log(volume / len(self.masses) / wavelength_cubed)


def einstein(atoms: Atoms, springs: Tensor) -> HarmonicReference:
    """Return the Einstein crystal about the positions of `atoms`; springs `[n_atoms]`, eV/Å²."""
    return HarmonicReference(_sites(atoms), torch.diag(springs.double().repeat_interleave(3)), _masses(atoms))


def fit_einstein(atoms: Atoms, positions: Tensor, temperature: float) -> HarmonicReference:
    """Return the Einstein crystal with springs k = 3kT/⟨|u|²⟩ of every species.

    Args:
        atoms: The ideal crystal.
        positions: Frames `[n, n_atoms, 3]`, Å, unwrapped, sampled about it.
        temperature: Temperature, K.
    """
    u = _displacements(atoms, positions)
    squares = u.square().sum(-1).mean(0)
    numbers = torch.as_tensor(atoms.numbers)
    springs = torch.empty(len(atoms), dtype=torch.float64)
    for z in numbers.unique():
        springs[numbers == z] = 3 * KB * temperature / squares[numbers == z].mean()
    return einstein(atoms, springs)


def fit_harmonic(atoms: Atoms, positions: Tensor, temperature: float) -> HarmonicReference:
    """Return the harmonic crystal whose displacement covariance is the sampled one, kT K⁻¹ = ⟨u uᵀ⟩.

    The covariance is averaged over the space group of the ideal crystal, which a cell of n primitive cells
    multiplies the frames by n times its point group.

    Args:
        atoms: The ideal crystal (sites and cell).
        positions: Frames `[n, n_atoms, 3]`, Å, unwrapped.
        temperature: Temperature, K.

    Raises:
        SamplingError: If there are too few frames for a covariance of full rank.
    """
    found = harmonic_from_covariance(atoms, displacement_covariance(atoms, positions), temperature)
    if found is None:
        raise SamplingError(
            f"{len(positions)} frames do not determine the covariance of {len(atoms)} atoms: "
            "sample longer for the fit (free_energy.fit) or use reference: einstein"
        )
    return found


def displacement_covariance(atoms: Atoms, positions: Tensor) -> Tensor:
    """Return ⟨u uᵀ⟩ of displacements without their centre of mass `[3N, 3N]`, Å².

    It is averaged over the space group.

    Args:
        atoms: The ideal crystal (sites and cell).
        positions: Frames `[n, n_atoms, 3]`, Å, unwrapped.
    """
    u = _displacements(atoms, positions).flatten(1)
    return symmetrise(u.T @ u / len(u), atoms)


def harmonic_from_covariance(
    atoms: Atoms, covariance: Tensor, temperature: float
) -> HarmonicReference | None:
    """Return the harmonic crystal of a covariance of displacements; `None` if that is not of full rank.

    Args:
        atoms: The ideal crystal (sites and cell).
        covariance: Covariance `[3N, 3N]`, Å², of displacements without their centre of mass.
        temperature: Temperature, K.
    """
    root = _masses(atoms).repeat_interleave(3).sqrt()
    values, vectors = torch.linalg.eigh(covariance * root[:, None] * root)
    if values[3] <= 1e-8 * values[-1]:
        return None
    dynamical = (vectors[:, 3:] * (KB * temperature / values[3:])) @ vectors[:, 3:].T
    return HarmonicReference(_sites(atoms), dynamical * root[:, None] * root, _masses(atoms))


def symmetrise(matrix: Tensor, atoms: Atoms) -> Tensor:
    """Return a `[3N, 3N]` matrix averaged over the space group operations of the crystal.

    An operation has a Cartesian rotation, and takes site i to site permutation[i]. Every operation is a
    lattice translation followed by the one that was chosen for its rotation, so that the mean over the group
    is the mean over the translations, and then over one operation for every rotation.
    """
    n, cell, scaled = len(atoms), np.array(atoms.cell), atoms.get_scaled_positions(wrap=False)
    crystal: Any = (cell, scaled, atoms.numbers)
    data = spglib.get_symmetry(crystal, symprec=SYMMETRY_TOLERANCE)
    if data is None:
        return matrix
    translations = [i for i, w in enumerate(data["rotations"]) if (w == np.eye(3)).all()]
    one_each = np.unique(data["rotations"], axis=0, return_index=True)[1].tolist()
    blocks = matrix.view(n, 3, n, 3).permute(0, 2, 1, 3)
    for operations in (translations, one_each):
        total = torch.zeros_like(blocks)
        for i in operations:
            w, t = data["rotations"][i], data["translations"][i]
            delta = (scaled @ w.T + t)[:, None] - scaled
            distances = np.linalg.norm((delta - np.round(delta)) @ cell, axis=-1)
            permutation = torch.from_numpy(distances.argmin(1))
            rotation = torch.from_numpy(cell.T @ w @ np.linalg.inv(cell.T))
            total += rotation.T @ blocks[permutation][:, permutation] @ rotation
        blocks = total / len(operations)
    return blocks.permute(0, 2, 1, 3).reshape(3 * n, 3 * n)


def _displacements(atoms: Atoms, positions: Tensor) -> Tensor:
    masses = _masses(atoms)
    u = positions.double().cpu() - _sites(atoms)
    drift = torch.einsum("nik,i->nk", u, masses / masses.sum())
    return u - drift[:, None]


def _sites(atoms: Atoms) -> Tensor:
    return torch.from_numpy(atoms.positions.copy())


def _masses(atoms: Atoms) -> Tensor:
    return torch.from_numpy(atoms.get_masses())
