"""Neighbour tables: exact, small, and padded so that no system sees the rest of its batch."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk

from mlip_refine.potential import GraphBuilder, Potential, Structure
from mlip_refine.potential.neighbours import PairTable, chosen_pairs

PROBES = ("energy", "forces", "stress")


def _cell(potential: Potential, seed: int, repeat: int = 2) -> Structure:
    """Rattled bcc, the denser the higher the seed: atoms have between 20 and 50 neighbours."""
    atoms = bulk("Ti", "bcc", a=3.3 - 0.004 * (seed % 100), cubic=True) * ((repeat,) * 3)
    atoms.positions += np.random.default_rng(seed).normal(0, 0.2, atoms.positions.shape)
    return potential.graphs.from_atoms(atoms)


@pytest.fixture(scope="module")
def titanium() -> Potential:
    return Potential.load("titanium-compact", default_dtype="float64")


def _edges(structure: Structure) -> set[tuple[int, ...]]:
    """Edges as (sender, receiver, shift), without dummies."""
    frame, pair = chosen_pairs(structure.chosen[None], len(structure.shifts))
    assert not frame.any()
    rows = torch.cat([structure.pairs.T.long(), structure.shifts.long()], dim=1)[pair].tolist()
    vectors = structure.positions[[r[1] for r in rows]] - structure.positions[[r[0] for r in rows]]
    lengths = (vectors + torch.tensor([r[2:] for r in rows]).double() @ structure.cell).norm(dim=-1)
    kept = [tuple(row) for row, length in zip(rows, lengths.tolist(), strict=True) if length < 4.0]
    assert len(set(kept)) == len(kept)
    assert len(rows) == structure.n_edges
    assert [row[1] for row in rows] == sorted(row[1] for row in rows)
    return set(kept)


def _movie(kind: str, n_frames: int, amplitude: float) -> tuple[Atoms, torch.Tensor, torch.Tensor]:
    """Frames of a crystal that vibrates and breathes."""
    rng = np.random.default_rng(3)
    atoms = bulk("Ti", "bcc", a=3.2, cubic=True) * 2 if kind == "bcc" else bulk("Ti", "hcp", a=2.93, c=4.65)
    strains = np.eye(3) + 0.02 * rng.normal(size=(n_frames, 3, 3))
    positions = (atoms.positions + rng.normal(0, amplitude, (n_frames, len(atoms), 3))) @ strains
    # Far from the home cell, as unwrapped trajectories are.
    cells = atoms.cell.array @ strains
    positions[:, 0] += cells[:, 1] * 40 - cells[:, 0] * 3
    return atoms, torch.from_numpy(positions), torch.from_numpy(cells)


@pytest.fixture(params=[1, 4])
def builder(request) -> GraphBuilder:
    return GraphBuilder((22,), 4.0, torch.float64, torch.device("cpu"), request.param)


@pytest.mark.parametrize(("kind", "amplitude"), [("bcc", 0.15), ("hcp", 0.1), ("bcc", 0.45)])
def test_frames_have_the_neighbours_of_a_search_of_their_own(builder, kind, amplitude):
    """Also where some frames move too far to share a table."""
    atoms, positions, cells = _movie(kind, 12, amplitude)
    frames = builder.frames(positions, cells, atoms.numbers)
    sharing = sum(f.pairs is frames[0].pairs for f in frames)
    assert sharing == 12 if amplitude < 0.2 else sharing < 12
    for frame, x, cell in zip(frames, positions, cells, strict=True):
        alone = builder.structure(x, cell, frame.species)
        assert _edges(frame) == _edges(alone)
        assert frame.n_edges % builder.edge_multiple == 0
    first, second = builder.collate(frames), builder.collate([*frames[:5], *frames[5:]])
    assert torch.equal(first.edge_index, second.edge_index)


def test_frames_that_go_anywhere_have_lists_of_their_own(builder):
    atoms, positions, cells = _movie("bcc", 3, 1.5)
    frames = builder.frames(positions, cells, atoms.numbers)
    assert len({id(f.pairs) for f in frames}) == 3


def test_batches_mix_tables(builder):
    atoms, positions, cells = _movie("bcc", 6, 0.15)
    shared = builder.frames(positions, cells, atoms.numbers)
    own = [builder.structure(f.positions, f.cell, f.species) for f in shared]
    mixed = builder.collate([own[0], *shared[1:3], own[3], *shared[4:]])
    pure = builder.collate(shared)
    for graphs in (mixed, pure):
        assert (graphs.edge_index[1].diff() >= 0).all()
    lengths = [graphs.vectors.norm(dim=-1) for graphs in (mixed, pure)]
    for found in lengths:
        assert int((found < 4.0).sum()) == sum(len(_edges(f)) for f in shared)
    one, two = (torch.sort(found[found < 4.0]).values for found in lengths)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-9)


def test_a_frame_of_a_crystal_needs_little_memory(titanium):
    """Positions in double precision and a bit for every pair: 2,000 frames of 54 atoms take 4 MB."""
    atoms = bulk("Ti", "hcp", a=2.95, c=4.68).repeat((3, 3, 3))
    noise = np.random.default_rng(0).normal(0, 0.1, (20, 54, 3))
    cells = torch.from_numpy(atoms.cell.array.copy()).expand(20, 3, 3)
    frames = titanium.graphs.frames(torch.from_numpy(atoms.positions + noise), cells, atoms.numbers)
    own = {"positions", "cell", "chosen"}
    for frame in frames:
        sizes = {name: t.numel() * t.element_size() for name, t in vars(frame).items()}
        assert sum(sizes[name] for name in own) < 2000
        assert all(getattr(frame, name) is getattr(frames[0], name) for name in sizes.keys() - own)
    assert frames[0].pairs.dtype == frames[0].shifts.dtype == torch.int8


def test_integers_are_as_large_as_they_must_be():
    atoms = bulk("Ti", "sc", a=2.0) * (150, 1, 1)
    positions, cell = torch.from_numpy(atoms.positions), torch.from_numpy(atoms.cell.array.copy())
    moved = positions.clone()
    moved[3] += 200 * cell[1]
    for x, kinds in ((positions, (torch.int16, torch.int8)), (moved, (torch.int16, torch.int16))):
        table = PairTable.find(x, cell, 2.5, 3)
        assert (table.pairs.dtype, table.shifts.dtype) == kinds
        assert table.shifts.shape[0] == 6 * 150 + 3


def test_dummies_are_longer_than_the_cutoff():
    for lengths in ([2.5, 2.5, 4.0], [9.0, 9.1, 9.0], [30.0, 20.0, 3.0]):
        cell = torch.diag(torch.tensor(lengths)).double()
        table = PairTable.find(torch.zeros(1, 3).double(), cell, 6.0, 3)
        vectors = table.shifts[-3:].double() @ cell
        assert (vectors.norm(dim=1) > 12.0).all()
        assert (table.pairs[:, -3:] == 0).all()


@pytest.mark.parametrize("kind", ["density", "nonlinear"])
def test_dummy_edges_change_nothing_at_all(build, frames, kind):
    """Energy, forces, stress and gradients of a loss on them, with 0 to 10 dummies a system."""
    potential = Potential.from_module(build(kind))
    results = []
    for multiple in (1, 4, 11):
        builder = replace(potential.graphs, edge_multiple=multiple)
        graphs = builder.collate([builder.from_atoms(f) for f in frames])
        assert (torch.bincount(graphs.batch[graphs.edge_index[1]]) % multiple == 0).all()
        out = potential.evaluate(graphs, PROBES, create_graph=True)
        loss = sum(out[name].square().sum() for name in PROBES)
        parameters = [p for p in potential.trainable_parameters().values() if p.numel()]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        results.append([*(out[name].detach() for name in PROBES), *(g for g in gradients if g is not None)])
    for padded in results[1:]:
        for plain, other in zip(results[0], padded, strict=True):
            torch.testing.assert_close(plain, other, rtol=1e-12, atol=1e-12)


def test_an_isolated_atom_needs_no_dummies(titanium):
    atoms = bulk("Ti", "sc", a=20.0)
    graphs = titanium.graphs.collate([titanium.graphs.from_atoms(atoms)])
    assert graphs.edge_index.shape == (2, 0)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("n_threads", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_system_does_not_see_the_others_of_its_batch(titanium, threads, dtype, n_threads):
    """Twelve systems behind one that changes 17 times, from the very first call on, bit for bit."""
    threads(n_threads)
    potential = titanium.frozen_copy(dtype)
    others, first = [_cell(potential, i) for i in range(1, 13)], None
    for seed in range(103, 200, 6):
        graphs = potential.graphs.collate([_cell(potential, seed), *others])
        out = potential.evaluate(graphs, PROBES)
        found = [out["energy"][1:], out["forces"][16:], out["stress"][1:]]
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True)), seed


@pytest.mark.parametrize("n_threads", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["density", "nonlinear"])
def test_other_models_see_no_others_either(build, threads, kind, n_threads):
    """In float32, where with two threads indexing adds up in any order."""
    threads(n_threads)
    potential = Potential.from_module(build(kind, torch.float32), default_dtype="float32")
    others, first = [_cell(potential, i) for i in range(1, 17)], None
    for seed in range(103, 200, 32):
        out = potential.evaluate(potential.graphs.collate([_cell(potential, seed), *others]), PROBES)
        found = [out["energy"][1:].detach(), out["forces"][16:]]
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True)), seed
