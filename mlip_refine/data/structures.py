"""The crystals that simulations start from: built from a prototype, or read from a file."""

import json
import lzma
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast, get_args

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.data import atomic_numbers, chemical_symbols, reference_states
from ase.formula import Formula
from ase.io import read
from ase.io.extxyz import read_xyz
from ase.io.formats import (
    UnknownFileTypeError,
    filetype,
    get_compression,
    ioformats,
    open_with_compression,
)
from numpy.typing import ArrayLike

from mlip_refine.config.sections.phases import ATOMS_PER_CELL, IDEAL_C_OVER_A, Prototype
from mlip_refine.config.units import LENGTH
from mlip_refine.data.bounded import BoundedLines
from mlip_refine.errors import InputError, nearest
from mlip_refine.files import most_unpacked, unpack, user_path

_LARGEST = 10

_MOST_ATOMS = 1_000_000
"""Atoms of the largest cell; no simulation of this package gets near."""

_HEAVIEST = 1000.0
"""Mass that no atom has, amu; isotopes and what people make of them are lighter."""

_OCCUPANCIES = ("occupancy", "occupancies")
"""What readers of ASE call the occupancies of sites."""

_WHOLE = 1e-3
"""How far an occupancy may be from 1."""


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
    path = user_path(path)
    if not path.is_file():
        raise InputError("no such structure file", where=str(path))
    repeats = tuple(int(n) for n in supercell)
    if len(repeats) != 3 or min(repeats) < 1:
        raise InputError(
            "wrong supercell", where=str(path), found=list(supercell), expected="three numbers above 0"
        )
    if get_compression(path.name)[1] is not None:
        # The parser says what is wrong with a file that cannot be unpacked.
        with (
            suppress(OSError, EOFError, LookupError, ValueError, lzma.LZMAError, zlib.error),
            Path(os.devnull).open("wb") as nowhere,
            open_with_compression(str(path), "rb") as source,
        ):
            unpack(source, nowhere, path, most_unpacked(path))
    atoms = _read_structure(path, format)
    if len(atoms) == 0:
        raise InputError("a structure without atoms", where=str(path))
    check_atoms(atoms, str(path))
    volume = abs(atoms.cell.volume)
    if not atoms.pbc.all() or volume < 1e-3:
        raise InputError(
            "not a structure that is periodic in three dimensions",
            where=str(path),
            found=f"pbc {atoms.pbc.tolist()}, volume {volume:.3g} Å³",
            expected="three periodic directions, a cell with a volume",
        )
    # Turning the third lattice vector around describes a left-handed crystal by a right-handed cell.
    if np.linalg.det(np.array(atoms.cell)) <= 0:
        atoms.set_cell(np.array(atoms.cell) * [[1], [1], [-1]], scale_atoms=False)
    if len(atoms) * math.prod(repeats) > _MOST_ATOMS:
        found = f"{len(atoms)} atoms times {' x '.join(map(str, repeats))}"
        raise InputError(
            "too large a supercell", where=str(path), found=found, expected=f"at most {_MOST_ATOMS:,} atoms"
        )
    return cast(Atoms, atoms.repeat(repeats))


