"""Atomistic graphs: what a MACE model reads.

A `Structure` is one periodic configuration with its neighbour list; `collate` joins structures into
one `Graphs` batch. Neighbour lists are found once per structure and travel with it, because the frames
of an ensemble are evaluated many times under changing parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from ase import Atoms
from matscipy.neighbours import neighbour_list
from torch import Tensor

from mlip_refine.errors import InputError
from mlip_refine.potential.padding import far_shifts


@dataclass(frozen=True)
class Graphs:
    """A batch of graphs.

    Attributes:
        positions: Cartesian positions `[n_atoms, 3]`, Å; unwrapped positions are fine.
        cell: Lattice vectors as rows `[n_graphs, 3, 3]`, Å.
        node_attrs: One-hot elements `[n_atoms, n_elements]` in the order of the model.
        batch: Graph of every atom `[n_atoms]`.
        ptr: First atom of every graph, and the end `[n_graphs + 1]`.
        edge_index: Senders and receivers `[2, n_edges]`.
        unit_shifts: Lattice translations of the sender-receiver vectors `[n_edges, 3]`.
    """

    positions: Tensor
    cell: Tensor
    node_attrs: Tensor
    batch: Tensor
    ptr: Tensor
    edge_index: Tensor
    unit_shifts: Tensor

    @property
    def n_graphs(self) -> int:
        """Number of graphs in the batch."""
        return self.cell.shape[0]

    @property
    def volume(self) -> Tensor:
        """Cell volumes `[n_graphs]`, Å³."""
        volume: Tensor = torch.linalg.det(self.cell).abs()
        return volume

    def split(self, max_atoms: int) -> list["Graphs"]:
        """Consecutive parts of at most `max_atoms` atoms; the edges must be sorted by receiver."""
        starts = self.ptr.tolist()
        first = [0]
        for i in range(1, self.n_graphs):
            if starts[i + 1] - starts[first[-1]] > max_atoms:
                first.append(i)
        ends = [*first[1:], self.n_graphs]
        edges = torch.searchsorted(self.edge_index[1].contiguous(), self.ptr).tolist()
        return (
            [self] if len(first) == 1 else [self._part(i, j, edges) for i, j in zip(first, ends, strict=True)]
        )

    def _part(self, start: int, end: int, edges: list[int]) -> "Graphs":
        atoms, pairs = slice(int(self.ptr[start]), int(self.ptr[end])), slice(edges[start], edges[end])
        return Graphs(
            positions=self.positions[atoms],
            cell=self.cell[start:end],
            node_attrs=self.node_attrs[atoms],
            batch=self.batch[atoms] - start,
            ptr=self.ptr[start : end + 1] - atoms.start,
            edge_index=self.edge_index[:, pairs] - atoms.start,
            unit_shifts=self.unit_shifts[pairs],
        )

    def vectors(self) -> Tensor:
        """Vectors from senders to receivers `[n_edges, 3]`, Å."""
        sender, receiver = self.edge_index
        system = self.batch.index_select(0, sender)
        shifts = torch.bmm(self.unit_shifts.unsqueeze(1), self.cell.index_select(0, system)).squeeze(1)
        positions = self.positions.detach()
        return positions.index_select(0, receiver) - positions.index_select(0, sender) + shifts

    def mace_input(self, vectors: Tensor, head: int) -> dict[str, Tensor]:
        """The dictionary that `mace.modules.ScaleShiftMACE.forward` reads, with given edge vectors.

        MACE adds the shifts of edges to differences of positions: with all positions zero, they are the
        vectors. So these are the only variables of the geometry, and its derivatives are taken here.
        """
        return {
            "positions": torch.zeros_like(self.positions).as_subclass(_Constant),
            "cell": self.cell.reshape(-1, 3),
            "node_attrs": self.node_attrs,
            "batch": self.batch,
            "ptr": self.ptr,
            "edge_index": self.edge_index,
            "unit_shifts": self.unit_shifts,
            "shifts": vectors,
            "head": torch.full((self.n_graphs,), head, dtype=torch.long, device=self.cell.device),
        }

    def forces(self, slope: Tensor) -> Tensor:
        """Forces `[n_atoms, 3]`, eV/Å, from the derivative of the energies in the vectors `[n_edges, 3]`."""
        sender, receiver = self.edge_index
        forces = torch.zeros_like(self.positions).index_add(0, sender, slope)
        return forces.index_add(0, receiver, slope, alpha=-1)

    def stress(self, vectors: Tensor, slope: Tensor) -> Tensor:
        """Stress `[n_graphs, 3, 3]`, eV/Å³, tensile positive: symmetric sum of vector x slope, per volume."""
        virial = vectors.detach().unsqueeze(2) * slope.unsqueeze(1)
        system = self.batch.index_select(0, self.edge_index[0])
        total = torch.zeros_like(self.cell).index_add(0, system, 0.5 * (virial + virial.transpose(1, 2)))
        return total / self.volume[:, None, None]


class _Constant(torch.Tensor):
    """Positions that MACE cannot switch gradients on for: nothing is to be kept for derivatives in them."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def requires_grad_(self, requires_grad: bool = True) -> Self:  # noqa: ARG002
        """Leave it as it is."""
        return self


