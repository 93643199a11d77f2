"""Phonon calculations as phonopy and phono3py leave them: in a folder, an archive, or one file.

Files may be compressed (`.xz`, `.lzma`, `.gz`, `.bz2`). What a calculation holds:

- cells and matrices: `phonopy_params.yaml`, `phonopy.yaml`, `phonopy_disp.yaml`, the same of phono3py; or a
  unit cell in the format of the code that calculated (`POSCAR-unitcell`, `POSCAR`) with `phonopy.conf`;
- forces of displaced supercells in the YAML file or in `FORCE_SETS` (`FORCES_FC2`, `FORCES_FC3` of phono3py);
- force constants in the YAML file, in `FORCE_CONSTANTS`, or in `force_constants.hdf5` or `fc2.hdf5`.

To read another format, write a function that makes a `Calculation` of a file, or adds to one, put it into
`WHOLE_READERS` or `PART_READERS`, and its file names into the tables of `mlip_refine.data.phonons.files`.
"""

import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray
from phonopy.cui.load_helper import read_force_constants_from_hdf5
from phonopy.file_IO import parse_FORCE_CONSTANTS, parse_FORCE_SETS_from_strings
from phonopy.harmonic.displacement import DisplacementDataset
from phonopy.interface.calculator import get_default_cell_filename, read_crystal_structure
from phonopy.interface.phonopy_yaml import PhonopyYamlData, load_phonopy_yaml
from phonopy.structure.atoms import PhonopyAtoms
from phonopy.structure.dataset import forces_in_dataset, get_displacements_and_forces

from mlip_refine.data.hdf5 import refuse_outside_data
from mlip_refine.data.phonons import files as layout
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

_PREFIX = "phonon_"


@dataclass(frozen=True, eq=False)
class Calculation:
    """Contents of the files of one supercell, in the units of the code that calculated.

    Attributes:
        unit_cell: Unit cell as given.
        supercell_matrix: Supercell's vectors as columns, in those of the unit cell; None when unknown.
        primitive_matrix: Primitive vectors as columns; a centring; None when unknown.
        supercell: Atoms in the order of the forces, where a file lists them.
        displacements: Displacements of the atoms `[n_sets, N, 3]`; None when there are none.
        forces: Forces on the atoms `[n_sets, N, 3]`, nan where none were calculated; None without
            forces.
        energies: Energies of the displaced supercells `[n_sets]`, or None.
        residual_forces: Forces of the undisplaced supercell `[N, 3]`, already subtracted; None when unknown.
        n_fitted: Number of sets, from the first, that force constants are fitted to; None for all.
        left_out: Sets that were never to be calculated `[n_sets]`, whose forces files have as 0; None for
            none.
        force_constants: Force constants `[n_prim or N, N, 3, 3]`, or None.
        calculator: Code that calculated, in phonopy's words; None is VASP's units.
        nac: Whether Born charges come with it.
        functional: Exchange-correlation functional.
        cutoff: Cutoff energy of the plane waves, eV.
        where: File or folder, for messages.
    """

    unit_cell: PhonopyAtoms
    supercell_matrix: NDArray[np.int64] | None = None
    primitive_matrix: NDArray[np.float64] | str | None = None
    supercell: PhonopyAtoms | None = None
    displacements: NDArray[np.float64] | None = None
    forces: NDArray[np.float64] | None = None
    energies: NDArray[np.float64] | None = None
    residual_forces: NDArray[np.float64] | None = None
    n_fitted: int | None = None
    left_out: NDArray[np.bool_] | None = None
    force_constants: NDArray[np.float64] | None = None
    calculator: str | None = None
    nac: bool = False
    functional: str | None = None
    cutoff: float | None = None
    where: str = ""

    def with_dataset(self, dataset: DisplacementDataset) -> "Calculation":
        """Add displaced supercells in one of phonopy's two forms."""
        displacements, forces = get_displacements_and_forces(dataset)
        content: Mapping[str, Any] = dataset
        energies = content.get("supercell_energies")
        if "first_atoms" in content:
            each = np.array([one.get("supercell_energy", np.nan) for one in content["first_atoms"]])
            energies = None if np.isnan(each).all() else each
        return replace(
            self,
            displacements=displacements,
            forces=forces if forces_in_dataset(dataset) else None,
            energies=None if energies is None else np.asarray(energies, dtype=np.float64),
        )


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
    if not path.exists():
        raise InputError("no such file or folder", where=str(path), expected="a phonon calculation")
    with parsing(path), layout.unpacked(path) as source:
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
    return yaml.load(layout.read_text(path), Loader=_YamlLoader)  # noqa: S506 - a safe loader


