"""What the symmetry of a crystal says about its third-order force constants.

A pair (i, j) takes the place that an atom has at second order. Constants are invariant when
Ψ[g(i), g(j), g(k)] = (R ⊗ R ⊗ R) Ψ[i, j, k] for every operation g with rotation R, and when the pair changes
places: Ψ[j, i, k] is Ψ[i, j, k] with its first two axes exchanged. Few pairs, and for each of them few pairs
of axes, determine all constants.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from mlip_refine.data.phonons.spacegroups import CrystalSymmetry, Translations

_INDEPENDENT = 1e-6
"""Smallest eigenvalue of directions that are independent; rotations are orthogonal to 1e-15."""


class PairColumn(NamedTuple):
    """A column of the third derivatives: two displaced atoms, and along which axes.

    Attributes:
        atom: In the supercell, one of the primitive cell.
        axis: 0, 1, 2 for x, y, z.
        other: Any atom of the supercell.
        other_axis: Of the other atom.
    """

    atom: int
    axis: int
    other: int
    other_axis: int


@dataclass(frozen=True, eq=False)
class PairSymmetry:
    """Operations on pairs of atoms: those of the space group, and the same after the pair changed places.

    The first atom of a pair is one of the primitive cell: a translation brings it there. Pairs are numbered
    p N + j, and operations g or G + g, of which the latter change places first.

    Attributes:
        translations: Lattice translations of the supercell.
        symmetry: Its space group, modulo those.
    """

    translations: Translations
    symmetry: CrystalSymmetry

    @property
    def n_atoms(self) -> int:
        """Number of atoms of the supercell."""
        return self.translations.permutations.shape[1]

    def irreducible(self, wanted: Tensor) -> list[PairColumn]:
        """Return as few columns as determine the constants.

        Args:
            wanted: Which pairs have any `[n_prim, N]`, bool; the same for equivalent ones.
        """
        columns = []
        first = self._images.amin(0) == torch.arange(wanted.numel())
        for pair in (first & wanted.flatten()).nonzero().flatten().tolist():
            atom, other = self._atoms(pair)
            squares = self._directions(self._keeping(pair)).square_of_columns()
            columns += [PairColumn(atom, c // 3, other, c % 3) for c in _spanning(squares)]
        return columns

    def complete(self, columns: Sequence[PairColumn], values: Tensor) -> Tensor:
        """Build constants from columns that determine them, such as the irreducible ones.

        Args:
            columns: Where the values belong.
            values: Slopes of the forces, with the sign of the energy `[n_columns, N, 3]`, eV/Å³, float64.

        Returns:
            `[n_prim, N, N, 3, 3, 3]`, eV/Å³; zero for pairs without columns.
        """
        n_prim, n_atoms = len(self.translations.primitive_atoms), self.n_atoms
        constants = values.new_zeros(n_prim * n_atoms, n_atoms, 3, 3, 3)
        own: dict[int, list[int]] = {}
        for k, column in enumerate(columns):
            home = int(self.translations.primitive_index[column.atom])
            own.setdefault(home * n_atoms + column.other, []).append(k)
        for pair, of_pair in own.items():
            axes = [3 * columns[k].axis + columns[k].other_axis for k in of_pair]
            block = self._block(pair, axes, values[of_pair])
            images = self._images[:, pair]
            for image in images.unique():
                operation = int((images == image).nonzero()[0])
                constants[image] = self._turned(operation, pair, block)
        compact: Tensor = constants.unflatten(0, (n_prim, n_atoms))
        return compact

    def _block(self, pair: int, axes: list[int], values: Tensor) -> Tensor:
        """All nine columns of a pair `[N, 3, 3, 3]` from some `[n, N, 3]`, by the operations that keep it."""
        keeping = self._keeping(pair)
        directions = self._directions(keeping).of[:, axes]
        total = values.new_zeros(9, self.n_atoms, 3)
        for operation, along in zip(keeping, directions, strict=True):
            turned = torch.empty_like(values)
            rotation = self.symmetry.rotations[operation % self._order]
            turned[:, self._permutation(operation, pair)] = values @ rotation.T
            total += torch.einsum("nd,nkc->dkc", along, turned)
        square = torch.einsum("gnd,gne->de", directions, directions)
        block: Tensor = torch.linalg.solve(square, total.flatten(1)).view(3, 3, self.n_atoms, 3)
        return block.permute(2, 0, 1, 3)

    def _turned(self, operation: int, pair: int, block: Tensor) -> Tensor:
        """Constants of the image of a pair `[N, 3, 3, 3]` from those of the pair."""
        rotation = self.symmetry.rotations[operation % self._order]
        seen = block.transpose(1, 2) if operation >= self._order else block
        turned = torch.empty_like(block)
        rotated = torch.einsum("ad,be,cf,kdef->kabc", rotation, rotation, rotation, seen)
        turned[self._permutation(operation, pair)] = rotated
        return turned

    def _keeping(self, pair: int) -> list[int]:
        """Operations that keep a pair."""
        return [int(g) for g in (self._images[:, pair] == pair).nonzero()]

    def _directions(self, operations: list[int]) -> "_Directions":
        rotations = self.symmetry.rotations[[g % self._order for g in operations]]
        turned = torch.einsum("gda,geb->gabde", rotations, rotations)
        changed = torch.tensor([g >= self._order for g in operations])
        turned[changed] = turned[changed].transpose(1, 2)
        return _Directions(turned.reshape(-1, 9, 9))

    def _permutation(self, operation: int, pair: int) -> Tensor:
        """Where an operation takes all atoms when a translation brings the pair back `[N]`."""
        home, other = divmod(pair, self.n_atoms)
        if operation < self._order:
            return self._moves[operation, home]
        back = self.translations.inverse[self.translations.translation_index[other]]
        return self._moves[operation - self._order, self.translations.primitive_index[other]][back]

    def _atoms(self, pair: int) -> tuple[int, int]:
        home, other = divmod(pair, self.n_atoms)
        return int(self.translations.primitive_atoms[home]), other

    @property
    def _order(self) -> int:
        """Number of operations of the space group."""
        return len(self.symmetry.rotations)

    @cached_property
    def _first_images(self) -> Tensor:
        """Where operations take the atoms of the primitive cell `[G, n_prim]`."""
        return self.symmetry.permutations[:, self.translations.primitive_atoms]

    @cached_property
    def _moves(self) -> Tensor:
        """Where they take all atoms when a translation brings one of those back `[G, n_prim, N]`."""
        back = self.translations.inverse[self.translations.translation_index[self._first_images]]
        return back.gather(2, self.symmetry.permutations[:, None].expand_as(back))

    @cached_property
    def _images(self) -> Tensor:
        """Where operations take pairs `[2 G, n_prim N]`."""
        translations, n = self.translations, self.n_atoms
        homes = translations.primitive_index[self._first_images]
        plain = (n * homes[:, :, None] + self._moves).flatten(1)
        back = translations.inverse[translations.translation_index][:, translations.primitive_atoms]
        changed = n * translations.primitive_index[:, None] + back
        return torch.cat([plain, plain[:, changed.T.flatten()]])


class _Directions(NamedTuple):
    """What operations make of the nine pairs of axes.

    Attributes:
        of: `[n_operations, 9, 9]`: pair of axes, components of its image.
    """

    of: Tensor

    def square_of_columns(self) -> Tensor:
        """For every pair of axes the sum of squares of its images `[9, 9, 9]`."""
        return torch.einsum("gnd,gne->nde", self.of, self.of)


def _spanning(squares: Tensor) -> list[int]:
    """Pairs of axes whose images span all nine, each the one that adds most."""
    chosen: list[int] = []
    total = torch.zeros_like(squares[0])
    rank = 0
    while rank < len(total):
        ranks = torch.linalg.matrix_rank(total + squares, atol=_INDEPENDENT, rtol=0.0, hermitian=True)
        best = int(ranks.argmax())
        chosen.append(best)
        total, rank = total + squares[best], int(ranks[best])
    return chosen
