"""Chunks fit: by atoms and edges, by measured memory, and in halves where memory runs out all the same."""

import weakref
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from ase.build import bulk

from mlip_refine.errors import MlipRefineError
from mlip_refine.potential import Graphs, Potential, Work, batching
from mlip_refine.potential.batching import (
    HELD,
    HOST_SHARE,
    PROBE_ATOMS,
    Chunker,
    Extent,
    Footprint,
    Systems,
    is_out_of_memory,
)
from mlip_refine.potential.graphs import Offsets

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Device:
    """A device of given memory, on which a chunk takes bytes by its size and an overhead."""

    def __init__(
        self,
        capacity: float,
        *,
        atom: float = 0.0,
        edge: float = 0.0,
        overhead: float = 0.0,
        square: float = 0.0,
    ) -> None:
        self.capacity, self.costs = capacity, (atom, edge, overhead, square)
        self.most, self.marks, self.released = 0.0, 0, 0
        self.resident = 1000.0

    def work(self, systems: Systems, part: slice) -> slice:
        extent, (atom, edge, overhead, square) = systems.extent(part), self.costs
        used = self.resident + atom * extent.atoms + edge * extent.edges + overhead + square * extent.atoms**2
        if used > self.capacity:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.most = max(self.most, used)
        return part

    def mark(self) -> int:
        self.marks, self.most = self.marks + 1, self.resident
        return int(self.resident)

    def peak(self) -> int:
        return int(self.most)

    def available(self) -> int:
        return int(self.capacity - self.resident)

    def release(self) -> None:
        self.released += 1


def _systems(sizes: list[tuple[int, int]]) -> Systems:
    atoms, edges = np.cumsum([(0, 0), *sizes], axis=0).T.tolist()
    return Systems(len(sizes), Extent(atoms[-1], edges[-1]), lambda: Offsets(atoms, edges))


def _run(chunker: Chunker, device: Device, systems: Systems, work: Work = Work.ENERGY) -> list[int]:
    """Numbers of systems of the chunks, which cover all in order."""
    parts = list(chunker.run(work, systems, lambda part: device.work(systems, part)))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(systems.count))
    return [part.stop - part.start for part in parts]


@pytest.mark.parametrize(("limit", "ends"), [(1, [1, 2, 3, 4]), (18, [2, 4]), (20, [3, 4]), (1000, [4])])
def test_chunks_hold_at_most_so_many_atoms(monkeypatch, limit, ends):
    monkeypatch.setitem(batching.CHUNK_ATOMS, "cpu", limit)
    plan = Chunker(CPU).plan(Work.ENERGY, _systems([(16, 9), (2, 9), (2, 9), (16, 9)]))
    assert [part.stop for part in plan] == ends
    assert [part.start for part in plan] == [0, *ends[:-1]]
    assert Chunker(CPU).plan(Work.ENERGY, _systems([])) == []


def test_dense_cells_count_by_their_edges():
    systems = _systems([(10, 100)] * 4 + [(10, 400)] * 4)
    limit = Extent(80, 800)
    assert systems.take(0, limit) == slice(0, 5)
    assert systems.take(4, limit) == slice(4, 6)
    assert systems.take(4, Extent(80, 100)) == slice(4, 5)
    assert systems.take(0, Extent(20, 800)) == slice(0, 2)
    assert systems.take(6, Extent(1e9, 1e9)) == slice(6, 8)


def test_what_fits_is_not_looked_into():
    """A batch on a device is waited for only if it is divided."""

    def synchronise() -> Offsets:
        raise AssertionError

    systems = Systems(3, Extent(162, 4000), synchronise)
    assert list(Chunker(CPU).run(Work.FORCES, systems, lambda part: part)) == [slice(0, 3)]


