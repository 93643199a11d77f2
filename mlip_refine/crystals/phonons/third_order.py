"""Third-order force constants: exact third derivatives of the energy, from few pairs of displaced atoms.

A column is ∂(w · H v)/∂x for displacements v and w of one atom each: one more reverse pass through the
product of the Hessian with v. It costs no more than a central difference of such products (3.6 evaluations of
forces, with the product shared among several w; a difference takes 4.4), and there is no finite step to
choose: it holds to rounding also in single precision, where differences of 1e-3 Å are off by 4e-3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import batched, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from mlip_refine.crystals.phonons.harmonic import HarmonicCrystal
from mlip_refine.crystals.phonons.hessian import unit_displacements
from mlip_refine.data.kept_rows import evaluate_rows
from mlip_refine.data.phonons.spacegroups import CrystalSymmetry, Translations
from mlip_refine.errors import MlipRefineError
from mlip_refine.potential import Graphs, Potential, Structure, Work

_SHARED = 4
"""Second displacements that share a product with the Hessian: 3.5, not 5.5, evaluations of forces each."""

_ALLOWED = 1e-3
"""Largest relative deviation from symmetries that hold by themselves; places are symmetric to 1e-5 Å only."""

_INDEPENDENT = 1e-6
"""Smallest eigenvalue of directions that are independent; rotations are orthogonal to 1e-15."""


class PairColumn(NamedTuple):
    """A column of the third derivatives: two displaced atoms, and along which axes.

    Attributes:
        atom: First atom of the supercell, one of the primitive cell.
        axis: Axis of its displacement: 0, 1, 2 for x, y, z.
        other: Second atom, any of the supercell.
        other_axis: Axis of its displacement.
    """

    atom: int
    axis: int
    other: int
    other_axis: int


@dataclass(frozen=True, eq=False)
class PairSymmetry:
    """What the symmetry of a crystal says about its third-order force constants.

    A pair (i, j) takes the place that an atom has at second order. Constants are invariant when
    Ψ[g(i), g(j), g(k)] = (R ⊗ R ⊗ R) Ψ[i, j, k] for every operation g with rotation R, and when the pair
    changes places: Ψ[j, i, k] is Ψ[i, j, k] with its first two axes exchanged. Few pairs, and for each of
    them few pairs of axes, determine all constants.

    The operations are those of the space group, and the same after the pair changed places. The first atom of
    a pair is one of the primitive cell: a translation brings it there. Pairs are numbered p N + j, and
    operations g or G + g, of which the latter change places first.

    Attributes:
        translations: Lattice translations of the supercell.
        symmetry: Space group of the supercell, modulo its translations.
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
            wanted: Whether a pair has constants `[n_prim, N]`, bool; the same for equivalent pairs.
        """
        columns = []
        first = self._images.amin(0) == torch.arange(wanted.numel())
        for pair in (first & wanted.flatten()).nonzero().flatten().tolist():
            home, other = divmod(pair, self.n_atoms)
            atom = int(self.translations.primitive_atoms[home])
            directions = self._directions(self._keeping(pair))
            squares = torch.einsum("gnd,gne->nde", directions, directions)
            # Pairs of axes whose images span all nine, each the one that adds most.
            total, rank = torch.zeros_like(squares[0]), 0
            while rank < len(total):
                ranks = torch.linalg.matrix_rank(total + squares, atol=_INDEPENDENT, rtol=0.0, hermitian=True)
                best = int(ranks.argmax())
                columns.append(PairColumn(atom, best // 3, other, best % 3))
                total, rank = total + squares[best], int(ranks[best])
        return columns

    def complete(self, columns: Sequence[PairColumn], values: Tensor) -> Tensor:
        """Build constants from columns that determine them, such as the irreducible ones.

        Args:
            columns: Columns of the values.
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
                rotation = self.symmetry.rotations[operation % self._order]
                seen = block.transpose(1, 2) if operation >= self._order else block
                turned = torch.einsum("ad,be,cf,kdef->kabc", rotation, rotation, rotation, seen)
                constants[image, self._permutation(operation, pair)] = turned
        compact: Tensor = constants.unflatten(0, (n_prim, n_atoms))
        return compact

    def _block(self, pair: int, axes: list[int], values: Tensor) -> Tensor:
        """Return all columns of a pair `[N, 3, 3, 3]` from some `[n, N, 3]`, by operations that keep it."""
        keeping = self._keeping(pair)
        directions = self._directions(keeping)[:, axes]
        total = values.new_zeros(9, self.n_atoms, 3)
        for operation, along in zip(keeping, directions, strict=True):
            turned = torch.empty_like(values)
            rotation = self.symmetry.rotations[operation % self._order]
            turned[:, self._permutation(operation, pair)] = values @ rotation.T
            total += torch.einsum("nd,nkc->dkc", along, turned)
        square = torch.einsum("gnd,gne->de", directions, directions)
        block: Tensor = torch.linalg.solve(square, total.flatten(1)).view(3, 3, self.n_atoms, 3)
        return block.permute(2, 0, 1, 3)

    def _keeping(self, pair: int) -> list[int]:
        """Return the operations that keep a pair."""
        return [int(g) for g in (self._images[:, pair] == pair).nonzero()]

    def _directions(self, operations: list[int]) -> Tensor:
        """Return what operations make of the nine pairs of axes `[n_operations, 9, 9]`.

        Indices are operation, pair of axes, components of its image.
        """
        rotations = self.symmetry.rotations[[g % self._order for g in operations]]
        turned = torch.einsum("gda,geb->gabde", rotations, rotations)
        changed = torch.tensor([g >= self._order for g in operations])
        turned[changed] = turned[changed].transpose(1, 2)
        return turned.reshape(-1, 9, 9)

    def _permutation(self, operation: int, pair: int) -> Tensor:
        """Return images of all atoms under an operation, after the translation that brings the pair back."""
        home, other = divmod(pair, self.n_atoms)
        if operation < self._order:
            return self._moves[operation, home]
        back = self.translations.inverse[self.translations.translation_index[other]]
        return self._moves[operation - self._order, self.translations.primitive_index[other]][back]

    @property
    def _order(self) -> int:
        """Number of operations of the space group."""
        return len(self.symmetry.rotations)

    @cached_property
    def _first_images(self) -> Tensor:
        """Images of the atoms of the primitive cell under the operations `[G, n_prim]`."""
        return self.symmetry.permutations[:, self.translations.primitive_atoms]

    @cached_property
    def _moves(self) -> Tensor:
        """Images of all atoms after the translation that brings one of those back `[G, n_prim, N]`."""
        back = self.translations.inverse[self.translations.translation_index[self._first_images]]
        return back.gather(2, self.symmetry.permutations[:, None].expand_as(back))

    @cached_property
    def _images(self) -> Tensor:
        """Images of pairs under the operations `[2 G, n_prim N]`."""
        translations, n = self.translations, self.n_atoms
        homes = translations.primitive_index[self._first_images]
        plain = (n * homes[:, :, None] + self._moves).flatten(1)
        back = translations.inverse[translations.translation_index][:, translations.primitive_atoms]
        changed = n * translations.primitive_index[:, None] + back
        return torch.cat([plain, plain[:, changed.T.flatten()]])


