import math

import numpy as np
import pytest
import torch
from ase.build import bulk
from torch import Tensor

from mlip_refine.errors import InputError
from mlip_refine.observables import average
from mlip_refine.observables.cell import CellAngles, Lattice, cell_angles


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
