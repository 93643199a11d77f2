"""How many systems are evaluated at a time: as many as are fast and fit.

Speed gives one bound, in atoms. Memory gives another. On a GPU the peak of a small first chunk is measured
and scaled up, and measured again when chunks have grown. On a CPU the bound follows from the model and the
size of the memory alone, so that a run that is repeated or resumed divides its work alike, to the same bits.
Where memory runs out all the same, the chunk is halved.
"""

import gc
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, partial
from typing import Any, Protocol, Self

import torch

from mlip_refine.errors import OutOfMemoryError, bytes_in_words
from mlip_refine.potential.graphs import Graphs, Offsets, Structure
from mlip_refine.progress import console

CHUNK_ATOMS = {"cpu": 900, "cuda": 20_000}
"""Number of atoms at a time by device: enough to fill the hardware; on a CPU few enough for its caches."""

PROBE_ATOMS = 256
"""Number of atoms of the first chunk on a device whose memory is measured."""

_GROWTH = 8.0
"""Largest step from one measured size to the next: what is extrapolated stays near what was seen."""

_SHARE = 0.8
"""Part of the free memory that is planned for; the rest is for fragments and other users of the device."""

HOST_SHARE = 0.2
"""Part of a machine's memory that the edges of a chunk may take on a CPU, and its atoms as much again."""

