"""Phonon calculations as phonopy and phono3py leave them: in a folder, an archive, or one file.

Files may be compressed (`.xz`, `.lzma`, `.gz`, `.bz2`). What a calculation holds:

- cells and matrices: `phonopy_params.yaml`, `phonopy.yaml`, `phonopy_disp.yaml`, the same of phono3py; or a
  unit cell in the format of the code that calculated (`POSCAR-unitcell`, `POSCAR`) with `phonopy.conf`;
- forces of displaced supercells in the YAML file or in `FORCE_SETS` (`FORCES_FC2`, `FORCES_FC3` of phono3py);
- force constants in the YAML file, in `FORCE_CONSTANTS`, or in `force_constants.hdf5` or `fc2.hdf5`.

`mlip_refine.data.phonons.formats` reads the single files.
"""

import lzma
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml
from ase.data import chemical_symbols
from numpy.typing import NDArray
from phonopy.cui.settings import parse_magmom
from phonopy.interface.calculator import get_default_cell_filename, read_crystal_structure
from phonopy.structure.atoms import PhonopyAtoms

from mlip_refine.data.phonons import files as layout
from mlip_refine.data.phonons.formats import READERS, Calculation, PartReader, WholeReader, reader_of
from mlip_refine.data.structures import poscar_elements
from mlip_refine.errors import InputError, MlipRefineError
from mlip_refine.files import most_unpacked, unpack, user_path

_NOT_CALCULATORS = ("phonopy_yaml",)
"""Formats of phonopy's that are read with its unsafe YAML loader."""

_PARSER_ERRORS = (
    *(ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError, RuntimeError, OSError),
    *(
        ArithmeticError,
        EOFError,
        NotImplementedError,
        lzma.LZMAError,
        zlib.error,
        tarfile.TarError,
        yaml.YAMLError,
    ),
)
"""What phonopy and the libraries below it raise when a file is not what its name says."""


_MOST_MEMBERS = 10_000
"""Files in an archive of one calculation: three for each of a thousand displacements are plenty."""


@dataclass(frozen=True, eq=False)
class PhononFiles:
    """Settings of a calculation that its files do not give, or that replace what they give.

    Attributes:
        cell: Unit cell, for files that come without one.
        supercell_matrix: Three integers, or a matrix with the supercell's vectors as columns.
        primitive_matrix: A matrix with the primitive vectors as columns, or a centring: P, F, I, A, C, R.
            None takes what the files say, or else finds the primitive cell by symmetry.
        calculator: Code that calculated, in phonopy's words (`qe`): settles formats and units.
        force_constants: Whether force constants in the files are taken. If not, they are fitted to the
            forces.
    """

    cell: Path | None = None
    supercell_matrix: NDArray[np.int64] | None = None
    primitive_matrix: NDArray[np.float64] | str | None = None
    calculator: str | None = None
    force_constants: bool = True


def read_calculations(path: Path, files: PhononFiles) -> list[Calculation]:
    """Read the calculation in a folder, an archive or a file.

    Args:
        path: Folder; archive; YAML file; or a file of forces or force constants beside a unit cell.
        files: Settings that the files do not give.

    Returns:
        One calculation; two when third-order displacements were made in another supercell, which then
        comes second.

    Raises:
        InputError: Something is missing, damaged, or not of the format that its name says.
    """
    path = user_path(path)
    if not path.exists():
        raise InputError("no such file or folder", where=str(path), expected="a phonon calculation")
    with parsing(path), unpacked(path) as source:
        try:
            calculations = _read(source, files)
        except InputError as error:
            if error.where and source != path:
                # The folder that an archive is unpacked into says nothing to a user.
                error.where = error.where.replace(str(source), str(path), 1)
            raise
    return [replace(one, where=str(path)) for one in calculations]


@contextmanager
def parsing(path: Path) -> Iterator[None]:
    """Turn what libraries raise about the content of a file into an error that names it.

    Raises:
        InputError: In place of what they raise.
    """
    try:
        yield
    except InputError as error:
        if error.where is None:
            error.where = str(path)
        raise
    except MlipRefineError:
        raise
    except yaml.constructor.ConstructorError as error:
        line = "" if error.problem_mark is None else f" (line {error.problem_mark.line + 1})"
        raise InputError(
            f"the file asks for more than data{line}",
            where=str(path),
            found=ascii(error.problem),
            expected="numbers, text, lists and mappings: a tag like !!python/object is not data",
        ) from error
    except _PARSER_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"cannot be read as a phonon calculation ({reason})", where=str(path)) from error


def is_calculation(path: Path) -> bool:
    """Whether a path may be a phonon calculation: archive, YAML file, or folder with what one is made of."""
    if path.is_dir():
        return layout.find(path, *(name for reader in READERS for name in reader.names)) is not None
    return layout.is_archive(path) or (path.is_file() and isinstance(reader_of(path), WholeReader))


