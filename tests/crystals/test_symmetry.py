"""The symmetry of a crystal is its own, whatever box it is described in."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from scipy.spatial.transform import Rotation

from mlip_refine.crystals.symmetry import (
    INDEPENDENT,
    Symmetry,
    crystal_lattice,
    find_symmetry,
    primitive_cell,
    supercell_matrix,
    symmetry_dataset,
)
from mlip_refine.crystals.tensors import project, rotate
from mlip_refine.errors import InputError, MlipRefineError
from mlip_refine.observables.elasticity import Deformation, deformation_constants

HCP = {"C11": 160.0, "C12": 90.0, "C13": 66.0, "C33": 181.0, "C44": 46.0}
BCC = {"C11": 140.0, "C12": 100.0, "C44": 40.0}
TURNS = {
    "as it is": np.eye(3),
    "a quarter": Rotation.from_euler("z", 90, degrees=True).as_matrix(),
    "anyhow": Rotation.from_rotvec([0.3, -0.8, 0.5]).as_matrix(),
}


def _box(kind: str) -> Atoms:
    """A box that does not keep all operations of the crystal."""
    if kind == "hcp":
        return bulk("Ti", "hcp", a=2.95, c=4.68, orthorhombic=True) * (2, 1, 1)
    return bulk("Ti", "bcc", a=3.3, cubic=True) * (3, 3, 2)


def _known(kind: str) -> torch.Tensor:
    """Voigt matrix of the crystal in its standard axes, GPa."""
    if kind == "bcc":
        c11, c12, c44 = BCC.values()
        c13, c33, c66 = c12, c11, c44
    else:
        c11, c12, c13, c33, c44 = HCP.values()
        c66 = (c11 - c12) / 2
    matrix = torch.diag(torch.tensor([c11, c11, c33, c44, c44, c66]).double())
    matrix[0, 1] = matrix[1, 0] = c12
    matrix[:2, 2] = matrix[2, :2] = c13
    return matrix


def _crystal(kind: str, turn: str) -> tuple[Symmetry, torch.Tensor]:
    """Its symmetry and its tensor, both in the turned frame."""
    atoms, rotation = _box(kind), TURNS[turn]
    atoms.set_cell(atoms.cell.array @ rotation.T, scale_atoms=True)
    symmetry = find_symmetry(atoms.cell.array, atoms.positions, atoms.numbers)
    return symmetry, rotate(_known(kind), torch.from_numpy(rotation))


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize(("kind", "order", "wanted"), [("hcp", 24, HCP), ("bcc", 48, BCC)])
def test_every_operation_of_the_crystal_is_known_in_any_box(kind, order, wanted, turn):
    symmetry, tensor = _crystal(kind, turn)
    assert len(symmetry.rotations) == order
    assert tuple(wanted) == INDEPENDENT[symmetry.laue]
    torch.testing.assert_close(project(tensor, symmetry.rotations), tensor)
    found = {name: float(value) for name, value in symmetry.independent(tensor).items()}
    assert found == pytest.approx(wanted)


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("kind", ["hcp", "bcc"])
def test_noise_is_averaged_over_every_operation(kind, turn):
    """What is projected has the symmetry of the class: its independent constants tell all of it."""
    symmetry, tensor = _crystal(kind, turn)
    noise = torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).double()
    noisy = project(tensor + noise + noise.T, symmetry.rotations)
    constants = torch.stack(list(symmetry.independent(noisy).values()))
    told = torch.einsum("m,mij->ij", constants, Deformation.of(symmetry, 0.01).basis)
    torch.testing.assert_close(told, noisy)


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize(("kind", "wanted"), [("hcp", HCP), ("bcc", BCC)])
def test_strained_cells_show_the_constants_in_any_box(kind, wanted, turn):
    symmetry, tensor = _crystal(kind, turn)
    deformation = Deformation.of(symmetry, 0.01)
    shears = torch.tensor([1.0, 1, 1, 2, 2, 2]).double()
    stress = torch.tensor(deformation.strains).double() * shears @ tensor
    values = deformation_constants(deformation, torch.cat([torch.zeros(1, 6).double(), stress]))
    assert values.tolist() == pytest.approx(list(wanted.values()))


def test_rotations_that_are_too_few_for_the_class_are_refused():
    symmetry, _ = _crystal("hcp", "as it is")
    with pytest.raises(MlipRefineError, match="Laue class 6/mmm has 5"):
        replace(symmetry, rotations=symmetry.rotations[:1])


def test_a_cell_that_is_not_quite_ideal_has_a_group_of_rotations():
    """Within the tolerance, but beyond it the axes no longer match: products are rotations of the group."""
    atoms = bulk("Ti", "hcp", a=2.95, c=4.68)
    strain = np.array([[1e-4, 5e-5, 0], [5e-5, -1e-4, 3e-5], [0, 3e-5, 0]])
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    group = find_symmetry(atoms.cell.array, atoms.positions, atoms.numbers).rotations
    products = group[:, None] @ group[None]
    distance = (products[:, :, None] - group).abs().amax(dim=(-1, -2))
    assert len(group) == 24
    assert float(distance.amin(dim=2).max()) < 1e-12
    torch.testing.assert_close(group @ group.mT, torch.eye(3).double().expand(24, 3, 3))


@pytest.mark.parametrize(
    ("cell", "length", "multiples"),
    [
        (
            bulk("In", "bct", a=3.25, c=4.95),
            12.0,
            (6, 6, 6),
        ),  # 5, 5, 6 has no four-fold axis
        (bulk("Ti", "hcp", a=2.95, c=4.68), 12.0, (5, 5, 3)),
        (bulk("Si", "diamond", a=5.43), 12.0, (4, 4, 4)),
        (Atoms("Po", cell=[3.0, 4.0, 6.0], pbc=True), 12.0, (4, 3, 2)),
    ],
)
def test_supercells_are_as_symmetric_as_the_crystal(cell, length, multiples):
    matrix = supercell_matrix(cell, length)
    assert tuple(np.diag(matrix)) == multiples
    heights = 1 / np.linalg.norm((cell * np.diag(matrix)).cell.reciprocal(), axis=1)
    assert heights.min() >= length - 1e-6
    rotations = symmetry_dataset((cell.cell.array, cell.get_scaled_positions(), cell.numbers), 1e-3).rotations
    turned = np.linalg.solve(matrix, rotations @ matrix)
    np.testing.assert_allclose(turned, np.rint(turned), atol=1e-12)


def test_a_primitive_cell_has_the_masses_of_its_atoms():
    salt = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    salt.set_masses([{"Na": 24.0, "Cl": 36.5}[symbol] for symbol in salt.symbols])
    salt.positions += [1.3, -0.4, 7.0]
    primitive = primitive_cell(salt)
    assert dict(zip(primitive.symbols, primitive.get_masses(), strict=True)) == {"Na": 24.0, "Cl": 36.5}
    assert not primitive_cell(bulk("NaCl", "rocksalt", a=5.64, cubic=True)).has("masses")
    masses = salt.get_masses()
    masses[0] = 25.0
    salt.set_masses(masses)
    with pytest.raises(InputError, match="same by symmetry have other masses"):
        primitive_cell(salt)


def test_lattice_constants_belong_to_the_crystal_and_not_to_its_box():
    hcp, fcc = _box("hcp"), bulk("Al", "fcc", a=4.05) * (1, 2, 3)
    found = crystal_lattice(hcp)
    assert (found.space_group, found.n_primitive) == ("P6_3/mmc", 2)
    assert found.conventional_A_deg == pytest.approx((2.95, 2.95, 4.68, 90, 90, 120))
    assert found.primitive_A_deg == pytest.approx(found.conventional_A_deg)
    found = crystal_lattice(fcc)
    assert (found.space_group, found.n_primitive) == ("Fm-3m", 1)
    assert found.conventional_A_deg == pytest.approx((4.05, 4.05, 4.05, 90, 90, 90))
    assert found.primitive_A_deg == pytest.approx([4.05 / 2**0.5] * 3 + [60] * 3)


def test_atoms_with_other_moments_or_masses_are_not_the_same_in_a_lattice():
    cubic = bulk("Fe", "bcc", a=2.87, cubic=True)
    assert crystal_lattice(cubic).n_primitive == 1
    other = cubic.copy()
    other.set_initial_magnetic_moments([2.2, -2.2])
    assert crystal_lattice(other).n_primitive == 2
    cubic.set_masses([54.0, 56.0])
    assert (crystal_lattice(cubic).space_group, crystal_lattice(cubic).n_primitive) == ("Pm-3m", 2)