def third_order_constants(
    crystal: HarmonicCrystal, potential: Potential, cutoff: float | None = None
) -> Tensor:
    """Compute third-order force constants ∂³U/∂u_i∂u_j∂u_k of a crystal by a potential, without a graph.

    Args:
        crystal: Crystal at rest.
        potential: Potential in either precision.
        cutoff: Distance, Å; constants of triplets with two atoms farther apart are zero, and all others
            change a little so that the sum rule holds again. None keeps all.

    Returns:
        Constants of the atoms of the primitive cell with all others `[n_prim, N, N, 3, 3, 3]`, eV/Å³,
        float64, on the CPU: invariant under the space group and permutations, with vanishing sums over each
        atom.

    Raises:
        InputError: The potential does not know an element.
        MlipRefineError: Memory runs out for a single system; or the derivatives contradict their symmetry.
    """
    pairs = PairSymmetry(crystal.translations, crystal.symmetry)
    n_atoms = len(crystal.supercell)
    near = torch.ones(n_atoms, n_atoms, dtype=torch.bool)
    if cutoff is not None:
        distances = crystal.supercell.get_all_distances(mic=True)
        near = torch.from_numpy(distances <= cutoff + crystal.symprec)
    first = crystal.translations.primitive_atoms
    columns = pairs.irreducible(near[first])
    values = third_derivatives(potential, crystal.structure(potential), columns)
    found = pairs.complete(columns, values)
    found *= (near[first][:, :, None] & near[first][:, None, :] & near)[..., None, None, None]
    permuted = permutation_symmetrised(crystal.translations, found)
    _require("permutations of atoms", permuted, found)
    summed = without_translations(crystal.translations, permuted)
    if cutoff is None:
        _require("the sum rule of translations", summed, permuted)
    return summed


