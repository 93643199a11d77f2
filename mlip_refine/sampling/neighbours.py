"""Neighbours with a skin: found seldom, filtered exactly at every step."""

from dataclasses import dataclass

import torch
import torch_sim as ts
from torch import Tensor
from torch_sim.neighbors import torch_nl_linked_cell, torchsim_nl

from mlip_refine.potential import GraphBuilder, Graphs

try:
    from nvalchemiops.neighbors.neighbor_utils import NeighborOverflowError
except ImportError:  # torch-sim then takes another neighbour search, which cannot overflow

    class NeighborOverflowError(Exception):  # type: ignore[no-redef]
        """Stands for the error of the search that is not installed."""


SKIN = 0.8

# MKL's float64 products treat the last rows of a matrix differently unless there are a multiple of these.
_ROWS = 4


@dataclass(frozen=True)
class _Found:
    """Pairs within cutoff and skin, and where they were found."""

    positions: Tensor
    cell: Tensor
    edge_index: Tensor
    unit_shifts: Tensor
    shifts: Tensor
    edge_system: Tensor
    node_attrs: Tensor
    ptr: Tensor


class SkinList:
    """Graphs of a moving batch.

    The pairs are in canonical order, by receiver, sender and shift. So the graph of a system depends on its
    own positions alone, not on when the list was made, and sums over neighbours read memory in order.
    """

    def __init__(self, builder: GraphBuilder, *, rigid: bool = False) -> None:
        """Start without a list.

        Args:
            builder: Of the model: elements, cutoff, dtype, device.
            rigid: Whether the cells never change.
        """
        self._builder, self._rigid = builder, rigid
        self._found: _Found | None = None
        table = torch.tensor(builder.atomic_numbers, device=builder.device)
        self._elements = table

    def forget(self) -> None:
        """Find the neighbours anew at the next call."""
        self._found = None

    def holds(self, positions: Tensor, cell: Tensor, system_idx: Tensor) -> bool:
        """Whether no pair can have come inside the cutoff since the list was made; false for NaN.

        A pair at least R = cutoff + skin apart is at least (1 - s)R - 2d apart now: s the largest strain of
        the cell, d the largest displacement beside the affine one.
        """
        found = self._found
        if found is None:
            return False
        if self._rigid:
            moved = (positions - found.positions).square().sum(-1).max()
            return bool(moved < (SKIN / 2) ** 2)
        reach = self._builder.cutoff + SKIN
        deformation = torch.linalg.solve(found.cell, cell)
        affine = (found.positions[:, :, None] * deformation[system_idx]).sum(1)
        moved = (positions - affine).square().sum(-1).max().sqrt()
        eye = torch.eye(3, device=cell.device, dtype=cell.dtype)
        strain = torch.linalg.matrix_norm(deformation - eye).max()
        return bool((1 - strain) * reach - 2 * moved > self._builder.cutoff)

    def find(self, state: ts.SimState, positions: Tensor, cell: Tensor) -> None:
        """Make the list at finite positions `[n_atoms, 3]` and cells (rows) `[n_systems, 3, 3]`."""
        index = state.system_idx
        fractional = _apply(positions, torch.linalg.inv(cell)[index])
        wraps = fractional.floor()
        wrapped = _apply(fractional - wraps, cell[index])
        pairs, shifts = _find_pairs(wrapped, cell, state.pbc, self._builder.cutoff + SKIN, index)
        unit_shifts = shifts - wraps[pairs[1]] + wraps[pairs[0]]
        order = _canonical_order(pairs, unit_shifts, len(index))
        pairs, unit_shifts = pairs[:, order].contiguous(), unit_shifts[order].to(positions)
        edge_system = index[pairs[0]]
        counts = torch.bincount(index)
        self._found = _Found(
            positions=positions.clone(),
            cell=cell.clone(),
            edge_index=pairs,
            unit_shifts=unit_shifts,
            shifts=_apply(unit_shifts, cell[edge_system]),
            edge_system=edge_system,
            node_attrs=(state.atomic_numbers[:, None] == self._elements).to(positions),
            ptr=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        )

    def graphs(self, positions: Tensor, cell: Tensor, system_idx: Tensor) -> Graphs:
        """The exact graphs of now: the pairs of the list that are within the cutoff."""
        found = self._found
        if found is None:
            raise RuntimeError("find the neighbours before asking for graphs")
        shifts = found.shifts if self._rigid else _apply(found.unit_shifts, cell[found.edge_system])
        sender, receiver = found.edge_index
        vectors = positions.index_select(0, receiver) - positions.index_select(0, sender) + shifts
        inside = vectors.square().sum(-1) < self._builder.cutoff**2
        if positions.dtype == torch.float64 and positions.device.type == "cpu":
            inside = _whole_rows(inside, found.edge_system, len(cell))
        kept = inside.nonzero().squeeze(1)
        return Graphs(
            positions=positions,
            cell=cell,
            node_attrs=found.node_attrs,
            batch=system_idx,
            ptr=found.ptr,
            edge_index=found.edge_index.index_select(1, kept),
            unit_shifts=found.unit_shifts.index_select(0, kept),
        )


def _apply(vectors: Tensor, matrices: Tensor) -> Tensor:
    """Row vectors times matrices, one each."""
    return (vectors[:, :, None] * matrices).sum(1)


def _canonical_order(pairs: Tensor, unit_shifts: Tensor, n_atoms: int) -> Tensor:
    shifts = unit_shifts.round().long()
    lowest = shifts.amin(0)
    width = (shifts.amax(0) - lowest + 1).tolist()
    key = pairs[1] * n_atoms + pairs[0]
    for axis in range(3):
        key = key * width[axis] + (shifts[:, axis] - lowest[axis])
    return torch.argsort(key)


def _whole_rows(inside: Tensor, edge_system: Tensor, n_systems: int) -> Tensor:
    """Keep a few pairs beyond the cutoff, which contribute exactly zero, to fill up the rows of every system.

    With whole rows the last bits of a system do not depend on what else is in the batch.
    """
    counts = torch.zeros(n_systems, dtype=torch.long).index_add_(0, edge_system, inside.long())
    outside = (~inside).long()
    rank = outside.cumsum(0)
    total = torch.zeros(n_systems, dtype=torch.long).index_add_(0, edge_system, outside)
    before = total.cumsum(0) - total
    wanted = before + (-counts) % _ROWS
    return inside | ((outside > 0) & (rank <= wanted[edge_system]))


def _find_pairs(
    positions: Tensor, cell: Tensor, pbc: Tensor, reach: float, system_idx: Tensor
) -> tuple[Tensor, Tensor]:
    """Pairs `[2, n]` and shifts `[n, 3]`; the fast search gives up on more than about 0.2 atoms per Å³."""
    try:
        pairs, _, shifts = torchsim_nl(positions, cell, pbc, reach, system_idx)
    except NeighborOverflowError:
        pairs, _, shifts = torch_nl_linked_cell(positions, cell, pbc, reach, system_idx)
    return pairs, shifts
