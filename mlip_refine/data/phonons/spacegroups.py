"""What the symmetry of a crystal says about its force constants, and which kind of structure it has.

A symmetry operation g turns vectors by R and moves atom i onto g(i); force constants are invariant when
Φ[g(i), g(j)] = R Φ[i, j] Rᵀ. Lattice translations are the operations with R = 1.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import gcd
from string import ascii_uppercase
from typing import NamedTuple

import numpy as np
import spglib
import torch
from ase import Atoms
from ase.data import chemical_symbols
from numpy.typing import NDArray
from scipy.linalg import polar, sqrtm
from torch import Tensor

from mlip_refine.errors import InputError

_EXACT = 1e-10
"""Error of the weights' sum rule, relative to the squared norm of a column."""


class HessianColumn(NamedTuple):
    """A column of the Hessian, and how many columns it stands for.

    Attributes:
        atom: Displaced atom of the supercell.
        axis: 0, 1, 2 for x, y, z.
        weight: Positive; all weights add up to 3 N.
    """

    atom: int
    axis: int
    weight: float


@dataclass(frozen=True, eq=False)
class Translations:
    """Lattice translations of a supercell, as permutations of its N atoms.

    Attributes:
        permutations: Translation t moves atom i onto `permutations[t, i]`; `[n_translations, N]`, int64.
        primitive_atoms: One atom of every class of equivalent ones `[n_prim]`, int64.
    """

    permutations: Tensor
    primitive_atoms: Tensor

    @cached_property
    def inverse(self) -> Tensor:
        """The inverse permutations `[n_translations, N]`."""
        return self.permutations.argsort(dim=1)

    @cached_property
    def images(self) -> Tensor:
        """Where every translation takes every atom of the primitive cell `[n_translations, n_prim]`."""
        return self.permutations[:, self.primitive_atoms]

    @cached_property
    def primitive_index(self) -> Tensor:
        """Which atom of the primitive cell every atom is an image of `[N]`."""
        return self.images.flatten().argsort() % len(self.primitive_atoms)

    @cached_property
    def translation_index(self) -> Tensor:
        """By which translation `[N]`."""
        return self.images.flatten().argsort() // len(self.primitive_atoms)

    def multiply(self, force_constants: Tensor, v: Tensor) -> Tensor:
        """Multiply compact force constants `[n_prim, N, 3, 3]` with directions `[..., N, 3]`."""
        n_prim, n_atoms = force_constants.shape[:2]
        rows = force_constants.transpose(1, 2).reshape(3 * n_prim, 3 * n_atoms)
        moved = v[..., self.permutations, :].flatten(-2)
        products = (moved @ rows.T).unflatten(-1, (n_prim, 3)).flatten(-3, -2)
        return torch.empty_like(products).index_copy(-2, self.images.flatten(), products)

    def expand(self, force_constants: Tensor) -> Tensor:
        """Expand compact force constants to all rows, `[N, 3, N, 3]`."""
        rows = force_constants[self.primitive_index[:, None], self.inverse[self.translation_index]]
        return rows.transpose(1, 2)

    def transposed(self, force_constants: Tensor) -> Tensor:
        """Transpose the matrix that compact force constants stand for, compactly."""
        primitive = self.primitive_index
        seen = self.inverse[self.translation_index][:, self.primitive_atoms]
        return force_constants[primitive[None, :], seen.T].transpose(-1, -2)

    def symmetrised(self, force_constants: Tensor) -> Tensor:
        """Return the nearest force constants that are symmetric and obey the acoustic sum rule.

        With T the projector on uniform translations, Φ ↦ (1 - T) (Φ + Φᵀ)/2 (1 - T): one step, exact.
        """
        n_atoms = force_constants.shape[1]
        symmetric = (force_constants + self.transposed(force_constants)) / 2
        rows = symmetric.sum(1) / n_atoms
        total = rows.mean(0)
        columns = rows[self.primitive_index].transpose(-1, -2)
        return symmetric - rows[:, None] - columns + total


