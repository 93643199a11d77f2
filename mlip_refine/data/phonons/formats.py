"""Files of phonopy and phono3py: a function for each kind, and the table that says which one reads what.

To read another kind of file, write a function and append an entry to `READERS`: a `WholeReader` if the file
holds cells and matrices, a `PartReader` if it adds forces or force constants to a calculation. Files may be
compressed: `read_text` and `decompressed` of `mlip_refine.data.phonons.files` see to that.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from io import StringIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray
from phonopy.file_IO import (
    parse_FORCE_CONSTANTS,
    parse_FORCE_SETS_from_strings,
)
from phonopy.harmonic.displacement import DisplacementDataset
from phonopy.interface.calculator import get_force_constant_conversion_factor
from phonopy.interface.phonopy_yaml import PhonopyYamlData, load_phonopy_yaml
from phonopy.structure.atoms import PhonopyAtoms
from phonopy.structure.dataset import forces_in_dataset, get_displacements_and_forces

from mlip_refine.data.hdf5 import foreign_hdf5
from mlip_refine.data.phonons import files as layout
from mlip_refine.errors import InputError

_YamlLoader: type[yaml.SafeLoader | yaml.CSafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Makes dicts, lists, numbers and text, nothing else; the one of libyaml is ten times as fast."""

_PREFIX = "phonon_"
"""How phono3py marks keys of the second-order supercell."""


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
        primitive_atoms: Atoms of the supercell `[n_prim]` that the rows of compact force constants belong to;
            None where the file does not say.
        calculator: Code that calculated, in phonopy's words; None is VASP's units.
        nac: Whether Born charges come with it.
        functional: Exchange-correlation functional.
        cutoff: Cutoff energy of the plane waves, eV.
        masses: Masses of the atoms of the primitive cell, amu; None for those that the cell has.
        notes: What the files hold and is not used, a clause each.
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
    primitive_atoms: NDArray[np.int64] | None = None
    calculator: str | None = None
    nac: bool = False
    functional: str | None = None
    cutoff: float | None = None
    masses: NDArray[np.float64] | None = None
    notes: tuple[str, ...] = ()
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


def read_yaml(path: Path) -> Any:
    """Parse a YAML file, compressed or not, without making any object that it asks for.

    phonopy's own `load_yaml` must never be called: its loader runs code that tags of the file name.

    Raises:
        yaml.YAMLError: The file is no YAML, or has tags that stand for Python objects.
    """
    return yaml.load(layout.read_text(path), Loader=_YamlLoader)  # noqa: S506 - a safe loader


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
    for key in ("displacements", f"{_PREFIX}displacements"):
        _require_finished(data.get(key))
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


def _require_finished(displacements: object) -> None:
    """Refuse displacements of which some have forces and others do not; FORCE_SETS may have those of all.

    Raises:
        InputError: With their numbers.
    """
    entries = displacements if isinstance(displacements, list) else []
    # An entry is one displaced atom, or a list of all atoms.
    with_forces = [
        all("force" in atom for atom in entry) if isinstance(entry, list) else "forces" in entry
        for entry in entries
    ]
    missing = [number for number, present in enumerate(with_forces, 1) if not present]
    if missing and len(missing) < len(entries):
        shown = ", ".join(map(str, missing[:10]))
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise InputError(
            "displacements without forces",
            found=f"none for {shown}{more} of {len(entries)}",
            fix="Finish these calculations, or take them out of the file.",
        )


def _calculation(data: PhonopyYamlData) -> Calculation:
    if data.unitcell is None:
        raise ValueError("the file has no unit cell")
    if data.unitcell.has_mixtures:
        raise ValueError("sites that several elements share cannot be read")
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


def with_forces(calculation: Calculation, forces: NDArray[np.float64]) -> Calculation:
    """Add the forces of `FORCES_FC2` or `FORCES_FC3` to the displacements of a YAML file.

    Args:
        calculation: With displacements.
        forces: Lines of the file `[n_sets * N, 3]`.

    Raises:
        ValueError: There are more or fewer than the displacements need.
    """
    wanted = None if calculation.displacements is None else calculation.displacements.shape
    n_fitted = calculation.n_fitted
    if wanted is not None and n_fitted and forces.size == n_fitted * np.prod(wanted[1:]):
        # Second-order forces, of the displacements of single atoms.
        first = None if calculation.displacements is None else calculation.displacements[:n_fitted]
        return replace(
            calculation, displacements=first, forces=forces.reshape(-1, *wanted[1:]), left_out=None
        )
    if wanted is None or forces.size != np.prod(wanted):
        needed = "no displacements" if wanted is None else f"{wanted[0]} displacements of {wanted[1]} atoms"
        raise ValueError(f"{len(forces)} lines of forces for {needed}")
    sets = forces.reshape(wanted).copy()
    if calculation.left_out is not None:
        sets[calculation.left_out] = np.nan
    return replace(calculation, forces=sets)


