"""The symmetry of a crystal: point group, standard axes, independent elastic constants, supercells, meshes.

spglib is called here alone in this room, and all its tolerances are named here.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import spglib
import torch
from ase import Atoms
from ase.geometry import cell_to_cellpar
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from mlip_refine.crystals.tensors import project, rotate
from mlip_refine.errors import InputError, MlipRefineError

TOLERANCE = 1e-3
"""How far atoms of crystals from a config may be from symmetric places, Å."""

PHONON_TOLERANCE = 1e-5
"""How far atoms of supercells with force constants may be from symmetric places, Å."""

MESH_TOLERANCE = 1e-4
"""How far atoms may be from symmetric places where wave vectors are reduced by symmetry, Å."""

SINGULAR = 1e-8
"""Singular values below this fraction of the largest count as zero."""

_LAST_GROUPS = {
    2: "-1",
    15: "2/m",
    74: "mmm",
    88: "4/m",
    142: "4/mmm",
    148: "-3",
    167: "-3m",
    176: "6/m",
    194: "6/mmm",
    206: "m-3",
    230: "m-3m",
}
"""Laue classes by the last number of their space groups."""

_LASTS = sorted(_LAST_GROUPS)

_TWOFOLD_ACROSS_A = frozenset({149, 151, 153, 157, 159, 162, 163})
"""Trigonal groups whose two-fold axes are at right angles to a, where others have them along a."""

_THIRTY_DEGREES = np.array([[3**0.5 / 2, -0.5, 0.0], [0.5, 3**0.5 / 2, 0.0], [0.0, 0.0, 1.0]])

_HEXAGONAL = ("C11", "C12", "C13", "C33", "C44")
_ORTHORHOMBIC = ("C11", "C12", "C13", "C22", "C23", "C33", "C44", "C55", "C66")
INDEPENDENT: Mapping[str, tuple[str, ...]] = {
    "-1": tuple(f"C{i}{j}" for i in range(1, 7) for j in range(i, 7)),
    "2/m": (*_ORTHORHOMBIC, "C15", "C25", "C35", "C46"),
    "mmm": _ORTHORHOMBIC,
    "4/m": (*_HEXAGONAL, "C66", "C16"),
    "4/mmm": (*_HEXAGONAL, "C66"),
    "-3": (*_HEXAGONAL, "C14", "C15"),
    "-3m": (*_HEXAGONAL, "C14"),
    "6/m": _HEXAGONAL,
    "6/mmm": _HEXAGONAL,
    "m-3": ("C11", "C12", "C44"),
    "m-3m": ("C11", "C12", "C44"),
}
"""Elastic constants from which all others follow, by Laue class (Nye 1957), in the standard axes."""


@dataclass(frozen=True)
class Symmetry:
    """The symmetry of a crystal, in the frame in which it is given.

    Attributes:
        space_group: International symbol, such as P6_3/mmc.
        laue: Laue class, a key of `INDEPENDENT`.
        rotations: The point group `[n_rotations, 3, 3]`, acting on Cartesian vectors: that of the crystal,
            whatever box it is described in.
        to_standard: Rotation `[3, 3]` to the standard axes: a along x, b in the plane of x and y. In
            hexagonal and trigonal crystals c is along z and, where there is one, a two-fold axis along x; in
            monoclinic ones the unique axis is along y.

    Raises:
        MlipRefineError: The rotations leave more tensors as they are than the Laue class does.
    """

    space_group: str
    laue: str
    rotations: Tensor
    to_standard: Tensor

    def __post_init__(self) -> None:
        """Refuse rotations that are not those of the Laue class, whose constants would not fix the tensor."""
        found = int(torch.linalg.matrix_rank(self.invariants().flatten(1), rtol=SINGULAR))
        if found != len(INDEPENDENT[self.laue]):
            raise MlipRefineError(
                f"{len(self.rotations)} rotations leave {found} independent elastic constants, but the "
                f"Laue class {self.laue} has {len(INDEPENDENT[self.laue])}"
            )

    def invariants(self) -> Tensor:
        """Return tensors that span all those with the symmetry of the crystal `[36, 6, 6]`, float64."""
        units = torch.eye(36, dtype=torch.float64).view(36, 1, 6, 6)
        return rotate((units + units.mT) / 2, self.rotations.double()).mean(1)

    def independent(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return the independent components of a tensor of this symmetry, in the standard axes.

        Args:
            matrix: Voigt matrix `[6, 6]` in the crystal's own frame.
        """
        standard = rotate(matrix, self.to_standard.to(matrix))
        return {name: standard[int(name[1]) - 1, int(name[2]) - 1] for name in INDEPENDENT[self.laue]}

    def constants_of(self, tensor: Tensor) -> Tensor:
        """Return the independent constants `[m]` of the symmetric part of a tensor, after projection.

        Args:
            tensor: Voigt matrix `[6, 6]` in the crystal's own frame, such as one with noise.
        """
        projected = project((tensor + tensor.mT) / 2, self.rotations.to(tensor))
        return torch.stack(list(self.independent(projected).values()))


