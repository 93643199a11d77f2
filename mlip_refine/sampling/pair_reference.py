"""The Uhlenbeck-Ford fluid: the known end of a path to a liquid.

Pairs repel each other with u(r) = -p kT ln(1 - exp(-r²/σ²)), softly but without bound (Paula Leite, Freitas,
Azevedo and de Koning, J. Chem. Phys. 145, 194101 (2016)): the fluid has no liquid-gas transition, and at
p = 0 it is the ideal gas. βU = p S is linear in the strength p, with S = -Σ ln(1 - exp(-r_ij²/σ_ij²)) over
all pairs, so that every strength has its energy from one number per frame.

The range of the pairs may exceed half a cell of a hundred atoms, so they are found with all their images, by
a search of their own: over all atoms of a cell, many cells at once, which for cells of up to some thousand
atoms is faster than bins.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from mlip_refine.errors import SamplingError
from mlip_refine.sampling.biases import BatchBias, BiasValues

CUTOFF = 5.0
"""Range of the pairs in σ, unless another is given: the energy there is 1.4e-11 p kT."""

SKIN = 1.2
"""Width of the skin in σ: a wider one is searched less often, and has more pairs at every step."""

ZETA = 1.3414872572509172
"""ζ(5/2): the integral of -ln(1 - exp(-r²/σ²)) over space is (πσ²)^(3/2) ζ(5/2)."""

_PAIRS_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class UhlenbeckFord:
    """A fluid of atoms with soft repulsion: a bias of cells that may move.

    Attributes:
        species: Species of every atom `[n_atoms]`, numbers of rows of `sigma`.
        sigma: Lengths σ of all pairs of species `[n_species, n_species]`, Å, float64, symmetric.
        kt: Thermal energy kT that sets the unit of energy, eV.
        strength: Strength p of the energy of this bias.
        cutoff: Range in σ; energies are shifted to vanish there, which with the default changes nothing. A
            shorter one is faster, and another fluid.

    Raises:
        SamplingError: For lengths that are not above zero or not symmetric, an energy unit, a strength or a
            range that is not, or species without a length.
    """

    species: Tensor
    sigma: Tensor
    kt: float
    strength: float = 1.0
    cutoff: float = CUTOFF

    def __post_init__(self) -> None:
        """Refuse parameters that make no fluid."""
        sigma, numbers = self.sigma, (self.kt, self.strength, self.cutoff)
        square = sigma.dim() == 2 and sigma.shape[0] == sigma.shape[1]
        if not (square and bool((sigma > 0).all()) and torch.equal(sigma, sigma.T)):
            raise SamplingError(
                f"lengths of a Uhlenbeck-Ford fluid must be above 0 and symmetric, not {sigma.tolist()}"
            )
        if not all(math.isfinite(x) and x > 0 for x in (*numbers, float(sigma.sum()))):
            raise SamplingError(f"kT, strength and cutoff must be above 0 and finite, not {numbers}")
        if self.species.dim() != 1 or not bool(((self.species >= 0) & (self.species < len(sigma))).all()):
            raise SamplingError(f"every atom needs one of the {len(sigma)} species that have lengths")

    @classmethod
    def of_one_length(cls, n_atoms: int, sigma: float, kt: float, strength: float = 1.0) -> Self:
        """Return the fluid of atoms that are all alike: σ in Å, kT in eV."""
        lengths = torch.tensor([[sigma]], dtype=torch.float64)
        return cls(torch.zeros(n_atoms, dtype=torch.long), lengths, kt, strength)

    @property
    def moves_with_cell(self) -> bool:
        """Always: the virial is known."""
        return True

    @property
    def pair_lengths(self) -> Tensor:
        """Return σ of all pairs of atoms `[n_atoms, n_atoms]`, Å."""
        lengths: Tensor = self.sigma[self.species[:, None], self.species]
        return lengths

    def packing(self, volume: float) -> float:
        """Return the reduced density x = ½ ρ (πσ²)^(3/2) of a cell, σ³ averaged over all pairs.

        Args:
            volume: Volume of the cell, Å³.
        """
        return float(0.5 * len(self.species) / volume * math.pi**1.5 * self.pair_lengths.pow(3).mean())

    def ideal_sum(self, volume: float) -> float:
        """Return the mean of S in an ideal gas: the integral of every pair over space, divided by V.

        That is of pairs without a cutoff.

        Args:
            volume: Volume of the cell, Å³.
        """
        return float(self.pair_lengths.pow(3).triu(1).sum() * math.pi**1.5 * ZETA / volume)

    def key(self) -> bytes:
        """Return a hash of all parameters."""
        state = hashlib.sha256(f"Uhlenbeck-Ford {self.cutoff!r} {self.kt!r} {self.strength!r}".encode())
        state.update(self.species.numpy().tobytes() + self.sigma.numpy().tobytes())
        return state.digest()

    def on(self, device: torch.device, dtype: torch.dtype) -> "UhlenbeckFordBatch":
        """Return what evaluates the fluid in a batch."""
        return UhlenbeckFordBatch(self, device, dtype)

    def energy(self, positions: Tensor, cells: Tensor) -> Tensor:
        """Return the energies of stored frames `[n]`, eV, float64.

        Args:
            positions: Positions `[n, n_atoms, 3]`, Å.
            cells: Cells (rows) `[n, 3, 3]`, Å.
        """
        return self.strength * self.kt * self.sums(positions, cells)

    def sums(self, positions: Tensor, cells: Tensor) -> Tensor:
        """Return S of stored frames `[n]`, float64: βU of strength p is p S (see `energy`).

        The shapes are those of `energy`.
        """
        return self._of_frames(positions, cells)[0]

    def closest(self, positions: Tensor, cells: Tensor) -> Tensor:
        """Return the shortest distance of two atoms in stored frames `[n]`, Å; infinite beyond the range."""
        return self._of_frames(positions, cells)[1]

    def _of_frames(self, positions: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        n, n_atoms = positions.shape[:2]
        size = max(1, _PAIRS_AT_ONCE // (n_atoms * n_atoms))
        sums, closest = [], []
        for first in range(0, n, size):
            x, h = (t[first : first + size].double() for t in (positions, cells))
            batch = self.on(x.device, torch.float64)
            batch.find(x, h, skin=0.0)
            total, distance = batch.sums_and_distances(x, h)
            sums.append(total)
            closest.append(distance)
        empty = torch.zeros(0, dtype=torch.float64, device=positions.device)
        return torch.cat([empty, *sums]), torch.cat([empty, *closest])


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a batch, every one once, and where they were found.

    The shifts are lattice translations, a row for each axis; `offsets` are the same in Å, in the cells where
    they were found.
    """

    positions: Tensor
    cells: Tensor
    skin: float
    system: Tensor
    first: Tensor
    second: Tensor
    shifts: Tensor
    offsets: list[Tensor]
    inverse_square: Tensor


