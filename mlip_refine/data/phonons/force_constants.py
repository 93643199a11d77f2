"""Supercells, force constants and residual forces from what files say, in eV and Å; phonopy does the fits.

A structure whose inner coordinates are not fully relaxed keeps residual forces, which the forces of displaced
supercells contain as well. They have the symmetry of the crystal, so that they vanish where atoms have no
freedom, and they cancel where force constants come from displacements to both sides; but forces that are
compared one by one still hold them. In one of seven materials of phonondb they are more than 30 % of the
forces of some displaced supercell.
"""

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from phonopy import Phonopy
from phonopy.harmonic.force_constants import compact_fc_to_full_fc, full_fc_to_compact_fc
from phonopy.interface.symfc import SymfcFCSolver
from phonopy.physical_units import get_calculator_physical_units
from phonopy.structure.atoms import PhonopyAtoms
from phonopy.structure.cells import get_primitive_matrix, guess_primitive_matrix
from torch import Tensor

from mlip_refine.data.phonons.formats import Calculation
from mlip_refine.data.phonons.spacegroups import CrystalSymmetry, Translations
from mlip_refine.errors import InputError

AT_REST = 1e-8
"""Displacements below this count as none, Å."""

HARMONIC = 0.1
"""Largest displacement, Å, whose forces are taken for harmonic."""

_PLACE = 1e-2
"""How far atoms of a listed supercell may be from those of the built one, Å."""

_UNLIKE = 0.1
"""Largest difference of full force constants from their expanded rows, over the largest entry."""

_PHONOPY_ERRORS = (
    *(ValueError, RuntimeError, IndexError, TypeError, AssertionError, ArithmeticError),
    np.linalg.LinAlgError,
)


def in_electronvolts(calculation: Calculation) -> Calculation:
    """Convert a calculation to eV and Å from the units of the code that made it."""
    units = get_calculator_physical_units(calculation.calculator)
    length, force = units.distance_to_A, units.force_to_eVperA
    listed = calculation.supercell

    def scaled(values: NDArray[np.float64] | None, factor: float) -> NDArray[np.float64] | None:
        return None if values is None else np.asarray(values, dtype=np.float64) * factor

    return replace(
        calculation,
        unit_cell=_stretched(calculation.unit_cell, length),
        supercell=None if listed is None else _stretched(listed, length),
        displacements=scaled(calculation.displacements, length),
        forces=scaled(calculation.forces, force),
        energies=scaled(calculation.energies, units.energy_to_eV),
        force_constants=scaled(calculation.force_constants, force / length),
        calculator=None,
    )


def _stretched(cell: PhonopyAtoms, factor: float) -> PhonopyAtoms:
    stretched = cell.copy()
    stretched.cell = cell.cell * factor
    return stretched


def build(calculation: Calculation, symprec: float) -> Phonopy:
    """Build supercell and primitive cell, and find their symmetry.

    Raises:
        InputError: The matrices are missing or fit no lattice, or the supercell is not the one that the file
            lists.
    """
    matrix, where = calculation.supercell_matrix, calculation.where
    axes: Any = calculation.primitive_matrix
    if matrix is None:
        fix = "Put DIM into phonopy.conf beside the files."
        raise InputError("the supercell is not known", where=where, fix=fix)
    if np.shape(matrix) != (3, 3) or not np.array_equal(matrix, np.rint(matrix)):
        found, expected = np.asarray(matrix).tolist(), "3 x 3 integers"
        raise InputError("no supercell matrix", where=where, found=found, expected=expected)
    try:
        by_symmetry = axes is None or (isinstance(axes, str) and axes.lower() == "auto")
        primitive = (
            guess_primitive_matrix(calculation.unit_cell, symprec=symprec)
            if by_symmetry
            else get_primitive_matrix(axes, symprec=symprec)
        )
        phonon = Phonopy(calculation.unit_cell, matrix, primitive_matrix=primitive, symprec=symprec)
    except _PHONOPY_ERRORS as error:
        found = f"supercell {np.asarray(matrix).tolist()}, primitive {np.asarray(axes).tolist()}"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        problem = f"the matrices do not fit the unit cell ({reason})"
        raise InputError(problem, where=where, found=found) from error
    # Forces are in the order of the supercell that the file lists: it must be the one that is built.
    listed, supercell = calculation.supercell, phonon.supercell
    if listed is not None:
        same = len(listed) == len(supercell) and np.array_equal(listed.numbers, supercell.numbers)
        if same:
            apart = listed.scaled_positions - supercell.scaled_positions
            apart -= np.rint(apart)
            cells = np.abs(listed.cell - supercell.cell).max()
            same = bool(np.abs(apart @ supercell.cell).max() < _PLACE and cells < _PLACE)
        if not same:
            raise InputError(
                "the listed supercell is not unit cell times supercell matrix, atom by atom",
                where=where,
                fix="Write the file anew with the present phonopy: "
                "the order of atoms decides what forces mean.",
            )
    return phonon


