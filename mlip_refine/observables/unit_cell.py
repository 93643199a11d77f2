"""Which lattice constants of its unit cell a box of a crystal shows."""

import numpy as np
from numpy.typing import NDArray

from mlip_refine.crystals.symmetry import TOLERANCE, symmetry_dataset
from mlip_refine.errors import InputError
from mlip_refine.observables.lattice import Lattice

_FIRST_WITH_TWO_EQUAL, _FIRST_CUBIC = 75, 195
"""Numbers of space groups: the first tetragonal one (trigonal and hexagonal follow), the first cubic one."""

_ROUNDING = 1e-4


def conventional_lattice(
    cell: NDArray[np.float64],
    positions: NDArray[np.float64],
    numbers: NDArray[np.int64],
    tolerance: float = TOLERANCE,
) -> Lattice:
    """Lattice constants of the conventional unit cell, whatever box the crystal is in.

    Cubic crystals have a; tetragonal, hexagonal and trigonal ones (in hexagonal axes) a and c; others a, b
    and c, in the setting that spglib takes as the standard. A box vector shows a constant if its length is a
    fixed multiple of that constant alone, however the crystal expands. Constants that no vector shows are
    left out.

    Args:
        cell: Rows `[3, 3]`, Å.
        positions: `[n_atoms, 3]`, Å.
        numbers: Atomic numbers `[n_atoms]`.
        tolerance: How far atoms may be from where the symmetry has them, Å.

    Raises:
        InputError: No symmetry can be told, or no vector of the box shows a constant.
    """
    found = symmetry_dataset((cell, np.linalg.solve(cell.T, positions.T).T, numbers), tolerance)
    # Columns of the matrix are the box vectors in units of the unit cell's.
    ratios = {
        name: tuple(_ratio(vector, found.std_lattice, axes) for vector in found.transformation_matrix.T)
        for name, axes in _constants(found.number).items()
    }
    shown = {name: row for name, row in ratios.items() if any(row)}
    if not shown:
        raise InputError(
            "no vector of the box shows a lattice constant of the crystal",
            found=f"space group {found.international}, box vectors "
            f"{np.round(found.transformation_matrix.T, 3).tolist()} in units of the unit cell",
            expected="a vector along an axis of the unit cell, or between axes of equal length",
        )
    return Lattice(shown)


def _constants(space_group: int) -> dict[str, tuple[int, ...]]:
    """Lattice constants, each with the axes that have this length."""
    if space_group >= _FIRST_CUBIC:
        return {"a": (0, 1, 2)}
    if space_group >= _FIRST_WITH_TWO_EQUAL:
        return {"a": (0, 1), "c": (2,)}
    return {"a": (0,), "b": (1,), "c": (2,)}


def _ratio(vector: NDArray[np.float64], lattice: NDArray[np.float64], axes: tuple[int, ...]) -> float | None:
    """Length of a box vector in units of the constant, if it lies in the axes of that constant alone."""
    others = np.delete(vector, axes)
    if np.abs(others).max(initial=0.0) > _ROUNDING:
        return None
    return float(np.linalg.norm(vector @ lattice) / np.linalg.norm(lattice[axes[0]]))
