"""Dummy edges that round the number of edges of every system up, so that results do not depend on the batch.

Matrix products of float64 on the CPU take another order of summation for the last rows of a matrix when
their number is no multiple of four. Rows are edges, so that the last bits of one system's energy would
depend on the number of edges of the systems before it. A dummy edge leads from the last atom of a system to
a far image of itself, beyond the cutoff, where the model's envelope and all its derivatives are exactly 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 4
"""Edges of every system come in multiples of this on the CPU."""

_MARGIN = 1.5
"""Length of a dummy edge in cutoffs, at least: so a cell may shrink by a third."""


def far_shifts(cells: Tensor, cutoff: float) -> Tensor:
    """Find a lattice translation beyond the cutoff for every cell.

    Args:
        cells: Lattice vectors as rows `[n, 3, 3]`, Å.
        cutoff: Cutoff of the model, Å.

    Returns:
        Whole multiples of the longest lattice vector, as unit shifts `[n, 3]` in the dtype of the cells.
    """
    length, axis = cells.norm(dim=-1).max(dim=-1)
    multiple = torch.floor(_MARGIN * cutoff / length) + 1
    return torch.zeros_like(cells[:, 0]).scatter(1, axis[:, None], multiple[:, None])


@dataclass(frozen=True)
class SpareEdges:
    """An edge list that holds spare dummy edges, for a caller that picks its edges anew in every step.

    Attributes:
        edge_index: Senders and receivers with the spares, sorted by receiver `[2, n_edges]`.
        unit_shifts: Lattice translations `[n_edges, 3]`.
        places: Where the spares of every system are `[n_systems, multiple - 1]`.
        ends: First edge of every system, and the end `[n_systems + 1]`.
    """

    edge_index: Tensor
    unit_shifts: Tensor
    places: Tensor
    ends: Tensor

    def complete(self, inside: Tensor) -> Tensor:
        """Add spares to a choice of edges until every system has a multiple.

        Args:
            inside: Edges within the cutoff `[n_edges]`, none of them a spare.

        Returns:
            The mask with so many spares of every system set.
        """
        n_spares = self.places.shape[1]
        if n_spares == 0:
            return inside
        running = torch.nn.functional.pad(inside.cumsum(0), (1, 0))
        count = running[self.ends].diff()
        wanted = torch.arange(n_spares, device=inside.device) < (-count % (n_spares + 1))[:, None]
        return inside.index_put((self.places.flatten(),), wanted.flatten())


def with_spares(
    edge_index: Tensor, unit_shifts: Tensor, ptr: Tensor, cells: Tensor, cutoff: float, multiple: int
) -> SpareEdges:
    """Add `multiple - 1` dummy edges to every system of an edge list.

    Args:
        edge_index: Senders and receivers `[2, n_edges]`, sorted by receiver.
        unit_shifts: Lattice translations `[n_edges, 3]`.
        ptr: First atom of every system, and the end `[n_systems + 1]`.
        cells: Lattice vectors as rows `[n_systems, 3, 3]`, Å.
        cutoff: Cutoff of the model, Å.
        multiple: What the number of edges of every system shall be a multiple of (`GraphBuilder`).

    Returns:
        The longer list, whose spares follow the edges of the last atom of their system.
    """
    n_spares, n_systems = multiple - 1, len(cells)
    last = (ptr[1:] - 1).repeat_interleave(n_spares)
    ends = torch.searchsorted(edge_index[1].contiguous(), ptr)
    starts = ends + n_spares * torch.arange(n_systems + 1, device=ends.device)
    places = starts[1:, None] - n_spares + torch.arange(n_spares, device=ends.device)
    shifts = far_shifts(cells, cutoff).repeat_interleave(n_spares, dim=0).to(unit_shifts)
    total = edge_index.shape[1] + n_spares * n_systems
    own = torch.ones(total, dtype=torch.bool, device=ends.device)
    own[places.flatten()] = False
    longer_index, longer_shifts = edge_index.new_empty(2, total), unit_shifts.new_empty(total, 3)
    longer_index[:, own], longer_shifts[own] = edge_index, unit_shifts
    longer_index[:, places.flatten()], longer_shifts[places.flatten()] = last, shifts
    return SpareEdges(longer_index, longer_shifts, places, starts)
