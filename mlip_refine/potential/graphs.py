"""Atomistic graphs: what a MACE model reads.

A `Structure` is one periodic configuration with its neighbour list; `collate` joins structures into
one `Graphs` batch. Neighbour lists are found once per structure and travel with it, because the frames
of an ensemble are evaluated many times under changing parameters. `mlip_refine.potential.neighbours` keeps
them small.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from mlip_refine.errors import InputError
from mlip_refine.potential.neighbours import LONGEST_REACH, PairTable, chosen_pairs, needed_reach


class Offsets(NamedTuple):
    """First atoms `[n_graphs + 1]` and first edges `[n_graphs + 1]` of consecutive graphs, with the ends."""

    atoms: Sequence[int]
    edges: Sequence[int]


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
        vectors: Vectors from senders to receivers `[n_edges, 3]`, Å: the only variables of the geometry.
    """

    positions: Tensor
    cell: Tensor
    node_attrs: Tensor
    batch: Tensor
    ptr: Tensor
    edge_index: Tensor
    vectors: Tensor

    @property
    def n_graphs(self) -> int:
        """Number of graphs in the batch."""
        return self.cell.shape[0]

    @property
    def volume(self) -> Tensor:
        """Cell volumes `[n_graphs]`, Å³."""
        volume: Tensor = torch.linalg.det(self.cell).abs()
        return volume

    def offsets(self) -> Offsets:
        """Return where every graph starts; edges must be sorted by receiver. Waits for the device once."""
        edges = torch.searchsorted(self.edge_index[1].contiguous(), self.ptr)
        return Offsets(*torch.stack([self.ptr, edges]).tolist())

    def part(self, graphs: slice, offsets: Offsets) -> "Graphs":
        """Return consecutive graphs of the batch as a batch of their own."""
        start, stop = graphs.start, graphs.stop
        atoms = slice(offsets.atoms[start], offsets.atoms[stop])
        edges = slice(offsets.edges[start], offsets.edges[stop])
        return Graphs(
            positions=self.positions[atoms],
            cell=self.cell[start:stop],
            node_attrs=self.node_attrs[atoms],
            batch=self.batch[atoms] - start,
            ptr=self.ptr[start : stop + 1] - atoms.start,
            edge_index=self.edge_index[:, edges] - atoms.start,
            vectors=self.vectors[edges],
        )

    def select(self, chosen: Tensor) -> "Graphs":
        """Return the graphs that a mask `[n_graphs]` chooses, in their order, as a batch of their own."""
        atoms = chosen.index_select(0, self.batch)
        edges = atoms.index_select(0, self.edge_index[0]).nonzero().squeeze(1)
        numbers, graphs = atoms.cumsum(0) - 1, chosen.cumsum(0) - 1
        sizes = self.ptr.diff()[chosen]
        return Graphs(
            positions=self.positions[atoms],
            cell=self.cell[chosen],
            node_attrs=self.node_attrs[atoms],
            batch=graphs.index_select(0, self.batch[atoms]),
            ptr=torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]),
            edge_index=numbers[self.edge_index.index_select(1, edges)],
            vectors=self.vectors.index_select(0, edges),
        )

    def displaced(self, displacements: Tensor) -> "Graphs":
        """Return the same graphs with atoms displaced by `[n_atoms, 3]`, Å; no edge comes or goes."""
        starts, ends = (displacements.index_select(0, atoms) for atoms in self.edge_index)
        return replace(self, positions=self.positions + displacements, vectors=self.vectors + (ends - starts))

    def mace_input(self, vectors: Tensor, head: int) -> dict[str, Tensor]:
        """Return the dictionary that `mace.modules.ScaleShiftMACE.forward` reads, with given edge vectors.

        MACE adds the shifts of edges to differences of positions: with all positions zero, the shifts are the
        vectors. So the vectors are the only variables of the geometry, and derivatives are taken in them.
        """
        return {
            "positions": torch.zeros_like(self.positions).as_subclass(_Constant),
            "cell": self.cell.reshape(-1, 3),
            "node_attrs": self.node_attrs,
            "batch": self.batch,
            "ptr": self.ptr,
            "edge_index": self.edge_index,
            "shifts": vectors,
            "head": torch.full((self.n_graphs,), head, dtype=torch.long, device=self.cell.device),
        }

    def forces(self, slope: Tensor) -> Tensor:
        """Return forces `[n_atoms, 3]`, eV/Å, from the derivative of energies in the vectors."""
        sender, receiver = self.edge_index
        forces = torch.zeros_like(self.positions).index_add(0, sender, slope)
        return forces.index_add(0, receiver, slope, alpha=-1)

    def stress(self, vectors: Tensor, slope: Tensor) -> Tensor:
        """Return the stress `[n_graphs, 3, 3]`, eV/Å³, tensile positive, from the same derivative."""
        virial = vectors.detach().unsqueeze(2) * slope.unsqueeze(1)
        system = self.batch.index_select(0, self.edge_index[0])
        total = torch.zeros_like(self.cell).index_add(0, system, 0.5 * (virial + virial.transpose(1, 2)))
        return total / self.volume[:, None, None]