@dataclass(frozen=True)
class Structure:
    """One periodic configuration and its neighbours, on the CPU.

    Attributes:
        positions: `[n_atoms, 3]`, Å, float64.
        cell: Lattice vectors as rows `[3, 3]`, Å, float64.
        species: Index of every atom's element in the model `[n_atoms]`.
        edge_index: Senders and receivers `[2, n_edges]`, sorted by receiver, int32.
        unit_shifts: Lattice translations `[n_edges, 3]`, int8.
    """

    positions: Tensor
    cell: Tensor
    species: Tensor
    edge_index: Tensor
    unit_shifts: Tensor


@dataclass(frozen=True)
class GraphBuilder:
    """Makes structures and batches for one model.

    Attributes:
        atomic_numbers: Elements of the model, in its order.
        cutoff: Å.
        dtype: Floating type of batches.
        device: Where batches go.
        edge_multiple: The edges of every system of a batch are padded to a multiple of this with dummy
            edges beyond the cutoff (see `mlip_refine.potential.padding`).
    """

    atomic_numbers: tuple[int, ...]
    cutoff: float
    dtype: torch.dtype
    device: torch.device
    edge_multiple: int = 1

    def species(self, numbers: Sequence[int] | np.ndarray) -> Tensor:
        """Map atomic numbers to the model's element indices `[n_atoms]`.

        Raises:
            InputError: If the model does not know an element.
        """
        unknown = sorted({int(z) for z in numbers} - set(self.atomic_numbers))
        if unknown:
            raise InputError(
                "the model does not know every element of the structure",
                found=f"atomic numbers {unknown}",
                expected=f"a subset of {list(self.atomic_numbers)}",
            )
        index = {z: i for i, z in enumerate(self.atomic_numbers)}
        return torch.tensor([index[int(z)] for z in numbers], dtype=torch.long)

    def structure(self, positions: Tensor, cell: Tensor, species: Tensor) -> Structure:
        """Find the neighbours of one configuration (positions `[n, 3]`, cell rows `[3, 3]`, Å)."""
        positions, cell = positions.detach().cpu().double(), cell.detach().cpu().double()
        sender, receiver, shifts = neighbour_list(
            "ijS",
            cutoff=self.cutoff,
            positions=positions.numpy(),
            cell=cell.numpy(),
            pbc=np.ones(3, dtype=bool),
        )
        # Seen from the other end every pair is there once more: so they come sorted by receiver.
        edges = torch.from_numpy(np.stack([receiver, sender]).astype(np.int32))
        return Structure(positions, cell, species, edges, torch.from_numpy((-shifts).astype(np.int8)))

    def from_atoms(self, atoms: Atoms) -> Structure:
        """A structure from an ASE `Atoms` object, which must be periodic in three dimensions."""
        if not atoms.pbc.all() or abs(atoms.cell.volume) < 1e-6:
            raise InputError(
                "the structure is not periodic in three dimensions",
                found=f"pbc {atoms.pbc.tolist()}, volume {atoms.cell.volume:.3g} Å³",
                expected="three periodic directions and a cell with a volume",
            )
        positions, cell = torch.from_numpy(atoms.positions), torch.from_numpy(np.array(atoms.cell))
        return self.structure(positions, cell, self.species(atoms.numbers))

    def frames(self, positions: Tensor, cells: Tensor, numbers: np.ndarray) -> list[Structure]:
        """Structures of an ensemble: positions `[n_frames, n_atoms, 3]`, cells `[n_frames, 3, 3]`."""
        species = self.species(numbers)
        return [self.structure(x, h, species) for x, h in zip(positions, cells, strict=True)]

    def collate(self, structures: Sequence[Structure]) -> Graphs:
        """Join structures into one batch on the model's device and dtype, edges sorted by receiver."""
        sizes = torch.tensor([len(s.species) for s in structures])
        ptr = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
        cells = torch.stack([s.cell for s in structures])
        edges, shifts = self._edges(structures, ptr.tolist(), cells)
        species = torch.cat([s.species for s in structures])
        one_hot = torch.nn.functional.one_hot(species, len(self.atomic_numbers))
        real: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        return Graphs(
            positions=torch.cat([s.positions for s in structures]).to(**real),
            cell=cells.to(**real),
            node_attrs=one_hot.to(**real),
            batch=torch.repeat_interleave(torch.arange(len(structures)), sizes).to(self.device),
            ptr=ptr.to(self.device),
            edge_index=edges.to(self.device),
            unit_shifts=shifts.to(**real),
        )

    def _edges(self, structures: Sequence[Structure], ptr: list[int], cells: Tensor) -> tuple[Tensor, Tensor]:
        """Edges `[2, n_edges]` and shifts `[n_edges, 3]` of a batch, every system's padded."""
        edges, shifts, far = [], [], far_shifts(cells, self.cutoff).to(torch.int8)
        for i, structure in enumerate(structures):
            n_spares = -structure.edge_index.shape[1] % self.edge_multiple
            edges += [structure.edge_index.long() + ptr[i], torch.full((2, n_spares), ptr[i + 1] - 1)]
            shifts += [structure.unit_shifts, far[i].expand(n_spares, 3)]
        return torch.cat(edges, dim=1), torch.cat(shifts)


def chunks(structures: Sequence[Structure], max_atoms: int) -> list[slice]:
    """Split a list into consecutive slices of at most `max_atoms` atoms (at least one structure each)."""
    slices, start, atoms = [], 0, 0
    for i, structure in enumerate(structures):
        n = len(structure.species)
        if i > start and atoms + n > max_atoms:
            slices.append(slice(start, i))
            start, atoms = i, 0
        atoms += n
    if structures:
        slices.append(slice(start, len(structures)))
    return slices
