"""Products, columns and force constants: against dense differences, on balls and springs, in chunks."""

from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch import Tensor

from mlip_refine import testing
from mlip_refine.crystals.phonons.hessian import (
    force_constants,
    hessian_columns,
    hessian_gradients,
    hessian_products,
    require_hessian,
    summed,
    unit_displacements,
)
from mlip_refine.errors import MlipRefineError
from mlip_refine.potential import Potential, Work, batching

STENCIL = {3: 1 / 60, 2: -3 / 20, 1: 3 / 4, -1: -3 / 4, -2: 3 / 20, -3: -1 / 60}
"""Central difference of sixth order."""

F64 = torch.float64
TITANIUM = bulk("Ti", "hcp", a=2.93, c=4.65)


@pytest.fixture(scope="module")
def titanium() -> Potential:
    """Titanium in float64; tests must leave it as it is."""
    return Potential.load("titanium-compact")


def _rattled() -> Atoms:
    atoms = TITANIUM * (2, 1, 1)
    atoms.positions += np.random.default_rng(1).normal(scale=0.1, size=atoms.positions.shape)
    return atoms


def _dense(potential: Potential, atoms: Atoms, h: float = 2e-3) -> Tensor:
    """The whole Hessian `[3N, 3N]` from forces of displaced atoms, with neighbours of their own."""
    rows = []
    for i in range(3 * len(atoms)):
        row = torch.zeros(len(atoms), 3, dtype=F64)
        for steps, weight in STENCIL.items():
            moved = atoms.copy()
            moved.positions[i // 3, i % 3] += steps * h
            graphs = potential.graphs.collate([potential.graphs.from_atoms(moved)])
            row -= weight / h * potential.evaluate(graphs, ("forces",))["forces"].detach()
        rows.append(row.flatten())
    return torch.stack(rows)


def test_all_columns_are_the_dense_hessian_of_differences(titanium):
    atoms = _rattled()
    columns = [(atom, axis) for atom in range(len(atoms)) for axis in range(3)]
    found = hessian_columns(titanium, titanium.graphs.from_atoms(atoms), columns).flatten(1)
    expected = _dense(titanium, atoms)
    assert (found - expected).norm() < 1e-7 * expected.norm()
    torch.testing.assert_close(found, found.T, rtol=0, atol=1e-12)


def test_chunks_are_those_of_products_with_the_hessian(titanium, monkeypatch):
    """They take as much memory as a Born term, but a third of it where derivatives are wanted."""
    found: list[Work] = []
    run = batching.Chunker.run
    monkeypatch.setattr(
        batching.Chunker, "run", lambda self, work, *rest: found.append(work) or run(self, work, *rest)
    )
    structure, direction = titanium.graphs.from_atoms(TITANIUM), torch.ones(2, 3, dtype=F64)
    hessian_products(titanium, [structure], [direction])
    hessian_gradients(titanium, [structure], [direction], [direction])
    assert found == [Work.HESSIAN, Work.HESSIAN_GRADIENT]


def test_structures_of_all_sizes_and_chunks(titanium, monkeypatch):
    graphs = titanium.graphs
    small, large = graphs.from_atoms(_rattled()), graphs.from_atoms(TITANIUM * (2, 2, 1))
    generator = torch.Generator().manual_seed(2)
    structures = [small, large, large, small]
    directions = [torch.randn(len(s.positions), 3, generator=generator, dtype=F64) for s in structures]
    adjoints = [torch.randn(v.shape, generator=generator, dtype=F64) for v in directions]
    whole = hessian_products(titanium, structures, directions)
    one = hessian_gradients(titanium, structures, directions, adjoints)
    monkeypatch.setitem(batching.CHUNK_ATOMS, "cpu", 5)
    parts = hessian_products(titanium, structures, directions)
    many = hessian_gradients(titanium, structures, directions, adjoints)
    for s, v, a, b in zip(structures, directions, whole, parts, strict=True):
        alone = titanium.hessian_product(graphs.collate([s]), v).positions
        torch.testing.assert_close(a, alone, rtol=0, atol=1e-12)
        torch.testing.assert_close(b, a, rtol=0, atol=1e-12)
    for a, b in zip(one, many, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert (b - a).norm() <= 1e-10 * a.norm()


def test_gradients_are_those_of_differences(titanium):
    potential = Potential.from_module(titanium.module)
    structure = potential.graphs.from_atoms(_rattled())
    generator = torch.Generator().manual_seed(3)
    v, w = torch.randn(2, 4, 3, generator=generator, dtype=F64)
    start = potential.parameters()
    change = {
        n: p.abs().mean() * torch.randn(p.shape, generator=generator, dtype=F64) for n, p in start.items()
    }
    gradients = hessian_gradients(potential, [structure], [v], [w])
    named = zip(potential.trainable_parameters(), gradients, strict=True)
    slope = sum(float((change[n] * g).sum()) for n, g in named if g is not None)
    h, difference = 1e-4, 0.0
    for steps, weight in STENCIL.items():
        with potential.holding({n: p + steps * h * change[n] for n, p in start.items()}):
            difference += weight / h * float((w * hessian_products(potential, [structure], [v])[0]).sum())
    assert slope == pytest.approx(difference, rel=1e-6)


def test_force_constants_of_springs_from_irreducible_columns(phonons_of, springs):
    salt = bulk("NaCl", "rocksalt", a=5.64)
    made = phonons_of(salt, (2, 2, 2), lambda atoms: testing.bond_springs(atoms, {2.9: 2.5, 4.1: 0.8}))
    potential = springs(salt, {2.9: (2.5, 2.82), 4.1: (0.8, 2.82 * 2**0.5)})
    structure = potential.graphs.from_atoms(made.supercell)
    assert len(made.irreducible()) == 2
    found = force_constants(potential, structure, made.translations, made.symmetry)
    torch.testing.assert_close(found, made.force_constants, rtol=0, atol=1e-12)


def test_force_constants_of_a_model_are_its_columns(titanium, phonons_of):
    made = phonons_of(TITANIUM, (2, 2, 2), None)
    structure = titanium.graphs.from_atoms(made.supercell)
    found = force_constants(titanium, structure, made.translations, made.symmetry)
    places = [(atom, axis) for atom in made.primitive_atoms for axis in range(3)]
    columns = hessian_columns(titanium, structure, places).view(2, 3, 16, 3).transpose(1, 2)
    torch.testing.assert_close(found, columns, rtol=0, atol=1e-10)


def test_right_second_derivatives_pass(titanium):
    require_hessian(titanium, titanium.graphs.from_atoms(TITANIUM * (2, 2, 2)))
    single = Potential.load("titanium-compact", default_dtype="float32")
    require_hessian(single, single.graphs.from_atoms(TITANIUM * (2, 2, 2)))


@pytest.mark.parametrize("what", ["symmetry", "nan"])
def test_wrong_second_derivatives_are_refused(titanium, monkeypatch, what: str):
    potential = Potential.from_module(titanium.module)
    right = potential.curvature

    def wrong(graphs: Any) -> Any:
        curvature = right(graphs)
        along = curvature.along

        def changed(direction: Tensor) -> Any:
            found = along(direction)
            if what == "nan":
                return found._replace(positions=found.positions * torch.nan)
            # Too small a change for differences to show.
            shifted = found.positions + 1e-6 * (direction - direction.mean(0)).roll(1, dims=1)
            return found._replace(positions=shifted)

        object.__setattr__(curvature, "along", changed)
        return curvature

    monkeypatch.setattr(potential, "curvature", wrong)
    structure = potential.graphs.from_atoms(TITANIUM * (2, 2, 2))
    expected = "differences of forces" if what == "nan" else "the symmetry of second derivatives"
    with pytest.raises(MlipRefineError, match=f"contradict {expected}"):
        require_hessian(potential, structure)


def test_units_and_sums():
    first, second = unit_displacements(3, [(2, 1), (0, 0)])
    assert first.flatten().tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 0]
    assert second.flatten().tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0]
    one = torch.ones(2)
    total = summed([None, one, None, one], [None, None, one, one])
    assert total[0] is None
    assert [t.tolist() for t in total if t is not None] == [[1, 1], [1, 1], [2, 2]]
