"""The crystals that simulations start from: built from a prototype, or read from a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.data import atomic_numbers, chemical_symbols, reference_states
from ase.io import read
from ase.io.formats import UnknownFileTypeError
from pymatgen.core import Structure
from pymatgen.io.ase import AseAtomsAdaptor

from mlip_refine.errors import InputError, nearest

Prototype = Literal["hcp", "bcc", "fcc", "diamond", "sc"]

_ATOMS_PER_CELL: dict[str, int] = {"hcp": 2, "bcc": 2, "fcc": 4, "diamond": 8, "sc": 1}
_LARGEST = 10
_PARSER_ERRORS = (
    *(ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError, SyntaxError),
    *(OSError, RuntimeError),
)
"""What the parsers of ASE and pymatgen raise when they are given another kind of file."""

_IDEAL_RATIO = float(np.sqrt(8 / 3))


def build_phase(
    prototype: Prototype, element: str, n_atoms: int, a: float | None = None, c: float | None = None
) -> Atoms:
    """Build an n x n x n supercell of a crystal.

    Args:
        prototype: `hcp` repeats the primitive cell of two atoms, the others their cubic cell.
        element: Chemical symbol.
        n_atoms: Wanted size; must be n³ times the atoms of the cell. hcp and bcc have the same sizes.
        a: Lattice constant, Å; None takes the element's experimental one where it has this structure.
        c: Second lattice constant of hcp, Å; None takes the element's ratio, or the ideal one.

    Returns:
        The crystal in standard orientation, right-handed, a along x.

    Raises:
        InputError: Unknown prototype or element, a size that cannot be reached, or no lattice constant.
    """
    if prototype not in get_args(Prototype):
        word = nearest(str(prototype), get_args(Prototype))
        fix = f"Did you mean {word!r}?" if word else None
        raise InputError(
            "unknown prototype", found=prototype, expected=", ".join(get_args(Prototype)), fix=fix
        )
    if element not in chemical_symbols[1:]:
        word = nearest(element, chemical_symbols[1:])
        fix = f"Did you mean {word!r}?" if word else None
        raise InputError("unknown element", found=repr(element), expected="a chemical symbol", fix=fix)
    repeat = _repeat(prototype, n_atoms)
    lattice = _positive(
        a if a is not None else _reference(prototype, element, "a"), f"{prototype} {element}: a"
    )
    if prototype != "hcp":
        return cast(Atoms, bulk(element, prototype, a=lattice, cubic=True).repeat(repeat))
    return cast(Atoms, bulk(element, "hcp", a=lattice, c=_hcp_c(element, lattice, c)).repeat(repeat))


def reachable_sizes(prototype: Prototype) -> list[int]:
    """Return the numbers of atoms that `build_phase` can make of a prototype."""
    return [_ATOMS_PER_CELL[prototype] * n**3 for n in range(1, _LARGEST + 1)]


def load_structure(
    path: Path,
    supercell: Sequence[int] = (1, 1, 1),
    format: str | None = None,
) -> Atoms:
    """Read a periodic structure and repeat it.

    Args:
        path: Any file that ASE or pymatgen reads; of several frames the last is taken.
        supercell: Repetitions along the three lattice vectors.
        format: ASE's name of the format; None tells by name and contents.

    Raises:
        InputError: The file is missing or cannot be read, the structure is not periodic in three dimensions,
            or the supercell is not three positive numbers.
    """
    if not path.is_file():
        raise InputError("no such structure file", where=str(path))
    repeats = tuple(int(n) for n in supercell)
    if len(repeats) != 3 or min(repeats) < 1:
        raise InputError(
            "wrong supercell", where=str(path), found=list(supercell), expected="three numbers above 0"
        )
    atoms = _read_structure(path, format)
    _check_periodic(atoms, str(path))
    return cast(Atoms, _right_handed(atoms).repeat(repeats))


def _repeat(prototype: Prototype, n_atoms: int) -> int:
    sizes = reachable_sizes(prototype)
    if n_atoms not in sizes:
        raise InputError(
            f"no {prototype} supercell n x n x n has this many atoms",
            found=f"n_atoms {n_atoms}",
            expected=f"one of {', '.join(map(str, sizes))}",
            fix=f"The nearest is {min(sizes, key=lambda size: abs(size - n_atoms))}.",
        )
    return sizes.index(n_atoms) + 1


def _reference(prototype: str, element: str, key: str) -> float:
    state = cast(dict[str, Any], reference_states[atomic_numbers[element]] or {})
    if state.get("symmetry") != prototype or state.get(key) is None:
        raise InputError(
            f"no tabulated lattice constant of {prototype} {element}",
            fix="Give it as a (and c for hcp), in Å.",
        )
    return float(state[key])


def _hcp_c(element: str, a: float, c: float | None) -> float:
    if c is not None:
        return _positive(c, f"hcp {element}: c")
    state = cast(dict[str, Any], reference_states[atomic_numbers[element]] or {})
    ratio = state.get("c/a") if state.get("symmetry") == "hcp" else None
    return a * float(ratio or _IDEAL_RATIO)


def _positive(value: float, what: str) -> float:
    if not (np.isfinite(value) and value > 0):
        raise InputError(f"{what} must be above 0", found=value, expected="a length in Å")
    return value


def _read_structure(path: Path, format: str | None) -> Atoms:
    try:
        return cast(Atoms, read(path, index=-1, format=format))
    except UnknownFileTypeError as error:
        if format is None:
            return _read_with_pymatgen(path)
        raise InputError("unknown file format", where=str(path), found=format) from error
    except (*_PARSER_ERRORS, StopIteration) as error:
        if format is None:
            return _read_with_pymatgen(path)
        raise InputError(f"cannot be read as {format} ({error})", where=str(path)) from error


def _read_with_pymatgen(path: Path) -> Atoms:
    try:
        atoms = AseAtomsAdaptor.get_atoms(Structure.from_file(path))
    except _PARSER_ERRORS as error:
        raise InputError(
            "cannot be read by ASE nor by pymatgen",
            where=str(path),
            expected="a structure file (POSCAR, CIF, extended XYZ, ...)",
            fix="Name its format where ASE cannot tell it.",
        ) from error
    return Atoms(atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)


def _check_periodic(atoms: Atoms, where: str) -> None:
    if len(atoms) == 0:
        raise InputError("a structure without atoms", where=where)
    volume = abs(atoms.cell.volume)
    if not atoms.pbc.all() or volume < 1e-3 or not np.isfinite(atoms.positions).all():
        raise InputError(
            "not a structure that is periodic in three dimensions",
            where=where,
            found=f"pbc {atoms.pbc.tolist()}, volume {volume:.3g} Å³",
            expected="three periodic directions, a cell with a volume, finite positions",
        )


def _right_handed(atoms: Atoms) -> Atoms:
    """Describe a left-handed crystal by a right-handed cell: the third lattice vector is turned around."""
    if np.linalg.det(np.array(atoms.cell)) > 0:
        return atoms
    turned: Atoms = atoms.copy()
    turned.set_cell(np.array(atoms.cell) * [[1], [1], [-1]], scale_atoms=False)
    return turned