class UhlenbeckFordBatch(BatchBias):
    """Evaluates the fluid for the systems of a batch, with a neighbour list that has a skin."""

    def __init__(self, fluid: UhlenbeckFord, device: torch.device, dtype: torch.dtype) -> None:
        """Set up without a list."""
        self._unit = fluid.strength * fluid.kt
        self._inverse_square = fluid.pair_lengths.pow(-2).to(device, dtype)
        self._cutoff, self._longest = fluid.cutoff, float(fluid.sigma.max())
        # ln(1 - exp(-r²/σ²)) at the cutoff
        self._shift = math.log1p(-math.exp(-(fluid.cutoff**2)))
        self._uniform = bool((fluid.sigma == fluid.sigma[0, 0]).all())
        self._list: _Pairs | None = None

    def forget(self) -> None:
        """Find the neighbours anew at the next call."""
        self._list = None

    def found_at(self) -> Mapping[str, Tensor]:
        """Return `positions` and `cells` at which the list was made; nothing without one."""
        pairs = self._list
        return {} if pairs is None else {"positions": pairs.positions, "cells": pairs.cells}

    def holds(self, positions: Tensor, cells: Tensor) -> bool:
        """Return whether no pair can have come within range since the list was made; false for NaN.

        A pair at least R = range + skin apart is at least (1 - s)R - 2d apart now: s the largest strain of
        the cell, d the largest displacement beside the affine one.
        """
        pairs = self._list
        if pairs is None:
            return False
        reach, strain, origin = self._cutoff * self._longest, 0.0, pairs.positions
        if not torch.equal(cells, pairs.cells):
            deformation = torch.linalg.solve(pairs.cells, cells)
            origin = pairs.positions @ deformation
            eye = torch.eye(3, device=cells.device, dtype=cells.dtype)
            strain = float(torch.linalg.matrix_norm(deformation - eye).max())
        moved = float((positions - origin).square().sum(-1).max().sqrt())
        return (1 - strain) * (reach + pairs.skin) - 2 * moved > reach

    def find(self, positions: Tensor, cells: Tensor, *, skin: float | None = None) -> None:
        """Find all pairs within range and a skin.

        Args:
            positions: Finite positions `[n, n_atoms, 3]`, Å.
            cells: Finite cells (rows) `[n, 3, 3]`, Å.
            skin: Width of the skin, Å; `SKIN` by default.
        """
        skin = SKIN * self._longest if skin is None else skin
        n, n_atoms = positions.shape[:2]
        size = max(1, _PAIRS_AT_ONCE // (n_atoms * n_atoms))
        parts = []
        for start in range(0, n, size):
            chunk = slice(start, start + size)
            system, first, second, shifts = image_pairs(
                positions[chunk], cells[chunk], self._cutoff * self._longest + skin
            )
            parts.append((system + start, first + start * n_atoms, second + start * n_atoms, shifts))
        system, first, second = (torch.cat([part[k] for part in parts]) for k in range(3))
        shifts = torch.cat([part[3] for part in parts], dim=1)
        inverse = self._inverse_square
        self._list = _Pairs(
            positions=positions.clone(),
            cells=cells.clone(),
            skin=skin,
            system=system,
            first=first,
            second=second,
            shifts=shifts,
            offsets=_translations(shifts, cells, system),
            inverse_square=inverse[0, 0] if self._uniform else inverse[first % n_atoms, second % n_atoms],
        )

    def energy_forces(self, positions: Tensor, cells: Tensor, *, virial: bool = False) -> BiasValues:
        """Return energies, forces and virial (see `BatchBias.energy_forces`)."""
        if self._list is None:
            self.find(positions, cells)
        pairs, vectors = self._vectors(positions, cells)
        exponential, terms = self._terms(pairs, vectors)
        n = len(positions)
        energy = positions.new_zeros(n).index_add_(0, pairs.system, terms)
        # A pair pulls its first atom towards the second with du/dr / r times the vector between them, < 0.
        pull = exponential / (exponential - 1.0)
        pull *= 2.0 * self._unit * pairs.inverse_square
        forces = positions.new_zeros(3, positions.shape[0] * positions.shape[1])
        pulls = [pull * v for v in vectors]
        for axis, p in enumerate(pulls):
            forces[axis].scatter_add_(0, pairs.first, p)
            forces[axis].scatter_add_(0, pairs.second, p.neg_())
        strained = None
        if virial:
            rows = [
                positions.new_zeros(n).index_add_(0, pairs.system, -pulls[a] * vectors[b])
                for a in range(3)
                for b in range(3)
            ]
            strained = torch.stack(rows, dim=1).view(n, 3, 3)
        return BiasValues(-self._unit * energy, forces.T.reshape(positions.shape), strained)

    def sums_and_distances(self, positions: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Return S and the shortest distance of every system, both `[n]`; the list must hold."""
        pairs, vectors = self._vectors(positions, cells)
        _, terms = self._terms(pairs, vectors)
        sums = positions.new_zeros(len(positions)).index_add_(0, pairs.system, terms)
        squares = positions.new_full((len(positions),), math.inf)
        squares.scatter_reduce_(0, pairs.system, _square(vectors), "amin")
        return -sums, squares.sqrt()

    def _vectors(self, positions: Tensor, cells: Tensor) -> tuple[_Pairs, list[Tensor]]:
        """Return the pairs, and the components of the vectors from their first to their second atoms, Å."""
        pairs = self._list
        if pairs is None:
            raise RuntimeError("find the neighbours before asking for vectors")
        offsets = pairs.offsets
        if not torch.equal(cells, pairs.cells):
            offsets = _translations(pairs.shifts, cells, pairs.system)
        components = positions.reshape(-1, 3).T.contiguous()
        vectors = []
        for x, offset in zip(components, offsets, strict=True):
            vector = x.index_select(0, pairs.second)
            vector -= x.index_select(0, pairs.first)
            vector += offset
            vectors.append(vector)
        return pairs, vectors

    def _terms(self, pairs: _Pairs, vectors: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return exp(-r²/σ²) and the shifted ln(1 - exp(-r²/σ²)) of all pairs, zero beyond the cutoff."""
        reduced = _square(vectors).mul_(pairs.inverse_square)
        beyond = reduced > self._cutoff**2
        exponential = reduced.neg_().exp_().masked_fill_(beyond, 0.0)
        terms = torch.log1p(-exponential).sub_(self._shift).masked_fill_(beyond, 0.0)
        return exponential, terms


def image_pairs(positions: Tensor, cells: Tensor, reach: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find all pairs of atoms and images of atoms within reach, every pair once, in canonical order.

    A pair whose fractional coordinates differ by f along an axis is no closer than |f| times the width of the
    cell across that axis. So each axis has few images, and most pairs have only the nearest one.

    Args:
        positions: Positions `[n, n_atoms, 3]`, Å, unwrapped.
        cells: Cells (rows) `[n, 3, 3]`, Å.
        reach: Largest distance, Å.

    Returns:
        System, first and second atom of every pair `[n_pairs]`, atoms counted through the batch (an atom and
        its own image make a pair too), and the lattice translations of the second atom `[3, n_pairs]`, in the
        dtype of the positions.
    """
    n, n_atoms = positions.shape[:2]
    inverse = torch.linalg.inv(cells)
    # Column k of the inverse is normal to the planes of the other two vectors, and 1 / width long.
    widths = inverse.norm(dim=1).reciprocal()
    images = [int(m) for m in (reach / widths + 0.5).amax(0).floor().tolist()]
    one, two = torch.triu_indices(n_atoms, n_atoms, 0 if any(images) else 1, device=positions.device)
    starts = n_atoms * torch.arange(n, device=positions.device)[:, None]
    first, second = starts + one, starts + two
    differences, shifts = [], []
    for x in (positions @ inverse).view(-1, 3).T.contiguous():
        difference = x.index_select(0, second.view(-1)).sub_(x.index_select(0, first.view(-1)))
        shift = difference.round().neg_()
        differences.append(difference.add_(shift).view(first.shape))
        shifts.append(shift.view(first.shape))
    near = _square(_cartesian(differences, cells)) <= reach**2
    near &= one != two
    kept = near.view(-1).nonzero().squeeze(1)
    found = [(kept, *(shift.view(-1).index_select(0, kept) for shift in shifts))]
    if any(images):
        found.append(_other_images(differences, shifts, cells, (reach, widths, images), one == two))
    pair = torch.cat([group[0] for group in found])
    translations = torch.stack([torch.cat([group[axis] for group in found]) for axis in (1, 2, 3)])
    if any(images):
        # Which image is the nearest changes with the positions; the order of sums must not.
        order = torch.argsort(_code(pair, translations))
        pair, translations = pair[order], translations[:, order]
    return (
        pair // len(one),
        first.view(-1).index_select(0, pair),
        second.view(-1).index_select(0, pair),
        translations,
    )


def _code(pair: Tensor, translations: Tensor) -> Tensor:
    """Return one number `[n]` for a pair and a translation: it sorts by the first, then by the second."""
    if not len(pair):
        return pair
    for steps in translations.long():
        lowest, highest = torch.stack([steps.min(), steps.max()]).tolist()
        pair = pair * (highest - lowest + 1) + (steps - lowest)
    return pair


def _other_images(
    differences: list[Tensor],
    shifts: list[Tensor],
    cells: Tensor,
    bounds: tuple[float, Tensor, list[int]],
    same: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return pairs within reach by other images than the nearest along each axis, and their translations.

    Args:
        differences: Fractional differences to the nearest images by axis, each `[n, n_pairs]`.
        shifts: Translations that lead to them, likewise.
        cells: Cells (rows) `[n, 3, 3]`, Å.
        bounds: Reach, Å, widths of the cells `[n, 3]`, Å, and most images along each axis.
        same: Pairs of an atom with itself `[n_pairs]`: of two opposite images they take one.

    Returns:
        Numbers of the pairs in the flattened differences, and translations by axis.
    """
    reach, widths, images = bounds
    limits = reach / widths
    some = torch.zeros_like(differences[0], dtype=torch.bool)
    for axis, difference in enumerate(differences):
        some |= difference.abs() >= 1.0 - limits[:, axis, None]
    pair = some.view(-1).nonzero().squeeze(1)
    steps: list[Tensor] = []
    for axis, most in enumerate(images):
        here = differences[axis].view(-1).index_select(0, pair)
        limit = limits[:, axis].index_select(0, pair // len(same))
        chosen = [((here + t).abs() <= limit).nonzero().squeeze(1) for t in range(-most, most + 1)]
        kept = torch.cat(chosen)
        pair, steps = pair.index_select(0, kept), [s.index_select(0, kept) for s in steps]
        moved = [
            torch.full_like(c, t, dtype=here.dtype)
            for t, c in zip(range(-most, most + 1), chosen, strict=True)
        ]
        steps.append(torch.cat(moved))
    x, y, z = steps
    later = (x > 0) | ((x == 0) & ((y > 0) | ((y == 0) & (z > 0))))
    itself = same.index_select(0, pair % len(same))
    kept = (later | (~itself & ((x != 0) | (y != 0) | (z != 0)))).nonzero().squeeze(1)
    pair, steps = pair.index_select(0, kept), [s.index_select(0, kept) for s in steps]
    places = [d.view(-1).index_select(0, pair).add_(s) for d, s in zip(differences, steps, strict=True)]
    vectors = _translations(places, cells, pair // len(same))
    kept = (_square(vectors) <= reach**2).nonzero().squeeze(1)
    pair = pair.index_select(0, kept)
    x, y, z = (
        shift.view(-1).index_select(0, pair).add_(step.index_select(0, kept))
        for shift, step in zip(shifts, steps, strict=True)
    )
    return pair, x, y, z


def _cartesian(fractional: Sequence[Tensor], cells: Tensor) -> list[Tensor]:
    """Return the Cartesian components, each `[n, n_pairs]`, Å, of vectors in cells (rows) `[n, 3, 3]`."""
    components = []
    for axis in range(3):
        total = fractional[0] * cells[:, 0, axis, None]
        for k in (1, 2):
            total.addcmul_(fractional[k], cells[:, k, axis, None])
        components.append(total)
    return components


def _translations(fractional: Sequence[Tensor] | Tensor, cells: Tensor, system: Tensor) -> list[Tensor]:
    """Return the same for vectors `[n_pairs]` that each belong to a system of their own."""
    components = []
    for axis in range(3):
        total = fractional[0] * cells[:, 0, axis].index_select(0, system)
        for k in (1, 2):
            total.addcmul_(fractional[k], cells[:, k, axis].index_select(0, system))
        components.append(total)
    return components


def _square(vectors: Sequence[Tensor]) -> Tensor:
    """Return squared lengths `[n]` of vectors given by components."""
    x, y, z = vectors
    return (x * x).addcmul_(y, y).addcmul_(z, z)