@dataclass(frozen=True, eq=False)
class CrystalSymmetry:
    """A space group modulo the lattice translations.

    Attributes:
        rotations: Orthogonal to machine precision `[n_operations, 3, 3]`, float64.
        permutations: Operation g moves atom i onto `permutations[g, i]`; `[n_operations, N]`, int64.
    """

    rotations: Tensor
    permutations: Tensor

    def symmetrised(self, translations: Translations, force_constants: Tensor) -> Tensor:
        """Return the nearest invariant force constants, compact: their mean over the group."""
        mean = torch.zeros_like(force_constants)
        for rotation, moved in zip(self.rotations, self.permutations, strict=True):
            atoms = moved[translations.primitive_atoms]
            seen = translations.inverse[translations.translation_index[atoms]][:, moved]
            rows = force_constants[translations.primitive_index[atoms][:, None], seen]
            mean += rotation.T @ rows @ rotation
        return mean / len(self.rotations)

    def invariant(self, translations: Translations, vectors: Tensor) -> Tensor:
        """Return the totally symmetric part of vectors on atoms `[N, 3]`, such as forces at rest."""
        mean = torch.zeros_like(vectors)
        for rotation, moved in zip(self.rotations, self.permutations, strict=True):
            mean[moved] += vectors @ rotation.T
        of_primitive = mean[translations.images].mean(0) / len(self.rotations)
        return of_primitive[translations.primitive_index]

    def irreducible(self, translations: Translations) -> list[HessianColumn]:
        """Return as few columns per class of atoms as determine the Hessian, with their weights.

        The squared norm of a column (i, a) is M_aa of the matrix M = Σ_j Φ[j, i]ᵀ Φ[j, i], which the
        rotations that keep atom i leave as it is. Axes and positive weights are chosen so that Σ w_a M_aa
        is the trace of every such M. Then the columns determine the Hessian, too: the rotations turn their
        axes into all directions, or M = projector on what is left out would have the sum 0.
        """
        columns = []
        for atom, count in self._orbits(translations).items():
            rotations, _ = self._fixing(translations, atom)
            weights = _axis_weights(rotations.numpy())
            columns += [HessianColumn(atom, axis, count * weight) for axis, weight in weights.items()]
        return columns

    def complete(
        self, translations: Translations, columns: Sequence[HessianColumn], values: Tensor
    ) -> Tensor:
        """Build force constants from columns that determine them, such as the irreducible ones.

        Args:
            translations: Translations of the supercell.
            columns: Where the values belong; their weights do not matter.
            values: Columns of the Hessian `[n_columns, N, 3]`, eV/Å², float64.

        Returns:
            Compact force constants `[n_prim, N, 3, 3]`, eV/Å².
        """
        n_prim, n_atoms = len(translations.primitive_atoms), values.shape[1]
        force_constants = values.new_empty(n_prim, n_atoms, 3, 3)
        for atom in self._orbits(translations):
            own = [k for k, column in enumerate(columns) if column.atom == atom]
            known, axes = values[own], [columns[k].axis for k in own]
            # All three columns of the atom: the rotations that keep it turn the known ones onto the others.
            rotations, permutations = self._fixing(translations, atom)
            directions = rotations[:, :, axes].transpose(1, 2).reshape(-1, 3)
            turned = known.new_empty(len(rotations), *known.shape)
            for k, (rotation, permutation) in enumerate(zip(rotations, permutations, strict=True)):
                turned[k][:, permutation] = known @ rotation.T
            block = torch.einsum("am,mjb->jba", torch.linalg.pinv(directions), turned.flatten(0, 1))
            for rotation, moved in zip(self.rotations, self.permutations, strict=True):
                home, permutation = _returned(translations, moved, atom)
                # The row of an atom is its column, transposed.
                force_constants[home, permutation] = (rotation @ block @ rotation.T).transpose(-1, -2)
        return force_constants

    def _orbits(self, translations: Translations) -> dict[int, int]:
        """First atom of every class of equivalent ones, and how many atoms of the supercell it has."""
        homes = translations.primitive_index[self.permutations[:, translations.primitive_atoms]]
        first, counts = homes.amin(0).unique(return_counts=True)
        atoms = translations.primitive_atoms[first]
        copies = len(translations.permutations)
        return {int(atom): int(count) * copies for atom, count in zip(atoms, counts, strict=True)}

    def _fixing(self, translations: Translations, atom: int) -> tuple[Tensor, Tensor]:
        """Operations that keep an atom of the primitive cell where it is: rotations and permutations."""
        own = int(translations.primitive_index[atom])
        kept = []
        for g, moved in enumerate(self.permutations):
            home, permutation = _returned(translations, moved, atom)
            if home == own:
                kept.append((g, permutation))
        return self.rotations[[g for g, _ in kept]], torch.stack([p for _, p in kept])


def crystal_symmetry(
    cell: NDArray[np.float64],
    rotations: NDArray[np.int64],
    permutations: NDArray[np.int64],
    translations: Translations,
) -> CrystalSymmetry:
    """Reduce the space group of a supercell to one operation for every set that differs by translations.

    Args:
        cell: Lattice vectors of the supercell as rows `[3, 3]`, Å.
        rotations: In fractional coordinates `[n, 3, 3]`.
        permutations: Permutations of the atoms `[n, N]`.
        translations: Translations of the supercell.
    """
    moved = permutations[:, translations.primitive_atoms.numpy()]
    homes = translations.primitive_index.numpy()[moved]
    keys = np.concatenate([rotations.reshape(len(rotations), 9), homes], axis=1)
    _, first = np.unique(keys, axis=0, return_index=True)
    chosen = np.sort(first)
    cartesian = _orthogonal(cell, rotations[chosen])
    return CrystalSymmetry(torch.from_numpy(cartesian), torch.from_numpy(permutations[chosen]))