def find_symmetry(
    cell: NDArray[np.float64],
    positions: NDArray[np.float64],
    numbers: NDArray[np.int64],
    tolerance: float = TOLERANCE,
) -> Symmetry:
    """Find the symmetry of a crystal.

    Args:
        cell: Cell vectors as rows `[3, 3]`, Å.
        positions: Positions `[n_atoms, 3]`, Å.
        numbers: Atomic numbers `[n_atoms]`.
        tolerance: How far atoms may be from symmetric places, Å.

    Raises:
        InputError: No symmetry is found because atoms are too close to each other.
    """
    crystal = _primitive((cell, np.linalg.solve(cell.T, positions.T).T, numbers), tolerance)
    found = symmetry_dataset(crystal, tolerance)
    # Columns are the lattice vectors: x' = W x of fractional coordinates is h W h⁻¹ of Cartesian ones.
    columns = crystal[0].T
    rotations = columns @ np.unique(found.rotations, axis=0) @ np.linalg.inv(columns)
    # The rotation to the axes of a cell that is not quite ideal is not quite one: take the nearest.
    left, _, right = np.linalg.svd(np.array(found.std_rotation_matrix))
    standard: NDArray[np.float64] = left @ right
    if found.number in _TWOFOLD_ACROSS_A:
        standard = _THIRTY_DEGREES @ standard
    return Symmetry(
        space_group=str(found.international),
        laue=_LAST_GROUPS[_LASTS[bisect_left(_LASTS, found.number)]],
        rotations=torch.from_numpy(_orthogonal_group(rotations)),
        to_standard=torch.from_numpy(standard),
    )


@dataclass(frozen=True)
class CrystalLattice:
    """Space group and lattice constants of a crystal, whatever cell it is given in.

    Attributes:
        space_group: International symbol, such as P6_3/mmc.
        conventional_A_deg: a, b, c (Å), α, β, γ (°) of the conventional cell of the International Tables.
        primitive_A_deg: The same of the primitive cell.
        n_primitive: Number of atoms of the primitive cell.
    """

    space_group: str
    conventional_A_deg: tuple[float, ...]  # noqa: N815 - the unit's own case
    primitive_A_deg: tuple[float, ...]  # noqa: N815 - the unit's own case
    n_primitive: int


def crystal_lattice(atoms: Atoms, tolerance: float = TOLERANCE) -> CrystalLattice:
    """Find space group and lattice constants; atoms with other masses or moments are other atoms.

    Args:
        atoms: Any cell of the crystal.
        tolerance: How far atoms may be from symmetric places, Å.

    Raises:
        InputError: No symmetry is found because atoms are too close to each other.
    """
    moments = atoms.get_initial_magnetic_moments().reshape(len(atoms), -1)
    described = np.column_stack([atoms.numbers, atoms.get_masses(), moments])
    _, kinds = np.unique(described, axis=0, return_inverse=True)
    cell: Any = (atoms.cell.array, atoms.get_scaled_positions(wrap=False), kinds.reshape(-1) + 1)
    found = symmetry_dataset(cell, tolerance)
    primitive: Any = spglib.standardize_cell(cell, to_primitive=True, symprec=tolerance)
    conventional, smallest = (
        tuple(float(x) for x in cell_to_cellpar(lattice)) for lattice in (found.std_lattice, primitive[0])
    )
    return CrystalLattice(str(found.international), conventional, smallest, len(primitive[2]))


def primitive_cell(atoms: Atoms, tolerance: float = TOLERANCE) -> Atoms:
    """Return the smallest cell of a crystal in the same frame; the given one if there is no smaller one.

    Args:
        atoms: A crystal.
        tolerance: How far atoms may be from where lattice translations take others, Å.

    Raises:
        InputError: Atoms that are the same by symmetry have other masses.
    """
    crystal = (np.array(atoms.cell), atoms.get_scaled_positions(wrap=False), atoms.numbers)
    if atoms.has("masses"):
        masses, equivalent = atoms.get_masses(), symmetry_dataset(crystal, tolerance).equivalent_atoms
        other = np.flatnonzero(masses != masses[equivalent])
        if len(other):
            i, j = int(other[0]), int(equivalent[other[0]])
            raise InputError(
                "atoms that are the same by symmetry have other masses",
                found=f"{masses[i]:g} of atom {i}, {masses[j]:g} of atom {j}",
                fix="Give them one mass, such as the mean over isotopes.",
            )
    found = _primitive(crystal, tolerance)
    if found is None or len(found[2]) == len(atoms):
        return atoms
    cell, scaled, numbers = found
    primitive = Atoms(numbers, cell=cell, scaled_positions=scaled, pbc=True)
    if atoms.has("masses"):
        apart = np.linalg.solve(cell.T, atoms.positions.T).T - scaled[:, None]
        same = np.linalg.norm((apart - np.rint(apart)) @ cell, axis=2).argmin(axis=1)
        primitive.set_masses(atoms.get_masses()[same])
    return primitive