def test_measured_chunks_grow_from_a_probe_to_the_bound_of_speed():
    device = Device(1e12, atom=1e3, edge=1e2, overhead=1e5)
    chunker = Chunker(CUDA, device)
    chunks = _run(chunker, device, _systems([(64, 3200)] * 2000))
    assert chunks[0] == PROBE_ATOMS // 64
    assert all(after <= 8 * before for before, after in pairwise(chunks))
    assert set(chunks[3:-1]) == {20_000 // 64}
    assert device.marks == 3
    assert _run(chunker, device, _systems([(64, 3200)] * 100)) == [100]
    assert device.marks == 3


@pytest.mark.parametrize("overhead", [0.0, 1e6])
def test_measured_chunks_use_most_of_the_memory_and_not_more(capsys, overhead):
    device = Device(1e7, atom=1e3, edge=20.0, overhead=overhead)
    chunks = _run(Chunker(CUDA, device), device, _systems([(64, 3200)] * 2000))
    largest = (1e7 - 1e3 - overhead) / (64 * 1e3 + 3200 * 20)
    assert 0.6 * largest < max(chunks) <= 0.8 * largest + 1
    assert (device.released, capsys.readouterr().err) == (0, "")


def test_no_mixture_of_sparse_and_dense_cells_overruns(capsys):
    rng = np.random.default_rng(0)
    for atom, edge in [(1e3, 0.0), (0.0, 50.0), (1e3, 50.0)]:
        device = Device(2e7, atom=atom, edge=edge, overhead=1e4)
        chunker = Chunker(CUDA, device)
        for _ in range(10):
            atoms, neighbours = rng.integers(1, 200, 500), rng.integers(10, 90, 500)
            _run(chunker, device, _systems([*zip(atoms, atoms * neighbours, strict=True)]))
        assert device.released == 0
    assert capsys.readouterr().err == ""


def test_kinds_of_work_are_measured_apart():
    cheap, dear = Device(1e8, atom=1e2), Device(1e8, atom=1e4)
    chunker = Chunker(CUDA, cheap)
    systems = _systems([(100, 1)] * 1000)
    energies = max(_run(chunker, cheap, systems, Work.ENERGY))
    chunker.memory = dear
    gradients = max(_run(chunker, dear, systems, Work.GRADIENT))
    assert energies == 200
    assert 60 < gradients <= 80


def test_a_device_that_others_fill_is_given_half_and_the_word_comes_once(capsys):
    device = Device(1e7, atom=1e3)
    chunker, systems = Chunker(CUDA, device), _systems([(100, 1)] * 400)
    full = max(_run(chunker, device, systems))
    device.capacity /= 5
    chunks = _run(chunker, device, systems)
    assert max(chunks) == full // 4
    assert device.released == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert f"{100 * full} atoms" in lines[0]
    assert f"{25 * full} atoms" in lines[0] or f"{100 * (full // 4)} atoms" in lines[0]
    device.capacity *= 5
    assert max(_run(chunker, device, systems)) == full // 4
    assert (device.released, capsys.readouterr().err) == (2, "")


def test_a_limit_found_the_hard_way_is_not_raised_again(capsys):
    """Memory that grows with the square of the size: what is extrapolated linearly does not fit."""
    device = Device(1e6, square=1.0)
    chunks = _run(Chunker(CUDA, device), device, _systems([(64, 1)] * 100))
    assert chunks[:2] == [4, 8]
    assert max(chunks) == 8
    assert device.released == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_single_system_that_does_not_fit_is_named():
    device = Device(1e6, atom=1e3)
    with pytest.raises(MlipRefineError, match=r"forces of a single system of 5000 atoms with 70000 edges"):
        _run(Chunker(CUDA, device), device, _systems([(100, 50), (5000, 70_000), (100, 50)]), Work.FORCES)


def test_a_failed_chunk_is_freed_before_the_next_try():
    held: list[weakref.ref] = []

    def evaluate(part: slice) -> int:
        assert all(tensor() is None for tensor in held)
        if part.stop - part.start > 2:
            tensor = torch.zeros(10)
            cycle = [tensor]
            cycle.append(cycle)
            held.append(weakref.ref(tensor))
            raise torch.OutOfMemoryError
        return 0

    list(Chunker(CPU).run(Work.ENERGY, _systems([(1, 1)] * 8), evaluate))
    assert len(held) == 2


@torch.jit.script
def _scripted(n: int) -> torch.Tensor:
    return torch.zeros(n)


def test_the_allocators_errors_are_known_in_python_and_in_torchscript():
    for allocate in (torch.zeros, _scripted):
        with pytest.raises(RuntimeError) as caught:
            allocate(10**16)
        assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_other_errors_pass():
    def wrong(_: slice) -> None:
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        list(Chunker(CPU).run(Work.ENERGY, _systems([(1, 1)] * 4), wrong))


def test_free_memory_is_that_of_the_device_and_what_the_allocator_keeps(monkeypatch):
    counts = {"memory_reserved": 300, "memory_allocated": 200, "max_memory_allocated": 250}
    for name, count in counts.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, count=count: count)
    resets: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 8000))
    memory = Chunker(CUDA).memory
    assert memory is not None
    assert (memory.available(), memory.mark(), memory.peak()) == (1100, 200, 250)
    assert resets == [CUDA]
    assert Chunker(CPU).memory is None