class _Constant(torch.Tensor):
    """Positions for which MACE cannot switch gradients on: nothing is kept for derivatives in them."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def requires_grad_(self, requires_grad: bool = True) -> Self:  # noqa: ARG002
        """Do nothing."""
        return self


@dataclass(frozen=True)
class Structure:
    """One periodic configuration and its neighbours, on the CPU.

    Attributes:
        positions: Cartesian positions `[n_atoms, 3]`, Å, float64.
        cell: Lattice vectors as rows `[3, 3]`, Å, float64.
        species: Index of every atom's element in the model `[n_atoms]`.
        pairs: Senders and receivers `[2, n_pairs]` of a `PairTable` that many structures may share.
        shifts: Lattice translations `[n_pairs, 3]` of the table.
        chosen: Mask of the pairs of the table that are edges, one bit each `[n_bytes]`.
    """

    positions: Tensor
    cell: Tensor
    species: Tensor
    pairs: Tensor
    shifts: Tensor
    chosen: Tensor

    @property
    def n_edges(self) -> int:
        """Number of edges, dummies included."""
        return int.from_bytes(self.chosen.numpy()).bit_count()


@dataclass(frozen=True)
class GraphBuilder:
    """Makes structures and batches for one model.

    Attributes:
        atomic_numbers: Elements of the model, in its order.
        cutoff: Radius within which atoms are neighbours, Å.
        dtype: Floating type of batches.
        device: Device of batches.
        edge_multiple: Number that the edges of every structure are a multiple of, filled up with dummies
            beyond the cutoff (see `mlip_refine.potential.neighbours`).
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
        table = PairTable.find(positions, cell, self.cutoff, self.edge_multiple - 1)
        return Structure(positions, cell, species, table.pairs, table.shifts, table.all())

    def from_atoms(self, atoms: Atoms) -> Structure:
        """Make a structure of an ASE `Atoms` object, which must be periodic in three dimensions.

        Raises:
            InputError: If it is not, or the model does not know an element.
        """
        if not atoms.pbc.all() or abs(atoms.cell.volume) < 1e-6:
            raise InputError(
                "the structure is not periodic in three dimensions",
                found=f"pbc {atoms.pbc.tolist()}, volume {atoms.cell.volume:.3g} Å³",
                expected="three periodic directions and a cell with a volume",
            )
        positions, cell = torch.from_numpy(atoms.positions), torch.from_numpy(np.array(atoms.cell))
        return self.structure(positions, cell, self.species(atoms.numbers))

    def frames(self, positions: Tensor, cells: Tensor, numbers: np.ndarray) -> list[Structure]:
        """Make structures of frames; those that stay close to their mean share one table of pairs.

        Args:
            positions: Unwrapped positions `[n_frames, n_atoms, 3]`, Å.
            cells: Lattice vectors as rows `[n_frames, 3, 3]`, Å.
            numbers: Atomic numbers `[n_atoms]`.
        """
        species = self.species(numbers)
        positions, cells = positions.detach().cpu().double(), cells.detach().cpu().double()
        sharing: dict[int, Structure] = {}
        if len(positions) > 1:
            sites, cell, reach = needed_reach(positions, cells, self.cutoff)
            near = (reach < LONGEST_REACH * self.cutoff).nonzero().squeeze(1)
            if len(near):
                table = PairTable.find(sites, cell, float(reach[near].max()), self.edge_multiple - 1)
                chosen = table.within(positions[near], cells[near], self.cutoff)
                for i, bits in zip(near.tolist(), chosen, strict=True):
                    sharing[i] = Structure(positions[i], cells[i], species, table.pairs, table.shifts, bits)
        return [
            sharing[i] if i in sharing else self.structure(x, h, species)
            for i, (x, h) in enumerate(zip(positions, cells, strict=True))
        ]

    def collate(self, structures: Sequence[Structure]) -> Graphs:
        """Join structures into one batch on the model's device and dtype, edges sorted by receiver."""
        sizes = torch.tensor([len(s.species) for s in structures])
        ptr = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        species = torch.cat([s.species for s in structures])
        one_hot = torch.nn.functional.one_hot(species, len(self.atomic_numbers))
        real: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        on_device = ptr.to(self.device)
        # Consecutive structures that share a table are unpacked together.
        new_table = [i for i, (a, b) in enumerate(pairwise(structures), 1) if a.pairs is not b.pairs]
        runs = [slice(i, j) for i, j in pairwise([0, *new_table, len(structures)])]
        indices, translations = [], []
        for run in runs:
            table = structures[run.start]
            bits = torch.stack([s.chosen for s in structures[run]]).to(self.device)
            frame, pair = chosen_pairs(bits, len(table.shifts))
            pairs, lattice = table.pairs.to(self.device).long(), table.shifts.to(self.device).to(self.dtype)
            indices.append(pairs.index_select(1, pair) + on_device[run].index_select(0, frame))
            translations.append(lattice.index_select(0, pair))
        edge_index = torch.cat(indices, dim=1)
        positions = torch.cat([s.positions for s in structures]).to(**real)
        cell = torch.stack([s.cell for s in structures]).to(**real)
        batch = torch.repeat_interleave(torch.arange(len(structures)), sizes).to(self.device)
        cells = cell.index_select(0, batch.index_select(0, edge_index[0]))
        shifts = torch.bmm(torch.cat(translations).unsqueeze(1), cells).squeeze(1)
        starts, ends = (positions.index_select(0, atoms) for atoms in edge_index)
        return Graphs(
            positions=positions,
            cell=cell,
            node_attrs=one_hot.to(**real),
            batch=batch,
            ptr=on_device,
            edge_index=edge_index,
            vectors=ends - starts + shifts,
        )