def files_of(path: Path) -> list[Path]:
    """Files that a calculation may be read from: an archive; a file and its neighbours; those of a folder."""
    if layout.is_archive(path):
        return [path]
    folder = path if path.is_dir() else path.parent
    names = _known_names()
    with suppress(InputError, *_PARSER_ERRORS):  # which are told when the calculation is read
        names |= {name for name in [layout.conf_cell(folder)] if name is not None}
    known = [file for file in sorted(folder.iterdir()) if file.is_file() and layout.plain_name(file) in names]
    return known if path.is_dir() else [path, *(file for file in known if file != path)]


def _known_names() -> set[str]:
    """Names of all files that a calculation may be made of, without the suffix of a compression."""
    others = (layout.CELL_FILES, layout.CONF_FILES, layout.INCAR_FILES, layout.BORN_FILES)
    return {name for names in (*(reader.names for reader in READERS), *others) for name in names}


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Hold the files of an archive in a folder while the block runs; anything else stays where it is."""
    if not layout.is_archive(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder, known, left = Path(temporary), _known_names(), most_unpacked(path)
        with tarfile.open(path, "r:*") as archive:
            # Known files alone, under their last names: no path of an archive leads out of the folder.
            for number, member in enumerate(archive):
                if number > _MOST_MEMBERS:
                    found = f"more than {_MOST_MEMBERS:,} files"
                    raise InputError(
                        "the archive holds more than a calculation", where=str(path), found=found
                    )
                name = Path(member.name).name
                if not member.isfile() or layout.plain_name(Path(name)) not in known:
                    continue
                if (folder / name).exists():
                    raise InputError(
                        "the archive holds several calculations", where=str(path), found=f"{name} twice"
                    )
                source = archive.extractfile(member)
                if source is not None:
                    with (folder / name).open("wb") as copy:
                        left -= unpack(source, copy, path, left)
            # The cell may have a name that `phonopy.conf` gives.
            cell = layout.conf_cell(folder)
            for member in archive if cell is not None and not (folder / cell).exists() else ():
                source = archive.extractfile(member) if Path(member.name).name == cell else None
                if source is not None and cell is not None:
                    with (folder / cell).open("wb") as copy:
                        shutil.copyfileobj(source, copy)
        yield folder


def _read(path: Path, files: PhononFiles) -> list[Calculation]:
    folder = path if path.is_dir() else path.parent
    given = reader_of(path) if path.is_file() else None
    if isinstance(given, WholeReader):
        whole: tuple[WholeReader, Path] | None = given, path
    else:
        whole = _first(folder, (reader for reader in READERS if isinstance(reader, WholeReader)))
    if whole is None or files.cell is not None:
        found = [_from_cell(folder, files)]
    else:
        with parsing(whole[1]):
            found = whole[0].read(whole[1])
        conf = layout.find(folder, *layout.CONF_FILES)
        if conf is not None and not isinstance(given, WholeReader):
            note = f"{conf.name} is not used: {whole[1].name} has cells and matrices"
            found = [replace(one, notes=(*one.notes, note)) for one in found]

    # What the caller says goes before the files.
    functional, cutoff = layout.read_incar(folder)
    matrix = None if files.supercell_matrix is None else np.asarray(files.supercell_matrix)
    if matrix is not None and matrix.shape == (3,):
        matrix = np.diag(matrix)
    axes, charges = files.primitive_matrix, layout.find(folder, *layout.BORN_FILES) is not None
    found = [
        replace(
            one,
            supercell_matrix=one.supercell_matrix if matrix is None else matrix,
            primitive_matrix=one.primitive_matrix if axes is None else axes,
            calculator=files.calculator or one.calculator,
            force_constants=one.force_constants if files.force_constants else None,
            functional=functional or one.functional,
            cutoff=one.cutoff if cutoff is None else cutoff,
            nac=one.nac or charges,
        )
        for one in found
    ]

    if isinstance(given, PartReader):
        with parsing(path):
            return [given.read(found[0], path)]
    if given is not None and found[0].forces is not None:
        return found
    # phono3py has two supercells, or else one for all.
    second, third = {"second-order forces"}, {"third-order forces"}
    orders = [[second], [third]] if len(found) == 2 else [[third | {"forces"}, second]]
    for k, wanted in enumerate(orders):
        for gives in wanted:
            if found[k].forces is None:
                found[k] = _with_part(found[k], folder, gives)
    if files.force_constants and found[0].force_constants is None:
        found[0] = _with_part(found[0], folder, {"force constants"})
    if len(found) == 2 and found[1].forces is None:
        # Second order counts by itself.
        return found[:1]
    return found


def _with_part(calculation: Calculation, folder: Path, gives: Collection[str]) -> Calculation:
    """Add the content of the first file in a folder whose reader gives one of these."""
    readers = (reader for reader in READERS if isinstance(reader, PartReader) and reader.gives in gives)
    first = _first(folder, readers)
    if first is None:
        return calculation
    with parsing(first[1]):
        return first[0].read(calculation, first[1])


def _first[R: WholeReader | PartReader](folder: Path, readers: Iterable[R]) -> tuple[R, Path] | None:
    """The first reader with a file in a folder, and the file."""
    found = ((reader, layout.find(folder, *reader.names)) for reader in readers)
    return next(((reader, path) for reader, path in found if path is not None), None)


def _from_cell(folder: Path, files: PhononFiles) -> Calculation:
    """Unit cell and matrices from a structure file and `phonopy.conf`."""
    conf, conf_path = layout.read_conf(folder), layout.find(folder, *layout.CONF_FILES)
    calculator = files.calculator or conf.get("CALCULATOR", "").lower() or None
    if calculator in _NOT_CALCULATORS:
        raise InputError("no calculator", found=calculator, expected="one of phonopy's, such as vasp or qe")
    if "SITE_MIXTURE" in conf:
        raise InputError(
            "sites that several elements share cannot be read", where=str(conf_path), found="SITE_MIXTURE"
        )
    named = layout.conf_cell(folder)
    names = (named,) if named else (*layout.CELL_FILES, get_default_cell_filename(calculator))
    path = files.cell or layout.find(folder, *names)
    if path is None or not path.is_file():
        expected = named or f"phonopy_params.yaml, or {layout.CELL_FILES[0]} with {layout.CONF_FILES[0]}"
        raise InputError("no unit cell", where=str(path or folder), expected=expected)
    with parsing(path), layout.decompressed(path) as plain:
        cell, _ = read_crystal_structure(plain, interface_mode=calculator)
        if cell is not None and calculator in (None, "vasp"):
            cell = _with_elements(cell, plain.read_text(encoding="utf-8"), conf.get("ATOM_NAME"), path)
    if cell is None:
        raise InputError("holds no structure", where=str(path))
    with parsing(conf_path or path):
        if "MAGMOM" in conf:
            cell.magnetic_moments = parse_magmom(conf["MAGMOM"])
        axes = conf.get("PRIMITIVE_AXES", conf.get("PRIMITIVE_AXIS", "auto"))
        matrix = layout.matrix_of(conf["DIM"]) if "DIM" in conf else None
        if matrix is not None and (not np.array_equal(matrix, np.rint(matrix)) or not np.linalg.det(matrix)):
            raise InputError(
                "no supercell",
                where=str(conf_path),
                found=f"DIM = {conf['DIM'][:80]}",
                expected="3 or 9 integers",
            )
        ignored = [tag for tag in conf if tag not in layout.USED_TAGS]
        return Calculation(
            cell,
            None if matrix is None else matrix.astype(np.int64),
            layout.matrix_of(axes) if " " in axes else axes,
            masses=np.array([float(word) for word in conf["MASS"].split()]) if "MASS" in conf else None,
            calculator=calculator,
            notes=(f"tags of {conf_path.name} that change nothing: {', '.join(ignored)}",)
            if ignored and conf_path
            else (),
        )


def _with_elements(cell: PhonopyAtoms, poscar: str, atom_name: str | None, path: Path) -> PhonopyAtoms:
    """Return the cell of a POSCAR with its elements: phonopy takes H, He, ... where it names none.

    Raises:
        InputError: Neither the file nor ATOM_NAME of `phonopy.conf` names an element for every group.
    """
    lines = poscar.splitlines()
    own = poscar_elements(poscar)
    elements = own or [word.capitalize() for word in (atom_name or "").split()]
    counts = [
        int(word) for word in lines[5 if lines[5].split()[0].isdecimal() else 6].partition("!")[0].split()
    ]
    unknown = [element for element in elements if element not in chemical_symbols[1:]]
    if len(elements) != len(counts) or unknown:
        raise InputError(
            "the POSCAR names no elements" if own is None else "the POSCAR does not name every element",
            where=str(path),
            found=" ".join(elements)[:80] or None,
            expected=f"{len(counts)} symbol(s), for {' + '.join(map(str, counts))} atoms",
            fix="Put them into a line before the numbers of atoms, or ATOM_NAME into phonopy.conf.",
        )
    if float(lines[1].split()[0]) <= 0:
        raise InputError(
            "a POSCAR whose scale is a volume cannot be read", where=str(path), fix="Write the cell in Å."
        )
    symbols = [element for element, count in zip(elements, counts, strict=True) for _ in range(count)]
    return PhonopyAtoms(symbols=symbols, cell=cell.cell, scaled_positions=cell.scaled_positions)
