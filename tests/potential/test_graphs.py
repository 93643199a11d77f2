"""Structures and batches: neighbours, refusals, joining and splitting."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import neighbor_list

from mlip_refine.errors import InputError
from mlip_refine.potential import GraphBuilder
from mlip_refine.potential.graphs import Graphs


@pytest.fixture
def builder() -> GraphBuilder:
    return GraphBuilder((14, 22), 4.0, torch.float64, torch.device("cpu"))


def _lengths(graphs: Graphs) -> torch.Tensor:
    return graphs.vectors.norm(dim=1)


def _crystal(seed: int, shape: str) -> Atoms:
    atoms = (
        bulk("Ti", "hcp", a=2.93, c=4.65) if shape == "small" else bulk("Ti", "bcc", a=3.2, cubic=True) * 2
    )
    rng = np.random.default_rng(seed)
    atoms.numbers = rng.choice([14, 22], len(atoms))
    if shape == "triclinic":
        shear = np.eye(3) + 0.25 * np.triu(rng.normal(size=(3, 3)), 1)
        atoms.set_cell(np.array(atoms.cell) @ shear, scale_atoms=True)
    atoms.positions += rng.normal(scale=0.2, size=atoms.positions.shape)
    return atoms


@pytest.mark.parametrize("shape", ["cubic", "triclinic", "small"])
def test_neighbours_are_those_of_ase(builder: GraphBuilder, shape: str) -> None:
    atoms = _crystal(1, shape)
    graphs = builder.collate([builder.from_atoms(atoms)])
    exact = np.sort(neighbor_list("d", atoms, 4.0))
    np.testing.assert_allclose(np.sort(_lengths(graphs).numpy()), exact, atol=1e-10)


def test_unwrapped_atoms_have_the_same_neighbours(builder: GraphBuilder) -> None:
    atoms = _crystal(2, "triclinic")
    moved = atoms.copy()
    moved.positions += np.random.default_rng(3).integers(-3, 4, (len(atoms), 3)) @ np.array(atoms.cell)
    one, two = (_lengths(builder.collate([builder.from_atoms(a)])).sort().values for a in (atoms, moved))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-9)


def test_collate_and_part_are_inverse(builder: GraphBuilder) -> None:
    structures = [builder.from_atoms(_crystal(i, s)) for i, s in enumerate(["cubic", "small", "triclinic"])]
    graphs = builder.collate(structures)
    assert graphs.ptr.tolist() == [0, 16, 18, 34]
    assert graphs.batch.tolist() == [0] * 16 + [1] * 2 + [2] * 16
    order = torch.argsort(graphs.edge_index[1], stable=True)
    graphs = Graphs(
        graphs.positions,
        graphs.cell,
        graphs.node_attrs,
        graphs.batch,
        graphs.ptr,
        graphs.edge_index[:, order],
        graphs.vectors[order],
    )
    offsets = graphs.offsets()
    assert offsets.atoms == [0, 16, 18, 34]
    assert offsets.edges == [0, *torch.bincount(graphs.batch[graphs.edge_index[0]]).cumsum(0).tolist()]
    for ends in [(1, 2, 3), (2, 3), (3,)]:
        parts = [graphs.part(slice(i, j), offsets) for i, j in zip((0, *ends), ends, strict=False)]
        torch.testing.assert_close(torch.cat([_lengths(p) for p in parts]), _lengths(graphs))
        torch.testing.assert_close(torch.cat([p.node_attrs for p in parts]), graphs.node_attrs)
        torch.testing.assert_close(torch.cat([p.volume for p in parts]), graphs.volume)
        for part in parts:
            assert part.ptr[0] == 0
            assert part.ptr[-1] == len(part.positions)
            assert part.edge_index.max() < len(part.positions)


def test_chosen_graphs_are_a_batch_of_their_own(builder: GraphBuilder) -> None:
    structures = [builder.from_atoms(_crystal(i, s)) for i, s in enumerate(["cubic", "small", "triclinic"])]
    chosen = builder.collate(structures).select(torch.tensor([True, False, True]))
    alone = builder.collate(structures[::2])
    for field in fields(Graphs):
        found, exact = getattr(chosen, field.name), getattr(alone, field.name)
        assert torch.equal(found, exact), field.name


def test_one_hot_follows_the_models_order(builder: GraphBuilder) -> None:
    atoms = _crystal(4, "cubic")
    attributes = builder.collate([builder.from_atoms(atoms)]).node_attrs
    assert attributes.argmax(1).tolist() == [[14, 22].index(z) for z in atoms.numbers]
    assert attributes.sum(1).tolist() == [1.0] * len(atoms)


def test_frames_share_elements_and_have_their_own_cells(builder: GraphBuilder) -> None:
    atoms = _crystal(5, "cubic")
    positions = torch.from_numpy(atoms.positions).expand(3, -1, -1)
    cells = torch.from_numpy(np.array(atoms.cell)) * torch.tensor([1.0, 1.01, 1.02])[:, None, None]
    graphs = builder.collate(builder.frames(positions, cells, atoms.numbers))
    torch.testing.assert_close(graphs.cell, cells)
    assert graphs.positions.dtype == torch.float64


def test_an_unknown_element_is_refused(builder: GraphBuilder) -> None:
    with pytest.raises(InputError, match="does not know") as caught:
        builder.from_atoms(bulk("Al", "fcc", a=4.0))
    assert "13" in str(caught.value)
    assert "22" in str(caught.value)


@pytest.mark.parametrize("pbc", [(True, True, False), (False, False, False)])
def test_an_open_structure_is_refused(builder: GraphBuilder, pbc: tuple[bool, ...]) -> None:
    atoms = bulk("Ti", "hcp", a=2.93, c=4.65)
    atoms.pbc = pbc
    with pytest.raises(InputError, match="not periodic"):
        builder.from_atoms(atoms)


def test_a_cell_without_volume_is_refused(builder: GraphBuilder) -> None:
    with pytest.raises(InputError, match="not periodic"):
        builder.from_atoms(Atoms("Ti", pbc=True))


def test_isolated_atoms_have_no_neighbours(builder: GraphBuilder) -> None:
    lone = Atoms("Ti", positions=[[1, 1, 1]], cell=np.eye(3) * 20, pbc=True)
    pair = Atoms("TiSi", positions=[[1, 1, 1], [1, 1, 9]], cell=np.eye(3) * 20, pbc=True)
    graphs = builder.collate([builder.from_atoms(lone), builder.from_atoms(pair)])
    assert graphs.edge_index.shape == (2, 0)
    assert graphs.vectors.shape == (0, 3)
