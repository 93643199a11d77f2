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


# Å beyond the cutoff: a wider skin is searched less often and filtered at more cost.
SKIN = 0.9

# MKL's float64 products treat the last rows of a matrix differently unless there are a multiple of these.
_ROWS = 4


@dataclass(frozen=True)
class _Pairs:
    """All pairs within cutoff and skin, and where they were found.

    The few translations that occur are held once: `shift` says which of them each pair has. `spare` numbers
    the spare pairs of a system from 0; for true pairs it is `_ROWS`.
    """

    positions: Tensor
    cell: Tensor
    node_attrs: Tensor
    ptr: Tensor
    edge_index: Tensor
    edge_system: Tensor
    shift: Tensor
    translations: Tensor
    translation_system: Tensor
    spare: Tensor


class SkinList:
    """Graphs of a moving batch.

    The pairs are in canonical order, by receiver, sender and shift. So the graph of a system depends on its
    own positions alone, not on when the list was made, and sums over neighbours read memory in order.
    """

    def __init__(self, builder: GraphBuilder, *, rigid: bool = False) -> None:
        """Set up without a list.

        Args:
            builder: Graph builder of the model: its elements, cutoff, dtype and device count.
            rigid: Whether the cells never change.
        """
        self._builder, self._rigid = builder, rigid
        self._pads = builder.dtype == torch.float64 and builder.device.type == "cpu"
        self._reach = builder.cutoff + SKIN
        self._pairs: _Pairs | None = None
        self._elements = torch.tensor(builder.atomic_numbers, device=builder.device)

    def forget(self) -> None:
        """Find the neighbours anew at the next call."""
        self._pairs = None

    def found_at(self) -> dict[str, Tensor]:
        """Return `positions` and `cell` at which the list was made; nothing without one."""
        pairs = self._pairs
        return {} if pairs is None else {"positions": pairs.positions.clone(), "cell": pairs.cell.clone()}

    def holds(self, positions: Tensor, cell: Tensor, system_idx: Tensor) -> bool:
        """Return whether no pair can have come inside the cutoff since the list was made; false for NaN.

        A pair at least R = cutoff + skin apart is at least (1 - s)R - 2d apart now: s the largest strain of
        the cell, d the largest displacement beside the affine one.
        """
        pairs = self._pairs
        if pairs is None:
            return False
        if self._rigid:
            moved = (positions - pairs.positions).square().sum(-1).max()
            return bool(moved < (SKIN / 2) ** 2)
        deformation = torch.linalg.solve(pairs.cell, cell)
        moved = (positions - _apply(pairs.positions, deformation[system_idx])).square().sum(-1).max().sqrt()
        eye = torch.eye(3, device=cell.device, dtype=cell.dtype)
        strain = torch.linalg.matrix_norm(deformation - eye).max()
        return bool((1 - strain) * self._reach - 2 * moved > self._builder.cutoff)

    def find(self, state: ts.SimState, positions: Tensor, cell: Tensor) -> None:
        """Find the list at finite positions `[n_atoms, 3]` and cells (rows) `[n_systems, 3, 3]`."""
        index = state.system_idx
        fractional = _apply(positions, torch.linalg.inv(cell)[index])
        wraps = fractional.floor()
        wrapped = _apply(fractional - wraps, cell[index])
        try:
            edges, _, shifts = torchsim_nl(wrapped, cell, state.pbc, self._reach, index)
        except NeighborOverflowError:
            # The fast search gives up on more than about 0.2 atoms per Å³.
            edges, _, shifts = torch_nl_linked_cell(wrapped, cell, state.pbc, self._reach, index)
        unit_shifts = (shifts - wraps[edges[1]] + wraps[edges[0]]).round().long()
        spare = torch.full_like(edges[0], _ROWS)
        if self._pads:
            spare_edges, spare_shifts, numbers = _spare_pairs(index, cell, self._reach)
            edges = torch.cat([edges, spare_edges], dim=1)
            unit_shifts = torch.cat([unit_shifts, spare_shifts])
            spare = torch.cat([spare, numbers])
        order = torch.argsort(_code(edges[1] * len(index) + edges[0], unit_shifts))
        edges, unit_shifts = edges[:, order].contiguous(), unit_shifts[order]
        edge_system = index[edges[0]]
        _, shift = torch.unique(_code(edge_system, unit_shifts), return_inverse=True)
        # Any pair of a translation can tell which it is.
        example = torch.empty(
            int(shift.max()) + 1 if len(shift) else 0, dtype=torch.long, device=shift.device
        )
        example[shift] = torch.arange(len(shift), device=shift.device)
        counts = torch.bincount(index)
        self._pairs = _Pairs(
            positions=positions.clone(),
            cell=cell.clone(),
            node_attrs=(state.atomic_numbers[:, None] == self._elements).to(positions),
            ptr=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
            edge_index=edges,
            edge_system=edge_system,
            shift=shift,
            translations=unit_shifts[example].to(positions),
            translation_system=edge_system[example],
            spare=spare[order],
        )

    def graphs(self, positions: Tensor, cell: Tensor, system_idx: Tensor) -> Graphs:
        """Return the exact graphs of the present positions: the pairs of the list within the cutoff."""
        pairs = self._pairs
        if pairs is None:
            raise RuntimeError("find the neighbours before asking for graphs")
        sender, receiver = pairs.edge_index
        translations = _apply(pairs.translations, cell[pairs.translation_system])
        vectors = positions.index_select(0, receiver) - positions.index_select(0, sender)
        vectors += translations.index_select(0, pairs.shift)
        inside = vectors.square().sum(-1) < self._builder.cutoff**2
        if self._pads:
            # As many spare pairs as fill up the rows of every system: with whole rows the last bits of a
            # system do not depend on what else is in the batch.
            counts = torch.zeros(len(pairs.cell), dtype=torch.long)
            counts.index_add_(0, pairs.edge_system, inside.long())
            inside = inside | (pairs.spare < ((-counts) % _ROWS)[pairs.edge_system])
        kept = inside.nonzero().squeeze(1)
        return Graphs(
            positions=positions,
            cell=cell,
            node_attrs=pairs.node_attrs,
            batch=system_idx,
            ptr=pairs.ptr,
            edge_index=pairs.edge_index.index_select(1, kept),
            vectors=vectors.index_select(0, kept),
        )