def check_atoms(atoms: Atoms, where: str) -> None:
    """Refuse what is no arrangement of whole atoms, of whatever format it was read.

    Raises:
        InputError: Positions or cells that are not finite or absurdly large, atoms without an element, masses
            that are not above 0, or sites that are occupied in part or by several elements.
    """
    lengths = np.abs(np.array([*atoms.cell.array, *atoms.positions]))
    if not np.isfinite(lengths).all():
        raise InputError("cell or positions are not finite", where=where)
    if lengths[:3].max() > LENGTH.most:
        found, expected = f"{lengths[:3].max():.3g} Å", f"at most {LENGTH.most:g} Å"
        raise InputError("a cell beyond measure", where=where, found=found, expected=expected)
    if not ((atoms.numbers > 0) & (atoms.numbers < len(chemical_symbols))).all():
        found = f"atom {int(np.argmax((atoms.numbers < 1) | (atoms.numbers >= len(chemical_symbols))))}"
        fix = "Vacancies and dummy atoms must not be in the file."
        raise InputError("an atom without an element", where=where, found=found, fix=fix)
    masses = atoms.get_masses()
    if not (np.isfinite(masses) & (masses > 0) & (masses < _HEAVIEST)).all():
        wrong = int(np.argmin(np.isfinite(masses) & (masses > 0) & (masses < _HEAVIEST)))
        found = f"{masses[wrong]:g} of atom {wrong}"
        raise InputError("a mass that no atom has", where=where, found=found, expected="amu, above 0")
    _require_whole_sites(atoms, where)


def _require_whole_sites(atoms: Atoms, where: str) -> None:
    """Refuse sites that are occupied in part or by several elements, as far as the reader kept it."""
    kinds = atoms.info.get("occupancy")
    sites = list(kinds.values()) if isinstance(kinds, Mapping) else []
    columns = [np.ravel(atoms.arrays[name]) for name in _OCCUPANCIES if name in atoms.arrays]
    for values in columns:
        # Programs that know no occupancy write 0 for all atoms.
        if np.issubdtype(values.dtype, np.number) and values.any():
            sites += [{str(atoms.symbols[i]): x} for i, x in enumerate(values[: len(atoms)].tolist())]
    for site in sites:
        # An occupancy that is not known is a text, such as a question mark.
        known = {element: x for element, x in site.items() if isinstance(x, int | float)}
        if len(site) > 1 or any(abs(x - 1.0) > _WHOLE for x in known.values()):
            raise InputError(
                "a site is not occupied by one whole atom",
                where=where,
                found=", ".join(f"{element} {x}" for element, x in site.items()),
                fix="Build a cell in which every site has one atom, such as a special quasirandom structure.",
            )


