"""The crystals that simulations start from: built from a prototype, or read from a file."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import IO, Any, cast, get_args

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.data import atomic_numbers, chemical_symbols, reference_states
from ase.io import read
from ase.io.formats import UnknownFileTypeError, filetype, get_compression, open_with_compression

from mlip_refine.config.sections.phases import ATOMS_PER_CELL, IDEAL_C_OVER_A, Prototype
from mlip_refine.errors import InputError, nearest

_LARGEST = 10


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
    sizes = reachable_sizes(prototype)
    if n_atoms not in sizes:
        raise InputError(
            f"no {prototype} supercell n x n x n has this many atoms",
            found=f"n_atoms {n_atoms}",
            expected=f"one of {', '.join(map(str, sizes))}",
            fix=f"The nearest is {min(sizes, key=lambda size: abs(size - n_atoms))}.",
        )
    state = cast(dict[str, Any], reference_states[atomic_numbers[element]] or {})
    tabulated = state if state.get("symmetry") == prototype else {}
    if a is None:
        if tabulated.get("a") is None:
            raise InputError(
                f"no tabulated lattice constant of {prototype} {element}",
                fix="Give it as a (and c for hcp), in Å.",
            )
        a = float(tabulated["a"])
    _check_length(a, f"{prototype} {element}: a")
    if prototype == "hcp":
        if c is None:
            c = a * float(tabulated.get("c/a") or IDEAL_C_OVER_A)
        _check_length(c, f"hcp {element}: c")
        cell = bulk(element, "hcp", a=a, c=c)
    else:
        cell = bulk(element, prototype, a=a, cubic=True)
    return cast(Atoms, cell.repeat(sizes.index(n_atoms) + 1))


def _check_length(value: float, what: str) -> None:
    if not (np.isfinite(value) and value > 0):
        raise InputError(f"{what} must be above 0", found=value, expected="a length in Å")


def reachable_sizes(prototype: Prototype) -> list[int]:
    """Return the numbers of atoms that `build_phase` can make of a prototype."""
    return [ATOMS_PER_CELL[prototype] * n**3 for n in range(1, _LARGEST + 1)]


def load_structure(
    path: Path,
    supercell: Sequence[int] = (1, 1, 1),
    format: str | None = None,
) -> Atoms:
    """Read a periodic structure and repeat it.

    Args:
        path: Any file that ASE reads, or a structure in pymatgen's JSON; of several frames the last is taken.
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
    if len(atoms) == 0:
        raise InputError("a structure without atoms", where=str(path))
    volume = abs(atoms.cell.volume)
    if not atoms.pbc.all() or volume < 1e-3 or not np.isfinite(atoms.positions).all():
        raise InputError(
            "not a structure that is periodic in three dimensions",
            where=str(path),
            found=f"pbc {atoms.pbc.tolist()}, volume {volume:.3g} Å³",
            expected="three periodic directions, a cell with a volume, finite positions",
        )
    # Turning the third lattice vector around describes a left-handed crystal by a right-handed cell.
    if np.linalg.det(np.array(atoms.cell)) <= 0:
        atoms.set_cell(np.array(atoms.cell) * [[1], [1], [-1]], scale_atoms=False)
    return cast(Atoms, atoms.repeat(repeats))


def _read_structure(path: Path, format: str | None) -> Atoms:
    with suppress(UnknownFileTypeError, OSError, ValueError):
        if (format or filetype(str(path))) == "castep-cell":
            raise InputError(
                "ASE runs castep to read such a file, and a structure must not start a program",
                where=str(path),
                found="the format castep-cell",
                fix="Convert it, for example to CIF.",
            )
    try:
        return cast(Atoms, read(path, index=-1, format=format))
    except UnknownFileTypeError as error:
        if format is not None:
            raise InputError("unknown file format", where=str(path), found=format) from error
    except Exception as error:  # ASE has a hundred parsers, which raise whatever a strange file makes them
        if format is not None:
            raise InputError(f"cannot be read as {format} ({error})", where=str(path)) from error
    plain, _ = get_compression(path.name)
    others = [reader for pattern, reader in _OTHER_READERS.items() if fnmatch(plain, pattern)]
    try:
        if others:
            with open_with_compression(str(path), "rt") as stream:
                return others[0](stream)
    except Exception as error:
        found = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _unreadable(path, found) from error
    raise _unreadable(path, None)


def _unreadable(path: Path, found: str | None) -> InputError:
    return InputError(
        "cannot be read as a structure",
        where=str(path),
        found=found,
        expected="a structure file (POSCAR, CIF, extended XYZ, ...)",
        fix="Name its format where ASE cannot tell it.",
    )


def _read_poscar(stream: IO[str]) -> Atoms:
    return cast(Atoms, read(stream, format="vasp"))


def _read_cif(stream: IO[str]) -> Atoms:
    """Read with pymatgen, whose parser takes more kinds of CIF than ASE's."""
    try:
        core, adaptor = import_module("pymatgen.core"), import_module("pymatgen.io.ase")
    except ImportError as error:
        raise ValueError("ASE cannot read it; with pymatgen installed that is tried next") from error
    found = core.Structure.from_str(stream.read(), fmt="cif")
    atoms = adaptor.AseAtomsAdaptor.get_atoms(found)
    return Atoms(atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)


def _read_pymatgen_json(stream: IO[str]) -> Atoms:
    """Read cell, elements and positions of a structure that pymatgen wrote.

    pymatgen's own decoder imports whatever module the file names, and calls what it finds there.
    """
    data = json.load(stream)
    symbols = []
    for site in data["sites"]:
        species = site["species"]
        if len(species) != 1 or species[0]["occu"] != 1:
            raise ValueError("a site is not occupied by one element alone")
        symbols.append(str(species[0]["element"]))
    return Atoms(
        [atomic_numbers[symbol] for symbol in symbols],
        scaled_positions=np.array([site["abc"] for site in data["sites"]], dtype=np.float64),
        cell=np.array(data["lattice"]["matrix"], dtype=np.float64),
        pbc=True,
    )


_OTHER_READERS: dict[str, Callable[[IO[str]], Atoms]] = {
    **dict.fromkeys(("*.vasp", "*CHGCAR*", "*LOCPOT*"), _read_poscar),
    **dict.fromkeys(("*.json", "*.mson"), _read_pymatgen_json),
    **dict.fromkeys(("*.cif", "*.mcif"), _read_cif),
}
"""What is tried when ASE does not read a file, by the pattern of its name without compression."""
