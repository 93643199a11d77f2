"""From the files of a phonon calculation to a reference: force constants, symmetry, checks."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from numpy.typing import NDArray
from phonopy import Phonopy
from phonopy.structure.atoms import PhonopyAtoms
from torch import Tensor

from mlip_refine.data.phonons.calculations import PhononFiles, parsing, read_calculations
from mlip_refine.data.phonons.checks import PhononTolerances, check_deviations, deviations
from mlip_refine.data.phonons.files import plain_name
from mlip_refine.data.phonons.force_constants import (
    Fit,
    at_rest,
    build,
    estimated_residual_forces,
    force_constants,
    in_electronvolts,
)
from mlip_refine.data.phonons.formats import READERS, Calculation
from mlip_refine.data.phonons.reference import Displacement, PhononMetadata, PhononReference
from mlip_refine.data.phonons.spacegroups import (
    CrystalSymmetry,
    Translations,
    crystal_symmetry,
    reduced_formula,
    space_group_and_prototype,
)
from mlip_refine.data.structures import check_atoms
from mlip_refine.errors import InputError, nearest
from mlip_refine.files import user_path

_NOTICEABLE = 1e-3
"""Residual forces above this, eV/Å, are subtracted before force constants are fitted, too."""

_USUAL = re.compile(r"^(phono(py|3py)(_params|_disp)?|FORCE_SETS|FORCE_CONSTANTS|force_constants)[_-]?")
"""How phonopy's own names begin."""


@dataclass(frozen=True, eq=False)
class PhononSettings:
    """How calculations are read.

    Attributes:
        files: Settings that the files themselves do not give.
        residual_forces: Forces of the undisplaced supercell `[N, 3]`, eV/Å, subtracted from all others.
            None takes those of a set without displacement, or else estimates them.
        fit: Whether force constants are fitted to forces when no file has them; `possible`: where the forces
            determine them.
        symprec: How far atoms may be from symmetric places, Å.
        tolerances: Largest deviations that the checks accept.
    """

    files: PhononFiles = field(default_factory=PhononFiles)
    residual_forces: NDArray[np.float64] | None = None
    fit: Fit = True
    symprec: float = 1e-5
    tolerances: PhononTolerances = field(default_factory=PhononTolerances)