def _orthogonal(cell: NDArray[np.float64], rotations: NDArray[np.int64]) -> NDArray[np.float64]:
    """Cartesian rotations, exactly orthogonal and exactly a group though the cell obeys them to its digits.

    The metric is averaged over the group, and its root takes the place of the cell, with its orientation.
    """
    lattice = cell.T
    metric = np.mean([r.T @ lattice.T @ lattice @ r for r in rotations], axis=0)
    orientation, _ = polar(lattice)
    vectors = orientation @ sqrtm(metric).real
    return np.array(vectors @ rotations @ np.linalg.inv(vectors))


def _returned(translations: Translations, moved: Tensor, atom: int) -> tuple[int, Tensor]:
    """Follow an operation by the translation that takes an atom's image back into the primitive cell.

    Returns:
        Index of the atom in the primitive cell where it ends, and the permutation `[N]`.
    """
    image = moved[atom]
    back = translations.inverse[translations.translation_index[image]]
    return int(translations.primitive_index[image]), back[moved]


def _axis_weights(rotations: NDArray[np.float64]) -> Mapping[int, float]:
    """Fewest axes a, and positive w_a, with Σ w_a M_aa = tr M for all M that the rotations leave alone."""
    mean = np.mean([np.kron(r, r) for r in rotations], axis=0)
    diagonals = mean[[0, 4, 8]]
    wanted = diagonals.sum(0)
    best: dict[int, float] = dict.fromkeys(range(3), 1.0)
    for size in (2, 1):
        largest = 0.0
        for axes in combinations(range(3), size):
            weights = np.linalg.lstsq(diagonals[list(axes)].T, wanted)[0]
            missed = np.abs(weights @ diagonals[list(axes)] - wanted).max()
            # A weight below 0.1 is too small to count on; of several choices the most even one is taken.
            if missed <= _EXACT and weights.min() >= 0.1 and weights.min() > largest:
                largest = weights.min()
                best = dict(zip(axes, weights.tolist(), strict=True))
    return best


def reduced_formula(atoms: Atoms) -> str:
    """Return the reduced formula, elements in alphabetical order: `Al2O3`."""
    counts = {chemical_symbols[z]: n for z, n in Counter(atoms.numbers.tolist()).items()}
    common = gcd(*counts.values())
    return "".join(f"{symbol}{_count(counts[symbol] // common)}" for symbol in sorted(counts))


def space_group_and_prototype(atoms: Atoms, symprec: float) -> tuple[int, str]:
    """Return the number of the space group, and a label of the prototype.

    The label holds the anonymous formula, the space group, and for every element how many atoms each of its
    orbits has in the primitive cell: rock salt is `AB_225_1_1`. It does not depend on the choice of origin,
    as letters of Wyckoff positions do, and different prototypes may share one.

    Args:
        atoms: Any cell of the crystal.
        symprec: How far atoms may be from symmetric places, Å.

    Raises:
        InputError: Not even the identity is found: atoms are on top of each other.
    """
    cell = (atoms.cell.tolist(), atoms.get_scaled_positions().tolist(), atoms.numbers.tolist())
    dataset = spglib.get_symmetry_dataset(cell, symprec=symprec)
    if dataset is None:
        raise InputError(
            "no symmetry is found", found=str(atoms.symbols), fix="Check positions, and symprec."
        )
    orbits: dict[int, set[int]] = defaultdict(set)
    for orbit, primitive in zip(dataset.crystallographic_orbits, dataset.mapping_to_primitive, strict=True):
        orbits[int(orbit)].add(int(primitive))
    by_element: dict[int, list[int]] = defaultdict(list)
    for first, members in sorted(orbits.items()):
        by_element[int(atoms.numbers[first])].append(len(members))
    sizes = sorted((sum(own), sorted(own)) for own in by_element.values())
    common = gcd(*(total for total, _ in sizes))
    formula = "".join(f"{ascii_uppercase[k]}{_count(n // common)}" for k, (n, _) in enumerate(sizes))
    labels = ["+".join(map(str, own)) for _, own in sizes]
    return int(dataset.number), "_".join([formula, str(dataset.number), *labels])


def _count(n: int) -> str:
    return str(n) if n > 1 else ""
