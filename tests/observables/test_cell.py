"""Lattice constants and angles of cells, and of the unit cell whatever box a crystal is in."""

import math

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch import Tensor

from mlip_refine.errors import InputError
from mlip_refine.observables import average, conventional_lattice
from mlip_refine.observables.cell import CellAngles, Lattice, cell_angles

A, C = 2.95, 4.68
HCP = bulk("Ti", "hcp", a=A, c=C)
TIN = Atoms("Sn", cell=[[3, 0, 0], [0, 4, 0], [0, 0, 5]], pbc=True)


def rows(cell: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(cell))[None]


def test_hcp_constants_are_the_same_in_every_box(make_sample) -> None:
    a, c = 2.95, 4.68
    hexagonal = bulk("Ti", "hcp", a=a, c=c) * (4, 4, 3)
    orthorhombic = bulk("Ti", "hcp", a=a, c=c, orthorhombic=True) * (4, 2, 3)
    for atoms, ratios in (
        (hexagonal, {"a": (4, 4, None), "c": (None, None, 3)}),
        (orthorhombic, {"a": (4, 2 * math.sqrt(3), None), "c": (None, None, 3)}),
    ):
        found = average(Lattice(ratios), make_sample(cells=rows(atoms.cell.array)))
        assert found.tolist() == pytest.approx([a, c])


def test_repeats_give_the_constants_of_the_unit_cell(make_sample) -> None:
    cells = torch.diag_embed(torch.tensor([[6.0, 8.0, 15.0], [6.2, 8.4, 15.6]], dtype=torch.float64))
    lattice = Lattice.of_repeats((2, 2, 3))
    assert lattice.labels == ("a", "b", "c")
    assert average(lattice, make_sample(cells=cells)).tolist() == pytest.approx([3.05, 4.1, 5.1])


def test_angles_are_those_of_ase(make_sample) -> None:
    atoms = bulk("Al", "fcc", a=4.0)
    atoms.set_cell(np.array([[4.0, 0.1, 0.2], [1.0, 3.0, -0.3], [0.3, 0.5, 5.0]]))
    found = average(CellAngles(), make_sample(cells=rows(atoms.cell.array)))
    assert found.tolist() == pytest.approx(list(atoms.cell.angles()))
    assert cell_angles(torch.eye(3)[None, None]).shape == (1, 1, 3)


@pytest.mark.parametrize("row", [(None, None, None), (1, 2), (0, None, None), (-1.0, 1.0, 1.0)])
def test_ratios_that_tell_nothing_are_refused(row: tuple[float | None, ...]) -> None:
    with pytest.raises(InputError, match="'a'"):
        Lattice({"a": row})
    with pytest.raises(InputError, match="no lattice constant"):
        Lattice({})


def _lattice(atoms: Atoms):
    return conventional_lattice(atoms.cell.array, atoms.positions, atoms.numbers)


def _found(atoms: Atoms, make_sample, stretch=(1.0, 1.0, 1.0)) -> dict[str, float]:
    lattice = _lattice(atoms)
    cells = torch.from_numpy(atoms.cell.array * np.array(stretch)).expand(2, 3, 3)
    values = average(lattice, make_sample(n=2, cells=cells)).tolist()
    return dict(zip(lattice.labels, values, strict=True))


@pytest.mark.parametrize(
    "box",
    [
        HCP * (3, 3, 2),
        bulk("Ti", "hcp", a=A, c=C, orthorhombic=True) * (3, 2, 2),
        Atoms(HCP.symbols, HCP.positions, cell=HCP.cell.array, pbc=True) * (2, 4, 1),
    ],
)
def test_hcp_in_any_box(box, make_sample):
    assert _found(box, make_sample) == pytest.approx({"a": A, "c": C})
    expanded = _found(box, make_sample, (1.01, 1.01, 0.98))
    assert expanded == pytest.approx({"a": 1.01 * A, "c": 0.98 * C})


@pytest.mark.parametrize("cubic", [True, False])
@pytest.mark.parametrize(("kind", "a"), [("bcc", 3.3), ("fcc", 4.05), ("sc", 3.1), ("diamond", 5.4)])
def test_cubic_crystals_have_one_constant(kind, a, cubic, make_sample):
    """Also in their primitive cells, whose vectors lie along diagonals."""
    atoms = bulk("Si", kind, a=a, cubic=cubic) * (2, 1, 3)
    assert _found(atoms, make_sample, (1.02,) * 3) == pytest.approx({"a": 1.02 * a})


def test_orthorhombic_crystals_have_three(make_sample):
    assert _found(TIN * (3, 2, 1), make_sample) == pytest.approx({"a": 3.0, "b": 4.0, "c": 5.0})


def test_what_no_vector_shows_is_left_out():
    """A vector between a and c is as long as neither of them says."""
    tilted = Atoms("Sn", cell=[[3, 0, 5], [0, 4, 0], [3, 0, -5]], pbc=True)
    tilted += Atoms("Sn", positions=[[3, 0, 0]])
    assert _lattice(tilted).labels == ("b",)
    oblique = Atoms("Sn", cell=[[3, 4, 0], [0, 4, 5], [3, 0, 5]], pbc=True)
    oblique += Atoms("Sn", positions=[[3, 4, 5]])
    with pytest.raises(InputError, match="no vector of the box shows a lattice constant"):
        _lattice(oblique)
