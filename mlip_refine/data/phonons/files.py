"""Phonon calculations as phonopy and phono3py leave them: in a folder, an archive, or one file.

Files may be compressed (`.xz`, `.lzma`, `.gz`, `.bz2`). What a calculation holds:

- cells and matrices: `phonopy_params.yaml`, `phonopy.yaml`, `phonopy_disp.yaml`, the same of phono3py; or a
  unit cell in the format of the code that calculated (`POSCAR-unitcell`, `POSCAR`) with `phonopy.conf`;
- forces of displaced supercells in the YAML file or in `FORCE_SETS` (`FORCES_FC2`, `FORCES_FC3` of phono3py);
- force constants in the YAML file, in `FORCE_CONSTANTS`, or in `force_constants.hdf5` or `fc2.hdf5`.
"""

import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from phonopy.cui.load_helper import read_force_constants_from_hdf5
from phonopy.file_IO import parse_FORCE_CONSTANTS, parse_FORCE_SETS_from_strings
from phonopy.interface.calculator import get_default_cell_filename, read_crystal_structure

from mlip_refine.data.hdf5 import refuse_outside_data
from mlip_refine.data.phonons import layout as place
from mlip_refine.data.phonons.phonopy_yaml import Calculation, calculations_of_yaml, with_forces
from mlip_refine.errors import InputError, MlipRefineError

