"""Dummy edges: without any effect, and with the effect that no system sees the rest of its batch."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase.build import bulk

from mlip_refine.potential import Potential, Structure
from mlip_refine.potential.padding import far_shifts, with_spares

PROBES = ("energy", "forces", "stress")


def _cell(potential: Potential, seed: int, repeat: int = 2) -> Structure:
    """Rattled bcc, the denser the higher the seed: atoms have between 20 and 50 neighbours."""
    atoms = bulk("Ti", "bcc", a=3.3 - 0.004 * (seed % 100), cubic=True) * ((repeat,) * 3)
    atoms.positions += np.random.default_rng(seed).normal(0, 0.2, atoms.positions.shape)
    return potential.graphs.from_atoms(atoms)


@pytest.fixture(scope="module")
def titanium() -> Potential:
    return Potential.load("titanium-compact", default_dtype="float64")


def test_far_shifts_are_beyond_the_cutoff_and_short():
    cells = torch.diag_embed(torch.tensor([[2.5, 2.5, 4.0], [9.0, 9.1, 9.0], [30.0, 20.0, 1.0]]))
    shifts = far_shifts(cells, 6.0)
    assert shifts.tolist() == [[0, 0, 3], [0, 1, 0], [1, 0, 0]]
    assert (torch.bmm(shifts[:, None], cells).norm(dim=-1) > 9.0).all()


@pytest.mark.parametrize("kind", ["density", "nonlinear"])
def test_dummy_edges_change_nothing_at_all(build, frames, kind):
    """Energy, forces, stress and gradients of a loss on them, with 0 to 10 dummies a system."""
    potential = Potential(build(kind))
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


def test_spares_complete_any_choice_of_edges(titanium):
    builder = replace(titanium.graphs, edge_multiple=1)
    graphs = builder.collate([_cell(titanium, 1, 2), _cell(titanium, 2, 1), _cell(titanium, 3, 2)])
    spares = with_spares(graphs.edge_index, graphs.unit_shifts, graphs.ptr, graphs.cell, builder.cutoff, 4)
    assert spares.edge_index.shape[1] == graphs.edge_index.shape[1] + 9
    assert (spares.edge_index[1].diff() >= 0).all()
    generator = torch.Generator().manual_seed(0)
    own = torch.ones(spares.edge_index.shape[1], dtype=torch.bool)
    own[spares.places.flatten()] = False
    assert torch.equal(spares.edge_index[:, own], graphs.edge_index)
    for _ in range(20):
        inside = own & (torch.rand(len(own), generator=generator) < 0.7)
        full = spares.complete(inside)
        system = graphs.batch[spares.edge_index[1]]
        assert (torch.bincount(system[full]) % 4 == 0).all()
        assert torch.equal(full & own, inside)
        assert int(full.sum() - inside.sum()) <= 9
    untouched = with_spares(graphs.edge_index, graphs.unit_shifts, graphs.ptr, graphs.cell, 4.0, 1)
    assert torch.equal(untouched.edge_index, graphs.edge_index)
    everything = torch.ones(graphs.edge_index.shape[1], dtype=torch.bool)
    assert untouched.complete(everything) is everything


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
@pytest.mark.parametrize("kind", ["residual", "density", "nonlinear"])
def test_other_models_see_no_others_either(build, threads, kind, n_threads):
    """In float32, where with two threads indexing adds up in any order."""
    threads(n_threads)
    potential = Potential(build(kind, torch.float32), default_dtype="float32")
    others, first = [_cell(potential, i) for i in range(1, 17)], None
    for seed in range(103, 200, 16):
        out = potential.evaluate(potential.graphs.collate([_cell(potential, seed), *others]), PROBES)
        found = [out["energy"][1:].detach(), out["forces"][16:]]
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True)), seed