def test_memory_bounds_a_chunk_on_a_cpu(monkeypatch, capsys):
    """The bound depends on nothing but the model and the machine, so that a run divides its work alike."""
    per_edge, per_atom = HELD[Work.FORCES]
    share = HOST_SHARE * 4e9
    monkeypatch.setattr(batching, "bytes_of_memory", lambda: 4 * 10**9)
    chunker = Chunker(CPU, footprint=Footprint(edge=1000, atom=10**7))
    edges, atoms = share / (per_edge * 1000), share / (per_atom * 1e7)
    limit = chunker.limit(Work.FORCES)
    assert (limit.atoms, limit.edges) == (pytest.approx(atoms), pytest.approx(edges))
    assert chunker.footprint.bytes(Work.FORCES, limit) == pytest.approx(2 * share)
    for systems in (_systems([(2, int(edges / 2.5))] * 5), _systems([(int(atoms / 2.5), 4)] * 5)):
        parts = list(chunker.run(Work.FORCES, systems, lambda part: part))
        assert [part.stop - part.start for part in parts] == [2, 2, 1]
    assert capsys.readouterr().err == ""
    assert Chunker(CPU).limit(Work.FORCES) == Extent(batching.CHUNK_ATOMS["cpu"], float("inf"))

    # What cannot be divided is tried, after a warning.
    huge = _systems([(1, round(3e9 / (per_edge * 1000)))] * 2)
    assert len(list(chunker.run(Work.FORCES, huge, lambda part: part))) == 2
    said = capsys.readouterr().err
    assert said.count("GB of memory; this machine has 4 GB") == 1
    assert "forces of a system of 1 atoms" in said


def test_a_footprint_is_what_convolutions_and_contractions_make():
    potential = Potential.load("titanium-compact")
    of_layer = 16 + 64 + 256  # features of the sender, radial weights, message
    found = Footprint.of(potential.module, torch.float64)
    assert found == Footprint(edge=2 * of_layer * 8, atom=2 * 256 * 8)  # pairs of harmonics at most
    assert potential.frozen_copy("float32").chunker.footprint == Footprint(found.edge // 2, found.atom // 2)
    assert Footprint.of(torch.nn.Linear(2, 2), torch.float32) == Footprint(0, 0)


@pytest.fixture(scope="module")
def _loaded() -> Potential:
    return Potential.load("titanium-compact")


@pytest.fixture
def titanium(_loaded: Potential) -> Iterator[Potential]:
    """The model on a device without experience."""
    _loaded.chunker = Chunker(CPU)
    yield _loaded
    _loaded.chunker = Chunker(CPU)


@pytest.fixture(scope="module")
def structures(_loaded):
    rng = np.random.default_rng(3)
    found = []
    for i in range(7):
        atoms = bulk("Ti", "hcp", a=2.95, c=4.68).repeat((2, 2, 1 + i % 2))
        atoms.positions += rng.normal(0, 0.08, atoms.positions.shape)
        found.append(_loaded.graphs.from_atoms(atoms))
    return found


class Cramped:
    """Runs out of memory above so many atoms, and notes how many every forward pass had."""

    def __init__(self, potential: Potential, most: int) -> None:
        self.sizes: list[int] = []
        self.most = most
        self.handle = potential.module.register_forward_pre_hook(self)

    def __call__(self, module: torch.nn.Module, inputs: tuple) -> None:
        self.sizes.append(len(inputs[0]["positions"]))
        if self.sizes[-1] > self.most:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to")


def test_energies_and_forces_recover(titanium, structures, capsys):
    probes = ("energy", "forces", "stress")
    graphs = titanium.graphs.collate(structures)
    whole = titanium.evaluate_chunked(graphs, probes)
    cramped = Cramped(titanium, 30)
    try:
        assert torch.allclose(titanium.energies(structures), whole["energy"], rtol=1e-12, atol=0)
        assert len(capsys.readouterr().err.splitlines()) == 1
        found = titanium.evaluate_chunked(graphs, probes)
        assert len(capsys.readouterr().err.splitlines()) == 1
        for probe in probes:
            assert torch.allclose(found[probe], whole[probe], rtol=1e-12, atol=1e-12)
            assert not found[probe].requires_grad
        cramped.sizes.clear()
        titanium.energies(structures)
        titanium.evaluate_chunked(graphs, probes)
        assert max(cramped.sizes) <= 30
        assert capsys.readouterr().err == ""
    finally:
        cramped.handle.remove()
    assert titanium.frozen_copy().chunker.limit(Work.ENERGY).atoms == batching.CHUNK_ATOMS["cpu"]


def test_a_single_structure_that_does_not_fit(titanium, structures):
    cramped = Cramped(titanium, 6)
    try:
        with pytest.raises(
            MlipRefineError, match=r"energies of a single system of 8 atoms with \d+ edges on cpu"
        ):
            titanium.energies(structures)
    finally:
        cramped.handle.remove()


def test_a_batch_that_fits_is_evaluated_without_looking_at_its_sizes(titanium, structures, monkeypatch):
    def synchronise(_: Graphs) -> Offsets:
        raise AssertionError

    monkeypatch.setattr(Graphs, "offsets", synchronise)
    forces = titanium.evaluate_chunked(titanium.graphs.collate(structures), ("forces",))["forces"]
    assert forces.shape == (sum(len(s.species) for s in structures), 3)