_YamlLoader: type[yaml.SafeLoader | yaml.CSafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Makes dicts, lists, numbers and text, nothing else; the one of libyaml is ten times as fast."""

_NOT_CALCULATORS = ("phonopy_yaml",)
"""Formats of phonopy's that are read with its unsafe YAML loader."""

_PARSER_ERRORS = (
    *(ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError, RuntimeError, OSError),
    *(EOFError, NotImplementedError, lzma.LZMAError, zlib.error, tarfile.TarError, yaml.YAMLError),
)
"""What phonopy and the libraries below it raise when a file is not what its name says."""


@dataclass(frozen=True, eq=False)
class PhononFiles:
    """What to read, where the files themselves do not say it.

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
    """Read what a folder, an archive or a file says.

    Args:
        path: Folder; archive; YAML file; or a file of forces or force constants beside a unit cell.
        files: What the files do not say.

    Returns:
        One calculation; two when third-order displacements were made in another supercell, which then
        comes second.

    Raises:
        InputError: Something is missing, damaged, or not of the format that its name says.
    """
    if not path.exists():
        raise InputError("no such file or folder", where=str(path), expected="a phonon calculation")
    with parsing(path), place.unpacked(path) as source:
        calculations = _read(source, files)
    return [replace(one, where=str(path)) for one in calculations]


@contextmanager
def parsing(path: Path) -> Iterator[None]:
    """Say of a file what libraries say of its content.

    Raises:
        InputError: In place of what they raise.
    """
    try:
        yield
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


def read_yaml(path: Path) -> Any:
    """Parse a YAML file, compressed or not, without making any object that it asks for.

    phonopy's own `load_yaml` must never be called: its loader runs code that tags of the file name.

    Raises:
        yaml.YAMLError: The file is no YAML, or has tags that stand for Python objects.
    """
    return yaml.load(place.read_text(path), Loader=_YamlLoader)  # noqa: S506 - a safe loader


def _read(path: Path, files: PhononFiles) -> list[Calculation]:
    folder = path if path.is_dir() else path.parent
    source = path if place.is_yaml(path) else place.find(folder, *place.YAML_FILES)
    if source is None or files.cell is not None:
        found = [_from_cell(folder, files)]
    else:
        found = calculations_of_yaml(read_yaml(source))
    found = [_overridden(one, folder, files) for one in found]
    if path.is_file() and not place.is_yaml(path):
        return [_with_file(found[0], path)]
    if path.is_file() and found[0].forces is not None:
        return found
    names = [("FORCES_FC2",), ("FORCES_FC3",)] if len(found) == 2 else [("FORCE_SETS", "FORCES_FC3")]
    found = [_with_first(one, folder, names[k]) for k, one in enumerate(found)]
    if files.force_constants:
        found[0] = _with_first(found[0], folder, place.FORCE_CONSTANTS_FILES)
    return found


def _from_cell(folder: Path, files: PhononFiles) -> Calculation:
    """Unit cell and matrices from a structure file and `phonopy.conf`."""
    if files.calculator in _NOT_CALCULATORS:
        raise InputError(
            "no calculator", found=files.calculator, expected="one of phonopy's, such as vasp or qe"
        )
    default = get_default_cell_filename(files.calculator)
    path = files.cell or place.find(folder, *place.CELL_FILES, default)
    if path is None or not path.is_file():
        expected = f"{place.YAML_FILES[0]}, or {place.CELL_FILES[0]} with {place.CONF_FILES[0]}"
        raise InputError("no unit cell", where=str(path or folder), expected=expected)
    with place.decompressed(path) as plain:
        cell, _ = read_crystal_structure(plain, interface_mode=files.calculator)
    if cell is None:
        raise InputError("holds no structure", where=str(path))
    conf = place.read_conf(folder)
    axes = conf.get("PRIMITIVE_AXES", conf.get("PRIMITIVE_AXIS", "auto"))
    return Calculation(
        cell,
        place.matrix_of(conf["DIM"]).astype(np.int64) if "DIM" in conf else None,
        place.matrix_of(axes) if " " in axes else axes,
    )


def _overridden(calculation: Calculation, folder: Path, files: PhononFiles) -> Calculation:
    """What the caller says goes before what the files say."""
    functional, cutoff = place.read_incar(folder)
    matrix = files.supercell_matrix
    return replace(
        calculation,
        supercell_matrix=calculation.supercell_matrix if matrix is None else _square(matrix),
        primitive_matrix=(
            calculation.primitive_matrix if files.primitive_matrix is None else files.primitive_matrix
        ),
        calculator=files.calculator or calculation.calculator,
        force_constants=calculation.force_constants if files.force_constants else None,
        functional=functional,
        cutoff=cutoff,
        nac=calculation.nac or place.find(folder, *place.BORN_FILES) is not None,
    )


def _square(matrix: NDArray[np.int64]) -> NDArray[np.int64]:
    given = np.asarray(matrix)
    return np.diag(given) if given.shape == (3,) else given


def _with_first(calculation: Calculation, folder: Path, names: tuple[str, ...]) -> Calculation:
    """Add the first of these files, unless the calculation has what it would bring."""
    path = place.find(folder, *names)
    constants = names == place.FORCE_CONSTANTS_FILES
    present = calculation.force_constants if constants else calculation.forces
    return calculation if path is None or present is not None else _with_file(calculation, path)


def _with_file(calculation: Calculation, path: Path) -> Calculation:
    """Add forces or force constants, as the name of the file says."""
    name = place.plain_name(path)
    if name.endswith(".hdf5"):
        refuse_outside_data(path)
        constants = read_force_constants_from_hdf5(path, calculator=calculation.calculator)
        return replace(calculation, force_constants=constants)
    if name.startswith("FORCE_CONSTANTS"):
        with place.decompressed(path) as plain:
            return replace(calculation, force_constants=parse_FORCE_CONSTANTS(plain))
    text = place.read_text(path)
    if name.startswith("FORCES_FC"):
        table = np.loadtxt(StringIO(text))
        # Of random displacements each line has the displacement before the force, as in FORCE_SETS.
        if table.ndim != 2 or table.shape[1] != 2 * 3:
            return with_forces(calculation, table)
        text = "\n".join(" ".join(map(repr, line)) for line in table.tolist())
    n_atoms = round(len(calculation.unit_cell) * abs(np.linalg.det(_supercell_matrix(calculation))))
    return calculation.with_dataset(parse_FORCE_SETS_from_strings(text, natom=n_atoms))


def _supercell_matrix(calculation: Calculation) -> NDArray[np.int64]:
    if calculation.supercell_matrix is None:
        raise InputError(
            "the supercell is not known",
            where=calculation.where or None,
            fix="Put DIM into phonopy.conf beside the file.",
        )
    return calculation.supercell_matrix