def at_rest(calculation: Calculation, residual_forces: NDArray[np.float64] | None) -> Calculation:
    """Leave out supercells that were not calculated, and subtract the forces of the undisplaced one.

    Args:
        calculation: With or without displaced supercells.
        residual_forces: `[N, 3]`, eV/Å; None takes those of a set without displacement, if there is one.

    Returns:
        The calculation; its `residual_forces` are what was subtracted, or None when they are not known.

    Raises:
        InputError: Forces have the wrong shape.
    """
    displacements, forces = calculation.displacements, calculation.forces
    if displacements is None or forces is None:
        return replace(calculation, displacements=None, forces=None, energies=None, n_fitted=None)
    if forces.shape != displacements.shape:
        raise _other_shape("forces", forces, displacements, calculation.where)
    present = np.isfinite(forces).all(axis=(1, 2))
    still = np.abs(displacements).max(axis=(1, 2)) < AT_REST
    if residual_forces is None and (present & still).any():
        residual_forces = forces[present & still].mean(0)
    if residual_forces is not None and np.shape(residual_forces) != forces.shape[1:]:
        raise _other_shape("residual forces", residual_forces, forces[0], calculation.where)
    kept = present & ~still
    fitted = None if calculation.n_fitted is None else int(kept[: calculation.n_fitted].sum())
    return replace(
        calculation,
        displacements=displacements[kept],
        forces=forces[kept] - (0.0 if residual_forces is None else residual_forces),
        residual_forces=residual_forces,
        energies=None if calculation.energies is None else calculation.energies[kept],
        n_fitted=fitted,
    )


def _other_shape(
    what: str, found: NDArray[np.float64], expected: NDArray[np.float64], where: str
) -> InputError:
    shapes = [f"shape {list(np.shape(values))}" for values in (found, expected)]
    return InputError(f"{what} do not fit the supercell", where=where, found=shapes[0], expected=shapes[1])


def estimated_residual_forces(
    translations: Translations, symmetry: CrystalSymmetry, force_constants: Tensor, calculation: Calculation
) -> Tensor:
    """Estimate the forces of the undisplaced supercell from those of displaced ones.

    They are the totally symmetric part of F + Φ u, averaged over the sets. What is not harmonic in F is near
    the displaced atom, so that averaging over all equivalent atoms takes it away.

    Args:
        translations: Lattice translations of the supercell.
        symmetry: Space group of the supercell.
        force_constants: Symmetrised `[n_prim, N, 3, 3]`, eV/Å².
        calculation: Its displacements above 0.1 Å are not used.

    Returns:
        `[N, 3]`, eV/Å; 0 when there are no small displacements.
    """
    displacements, forces = calculation.displacements, calculation.forces
    if displacements is None or forces is None:
        return torch.zeros(len(translations.primitive_index), 3, dtype=force_constants.dtype)
    small = np.linalg.norm(displacements, axis=2).max(axis=1, initial=0.0) < HARMONIC
    if not small.any():
        return torch.zeros(forces.shape[1:], dtype=force_constants.dtype)
    moved = torch.from_numpy(displacements[small])
    rest = torch.from_numpy(forces[small]) + translations.multiply(force_constants, moved)
    return symmetry.invariant(translations, rest.mean(0))


type Fit = bool | Literal["possible"]
"""Whether force constants are fitted to forces when no file has them; or where the forces determine them."""