def _read(path: Path, files: PhononFiles) -> list[Calculation]:
    folder = path if path.is_dir() else path.parent
    source = path if layout.is_whole(path) else layout.find(folder, *layout.WHOLE_FILES)
    if source is None or files.cell is not None:
        found = [_from_cell(folder, files)]
    else:
        found = _reader(WHOLE_READERS, source)(source)
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
            functional=functional,
            cutoff=cutoff,
            nac=one.nac or charges,
        )
        for one in found
    ]
    if path.is_file() and not layout.is_whole(path):
        return [_reader(PART_READERS, path)(found[0], path)]
    if path.is_file() and found[0].forces is not None:
        return found
    names = [("FORCES_FC2",), ("FORCES_FC3",)] if len(found) == 2 else [("FORCE_SETS", "FORCES_FC3")]
    found = [_with_first(one, folder, names[k]) for k, one in enumerate(found)]
    if files.force_constants:
        found[0] = _with_first(found[0], folder, layout.FORCE_CONSTANTS_FILES)
    return found


def _from_cell(folder: Path, files: PhononFiles) -> Calculation:
    """Unit cell and matrices from a structure file and `phonopy.conf`."""
    if files.calculator in _NOT_CALCULATORS:
        raise InputError(
            "no calculator", found=files.calculator, expected="one of phonopy's, such as vasp or qe"
        )
    default = get_default_cell_filename(files.calculator)
    path = files.cell or layout.find(folder, *layout.CELL_FILES, default)
    if path is None or not path.is_file():
        expected = f"{layout.WHOLE_FILES[0]}, or {layout.CELL_FILES[0]} with {layout.CONF_FILES[0]}"
        raise InputError("no unit cell", where=str(path or folder), expected=expected)
    with layout.decompressed(path) as plain:
        cell, _ = read_crystal_structure(plain, interface_mode=files.calculator)
    if cell is None:
        raise InputError("holds no structure", where=str(path))
    conf = layout.read_conf(folder)
    axes = conf.get("PRIMITIVE_AXES", conf.get("PRIMITIVE_AXIS", "auto"))
    return Calculation(
        cell,
        layout.matrix_of(conf["DIM"]).astype(np.int64) if "DIM" in conf else None,
        layout.matrix_of(axes) if " " in axes else axes,
    )


def _with_first(calculation: Calculation, folder: Path, names: tuple[str, ...]) -> Calculation:
    """Add the first of these files, unless the calculation has what it would bring."""
    path = layout.find(folder, *names)
    constants = names == layout.FORCE_CONSTANTS_FILES
    present = calculation.force_constants if constants else calculation.forces
    return (
        calculation if path is None or present is not None else _reader(PART_READERS, path)(calculation, path)
    )


def _reader[R](readers: Mapping[str, R], path: Path) -> R:
    """Return the first reader whose pattern fits the name of a file."""
    name = layout.plain_name(path)
    return next(reader for pattern, reader in readers.items() if fnmatch(name, pattern))


def _with_hdf5(calculation: Calculation, path: Path) -> Calculation:
    refuse_outside_data(path)
    constants = read_force_constants_from_hdf5(path, calculator=calculation.calculator)
    return replace(calculation, force_constants=constants)


def _with_force_constants(calculation: Calculation, path: Path) -> Calculation:
    with layout.decompressed(path) as plain:
        return replace(calculation, force_constants=parse_FORCE_CONSTANTS(plain))


def _with_third_order_forces(calculation: Calculation, path: Path) -> Calculation:
    """Add `FORCES_FC2` or `FORCES_FC3`; with random displacements these are in the format of `FORCE_SETS`."""
    table = np.loadtxt(StringIO(layout.read_text(path)))
    if table.ndim != 2 or table.shape[1] != 2 * 3:
        return with_forces(calculation, table)
    return _with_sets(calculation, "\n".join(" ".join(map(repr, line)) for line in table.tolist()))


def _with_force_sets(calculation: Calculation, path: Path) -> Calculation:
    return _with_sets(calculation, layout.read_text(path))


def _with_sets(calculation: Calculation, text: str) -> Calculation:
    """Add displacements and forces in the format of `FORCE_SETS`."""
    if calculation.supercell_matrix is None:
        raise InputError(
            "the supercell is not known",
            where=calculation.where or None,
            fix="Put DIM into phonopy.conf beside the file.",
        )
    n_atoms = round(len(calculation.unit_cell) * abs(np.linalg.det(calculation.supercell_matrix)))
    return calculation.with_dataset(parse_FORCE_SETS_from_strings(text, natom=n_atoms))