def read_phonons(
    path: Path | str,
    *,
    name: str | None = None,
    settings: PhononSettings | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> PhononReference:
    """Read the phonon calculation of one material.

    Args:
        path: Folder, archive, `phonopy_params.yaml` or another file of phonopy or phono3py, compressed or
            not; see `mlip_refine.data.phonons.calculations`.
        name: Name of the material; None takes the file's.
        settings: How calculations are read.
        metadata: What the files do not say, by the fields of `PhononMetadata`, such as `functional`.

    Returns:
        The reference; of phono3py's the one of second order, where that has a supercell of its own.

    Raises:
        InputError: A file is missing, damaged or of another calculation; there are no forces; matrices do
            not fit; force constants break the sum rule or the symmetry; or forces determine none.
    """
    return read_phonon_orders(path, name=name, settings=settings, metadata=metadata)[0]


def read_phonon_orders(
    path: Path | str,
    *,
    name: str | None = None,
    settings: PhononSettings | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> tuple[PhononReference, ...]:
    """Read the phonon calculation of one material with all its supercells.

    Arguments and errors are those of `read_phonons`.

    Returns:
        One reference, or two when phono3py's third-order displacements were made in a supercell of their
        own: its name ends with `-fc3`, its material is the same.
    """
    path = user_path(path)
    chosen = settings or PhononSettings()
    known = [f.name for f in fields(PhononMetadata) if f.name not in {"checks", "notes"}]
    for key in metadata or {}:
        if key not in known:
            word = nearest(key, known)
            fix = f"Did you mean {word!r}?" if word else None
            raise InputError("unknown metadata", found=repr(key), expected=", ".join(known), fix=fix)
    own = name or calculation_name(path)
    given = {"material": own, **(metadata or {})}
    calculations = read_calculations(path, chosen.files)
    names = [own, f"{own}-fc3"][: len(calculations)]
    with parsing(path):
        return tuple(_reference(one, n, chosen, given) for one, n in zip(calculations, names, strict=True))


def calculation_name(path: Path) -> str:
    """Name of a folder, or of a file without suffixes; files with phonopy's names take their folder's."""
    if path.is_dir():
        return path.resolve().name
    stem = Path(plain_name(path)).stem
    return _USUAL.sub("", stem) or path.resolve().parent.name


def _reference(
    calculation: Calculation, name: str, settings: PhononSettings, given: Mapping[str, Any]
) -> PhononReference:
    calculation = in_electronvolts(calculation)
    unit_cell, moved = _atoms(calculation.unit_cell), calculation.displacements
    check_atoms(unit_cell, calculation.where)
    if not abs(unit_cell.cell.volume) > 1e-3:
        volume = f"{abs(unit_cell.cell.volume):.3g} Å³"
        raise InputError("the unit cell has no volume", where=calculation.where, found=volume)
    if calculation.forces is None and calculation.force_constants is None:
        raise InputError(
            "there are neither forces nor force constants",
            where=calculation.where,
            found=None if moved is None else f"{len(moved)} displacements without forces",
            expected=", ".join(name for reader in READERS for name in reader.names if "FORCE" in name),
            fix="Collect the forces of the displaced supercells: phonopy -f, phono3py --cf2 or --cf3.",
        )
    calculation = at_rest(calculation, settings.residual_forces)
    phonon = build(calculation, settings.symprec)
    if calculation.masses is not None:
        if len(calculation.masses) != len(phonon.primitive):
            raise InputError(
                "MASS does not fit",
                where=calculation.where,
                found=f"{len(calculation.masses)} masses",
                expected=f"one for each of the {len(phonon.primitive)} atoms of the primitive cell",
            )
        phonon.masses = calculation.masses
        check_atoms(_atoms(phonon.primitive), calculation.where)
    atoms, translations, symmetry = phonon_crystal(phonon)
    moved = calculation.displacements
    if moved is not None and moved.shape[1] != len(atoms):
        raise InputError(
            "forces are of another supercell",
            where=calculation.where,
            found=f"{moved.shape[1]} atoms",
            expected=f"{len(atoms)}",
        )
    if not (moved is not None and len(moved)) and calculation.force_constants is None:
        raise InputError("there are neither forces nor force constants", where=calculation.where)
    calculation, raw, symmetrised = _harmonic(phonon, calculation, translations, symmetry, fit=settings.fit)
    moved, forces, energies = calculation.displacements, calculation.forces, calculation.energies
    displacements: tuple[Displacement, ...] = ()
    if moved is not None and forces is not None:
        known = [None] * len(moved) if energies is None else [float(e) for e in energies]
        displacements = tuple(
            Displacement(torch.from_numpy(u), torch.from_numpy(f), e)
            for u, f, e in zip(moved, forces, known, strict=True)
        )
    found = deviations(translations, symmetry, raw, displacements, calculation.residual_forces)
    check_deviations(found, settings.tolerances, calculation.where)

    primitive = _atoms(phonon.primitive)
    space_group, prototype = space_group_and_prototype(primitive, settings.symprec)
    read = {
        "formula": reduced_formula(primitive),
        "space_group": space_group,
        "prototype": prototype,
        "functional": calculation.functional,
        "cutoff": calculation.cutoff,
        "nac": calculation.nac,
        "energy_reference": None if calculation.energies is None else "total energy of the calculation",
    }
    said = {key: value for key, value in given.items() if value is not None}
    return PhononReference(
        name=name,
        supercell=atoms,
        translations=translations,
        symmetry=symmetry,
        primitive_matrix=torch.from_numpy(phonon.primitive_matrix),
        supercell_matrix=torch.from_numpy(phonon.supercell_matrix),
        force_constants=symmetrised,
        displacements=displacements,
        metadata=PhononMetadata(**{**read, **said, "checks": found, "notes": calculation.notes}),
    )


def phonon_crystal(phonon: Phonopy) -> tuple[Atoms, Translations, CrystalSymmetry]:
    """Return the supercell of a calculation, its lattice translations, and its symmetry modulo those."""
    primitive = phonon.primitive
    translations = Translations(
        torch.from_numpy(np.array(primitive.atomic_permutations)),
        torch.from_numpy(np.array(primitive.p2s_map)),
    )
    operations = phonon.symmetry.symmetry_operations["rotations"]
    permutations = phonon.symmetry.atomic_permutations
    symmetry = crystal_symmetry(phonon.supercell.cell, operations, permutations, translations)
    return _atoms(phonon.supercell), translations, symmetry


def _atoms(cell: PhonopyAtoms) -> Atoms:
    # By number: phonopy tells sites of one element apart as Mn1 and Mn2.
    atoms = Atoms(cell.numbers, scaled_positions=cell.scaled_positions, cell=cell.cell, pbc=True)
    atoms.set_masses(cell.masses)
    # Moments lower the symmetry, and with it that of the force constants.
    if cell.magnetic_moments is not None:
        atoms.set_initial_magnetic_moments(cell.magnetic_moments)
    return atoms


def _harmonic(
    phonon: Phonopy,
    calculation: Calculation,
    translations: Translations,
    symmetry: CrystalSymmetry,
    *,
    fit: Fit,
) -> tuple[Calculation, Tensor | None, Tensor | None]:
    """Force constants, as they are and symmetrised, and the calculation without its residual forces."""
    raw = force_constants(phonon, calculation, fit=fit)
    if raw is None:
        return calculation, None, None
    symmetrised = translations.symmetrised(symmetry.symmetrised(translations, raw))
    if calculation.residual_forces is not None or calculation.forces is None:
        return calculation, raw, symmetrised
    residual = estimated_residual_forces(translations, symmetry, symmetrised, calculation).numpy()
    forces = calculation.forces - residual
    known = replace(calculation, forces=forces, residual_forces=residual)
    if np.abs(residual).max() < _NOTICEABLE:
        return known, raw, symmetrised
    return _harmonic(phonon, known, translations, symmetry, fit=fit)
