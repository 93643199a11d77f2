"""A crystal in a supercell, its force constants by a potential, and phonopy's object for both.

Force constants are compact: rows of the atoms of one primitive cell `[n_prim, N, 3, 3]`, eV/Å², symmetric in
all ways that the crystal is. Phonopy computes what follows from them (Togo and Tanaka, Scr. Mater. 108, 1,
2015).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from ase import Atoms
from numpy.typing import NDArray
from phonopy import Phonopy
from phonopy.structure.atoms import PhonopyAtoms
from phonopy.structure.cells import guess_primitive_matrix
from torch import Tensor

from mlip_refine.crystals.phonons import hessian
from mlip_refine.crystals.relaxation import Rest, relax
from mlip_refine.crystals.symmetry import PHONON_TOLERANCE
from mlip_refine.data.kept_rows import evaluate_rows
from mlip_refine.data.phonons.reader import phonon_crystal
from mlip_refine.data.phonons.reference import PhononReference
from mlip_refine.data.phonons.spacegroups import CrystalSymmetry, Translations
from mlip_refine.potential import Graphs, Potential, Structure, Work

type Method = Literal["hessian", "displacements"]
"""Exact second derivatives, or differences of forces."""

DISPLACEMENT = 0.01
"""Displacement of one atom where differences of forces are taken, Å."""


@dataclass(frozen=True, eq=False)
class HarmonicCrystal:
    """A supercell at rest with its symmetry.

    Attributes:
        supercell: Supercell of N atoms.
        translations: Lattice translations of the supercell, as permutations.
        symmetry: Space group of the supercell, modulo its translations.
        primitive_matrix: Primitive lattice vectors as columns, in those of the supercell `[3, 3]`.
        symprec: How far atoms may be from symmetric places, Å.
    """

    supercell: Atoms
    translations: Translations
    symmetry: CrystalSymmetry
    primitive_matrix: NDArray[np.float64]
    symprec: float = PHONON_TOLERANCE

    @classmethod
    def of(
        cls, supercell: Atoms, primitive_matrix: NDArray[np.float64], symprec: float = PHONON_TOLERANCE
    ) -> Self:
        """Find the symmetry of a supercell.

        Args:
            supercell: Supercell at rest.
            primitive_matrix: Primitive lattice vectors as columns, in those of the supercell `[3, 3]`.
            symprec: How far atoms may be from symmetric places, Å.
        """
        phonon = _phonopy(supercell, primitive_matrix, symprec)
        return cls(*phonon_crystal(phonon), primitive_matrix, symprec)

    @classmethod
    def of_cell(
        cls, cell: Atoms, supercell_matrix: NDArray[np.int64], symprec: float = PHONON_TOLERANCE
    ) -> Self:
        """Repeat a cell, primitive or not.

        Args:
            cell: Any cell of the crystal, at rest.
            supercell_matrix: Lattice vectors of the supercell as columns, in those of the cell `[3, 3]`.
            symprec: How far atoms may be from symmetric places, Å.
        """
        unit = _phonopy_atoms(cell)
        axes = guess_primitive_matrix(unit, symprec=symprec)
        phonon = Phonopy(unit, supercell_matrix, primitive_matrix=axes, symprec=symprec)
        return cls(*phonon_crystal(phonon), np.linalg.solve(supercell_matrix, axes), symprec)

    @classmethod
    def of_reference(cls, reference: PhononReference) -> Self:
        """Return the crystal of a reference calculation, atom by atom."""
        supercell, primitive = reference.supercell_matrix.numpy(), reference.primitive_matrix.numpy()
        matrix = np.linalg.solve(supercell, primitive)
        return cls(reference.supercell, reference.translations, reference.symmetry, matrix)

    @property
    def primitive(self) -> Atoms:
        """Primitive cell, its atoms where they are in the supercell."""
        crystal: Atoms = self.supercell[self.translations.primitive_atoms.tolist()]
        crystal.set_cell(self.primitive_matrix.T @ self.supercell.cell.array, scale_atoms=False)
        return crystal

    def phonopy(self, force_constants: Tensor | None = None) -> Phonopy:
        """Return phonopy's object for the crystal, whose atoms have the same order.

        Args:
            force_constants: Force constants `[n_prim, N, 3, 3]`, eV/Å².
        """
        phonon = _phonopy(self.supercell, self.primitive_matrix, self.symprec)
        if force_constants is not None:
            phonon.force_constants = force_constants.numpy()
        return phonon

    def moved(self, primitive: Atoms) -> Self:
        """Return the crystal with another primitive cell: the same atoms, at other places in another lattice.

        Its symmetry is found anew: it is the same if the cell came to rest from this one.

        Args:
            primitive: Primitive cell with the atoms in the order of `primitive`.
        """
        cell = np.linalg.solve(self.primitive_matrix.T, primitive.cell.array)
        kinds = self.translations.primitive_index.numpy()
        own = self.primitive
        lattice = np.linalg.solve(own.cell.array.T, (self.supercell.positions - own.positions[kinds]).T).T
        supercell = self.supercell.copy()
        supercell.set_cell(cell, scale_atoms=False)
        supercell.positions = np.rint(lattice) @ primitive.cell.array + primitive.positions[kinds]
        return self.of(supercell, self.primitive_matrix, self.symprec)

    def at_rest(self, potential: Potential, rest: Rest) -> Self:
        """Return the crystal after relaxation by a potential.

        Args:
            potential: Potential in float64.
            rest: Conditions under which it is at rest.

        Raises:
            InputError: The potential is in single precision, or does not know an element.
            MlipRefineError: The crystal does not come to rest.
        """
        return self.moved(relax(potential, self.primitive, rest))

    def structure(self, potential: Potential) -> Structure:
        """Return the supercell with its neighbours."""
        return potential.graphs.from_atoms(self.supercell)

    def force_constants(
        self, potential: Potential, method: Method = "hessian", displacement: float = DISPLACEMENT
    ) -> Tensor:
        """Compute force constants by a potential, without a graph.

        Args:
            potential: Potential in either precision; differences of forces want float64.
            method: `hessian`, exact from the columns that differ by symmetry; or `displacements`, phonopy's
                finite differences.
            displacement: Displacement of one atom where differences are taken, Å.

        Returns:
            Force constants `[n_prim, N, 3, 3]`, eV/Å², float64, on the CPU, symmetrised.

        Raises:
            InputError: The potential does not know an element.
            MlipRefineError: Memory runs out for a single system.
        """
        if method == "hessian":
            found = hessian.force_constants(
                potential, self.structure(potential), self.translations, self.symmetry
            )
        else:
            phonon = self.phonopy()
            phonon.generate_displacements(distance=displacement)
            cells = [cell for cell in phonon.supercells_with_displacements or [] if cell is not None]
            crystals = [self.supercell.copy() for _ in cells]
            for crystal, cell in zip(crystals, cells, strict=True):
                crystal.positions = cell.positions
            phonon.forces = forces(potential, crystals)
            phonon.produce_force_constants(calculate_full_force_constants=False, show_drift=False)
            found = torch.from_numpy(np.array(phonon.force_constants))
        symmetric = self.symmetry.symmetrised(self.translations, found)
        return self.translations.symmetrised(symmetric)


def forces(potential: Potential, crystals: Sequence[Atoms]) -> NDArray[np.float64]:
    """Compute forces on crystals with equal numbers of atoms `[n, N, 3]`, eV/Å, without a graph.

    Raises:
        InputError: The potential does not know an element.
        MlipRefineError: Memory runs out for a single system.
    """
    structures = [potential.graphs.from_atoms(atoms) for atoms in crystals]

    def found(_: slice, graphs: Graphs) -> list[Tensor]:
        forces = potential.evaluate(graphs, ("forces",))["forces"].detach().double().cpu()
        return list(forces.unflatten(0, (graphs.n_graphs, -1)))

    return torch.stack(evaluate_rows(potential, Work.FORCES, structures, found, "forces")).numpy()


def _phonopy(supercell: Atoms, primitive_matrix: NDArray[np.float64], symprec: float) -> Phonopy:
    return Phonopy(
        _phonopy_atoms(supercell), np.eye(3, dtype=int), primitive_matrix=primitive_matrix, symprec=symprec
    )


def _phonopy_atoms(atoms: Atoms) -> PhonopyAtoms:
    moments = atoms.get_initial_magnetic_moments()
    return PhonopyAtoms(
        symbols=atoms.get_chemical_symbols(),
        cell=atoms.cell.array,
        scaled_positions=atoms.get_scaled_positions(wrap=False),
        masses=atoms.get_masses(),
        magnetic_moments=moments if moments.any() else None,
    )
