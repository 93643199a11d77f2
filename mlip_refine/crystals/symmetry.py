"""The symmetry of a crystal: its point group, its standard axes, and its independent elastic constants."""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import spglib
import torch
from ase import Atoms
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from mlip_refine.crystals.tensors import project, rotate
from mlip_refine.errors import InputError, MlipRefineError

TOLERANCE = 1e-3
"""How far, in Å, atoms may be from where the symmetry has them."""

SINGULAR = 1e-8
"""Singular values below this part of the largest are zero."""

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
    """The symmetry of a crystal, in the frame that it is given in.

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
        """Refuse rotations that are not those of the Laue class: the constants would not tell the tensor."""
        found = int(torch.linalg.matrix_rank(self.invariants().flatten(1), rtol=SINGULAR))
        if found != len(INDEPENDENT[self.laue]):
            raise MlipRefineError(
                f"{len(self.rotations)} rotations leave {found} independent elastic constants, but the "
                f"Laue class {self.laue} has {len(INDEPENDENT[self.laue])}"
            )

    def invariants(self) -> Tensor:
        """Tensors with the symmetry of the crystal, from which all others follow `[36, 6, 6]`, float64."""
        units = torch.eye(36, dtype=torch.float64).view(36, 1, 6, 6)
        return rotate((units + units.mT) / 2, self.rotations.double()).mean(1)

    def independent(self, matrix: Tensor) -> dict[str, Tensor]:
        """The independent components of a tensor of this symmetry, in the standard axes.

        Args:
            matrix: Voigt matrix `[6, 6]` in the crystal's own frame.
        """
        standard = rotate(matrix, self.to_standard.to(matrix))
        return {name: standard[int(name[1]) - 1, int(name[2]) - 1] for name in INDEPENDENT[self.laue]}

    def constants_of(self, tensor: Tensor) -> Tensor:
        """The independent constants `[m]` of the symmetric part of a tensor, given the crystal's symmetry.

        Args:
            tensor: Voigt matrix `[6, 6]` in the crystal's own frame, such as one with noise.
        """
        projected = project((tensor + tensor.mT) / 2, self.rotations.to(tensor))
        return torch.stack(list(self.independent(projected).values()))


def crystal_symmetry(
    cell: NDArray[np.float64],
    positions: NDArray[np.float64],
    numbers: NDArray[np.int64],
    tolerance: float = TOLERANCE,
) -> Symmetry:
    """Find the symmetry of a crystal.

    Args:
        cell: Rows `[3, 3]`, Å.
        positions: `[n_atoms, 3]`, Å.
        numbers: Atomic numbers `[n_atoms]`.
        tolerance: How far atoms may be from where the symmetry has them, Å.

    Raises:
        InputError: The atoms are so close that no symmetry can be told.
    """
    crystal = _primitive((cell, np.linalg.solve(cell.T, positions.T).T, numbers), tolerance)
    found = symmetry_dataset(crystal, tolerance)
    # Columns are the lattice vectors: x' = W x of fractional coordinates is h W h⁻¹ of Cartesian ones.
    columns = crystal[0].T
    rotations = columns @ np.unique(found.rotations, axis=0) @ np.linalg.inv(columns)
    standard = _orthogonal(np.array(found.std_rotation_matrix))
    if found.number in _TWOFOLD_ACROSS_A:
        standard = _THIRTY_DEGREES @ standard
    return Symmetry(
        space_group=str(found.international),
        laue=_LAST_GROUPS[_LASTS[bisect_left(_LASTS, found.number)]],
        rotations=torch.from_numpy(_orthogonal_group(rotations)),
        to_standard=torch.from_numpy(standard),
    )


def primitive_cell(atoms: Atoms, tolerance: float = TOLERANCE) -> Atoms:
    """The smallest cell of the same crystal, in the same frame; the cell itself if there is no smaller one.

    Args:
        atoms: A crystal.
        tolerance: How far atoms may be from where lattice translations have them, Å.

    Raises:
        InputError: Atoms that are the same by symmetry have other masses.
    """
    crystal = (np.array(atoms.cell), atoms.get_scaled_positions(wrap=False), atoms.numbers)
    if atoms.has("masses"):
        _require_equal_masses(atoms, symmetry_dataset(crystal, tolerance).equivalent_atoms)
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
    """How often to repeat a primitive cell so that faces are as far apart as asked, and all symmetry stays.

    Lattice vectors that rotations of the crystal mix are repeated equally often: the supercell, too, has
    all of the point group. M⁻¹ W M is then a matrix of integers for every rotation W.

    Args:
        cell: Primitive.
        length: Least distance of opposite faces, Å.
        tolerance: How far atoms may be from where the symmetry has them, Å.

    Returns:
        M `[3, 3]`, diagonal.
    """
    heights = 1 / np.linalg.norm(cell.cell.reciprocal(), axis=1)
    multiples = np.ceil(length / heights - 1e-9).astype(np.int64)
    crystal = (cell.cell.array, cell.get_scaled_positions(), cell.numbers)
    mixed = symmetry_dataset(crystal, tolerance).rotations.any(axis=0)
    _, kinds = connected_components(mixed, directed=False)
    matrix: NDArray[np.int64] = np.diag([multiples[kinds == kind].max() for kind in kinds])
    return matrix


def _require_equal_masses(atoms: Atoms, equivalent: NDArray[np.int64]) -> None:
    masses = atoms.get_masses()
    other = np.flatnonzero(masses != masses[equivalent])
    if len(other):
        i, j = int(other[0]), int(equivalent[other[0]])
        raise InputError(
            "atoms that are the same by symmetry have other masses",
            found=f"{masses[i]:g} of atom {i}, {masses[j]:g} of atom {j}",
            fix="Give them one mass, such as the mean over isotopes.",
        )


def _primitive(crystal: Any, tolerance: float) -> Any:
    """The primitive cell of a crystal as spglib has it, in the same frame; `None` where there is none.

    A larger box need not have the operations of the crystal, and is told to have only those that it keeps.
    """
    return spglib.standardize_cell(crystal, to_primitive=True, no_idealize=True, symprec=tolerance)


def symmetry_dataset(crystal: Any, tolerance: float) -> Any:
    """What spglib tells of a crystal (cell, fractional coordinates, numbers), or of `None`.

    Raises:
        InputError: No symmetry, the atoms being too close.
    """
    found = None if crystal is None else spglib.get_symmetry_dataset(crystal, symprec=tolerance)
    if found is None:
        raise InputError("no symmetry can be found: atoms closer to each other than the tolerance?")
    return found


def _orthogonal(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest orthogonal matrix: that of a cell that is not quite ideal is not quite a rotation."""
    left, _, right = np.linalg.svd(matrix)
    nearest: NDArray[np.float64] = left @ right
    return nearest


def _orthogonal_group(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same group `[n, 3, 3]` with orthogonal matrices, near those of a cell that is not quite ideal.

    Σ RᵀR is a metric that every matrix of the group keeps: in its orthonormal axes they are orthogonal, and a
    group as before.
    """
    values, vectors = np.linalg.eigh((matrices.transpose(0, 2, 1) @ matrices).mean(0))
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    group: NDArray[np.float64] = root @ matrices @ np.linalg.inv(root)
    return group
