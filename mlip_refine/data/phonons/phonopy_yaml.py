"""Phonon calculations from the YAML files of phonopy and phono3py.

phonopy parses its own keys. Those of phono3py are the same for third-order supercells, and have the prefix
`phonon_` for second-order ones when these are larger; only pairs of displacements are a format of their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from phonopy.harmonic.displacement import DisplacementDataset
from phonopy.interface.phonopy_yaml import PhonopyYamlData, load_phonopy_yaml
from phonopy.structure.atoms import PhonopyAtoms
from phonopy.structure.dataset import forces_in_dataset, get_displacements_and_forces

_PREFIX = "phonon_"


@dataclass(frozen=True, eq=False)
class Calculation:
    """What the files of one supercell say, in the units of the code that calculated.

    Attributes:
        unit_cell: As given.
        supercell_matrix: Supercell's vectors as columns, in those of the unit cell; None when unknown.
        primitive_matrix: Primitive vectors as columns; a centring; None when unknown.
        supercell: Atoms in the order of the forces, where a file lists them.
        displacements: `[n_sets, N, 3]`; None when there are none.
        forces: `[n_sets, N, 3]`, nan for supercells that were not calculated; None when there are none.
        energies: `[n_sets]`, or None.
        residual_forces: Of the undisplaced supercell `[N, 3]`, already subtracted; None when unknown.
        n_fitted: How many of the sets, from the first, force constants are fitted to; None for all.
        left_out: Sets that were never to be calculated `[n_sets]`, whose forces files have as 0; None for
            none.
        force_constants: `[n_prim or N, N, 3, 3]`, or None.
        calculator: In phonopy's words; None is VASP's units.
        nac: Whether there are Born charges.
        functional: Exchange and correlation.
        cutoff: Of the plane waves, eV.
        where: For messages.
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
        return replace(
            self,
            displacements=displacements,
            forces=forces if forces_in_dataset(dataset) else None,
            energies=_energies(dataset),
        )


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
        third = _with_pairs(third, data["displacement_pairs"], _n_atoms(data))
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


def _energies(dataset: Mapping[str, Any]) -> NDArray[np.float64] | None:
    if "first_atoms" in dataset:
        each = np.array([one.get("supercell_energy", np.nan) for one in dataset["first_atoms"]])
        return None if np.isnan(each).all() else each
    energies = dataset.get("supercell_energies")
    return None if energies is None else np.asarray(energies, dtype=np.float64)


def _n_atoms(data: Mapping[str, Any]) -> int:
    """Atoms of the supercell, which the YAML files of phono3py list."""
    return len(data["supercell"]["points"])


type _Move = tuple[int, list[float]]


def _with_pairs(calculation: Calculation, singles: list[Any], n_atoms: int) -> Calculation:
    """Displacements of one atom, then of two, in the order of their numbers; forces where they are given."""
    found = [_one(entry, []) for entry in singles]
    n_singles = len(found)
    for entry in singles:
        first = (entry["atom"] - 1, entry["displacement"])
        found += [move for partner in entry["paired_with"] for move in _partners(partner, first)]
    found = found[:n_singles] + sorted(found[n_singles:], key=lambda one: one.number)
    displacements = np.zeros((len(found), n_atoms, 3))
    forces = np.full_like(displacements, np.nan)
    left_out = np.array([not one.included for one in found])
    for k, one in enumerate(found):
        for atom, vector in one.moves:
            displacements[k, atom] += vector
        if one.forces is not None and one.included:
            forces[k] = one.forces
    calculated = not np.isnan(forces).all()
    return replace(
        calculation,
        displacements=displacements,
        forces=forces if calculated else None,
        n_fitted=n_singles,
        left_out=left_out if left_out.any() else None,
    )


class _Set(NamedTuple):
    """A displaced supercell: `included` is False where a pair is beyond phono3py's cutoff."""

    number: int
    moves: list[_Move]
    forces: Any
    included: bool


def _one(entry: Mapping[str, Any], before: list[_Move]) -> _Set:
    moves = [*before, (entry["atom"] - 1, entry["displacement"])]
    return _Set(entry.get("displacement_id", 0), moves, entry.get("forces"), entry.get("included", True))


def _partners(entry: Mapping[str, Any], first: _Move) -> list[_Set]:
    """Second displacements: one of an entry, or, in newer files, all of an atom in one entry."""
    if "displacement" in entry:
        return [_one(entry, [first])]
    atom, vectors = entry["atom"] - 1, entry["displacements"]
    numbers = entry.get("displacement_ids", range(len(vectors)))
    every: list[Any] = entry.get("forces", [None] * len(vectors))
    included = entry.get("included", True)
    sets = zip(numbers, vectors, every, strict=True)
    return [_Set(number, [first, (atom, vector)], forces, included) for number, vector, forces in sets]
