"""Frequencies at wave vectors from force constants, differentiable.

D_ab(jk, q) = (m_j m_k)^-1/2 Σ_l' Φ_ab(j0, kl') exp[iq·(r_kl' - r_j0)], as phonopy has it (Togo and Tanaka,
Scr. Mater. 108, 1, 2015): r_kl' is the image of an atom of the supercell that is nearest to r_j0, and where
several are, their mean counts. At wave vectors that the supercell holds that is exact. There is no
non-analytic term.
"""

import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from ase import Atoms
from ase.units import _amu, _e
from numpy.typing import NDArray
from phonopy.harmonic.dynmat_to_fc import get_commensurate_points
from phonopy.structure.cells import get_smallest_vectors
from torch import Tensor

from mlip_refine.crystals.symmetry import MESH_TOLERANCE
from mlip_refine.data.phonons.spacegroups import Translations

TERAHERTZ = math.sqrt(_e / _amu) * 1e10 / (2 * math.pi * 1e12)
"""Frequency of a curvature of 1 eV/Å²/amu, THz."""

SAME = 1e-3
"""Frequencies this close count as one, THz: far below what matters, far above rounding."""


@dataclass(frozen=True)
class BlochSums:
    """Dynamical matrices of a crystal at some wave vectors, as linear functions of its force constants.

    Attributes:
        phases: Mean of exp(iq·r) over nearest images, over √(m m'), complex `[n_q, n_prim, n_atoms]`,
            1/amu.
        kinds: Atom of the primitive cell that every atom of the supercell repeats `[n_atoms]`.
    """

    phases: Tensor
    kinds: Tensor

    @classmethod
    def of(
        cls, supercell: Atoms, translations: Translations, primitive: NDArray[Any], points: NDArray[Any]
    ) -> Self:
        """Compute the phases at wave vectors.

        Args:
            supercell: Supercell of the force constants.
            translations: Lattice translations of the supercell.
            primitive: Lattice vectors of the primitive cell as rows `[3, 3]`, Å.
            points: Wave vectors `[n_q, 3]` in its reciprocal lattice, without 2π.
        """
        chosen = translations.primitive_atoms.tolist()
        scaled = supercell.get_scaled_positions(wrap=False)
        vectors, counts = get_smallest_vectors(
            supercell.cell.array, scaled, scaled[chosen], store_dense_svecs=True, symprec=MESH_TOLERANCE
        )
        # The images of a pair are consecutive: `first` of them, and how many.
        number, first = counts[..., 0], counts[..., 1]
        reduced = vectors @ supercell.cell.array @ np.linalg.inv(primitive)
        waves = np.exp(2j * np.pi * points @ reduced.T)
        order = np.argsort(first, axis=None)
        sums = np.empty((len(points), first.size), dtype=complex)
        sums[:, order] = np.add.reduceat(waves, first.ravel()[order], axis=1)
        masses = supercell.get_masses()
        weights = number * np.sqrt(np.outer(masses, masses[chosen]))
        phases = (sums.reshape(len(points), *first.shape) / weights).transpose(0, 2, 1)
        return cls(torch.from_numpy(phases.copy()), translations.primitive_index)

    def matrices(self, force_constants: Tensor) -> Tensor:
        """Return the dynamical matrices, hermitian.

        Args:
            force_constants: Rows of the atoms of the primitive cell `[n_prim, n_atoms, 3, 3]`, eV/Å².

        Returns:
            Complex `[n_q, 3 n_prim, 3 n_prim]`, eV/Å²/amu.
        """
        n_q, n_prim = self.phases.shape[:2]
        terms = self.phases[..., None, None] * force_constants.to(self.phases.dtype)
        found = terms.new_zeros(n_q, n_prim, n_prim, 3, 3).index_add(2, self.kinds, terms)
        full = found.transpose(2, 3).reshape(n_q, 3 * n_prim, 3 * n_prim)
        return (full + full.mH) / 2


def squared_frequencies(matrices: Tensor, same: float = SAME) -> Tensor:
    """Return the eigenvalues of dynamical matrices, with derivatives that degeneracy does not spoil.

    By Hellmann and Feynman, ∂λ = v†∂D v. Of modes of one frequency no single v is defined, but their
    subspace is: each has the mean of their derivatives. A change of D that keeps the symmetry moves them
    together, so that this is exact; and it does not depend on how the subspace was spanned.

    Args:
        matrices: Hermitian `[..., n, n]`, eV/Å²/amu.
        same: Neighbouring frequencies closer than this count as one, THz.

    Returns:
        Eigenvalues in ascending order `[..., n]`, eV/Å²/amu; below zero where the crystal is unstable.
    """
    values, vectors = torch.linalg.eigh(matrices.detach())
    moved = torch.einsum("...im,...ij,...jm->...m", vectors.conj(), matrices, vectors).real
    gaps = (frequencies(values).diff(dim=-1) > same).to(torch.long)
    groups = torch.nn.functional.pad(gaps.cumsum(-1), (1, 0))
    change = moved - moved.detach()
    sums = torch.zeros_like(change).scatter_add(-1, groups, change)
    sizes = torch.zeros_like(values).scatter_add(-1, groups, torch.ones_like(values))
    shared: Tensor = values + (sums / sizes.clamp(min=1)).gather(-1, groups)
    return shared


def frequencies(squares: Tensor, floor: float = 0.0) -> Tensor:
    """Return frequencies from their squares, THz; imaginary ones are below zero.

    Args:
        squares: Eigenvalues λ, eV/Å²/amu.
        floor: Frequency below which frequencies turn into multiples of their squares, THz: λ/(λ² + floor⁴)^¼,
            so that the derivative exists at zero too. At ten times the floor that is 2.5e-5 too low.
    """
    if floor == 0:
        roots: Tensor = squares.sign() * squares.abs().sqrt() * TERAHERTZ
        return roots
    reduced = squares * TERAHERTZ**2 / floor**2
    found: Tensor = floor * reduced / (1 + reduced.square()) ** 0.25
    return found


def commensurate_points(supercell: NDArray[Any], primitive: NDArray[Any]) -> NDArray[np.float64]:
    """Return the wave vectors that a supercell holds `[n_q, 3]`, in the primitive reciprocal lattice.

    Args:
        supercell: Lattice vectors as rows `[3, 3]`, Å.
        primitive: Lattice vectors of the primitive cell as rows `[3, 3]`, Å.
    """
    multiples = np.rint(supercell @ np.linalg.inv(primitive)).astype(int)
    points: NDArray[np.float64] = get_commensurate_points(multiples.T)
    return points