def _read_structure(path: Path, format: str | None) -> Atoms:
    kind = format
    # Telling the format looks into the file, which may be as strange to it as to a parser.
    with suppress(Exception):
        kind = format or filetype(str(path))
    if kind == "castep-cell":
        raise InputError(
            "ASE runs castep to read such a file, and a structure must not start a program",
            where=str(path),
            found="the format castep-cell",
            fix="Convert it, for example to CIF.",
        )
    known = kind in ioformats  # ASE guesses the suffix where it does not know
    plain, _ = get_compression(path.name)
    others = [reader for pattern, reader in _OTHER_READERS.items() if fnmatch(plain, pattern)]
    if kind == "vasp" or _read_poscar in others:
        _require_elements(path)
    try:
        if kind == "extxyz":
            with open_with_compression(str(path), "rb") as content, BoundedLines(content) as stream:
                return cast(Atoms, next(read_xyz(stream, index=slice(-1, None))))
        return cast(Atoms, read(path, index=-1, format=format))
    except UnknownFileTypeError as error:
        if format is not None:
            word = nearest(format, ioformats)
            fix = f"Did you mean {word!r}?" if word else None
            raise InputError("unknown file format", where=str(path), found=format, fix=fix) from error
        reason = None
    except Exception as error:  # ASE has a hundred parsers, which raise whatever a strange file makes them
        reason = _first_line(error)
        if format is not None:
            raise InputError(f"cannot be read as {format} ({reason})", where=str(path)) from error
    try:
        if others:
            with open_with_compression(str(path), "rt") as stream:
                return others[0](stream)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - as above
        reason = _first_line(error)
    if not known:
        raise InputError(
            "cannot be read as a structure",
            where=str(path),
            found=reason,
            expected="a structure file (POSCAR, CIF, extended XYZ, ...)",
            fix="Name its format where ASE cannot tell it.",
        )
    raise InputError(
        f"cannot be read as a structure of the format {kind}",
        where=str(path),
        found=reason,
        expected="a complete file",
        fix="Is it cut off, or of another format? Name that as format.",
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def poscar_elements(text: str) -> list[str] | None:
    """Return the elements of a POSCAR in the order of its groups of atoms, as far as it names them.

    VASP 5 names them in a line of their own, with the potential's name behind (`Ti_sv`); VASP 4 does not, but
    its comment line often holds them (`Ti O`, `TiO2`). Any other comment, such as `cell of H`, is none.

    Returns:
        One word for each group, which need not be an element; None where there are none.

    Raises:
        IndexError: The text ends before the numbers of atoms.
    """
    lines = text.splitlines()
    words = lines[5].partition("!")[0].split()
    if not words[0].isdecimal():
        return [word.partition("/")[0].partition("_")[0] for word in words]
    try:
        named = [element for word in lines[0].split() for element in Formula(word)]
    except ValueError:
        return None
    return named if len(named) == len(words) and set(named) <= set(chemical_symbols[1:]) else None


def _require_elements(path: Path) -> None:
    """Refuse a POSCAR that names no elements: ASE takes words of its comment, or of other files, for some."""
    try:
        with open_with_compression(str(path), "rt") as stream:
            elements = poscar_elements("".join(islice(stream, 6)))
    except (OSError, EOFError, LookupError, ValueError, lzma.LZMAError, zlib.error):
        return  # the parser says what is wrong with it
    if elements is None:
        raise InputError(
            "the POSCAR names no elements",
            where=str(path),
            expected="a line of symbols before the numbers of atoms, such as 'Ti O'",
            fix="Add that line (VASP 5), or let the first line hold the symbols and nothing else.",
        )


def _read_poscar(stream: IO[str]) -> Atoms:
    return cast(Atoms, read(stream, format="vasp"))


def _read_cif(stream: IO[str]) -> Atoms:
    """Read with pymatgen, whose parser takes more kinds of CIF than ASE's."""
    try:
        core = import_module("pymatgen.core")
    except ImportError as error:
        raise ValueError("ASE cannot read it; with pymatgen installed that is tried next") from error
    found = core.Structure.from_str(stream.read(), fmt="cif")
    sites = [{species.symbol: float(x) for species, x in site.species.items()} for site in found]
    return _of_sites(sites, found.frac_coords, found.lattice.matrix)


def _read_pymatgen_json(stream: IO[str]) -> Atoms:
    """Read cell, elements and positions of a structure that pymatgen wrote.

    pymatgen's own decoder imports whatever module the file names, and calls what it finds there.
    """
    data = json.load(stream)
    sites = [{str(one["element"]): float(one["occu"]) for one in site["species"]} for site in data["sites"]]
    return _of_sites(sites, [site["abc"] for site in data["sites"]], data["lattice"]["matrix"])


def _of_sites(sites: Sequence[Mapping[str, float]], scaled_positions: ArrayLike, cell: ArrayLike) -> Atoms:
    """Return the crystal of sites, with their occupancies by element kept as ASE's CIF reader keeps them."""
    return Atoms(
        [atomic_numbers.get(next(iter(site)), 0) for site in sites],
        scaled_positions=np.asarray(scaled_positions, dtype=np.float64),
        cell=np.asarray(cell, dtype=np.float64),
        pbc=True,
        info={"occupancy": {str(i): dict(site) for i, site in enumerate(sites)}},
    )


_OTHER_READERS: dict[str, Callable[[IO[str]], Atoms]] = {
    **dict.fromkeys(("*.vasp", "*CHGCAR*", "*LOCPOT*"), _read_poscar),
    **dict.fromkeys(("*.json", "*.mson"), _read_pymatgen_json),
    **dict.fromkeys(("*.cif", "*.mcif"), _read_cif),
}
"""What is tried when ASE does not read a file, by the pattern of its name without compression."""
