"""The finite-size term of a crystal's free energy, from the force constants of its supercell.

The free energy of N atoms in a periodic cell is F(N) = N f∞ + kT δ_N, with f∞ that of an atom of the
infinite crystal. For a harmonic crystal both sides are known. The cell has 3N - 3 vibrations, those at the
wave vectors that it holds, and a centre of mass; the infinite crystal has vibrations at all wave vectors q of
the Brillouin zone:

    δ_N = Σ ln βħω_i - N_c ⟨Σ_b ln βħω_b(q)⟩_q - ln[(V/N)/Λ_M³],

with N_c primitive cells in the supercell, and Λ_M the thermal wavelength of the total mass: the centre of
mass moves in V/N, as in `HarmonicReference.free_energy`. Planck's constant cancels. The acoustic modes about
Γ, which no cell holds, make δ_N = -½ ln N + c, with c all but independent of N (the logarithm is that of
Hoover, J. Chem. Phys. 49, 1981, 1968, and of Polson, Trizac, Pronk and Frenkel, J. Chem. Phys. 112, 5339,
2000). With force constants at temperature, such as those of `fit_harmonic`, an anharmonic crystal has the
same term to leading order.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from ase import Atoms
from numpy.typing import NDArray
from phonopy.structure.atoms import PhonopyAtoms
from phonopy.structure.cells import get_primitive
from torch import Tensor

from mlip_refine.crystals.phonons.dynamical_matrix import BlochSums, frequencies
from mlip_refine.crystals.symmetry import TOLERANCE, primitive_cell
from mlip_refine.data.phonons.spacegroups import Translations
from mlip_refine.errors import InputError, StatisticsError
from mlip_refine.quantities import HBAR, KB, Measured
from mlip_refine.sampling import HarmonicReference
from mlip_refine.sampling.references import (
    AMU_A2_FS2,
    displacement_covariance,
    harmonic_from_covariance,
)

DENSITY = 3.0
"""Points of the coarse mesh along a reciprocal vector, per edge of the supercell in primitive cells. With the
fine mesh that leaves errors of δ_N below 2e-4, and of 6e-4 where modes are soft, whatever the size."""

SAME = 1e-3
"""Deviation from translational symmetry and from the sum rule, over the largest force constant, that is noise
of single precision and not another crystal."""

BLOCKS = 10
"""Blocks of frames that the error of a sampled term is found from."""

_TERMS = 4_000_000
"""Complex numbers of one batch of Bloch sums."""


@dataclass(frozen=True, eq=False)
class InterpolatedPhonons:
    """Vibrations at any wave vector, from the force constants of a supercell.

    Between the wave vectors that the supercell holds they are interpolated by the nearest images of its atoms
    (see `BlochSums`): exact where force constants have died away within half of the cell.

    Attributes:
        supercell: Ideal crystal of N atoms.
        translations: Its lattice translations, as permutations.
        primitive: Primitive lattice vectors as rows `[3, 3]`, Å.
        force_constants: Rows of the atoms of the primitive cell `[n_prim, N, 3, 3]`, eV/Å².
    """

    supercell: Atoms
    translations: Translations
    primitive: NDArray[np.float64]
    force_constants: Tensor

    @classmethod
    def of(cls, supercell: Atoms, force_constants: Tensor) -> Self:
        """Find the primitive cell of a crystal, and the rows of its force constants that belong to it.

        Args:
            supercell: Ideal crystal.
            force_constants: All force constants `[3N, 3N]`, eV/Å², float64, without the translations of the
                whole crystal.

        Raises:
            InputError: They depend on a translation of the whole crystal, as springs to fixed sites do, or
                lack its lattice translations; or no symmetry is found.
        """
        n_atoms = len(supercell)
        cell = primitive_cell(supercell).cell.array
        structure = PhonopyAtoms(
            symbols=supercell.get_chemical_symbols(),
            cell=supercell.cell.array,
            scaled_positions=supercell.get_scaled_positions(wrap=False),
            masses=supercell.get_masses(),
        )
        found = get_primitive(structure, np.linalg.solve(supercell.cell.array.T, cell.T), symprec=TOLERANCE)
        translations = Translations(
            torch.from_numpy(np.array(found.atomic_permutations)), torch.from_numpy(np.array(found.p2s_map))
        )
        blocks = force_constants.view(n_atoms, 3, n_atoms, 3).permute(0, 2, 1, 3)
        rows, allowed = blocks[translations.primitive_atoms], SAME * float(force_constants.abs().max())
        repeated = translations.expand(rows).transpose(1, 2)
        for what, deviation in (
            ("the sum rule of translations", blocks.sum(1)),
            ("the lattice translations of the crystal", repeated - blocks),
        ):
            if not float(deviation.abs().max()) <= allowed:
                raise InputError(
                    f"the force constants of {n_atoms} atoms break {what}",
                    found=f"a deviation of {float(deviation.abs().max()):.2g} eV/Å²",
                    expected=f"at most {allowed:.2g} eV/Å²",
                )
        return cls(supercell, translations, np.array(cell), rows)

    @property
    def n_cells(self) -> int:
        """Primitive cells in the supercell."""
        return len(self.translations.permutations)

    def squares(self, points: NDArray[np.float64]) -> Tensor:
        """Return the eigenvalues of the dynamical matrices `[n_q, 3 n_prim]`, eV/Å²/amu, ascending.

        Args:
            points: Wave vectors `[n_q, 3]` in the reciprocal lattice of the primitive cell, without 2π.
        """
        bloch = BlochSums.of(self.supercell, self.translations, self.primitive, points)
        found: Tensor = torch.linalg.eigvalsh(bloch.matrices(self.force_constants))
        return found

    def mean_logarithm(self, mesh: Sequence[int]) -> float:
        """Return Σ_b ln λ_b(q), λ in eV/Å²/amu, of a primitive cell: the mean over a mesh shifted off Γ.

        Args:
            mesh: Even numbers of points along the reciprocal vectors; the points lie half a step beside Γ.

        Raises:
            StatisticsError: A mode at a point of the mesh is imaginary.
        """
        total, n_points = 0.0, 0
        for points in self._points(mesh):
            squares = self.squares(points)
            if not float(squares.min()) > 0:
                worst = points[int(squares[:, 0].argmin())].round(3).tolist()
                raise StatisticsError(
                    "the force constants of the supercell do not give the thermodynamic limit: between its "
                    f"wave vectors, at {worst}, a mode has the frequency "
                    f"{float(frequencies(squares.min())):.2f} THz",
                    needed="a larger cell of the phase, longer sampling for the fit (free_energy.fit), or "
                    "free_energy.finite_size: cells, with cells of equal size",
                )
            total += float(squares.log().sum())
            n_points += len(points)
        return total / n_points

    def _points(self, mesh: Sequence[int]) -> Iterator[NDArray[np.float64]]:
        """Yield the half of a shifted mesh that time reversal takes to the other half, in batches."""
        n_points = math.prod(mesh) // 2
        n_prim, n_atoms = self.force_constants.shape[:2]
        size = max(1, _TERMS // (9 * n_prim * n_atoms))
        for first in range(0, n_points, size):
            chosen = np.arange(first, min(first + size, n_points))
            yield (np.stack(np.unravel_index(chosen, mesh), axis=1) + 0.5) / np.array(mesh)


def harmonic_size_term(crystal: Atoms, force_constants: Tensor, temperature: float) -> float:
    """Return δ_N of a crystal in its cell, in kT: F(N) = N f∞ + kT δ_N (see the module).

    Both sums are over the same force constants, so that what they say of the crystal cancels. The mean over
    the Brillouin zone is that of two meshes shifted off Γ, the finer one twice as dense: the logarithms of
    acoustic modes give the mean of m³ points an error proportional to 1/m³ (Lyness, Math. Comput. 30, 1,
    1976), which Richardson's extrapolation takes away.

    Args:
        crystal: Ideal crystal of N atoms in its supercell.
        force_constants: Its force constants `[3N, 3N]`, eV/Å², float64: those of `fit_harmonic`, or an exact
            Hessian. Springs to fixed sites (`einstein`) are none.
        temperature: Temperature, K.

    Raises:
        InputError: If the force constants lack the translational symmetry of the crystal.
        SamplingError: If a vibration of the supercell is imaginary.
        StatisticsError: If one between the wave vectors of the supercell is.
    """
    phonons = InterpolatedPhonons.of(crystal, force_constants)
    kt = KB * temperature
    masses = torch.from_numpy(crystal.get_masses())
    reference = HarmonicReference(torch.from_numpy(crystal.positions.copy()), force_constants, masses)
    of_cell = reference.free_energy(temperature, crystal.cell.volume) / kt
    edge = crystal.cell.volume ** (1 / 3)
    heights = 1 / np.linalg.norm(np.linalg.inv(phonons.primitive), axis=0)
    coarse = [2 * math.ceil(DENSITY * edge / height / 2) for height in heights]
    fine = [2 * m for m in coarse]
    rough, better = (phonons.mean_logarithm(mesh) for mesh in (coarse, fine))
    mean = better + (better - rough) / 7
    # ln βħω = ½ ln λ + ln(βħ/√unit of λ)
    n_modes = 3 * len(crystal) / phonons.n_cells
    of_infinite = 0.5 * mean + n_modes * math.log(HBAR / kt / math.sqrt(AMU_A2_FS2))
    return of_cell - phonons.n_cells * of_infinite


def sampled_size_term(crystal: Atoms, positions: Tensor, temperature: float) -> Measured:
    """Return δ_N of a crystal from its displacements at temperature, in kT, by `harmonic_size_term`.

    The force constants are those with the sampled covariance, kT K⁻¹ = ⟨u uᵀ⟩, averaged over the space group.
    The logarithm of noisy ones is biased in proportion to the inverse of the number of frames. The jackknife
    over blocks of frames takes that away, and gives the standard error (Efron and Stein, Ann. Stat. 9, 586,
    1981). The error does not know that the crystal is not harmonic.

    Args:
        crystal: Ideal crystal of N atoms in its supercell.
        positions: Frames `[n, N, 3]`, Å, unwrapped, in the order of time, run after run.
        temperature: Temperature, K.

    Raises:
        SamplingError: If a vibration of the supercell is imaginary.
        StatisticsError: If the frames do not determine the covariance, or a mode between the wave vectors of
            the supercell is imaginary.
    """
    blocks = [block for block in positions.tensor_split(BLOCKS) if len(block)]
    shares = torch.tensor([len(block) / len(positions) for block in blocks], dtype=torch.float64)
    covariances = torch.stack([displacement_covariance(crystal, block) for block in blocks])
    total = torch.einsum("b,bij->ij", shares, covariances)

    def term(covariance: Tensor) -> float:
        found = harmonic_from_covariance(crystal, covariance, temperature)
        if found is None or len(blocks) < BLOCKS:
            raise StatisticsError(
                f"{len(positions)} frames do not determine the force constants of {len(crystal)} atoms",
                needed="a longer free_energy.fit or production",
            )
        return harmonic_size_term(crystal, found.force_constants, temperature)

    whole = term(total)
    without = [
        term((total - share * own) / (1 - share)) for share, own in zip(shares, covariances, strict=True)
    ]
    mean, n = float(np.mean(without)), len(without)
    return Measured(n * whole - (n - 1) * mean, math.sqrt((n - 1) * float(np.var(without))), "")
