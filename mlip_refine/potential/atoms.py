"""Energies, forces and stresses of ASE's `Atoms`, as arrays of numpy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress
from numpy.typing import NDArray


@dataclass(frozen=True)
class AtomsResult:
    """What a potential says about configurations, in float64 on the CPU.

    Attributes:
        energy: Potential energy of every configuration `[n]`, eV.
        forces: Forces on the atoms of every configuration `[n_atoms, 3]`, eV/Å.
        stress: Stress of every configuration `[n, 3, 3]`, eV/Å³, tensile positive (ASE's sign); NaN where a
            direction is not periodic.
    """

    energy: NDArray[np.float64]
    forces: tuple[NDArray[np.float64], ...]
    stress: NDArray[np.float64]

    def attached(self, atoms: Sequence[Atoms]) -> list[Atoms]:
        """Return copies of the configurations with the results as a calculator, as `ase.io.write` takes them.

        Args:
            atoms: The configurations that were evaluated.
        """
        labelled = []
        for one, energy, forces, stress in zip(atoms, self.energy, self.forces, self.stress, strict=True):
            copy: Atoms = one.copy()
            known = {} if np.isnan(stress).any() else {"stress": full_3x3_to_voigt_6_stress(stress)}
            copy.calc = SinglePointCalculator(copy, energy=float(energy), forces=forces, **known)
            labelled.append(copy)
        return labelled


def in_periodic_cell(atoms: Atoms, cutoff: float) -> Atoms:
    """Return a configuration with a cell so wide, where it is not periodic, that its images do not see it.

    Args:
        atoms: A crystal, a slab, a wire or a molecule.
        cutoff: Radius within which atoms are neighbours, Å.
    """
    if atoms.pbc.all():
        return atoms
    boxed: Atoms = atoms.copy()
    free = ~boxed.pbc
    cell = boxed.cell.array.copy()
    cell[free] = 0.0
    # Lattice vectors that are zero become unit vectors at right angles to the others.
    cell = type(boxed.cell)(cell).complete().array
    normals = cell[free] / np.linalg.norm(cell[free], axis=1)[:, None]
    widths = np.ptp(boxed.positions @ normals.T, axis=0) + 1.01 * cutoff
    cell[free] = widths[:, None] * normals
    boxed.set_cell(cell, scale_atoms=False)
    boxed.pbc = True
    return boxed