def _with_hdf5(calculation: Calculation, path: Path) -> Calculation:
    """Add force constants as phonopy and phono3py write them, in the unit of the calculator."""
    names = ("fc2", "force_constants", "p2s_map", "physical_unit")
    found = {item.name: item.value for item in foreign_hdf5(path, names) if item.value is not None}
    constants = found.get("fc2", found.get("force_constants"))
    if constants is None:
        raise ValueError("neither fc2 nor force_constants is in the file")
    if "physical_unit" in found:
        unit = bytes(found["physical_unit"].item()).decode()
        constants = constants * get_force_constant_conversion_factor(unit, calculation.calculator)
    return replace(calculation, force_constants=constants, primitive_atoms=found.get("p2s_map"))


def _with_force_constants(calculation: Calculation, path: Path) -> Calculation:
    with layout.decompressed(path) as plain:
        return replace(calculation, force_constants=parse_FORCE_CONSTANTS(plain))


def _with_phono3py_forces(calculation: Calculation, path: Path) -> Calculation:
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


type Part = Literal["forces", "second-order forces", "third-order forces", "force constants"]
"""What a file adds to a calculation.

Where phono3py has two supercells, the first takes second-order forces and the second takes third-order ones.
Where there is one supercell, it takes `forces`, or else third-order ones.
"""


@dataclass(frozen=True, kw_only=True)
class WholeReader:
    """Entry for files that hold a whole calculation: cells, matrices, and perhaps forces and force constants.

    Attributes:
        names: Names that are looked for in folders and archives, without the suffix of a compression.
        patterns: Other names that a file may have that is given by its own path, such as `*.yaml`.
        read: Makes a calculation of a file; two when third-order displacements have a supercell of their own.
    """

    names: tuple[str, ...]
    patterns: tuple[str, ...] = ()
    read: Callable[[Path], list[Calculation]]


@dataclass(frozen=True, kw_only=True)
class PartReader:
    """Entry for files that add forces or force constants to a calculation.

    Attributes:
        gives: What a file adds; a calculation that has it already keeps its own.
        names: Names that are looked for in folders and archives, without the suffix of a compression.
        patterns: Other names that a file may have that is given by its own path, such as `*.hdf5`.
        read: Returns the calculation with what the file adds.
    """

    gives: Part
    names: tuple[str, ...]
    patterns: tuple[str, ...] = ()
    read: Callable[[Calculation, Path], Calculation]


READERS: list[WholeReader | PartReader] = [
    PartReader(gives="forces", names=("FORCE_SETS",), patterns=("*",), read=_with_force_sets),
    PartReader(
        gives="third-order forces",
        names=("FORCES_FC3",),
        patterns=("FORCES_FC*",),
        read=_with_phono3py_forces,
    ),
    PartReader(gives="second-order forces", names=("FORCES_FC2",), read=_with_phono3py_forces),
    PartReader(
        gives="force constants",
        names=("FORCE_CONSTANTS",),
        patterns=("FORCE_CONSTANTS*",),
        read=_with_force_constants,
    ),
    PartReader(
        gives="force constants",
        names=("force_constants.hdf5", "fc2.hdf5"),
        patterns=("*.hdf5",),
        read=_with_hdf5,
    ),
    WholeReader(
        names=(
            *("phonopy_params.yaml", "phono3py_params.yaml", "phonopy.yaml", "phono3py.yaml"),
            *("phonopy_disp.yaml", "phono3py_disp.yaml"),
        ),
        patterns=("*.yaml", "*.yml"),
        read=lambda path: calculations_of_yaml(read_yaml(path)),
    ),
]
"""All readers.

In a folder the first file that exists is taken, in the order of the table and of the names of an entry. A
file that is given by its own path is read by the last entry that takes its name: so a new entry at the end
goes before the general patterns above it.
"""


def reader_of(path: Path) -> WholeReader | PartReader:
    """Return the reader of a file that is given by its own path."""
    name = layout.plain_name(path)
    return next(
        reader
        for reader in reversed(READERS)
        if name in reader.names or any(fnmatch(name, pattern) for pattern in reader.patterns)
    )