def third_derivatives(potential: Potential, structure: Structure, columns: Sequence[PairColumn]) -> Tensor:
    """Compute columns of the third derivatives of one structure, without a graph.

    Args:
        potential: The potential.
        structure: The structure, usually a supercell.
        columns: Pairs of displaced atoms with their axes.

    Returns:
        Columns `[n_columns, n_atoms, 3]`, eV/Å³, float64, on the CPU.

    Raises:
        MlipRefineError: Memory runs out for a single system.
    """
    n_atoms = len(structure.positions)
    # Numbers of the columns with the same first displacement, in small groups.
    order = sorted(range(len(columns)), key=lambda k: columns[k])
    groups = [
        list(shared)
        for _, same in groupby(order, key=lambda k: columns[k][:2])
        for shared in batched(same, _SHARED)
    ]

    def derivatives(part: slice, graphs: Graphs) -> list[Tensor]:
        own = [[columns[k] for k in shared] for shared in groups[part]]
        first = unit_displacements(n_atoms, [shared[0][:2] for shared in own])
        second = torch.zeros(max(map(len, own)), len(own), n_atoms, 3, dtype=torch.float64)
        for g, shared in enumerate(own):
            for turn, column in enumerate(shared):
                second[turn, g, column.other, column.other_axis] = 1.0
        curvature = potential.curvature(graphs)
        with torch.enable_grad():
            product = curvature.along(torch.cat(first), create_graph=True).positions
        found = []
        for along in second.flatten(1, 2).to(product):
            (slope,) = torch.autograd.grad(product, curvature.vectors, along, retain_graph=True)
            found.append(-graphs.forces(slope))
        contracted = torch.stack(found).detach().double().cpu()
        return list(contracted.unflatten(1, (len(own), n_atoms)).unbind(1))

    values = torch.zeros(len(columns), n_atoms, 3, dtype=torch.float64)
    asked = torch.tensor([columns[k] for shared in groups for k in shared])
    sizes = torch.tensor([len(shared) for shared in groups])
    rows = evaluate_rows(
        potential,
        Work.HESSIAN_GRADIENT,
        [structure] * len(groups),
        derivatives,
        "third order",
        (asked, sizes),
    )
    for shared, found in zip(groups, rows, strict=True):
        values[shared] = found[: len(shared)]
    return values


def permutation_symmetrised(translations: Translations, constants: Tensor) -> Tensor:
    """Return the mean over all orders of the three atoms `[n_prim, N, N, 3, 3, 3]`."""

    def exchange_last(psi: Tensor) -> Tensor:
        """Return Ψ[i, k, j] in the place of Ψ[i, j, k]."""
        return psi.transpose(1, 2).transpose(-1, -2)

    later = (constants + exchange_last(constants)) / 2
    # Ψ[j, i, k] in the place of Ψ[i, j, k], compactly.
    back = translations.inverse[translations.translation_index]
    homes, first = translations.primitive_index, back[:, translations.primitive_atoms].T
    second = later[homes[None, :, None], first[:, :, None], back[None]].transpose(-3, -2)
    return (later + second + exchange_last(second)) / 3


def without_translations(translations: Translations, constants: Tensor) -> Tensor:
    """Return the nearest constants that obey the sum rule over each of the three atoms.

    With T the projector on uniform translations, Ψ ↦ (1 - T)⊗(1 - T)⊗(1 - T) Ψ: one step, exact.

    Args:
        translations: Lattice translations of the supercell.
        constants: Constants, symmetric under permutations `[n_prim, N, N, 3, 3, 3]`.
    """
    pairs = constants.mean(2)
    atoms = pairs.mean(1)
    homes, back = translations.primitive_index, translations.inverse[translations.translation_index]
    every_pair, every = pairs[homes[:, None], back], atoms[homes]
    found = constants - pairs[:, :, None] - pairs.transpose(-1, -2)[:, None]
    # A mean over the first atom is one over the last, whose axis moves to the front.
    found -= every_pair.permute(0, 1, 4, 2, 3)
    found += atoms[:, None, None] + every.transpose(-3, -2)[:, None] + every.permute(0, 2, 3, 1)
    return found.sub_(atoms.mean(0))


def _require(what: str, right: Tensor, found: Tensor) -> None:
    """Refuse constants that differ too much from what they should be, or are not numbers."""
    deviation = float((right - found).norm() / found.norm().clamp(min=1e-12))
    if not deviation <= _ALLOWED:
        raise MlipRefineError(
            f"third derivatives of this model contradict {what}: a relative error of {deviation:.1e}, "
            f"allowed {_ALLOWED:.0e}"
        )