def force_constants(phonon: Phonopy, calculation: Calculation, *, fit: Fit) -> Tensor | None:
    """Take or fit force constants, not symmetrised.

    Args:
        phonon: Supercell and primitive cell.
        calculation: Calculation without residual forces.
        fit: Whether to fit when there are none.

    Returns:
        `[n_prim, N, 3, 3]`, eV/Å², float64; None when there are none and none are fitted.

    Raises:
        InputError: Force constants have the wrong shape, or the forces do not determine any.
    """
    if calculation.force_constants is not None:
        return torch.from_numpy(_compact(phonon, calculation.force_constants, calculation))
    if not fit or calculation.forces is None or not len(calculation.forces):
        return None
    try:
        _fit(phonon, calculation)
    except _PHONOPY_ERRORS as error:
        if fit == "possible":
            return None
        reason = " ".join(str(error).split())
        raise InputError(
            f"the forces do not determine force constants ({reason})",
            where=calculation.where,
            fix="Give more displacements. phonon_hvp with backend: displacements needs no force constants.",
        ) from error
    return torch.from_numpy(np.array(phonon.force_constants))


def _compact(phonon: Phonopy, given: NDArray[np.float64], calculation: Calculation) -> NDArray[np.float64]:
    n_atoms, n_prim, where = len(phonon.supercell), len(phonon.primitive), calculation.where
    if given.shape == (n_prim, n_atoms, 3, 3) and n_prim != n_atoms:
        rows_of, wanted = calculation.primitive_atoms, phonon.primitive.p2s_map
        if rows_of is not None and not np.array_equal(rows_of, wanted):
            raise InputError(
                "compact force constants are those of other atoms",
                where=where,
                found=f"p2s_map {rows_of.tolist()}",
                expected=f"{wanted.tolist()}",
                fix="Check DIM, and give the PRIMITIVE_AXES that they were written with.",
            )
        return given
    if given.shape != (n_atoms, n_atoms, 3, 3):
        raise InputError(
            "force constants do not fit the cells",
            where=where,
            found=f"shape {list(given.shape)}",
            expected=f"[{n_prim}, {n_atoms}, 3, 3], or [{n_atoms}, {n_atoms}, 3, 3]",
            fix="Check DIM, and give the PRIMITIVE_AXES that they were written with.",
        )
    rows = full_fc_to_compact_fc(phonon.primitive, given)
    apart = np.abs(compact_fc_to_full_fc(phonon.primitive, rows) - given).max() / np.abs(given).max()
    if not apart <= _UNLIKE:
        raise InputError(
            "the force constants change under translations of the crystal",
            where=where,
            found=f"{apart:.3g} of the largest",
            expected=f"at most {_UNLIKE:g}",
            fix="Check supercell matrix and order of atoms.",
        )
    return rows


def _fit(phonon: Phonopy, calculation: Calculation) -> None:
    """Fit to forces: by phonopy's finite differences where one atom moves at a time, or else with symfc."""
    displacements, forces = calculation.displacements, calculation.forces
    if displacements is None or forces is None:
        raise ValueError("there are no forces")
    chosen, felt = displacements[: calculation.n_fitted], forces[: calculation.n_fitted]
    moved = np.abs(chosen).max(axis=2) > AT_REST
    if (moved.sum(axis=1) == 1).all():
        sets: list[Any] = [
            {"number": int(atom.argmax()), "displacement": u[atom.argmax()], "forces": f}
            for atom, u, f in zip(moved, chosen, felt, strict=True)
        ]
        phonon.dataset = {"natom": chosen.shape[1], "first_atoms": sets}
        phonon.produce_force_constants(calculate_full_force_constants=False, show_drift=False)
        return
    solver = SymfcFCSolver(phonon.supercell, symmetry=phonon.symmetry)
    needed = solver.estimate_numbers_of_supercells(orders=[2])[2]
    if len(chosen) < needed:
        raise ValueError(f"{len(chosen)} displaced supercells where {needed} are needed")
    phonon.dataset = {"displacements": chosen, "forces": felt}
    # symfc has a primitive cell of its own, by symmetry, which may be smaller than that of the calculation.
    phonon.produce_force_constants(
        calculate_full_force_constants=True, fc_calculator="symfc", show_drift=False
    )
    phonon.force_constants = full_fc_to_compact_fc(phonon.primitive, np.array(phonon.force_constants))