def supercell_matrix(cell: Atoms, length: float, tolerance: float = TOLERANCE) -> NDArray[np.int64]:
    """Return how often to repeat a primitive cell so that faces are far apart and all symmetry stays.

    Lattice vectors that rotations of the crystal mix are repeated equally often: the supercell, too, has
    all of the point group. M⁻¹ W M is then a matrix of integers for every rotation W.

    Args:
        cell: Primitive cell.
        length: Least distance of opposite faces, Å.
        tolerance: How far atoms may be from symmetric places, Å.

    Returns:
        M `[3, 3]`, diagonal.
    """
    heights = 1 / np.linalg.norm(cell.cell.reciprocal(), axis=1)
    multiples = np.ceil(length / heights - 1e-9).astype(np.int64)
    mixed = symmetry_dataset(_spglib_cell(cell), tolerance).rotations.any(axis=0)
    _, kinds = connected_components(mixed, directed=False)
    matrix: NDArray[np.int64] = np.diag([multiples[kinds == kind].max() for kind in kinds])
    return matrix


def space_group_number(crystal: Atoms) -> int:
    """Return the number of the space group; of a magnetic crystal that of the family of its magnetic group.

    Args:
        crystal: A crystal with its magnetic moments. Where spglib finds no symmetry the number is 1.
    """
    cell = _spglib_cell(crystal)
    moments = crystal.get_initial_magnetic_moments()
    if moments.any():
        magnetic = spglib.get_magnetic_symmetry_dataset((*cell, moments), symprec=MESH_TOLERANCE)
        kind = None if magnetic is None else spglib.get_magnetic_spacegroup_type(magnetic.uni_number)
        return 1 if kind is None else int(kind.number)
    group = spglib.get_symmetry_dataset(cell, symprec=MESH_TOLERANCE)
    return 1 if group is None else int(group.number)


def mesh_points(crystal: Atoms, mesh: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a Γ-centred mesh, reduced by the symmetry of a crystal with its magnetic moments.

    Args:
        crystal: Primitive cell.
        mesh: Points along each reciprocal vector.

    Returns:
        Wave vectors `[n_q, 3]` in the reciprocal lattice, and their weights `[n_q]`, which add up to 1.
    """
    cell = _spglib_cell(crystal)
    moments = crystal.get_initial_magnetic_moments()
    if moments.any():
        operations: Any = spglib.get_magnetic_symmetry((*cell, moments), symprec=MESH_TOLERANCE)
        rotations = np.unique(operations["rotations"], axis=0)
        found: Any = spglib.get_stabilized_reciprocal_mesh(list(mesh), rotations, is_shift=[0, 0, 0])
    else:
        found = spglib.get_ir_reciprocal_mesh(list(mesh), cell, is_shift=[0, 0, 0], symprec=MESH_TOLERANCE)
    mapping, grid = found
    places, counts = np.unique(mapping, return_counts=True)
    return grid[places] / np.array(mesh), counts / counts.sum()


def _spglib_cell(crystal: Atoms) -> Any:
    """Return a crystal as spglib takes it: cell, fractional coordinates, atomic numbers."""
    return crystal.cell.array, crystal.get_scaled_positions(), crystal.numbers


def _primitive(crystal: Any, tolerance: float) -> Any:
    """Return spglib's primitive cell of a crystal in the same frame, or `None` where it finds none.

    The point group is found from it: spglib gives a larger box only the operations that the box keeps.
    """
    return spglib.standardize_cell(crystal, to_primitive=True, no_idealize=True, symprec=tolerance)


def symmetry_dataset(crystal: Any, tolerance: float) -> Any:
    """Return spglib's dataset of a crystal (cell, fractional coordinates, numbers).

    Raises:
        InputError: No symmetry is found because atoms are too close, or the crystal is `None`.
    """
    found = None if crystal is None else spglib.get_symmetry_dataset(crystal, symprec=tolerance)
    if found is None:
        raise InputError("no symmetry can be found: atoms closer to each other than the tolerance?")
    return found


def _orthogonal_group(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the same group with orthogonal matrices, near those of a cell that is not quite ideal.

    Σ RᵀR is a metric that every matrix of the group keeps: in its orthonormal axes they are orthogonal, and a
    group as before.
    """
    values, vectors = np.linalg.eigh((matrices.transpose(0, 2, 1) @ matrices).mean(0))
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    group: NDArray[np.float64] = root @ matrices @ np.linalg.inv(root)
    return group