# TorchScript turns the allocator's own error into a plain RuntimeError that quotes it.
_SIGNS = ("out of memory", "not enough memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


class Work(StrEnum):
    """Kinds of evaluation, which differ in the memory that they need.

    On a CPU memory is estimated from what the model makes of every edge and every atom (`HELD`, `Footprint`),
    rather too high: a model of the size of MH-1 takes 0.55 to 0.96 of it (peaks of fresh processes).

    There `titanium-compact` in single precision takes per edge, kB: forces 6, their gradient 17, the gradient
    of differences 31 (both ends are held); products with the Hessian 16, their gradient 43; Born terms, of
    six directions, 18 and 136. (Peaks of fresh processes beyond what they held before, a batch of 14,280
    edges, means of two that differ by up to 14 %.)
    """

    ENERGY = "energies"
    FORCES = "forces"
    GRADIENT = "gradients"
    FORCES_GRADIENT = "gradients of forces"
    DIFFERENCE_GRADIENT = "gradients of differences of forces"
    HESSIAN = "products with the Hessian"
    HESSIAN_GRADIENT = "gradients of products with the Hessian"
    BORN = "second derivatives"
    BORN_GRADIENT = "gradients of second derivatives"


HELD: dict[Work, tuple[float, float]] = {
    Work.ENERGY: (1.5, 3.0),
    Work.FORCES: (2.5, 6.0),
    Work.GRADIENT: (3.0, 6.0),
    Work.FORCES_GRADIENT: (6.0, 13.0),
    Work.DIFFERENCE_GRADIENT: (12.0, 26.0),
    Work.HESSIAN: (7.0, 14.0),
    Work.HESSIAN_GRADIENT: (15.0, 28.0),
    Work.BORN: (7.0, 14.0),
    Work.BORN_GRADIENT: (50.0, 90.0),
}
"""How often the numbers of a `Footprint` are held at the peak of a kind of work: those of edges, of atoms."""


@dataclass(frozen=True)
class Footprint:
    """Size of what a model makes of a structure, by which the memory of an evaluation is estimated.

    Attributes:
        edge: Bytes that the convolutions make of an edge: features of the sender, radial weights and message
            of every layer.
        atom: Bytes of the largest intermediate of the symmetric contractions of an atom, of every layer.
    """

    edge: int
    atom: int

    @classmethod
    def of(cls, module: torch.nn.Module, dtype: torch.dtype) -> Self:
        """Return that of a MACE, and nothing for any other model."""

        def parts(blocks: str, name: str) -> list[Any]:
            found = [getattr(block, name, None) for block in getattr(module, blocks, ())]
            return [getattr(part, "original", part) for part in found if part is not None]

        edge = atom = 0
        for convolution in parts("interactions", "conv_tp"):
            edge += convolution.irreps_in1.dim + convolution.weight_numel + convolution.irreps_out.dim
        for product in parts("products", "symmetric_contractions"):
            contraction = product.contractions[0]
            harmonics = product.irreps_in.dim // contraction.num_features
            atom += product.irreps_in.dim * harmonics ** max(0, contraction.correlation - 2)
        return cls(edge * dtype.itemsize, atom * dtype.itemsize)

    def bytes(self, work: Work, extent: "Extent") -> float:
        """Return about how many bytes a kind of work takes for a chunk."""
        edge, atom = HELD[work]
        return edge * self.edge * extent.edges + atom * self.atom * extent.atoms

    def limit(self, work: Work, share: float) -> "Extent":
        """Return the chunk whose edges and whose atoms take so many bytes each; no bound without numbers."""
        edge, atom = HELD[work]
        return Extent(
            share / (atom * self.atom) if self.atom else math.inf,
            share / (edge * self.edge) if self.edge else math.inf,
        )


def bytes_of_memory() -> int:
    """Return the size of the memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True)
class Extent:
    """Size of a chunk, or a bound on it.

    Attributes:
        atoms: Number of atoms.
        edges: Number of edges, the neighbours of all atoms.
    """

    atoms: float
    edges: float

    def fits(self, limit: Self) -> bool:
        """Tell whether neither number is above its bound."""
        return self.atoms <= limit.atoms and self.edges <= limit.edges

    def times(self, factor: float) -> "Extent":
        """Return both numbers scaled by a factor."""
        return Extent(factor * self.atoms, factor * self.edges)

    def over(self, other: Self) -> float:
        """Return the multiple of another chunk that bounds this one, if costs are linear in both numbers."""
        return max(self.atoms / max(other.atoms, 1), self.edges / max(other.edges, 1))

    def __str__(self) -> str:
        return f"{self.atoms:.0f} atoms with {self.edges:.0f} edges"


UNBOUNDED = Extent(math.inf, math.inf)


class Systems:
    """Sizes of consecutive systems.

    Attributes:
        count: Number of systems.
        total: Extent of all systems together.
    """

    def __init__(self, count: int, total: Extent, offsets: Callable[[], Offsets]) -> None:
        """Keep the sizes; `offsets` is called only if the systems are divided."""
        self.count, self.total = count, total
        self._find_offsets = offsets

    @classmethod
    def of_structures(cls, structures: Sequence[Structure]) -> Self:
        """Return the sizes of structures."""
        atoms, edges = [0], [0]
        for structure in structures:
            atoms.append(atoms[-1] + len(structure.species))
            edges.append(edges[-1] + structure.n_edges)
        return cls(len(structures), Extent(atoms[-1], edges[-1]), lambda: Offsets(atoms, edges))

    @classmethod
    def of_graphs(cls, graphs: Graphs) -> Self:
        """Return sizes of a batch, edges sorted by receiver; waits for the device only if it is divided."""
        total = Extent(len(graphs.positions), graphs.edge_index.shape[1])
        return cls(graphs.n_graphs, total, graphs.offsets)

    @cached_property
    def offsets(self) -> Offsets:
        """First atom and first edge of every system, and the ends."""
        return self._find_offsets()

    def extent(self, part: slice) -> Extent:
        """Return the size of consecutive systems."""
        if part == slice(0, self.count):
            return self.total
        atoms, edges = self.offsets
        return Extent(atoms[part.stop] - atoms[part.start], edges[part.stop] - edges[part.start])

    def take(self, start: int, limit: Extent) -> slice:
        """Return the systems from `start` on that fit into a limit, at least one."""
        if start == 0 and self.total.fits(limit):
            return slice(0, self.count)
        atoms, edges = self.offsets
        stop = min(
            bisect_right(atoms, atoms[start] + limit.atoms), bisect_right(edges, edges[start] + limit.edges)
        )
        return slice(start, max(start + 1, stop - 1))


class Memory(Protocol):
    """The memory of a device; all numbers are bytes."""

    def mark(self) -> int:
        """Start to look for a peak; returns what is in use now."""

    def peak(self) -> int:
        """Most that was in use at once since the mark."""

    def available(self) -> int:
        """How much more can be allocated now."""

    def release(self) -> None:
        """Give back what is held but not in use."""


@dataclass(frozen=True)
class CudaMemory:
    """The memory of a GPU as torch's allocator counts it, on the host: nothing here waits for a kernel.

    A mark resets the peak statistics of the device.
    """

    device: torch.device

    def mark(self) -> int:
        """Start to look for a peak; returns what is in use now."""
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        """Most that was in use at once since the mark."""
        return torch.cuda.max_memory_allocated(self.device)

    def available(self) -> int:
        """What the device has free, and what the allocator holds for later."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def release(self) -> None:
        """Empty the allocator's cache."""
        torch.cuda.empty_cache()


class Chunker:
    """Divides work on many systems into chunks that suit a device, and remembers which sizes fit.

    Attributes:
        device: Device that does the work.
        memory: Meter of the memory of a GPU; `None` on a CPU.
        footprint: Size of the model, by which memory on a CPU is estimated.
    """

    def __init__(
        self, device: torch.device, memory: Memory | None = None, footprint: Footprint | None = None
    ) -> None:
        """Start without any size that is known to fit.

        Args:
            device: Device that does the work.
            memory: Meter to use in place of the device's own.
            footprint: Size of the model, where it is known.
        """
        self.device, self.footprint = device, footprint or Footprint(0, 0)
        self.memory = memory or (CudaMemory(device) if device.type == "cuda" else None)
        self._fitting: dict[Work, Extent] = {}
        self._warned: set[Work] = set()
        self._measured: dict[Work, Extent] = {}

    def limit(self, work: Work) -> Extent:
        """Return the largest chunk for a kind of work that is fast, and fits as far as is known now."""
        fitting = self._fitting.get(work, UNBOUNDED)
        atoms = min(CHUNK_ATOMS[self.device.type], fitting.atoms)
        if self.memory is not None:
            return Extent(atoms, fitting.edges)
        host = self.footprint.limit(work, HOST_SHARE * bytes_of_memory())
        return Extent(min(atoms, host.atoms), min(fitting.edges, host.edges))

    def plan(self, work: Work, systems: Systems) -> list[slice]:
        """Return chunks of the largest size that is not known to be too large."""
        parts, start = [], 0
        while start < systems.count:
            parts.append(systems.take(start, self.limit(work)))
            start = parts[-1].stop
        return parts

    def run[T](self, work: Work, systems: Systems, evaluate: Callable[[slice], T]) -> Iterator[T]:
        """Do the work chunk by chunk, in smaller ones where memory runs out.

        Args:
            work: Kind of the work.
            systems: Sizes of the systems.
            evaluate: Work on one chunk. It may be called again for a part of a chunk that failed, so it must
                leave nothing behind but its result.

        Yields:
            The result of every chunk, in order.

        Raises:
            OutOfMemoryError: If a single system does not fit.
        """
        start, failed = 0, None
        while start < systems.count:
            part = systems.take(start, self._next(work))
            extent = systems.extent(part)
            done = self._measured_attempt(work, extent, partial(evaluate, part))
            if done is None:
                failed = failed or extent
                self._halve(work, part, extent)
                continue
            if failed is not None:
                _report(work, failed, extent)
            start, failed = part.stop, None
            yield done[0]

    def at_once[T](self, work: Work, systems: Systems, evaluate: Callable[[], T]) -> tuple[T] | None:
        """Do the work on all systems together, if they are one chunk as far as is known.

        Returns:
            The result, or `None` if they are not, or memory ran out: `run` does it in parts.

        Raises:
            OutOfMemoryError: If a single system does not fit.
        """
        whole = slice(0, systems.count)
        if systems.take(0, self._next(work)) != whole:
            return None
        done = self._measured_attempt(work, systems.total, evaluate)
        if done is None:
            self._halve(work, whole, systems.total)
            _report(work, systems.total, self.limit(work))
        return done

    def _next(self, work: Work) -> Extent:
        """Return the bound on the next chunk: a probe where memory is still to be measured."""
        if self.memory is None or work in self._fitting:
            return self.limit(work)
        return Extent(PROBE_ATOMS, math.inf)

    def _measured_attempt[T](self, work: Work, extent: Extent, evaluate: Callable[[], T]) -> tuple[T] | None:
        """Try a chunk, and learn from its peak if it is much larger than any before."""
        seen = self._measured.get(work, Extent(0, 0))
        if self.memory is None:
            self._warn_of(work, extent)
        if self.memory is None or extent.over(seen) < 2:
            return _attempt(evaluate)
        before = self.memory.mark()
        done = _attempt(evaluate)
        if done is not None:
            used = max(self.memory.peak() - before, 1)
            self._measured[work] = extent
            self._fitting[work] = extent.times(min(_GROWTH, _SHARE * self.memory.available() / used))
        return done

    def _warn_of(self, work: Work, extent: Extent) -> None:
        """Say, once, what a chunk takes that may not fit: a CPU ends a program without a word."""
        needed, there = self.footprint.bytes(work, extent), bytes_of_memory()
        if needed > 0.5 * there and work not in self._warned:
            self._warned.add(work)
            console.print(
                f"{work} of a system of {extent} take about {bytes_in_words(int(needed))} of memory; this "
                f"machine has {bytes_in_words(there)}",
                soft_wrap=True,
            )

    def _halve(self, work: Work, part: slice, extent: Extent) -> None:
        """Remember that a chunk does not fit, and free what its failed evaluation held."""
        gc.collect(1)  # cycles among the failed frames, which are young; all generations would take a second
        if self.memory is not None:
            self.memory.release()
        if part.stop - part.start == 1:
            raise OutOfMemoryError(
                f"out of memory in the {work} of a single system of {extent} on {self.device}: it takes a "
                "smaller system, lower precision, or a device with more memory"
            )
        self._fitting[work] = extent.times(0.5)
        # A limit that was found the hard way is not raised by measuring.
        self._measured[work] = UNBOUNDED


def _attempt[T](evaluate: Callable[[], T]) -> tuple[T] | None:
    """Return the result, or `None` if memory ran out.

    The error ends here, and with it the last hold on the frames that it came through and on their tensors.
    """
    try:
        return (evaluate(),)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out, on a CPU or a GPU, in Python or in TorchScript."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def _report(work: Work, failed: Extent, fitting: Extent) -> None:
    console.print(f"out of memory in the {work} of {failed} at once: going on with {fitting}", soft_wrap=True)
