"""Forces of the undisplaced supercell, which displaced ones contain, and which are no response to anything.

A structure whose inner coordinates are not fully relaxed keeps forces. They have the symmetry of the crystal,
so that they vanish where atoms have no freedom, and cancel where force constants come from displacements to
both sides; but forces that are compared one by one still hold them. In one of seven materials of phonondb
they are more than 30 % of the forces of some displaced supercell.
"""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlip_refine.data.phonons.phonopy_yaml import Calculation
from mlip_refine.data.phonons.spacegroups import CrystalSymmetry, Translations
from mlip_refine.errors import InputError

AT_REST = 1e-8
"""Displacements below this are none, Å."""

HARMONIC = 0.1
"""Largest displacement, Å, whose forces are taken for harmonic."""


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
        translations: Of the supercell.
        symmetry: Of the supercell.
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
