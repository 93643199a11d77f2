"""Neighbour lists of structures, small in memory: a table of pairs and a mask of it for every frame.

Frames of one crystal share a table that reaches so far beyond the cutoff that it holds every pair of every
frame. A frame then needs one bit per pair of the table, which takes a fraction of the time and a hundredth
of the memory of a list of its own. Frames that move too far for that (a liquid) get lists of their own.

Every table ends with dummy pairs: MKL multiplies the last rows of a float64 matrix in another order of
summation unless there are a multiple of four. Rows are edges, so that the last bits of a system's energy
would depend on the numbers of edges of the systems before it in a batch. A dummy leads from the last atom to
a far image of itself, where the model's envelope and all its derivatives are exactly 0; a frame takes as
many as fill up its number of edges.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from matscipy.neighbours import neighbour_list
from torch import Tensor

MULTIPLE = 4
"""Edges of every structure come in multiples of this on the CPU."""

LONGEST_REACH = 1.6
"""Largest reach of a shared table in cutoffs: its length grows with the cube."""

_DUMMY_LENGTH = 2.0
"""Length of a dummy pair in reaches, at least: no deformation that a table admits brings it within."""

_BLOCK = 8
"""Number of frames whose distances are computed at once."""


@dataclass(frozen=True)
class PairTable:
    """Pairs of atoms in canonical order: by receiver, and dummies at the end.

    Attributes:
        pairs: Senders and receivers `[2, n_pairs]`, in the smallest integers that hold them.
        shifts: Lattice translations of the sender-receiver vectors `[n_pairs, 3]`, likewise.
        n_dummies: Number of dummies.
    """

    pairs: Tensor
    shifts: Tensor
    n_dummies: int

    @classmethod
    def find(cls, positions: Tensor, cell: Tensor, reach: float, n_dummies: int) -> Self:
        """Find all pairs closer than `reach`.

        Args:
            positions: Positions `[n_atoms, 3]`, Å, float64, wrapped or not.
            cell: Lattice vectors as rows `[3, 3]`, Å, float64.
            reach: Largest distance of a pair, Å.
            n_dummies: Number of dummy pairs at the end, whose length is at least twice `reach`.
        """
        periodic = np.ones(3, dtype=bool)
        first, second, shifts = neighbour_list(
            "ijS", cutoff=reach, positions=positions.numpy(), cell=cell.numpy(), pbc=periodic
        )
        # They come sorted by the first atom. Seen from the other end every pair is there once more.
        last = np.full((2, n_dummies), len(positions) - 1)
        # A multiple of the longest lattice vector that leads beyond the reach.
        lengths = np.linalg.norm(cell.numpy(), axis=1)
        longest = int(lengths.argmax())
        far = np.zeros((n_dummies, 3), dtype=np.int64)
        far[:, longest] = int(_DUMMY_LENGTH * reach / lengths[longest]) + 1
        pairs = np.concatenate([np.stack([second, first]), last], axis=1)
        return cls(_compact(pairs), _compact(np.concatenate([-shifts, far])), n_dummies)

    def all(self) -> Tensor:
        """Return the mask of all pairs but the dummies that are not needed: bits `[n_bytes]`."""
        return self._bits(torch.ones(1, self.shifts.shape[0] - self.n_dummies, dtype=torch.bool))[0]

    def within(self, positions: Tensor, cells: Tensor, cutoff: float) -> Tensor:
        """Choose the pairs of frames that are closer than a cutoff.

        Args:
            positions: Positions `[n_frames, n_atoms, 3]`, Å, float64.
            cells: Lattice vectors as rows `[n_frames, 3, 3]`, Å, float64.
            cutoff: Largest distance of a pair, Å.

        Returns:
            A bit per pair and frame, `[n_frames, n_bytes]`.
        """
        sender, receiver = self.pairs[:, : self.pairs.shape[1] - self.n_dummies].long()
        shifts = self.shifts[: len(sender)].double()
        # Written in place: small results between large temporaries would break up the heap.
        bits = torch.empty(len(positions), -(-self.shifts.shape[0] // 8), dtype=torch.uint8)
        blocks = (values.split(_BLOCK) for values in (positions, cells, bits))
        for x, cell, found in zip(*blocks, strict=True):
            vectors = x.index_select(1, receiver) - x.index_select(1, sender) + shifts @ cell
            found.copy_(self._bits(vectors.square().sum(-1) < cutoff**2))
        return bits

    def _bits(self, inside: Tensor) -> Tensor:
        """Pack a mask of the real pairs `[n_frames, n]` and of as many dummies as are needed."""
        missing = -inside.sum(1, keepdim=True) % (self.n_dummies + 1)
        mask = torch.cat([inside, torch.arange(self.n_dummies) < missing], dim=1)
        return torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little"))


def chosen_pairs(bits: Tensor, n_pairs: int) -> tuple[Tensor, Tensor]:
    """Unpack masks of one table on their device.

    Args:
        bits: A bit per pair and frame `[n_frames, n_bytes]`.
        n_pairs: Length of the table.

    Returns:
        Frame and pair of every edge, each `[n_edges]`, frame after frame.
    """
    places = torch.arange(8, device=bits.device, dtype=torch.uint8)
    mask = (bits[:, :, None] >> places & 1).view(len(bits), -1)[:, :n_pairs]
    frame, pair = mask.nonzero().unbind(1)
    return frame, pair


def needed_reach(positions: Tensor, cells: Tensor, cutoff: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return how far a table at the mean sites must reach to hold the neighbours of frames.

    A pair at least R apart there is at least (1 - s)R - 2d apart in a frame: s the strain of its cell, d the
    largest displacement of its atoms beside the affine one.

    Args:
        positions: Unwrapped positions `[n_frames, n_atoms, 3]`, Å, float64.
        cells: Lattice vectors as rows `[n_frames, 3, 3]`, Å, float64.
        cutoff: Radius within which atoms are neighbours, Å.

    Returns:
        Mean sites `[n_atoms, 3]`, mean cell `[3, 3]` and R of every frame `[n_frames]`, Å.
    """
    fractional = positions @ torch.linalg.inv(cells)
    # Neighbours do not change when a whole crystal drifts, as it does between replicas and draws.
    fractional = fractional - (fractional - fractional[:1]).mean(1, keepdim=True)
    sites, mean_cell = fractional.mean(0), cells.mean(0)
    moved = ((fractional - sites) @ cells).norm(dim=-1).amax(1)
    strain = torch.linalg.matrix_norm(torch.linalg.solve(mean_cell, cells) - torch.eye(3).to(cells))
    reach = (cutoff + 2 * moved) / (1 - strain).clamp(min=1e-6)
    return sites @ mean_cell, mean_cell, reach * (1 + 1e-9)


def _compact(values: np.ndarray) -> Tensor:
    """Return the same integers in the smallest type that holds them."""
    largest = int(np.abs(values).max(initial=0))
    kind = next(k for k in (np.int8, np.int16, np.int32, np.int64) if largest <= np.iinfo(k).max)
    return torch.from_numpy(values.astype(kind))