def calculations_of_yaml(data: Mapping[str, Any]) -> list[Calculation]:
    """Read the content of a YAML file.

    Args:
        data: As parsed.

    Returns:
        The second-order calculation; if third-order displacements were made in another supercell, theirs
        comes second.

    Raises:
        ValueError: There is no unit cell, or phonopy cannot read a key.
    """
    if "phono3py" not in data:
        return [_calculation(load_phonopy_yaml(dict(data)))]
    renamed = {**data, "phonopy": data["phono3py"]}
    third = _calculation(load_phonopy_yaml(renamed))
    if "displacement_pairs" in data:
        third = _with_pairs(third, data["displacement_pairs"], len(data["supercell"]["points"]))
    if not any(f"{_PREFIX}{key}" in data for key in ("supercell_matrix", "displacements", "dataset")):
        return [third]
    hidden = {"dataset", "displacements", "displacement_pairs", "force_constants"}
    second = {key: value for key, value in renamed.items() if key not in hidden}
    second |= {key.removeprefix(_PREFIX): value for key, value in data.items() if key.startswith(_PREFIX)}
    return [_calculation(load_phonopy_yaml(second)), third]


def with_forces(calculation: Calculation, forces: NDArray[np.float64]) -> Calculation:
    """Add the forces of `FORCES_FC2` or `FORCES_FC3` to the displacements of a YAML file.

    Args:
        calculation: With displacements.
        forces: Lines of the file `[n_sets * N, 3]`.

    Raises:
        ValueError: There are more or fewer than the displacements need.
    """
    wanted = None if calculation.displacements is None else calculation.displacements.shape
    if wanted is None or forces.size != np.prod(wanted):
        needed = "no displacements" if wanted is None else f"{wanted[0]} displacements of {wanted[1]} atoms"
        raise ValueError(f"{len(forces)} lines of forces for {needed}")
    sets = forces.reshape(wanted).copy()
    if calculation.left_out is not None:
        sets[calculation.left_out] = np.nan
    return replace(calculation, forces=sets)


def _calculation(data: PhonopyYamlData) -> Calculation:
    if data.unitcell is None:
        raise ValueError("the file has no unit cell")
    read = Calculation(
        data.unitcell,
        data.supercell_matrix,
        data.primitive_matrix,
        data.supercell,
        force_constants=data.force_constants,
        calculator=data.calculator,
        nac=data.nac_params is not None,
    )
    return read if data.dataset is None else read.with_dataset(data.dataset)


class _Set(NamedTuple):
    """A displaced supercell: `included` is False where a pair is beyond phono3py's cutoff."""

    number: int
    moves: list[tuple[int, list[float]]]
    forces: Any
    included: bool


def _with_pairs(calculation: Calculation, singles: list[Any], n_atoms: int) -> Calculation:
    """Displacements of one atom, then of two, in the order of their numbers; forces where they are given."""
    sets = []
    pairs = []
    for entry in singles:
        first = (entry["atom"] - 1, entry["displacement"])
        sets.append(_Set(0, [first], entry.get("forces"), entry.get("included", True)))
        for second in entry["paired_with"]:
            # One displacement in an entry, or, in newer files, all of an atom.
            if "displacement" in second:
                vectors, forces = [second["displacement"]], [second.get("forces")]
                numbers = [second.get("displacement_id", 0)]
            else:
                vectors = second["displacements"]
                forces = second.get("forces", [None] * len(vectors))
                numbers = second.get("displacement_ids", range(len(vectors)))
            atom, included = second["atom"] - 1, second.get("included", True)
            pairs += [
                _Set(number, [first, (atom, vector)], felt, included)
                for number, vector, felt in zip(numbers, vectors, forces, strict=True)
            ]
    sets += sorted(pairs, key=lambda one: one.number)
    displacements = np.zeros((len(sets), n_atoms, 3))
    every = np.full_like(displacements, np.nan)
    left_out = np.array([not one.included for one in sets])
    for k, one in enumerate(sets):
        for atom, vector in one.moves:
            displacements[k, atom] += vector
        if one.forces is not None and one.included:
            every[k] = one.forces
    return replace(
        calculation,
        displacements=displacements,
        forces=None if np.isnan(every).all() else every,
        n_fitted=len(singles),
        left_out=left_out if left_out.any() else None,
    )


WHOLE_READERS: dict[str, Callable[[Path], list[Calculation]]] = dict.fromkeys(
    layout.WHOLE_PATTERNS, lambda path: calculations_of_yaml(read_yaml(path))
)
"""Readers of files that hold cells and matrices, by the pattern of the name without compression."""

PART_READERS: dict[str, Callable[[Calculation, Path], Calculation]] = {
    "*.hdf5": _with_hdf5,
    "FORCE_CONSTANTS*": _with_force_constants,
    "FORCES_FC*": _with_third_order_forces,
    "*": _with_force_sets,
}
"""Readers of files that add forces or force constants to a calculation; the first that fits is taken."""