def _apply(vectors: Tensor, matrices: Tensor) -> Tensor:
    """Return row vectors `[n, 3]` times matrices `[n, 3, 3]`, one each."""
    return (vectors[:, :, None] * matrices).sum(1)


def _code(first: Tensor, unit_shifts: Tensor) -> Tensor:
    """Return one number `[n]` for a number and a translation: it sorts by the first, then by the second."""
    if not len(unit_shifts):
        return first
    lowest = unit_shifts.amin(0)
    for axis, width in enumerate((unit_shifts.amax(0) - lowest + 1).tolist()):
        first = first * width + (unit_shifts[:, axis] - lowest[axis])
    return first


def _spare_pairs(system_idx: Tensor, cell: Tensor, reach: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return pairs of the last atom of every system with images of itself beyond reach.

    They contribute nothing, and are the last of their system in canonical order, so that no true pair changes
    its place for them.

    Returns:
        Pairs `[2, n]`, unit shifts `[n, 3]` and numbers of the spare pairs within their system `[n]`.
    """
    last = torch.bincount(system_idx).cumsum(0) - 1
    # Twice the reach stays beyond the cutoff for as long as a list may hold in a cell that changes.
    far = (2 * reach / cell[:, 0].norm(dim=-1)).ceil().long() + 1
    numbers = torch.arange(_ROWS - 1, device=last.device).repeat(len(last))
    atoms = last.repeat_interleave(_ROWS - 1)
    shifts = torch.zeros(len(atoms), 3, dtype=torch.long, device=last.device)
    shifts[:, 0] = far.repeat_interleave(_ROWS - 1) + numbers
    return torch.stack([atoms, atoms]), shifts, numbers
