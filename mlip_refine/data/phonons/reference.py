"""Force constants of a crystal as a reference: stored compactly, multiplied without being expanded.

Φ[i, j] = ∂²U/∂u_i∂u_j = -∂F_i/∂u_j of a supercell is known when its rows of one primitive cell are, because a
lattice translation t, which moves atom i onto t(i), leaves it as it was: Φ[t(i), t(j)] = Φ[i, j]. So
`[n_prim, N, 3, 3]` numbers are kept instead of `[N, N, 3, 3]`, and t as a permutation of the atoms.

Force constants are those of the short-ranged part, as a supercell with periodic images has them: there is no
non-analytical correction, on the side of the reference or of the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ase import Atoms
from torch import Tensor

from mlip_refine.data.phonons.spacegroups import CrystalSymmetry, HessianColumn, Translations
from mlip_refine.errors import InputError


@dataclass(frozen=True)
class PhononMetadata:
    """Origin of a calculation, and deviations of its force constants before they were symmetrised.

    Attributes:
        material: Id of the material: two calculations of one material never fall into different splits.
        formula: Reduced formula, alphabetical: `AlN`.
        space_group: Number of the space group, 1 to 230.
        prototype: Kind of structure: anonymous formula, space group, atoms of every orbit (`AB_225_1_1`).
        functional: Exchange-correlation functional, `PBEsol`; None when unknown.
        cutoff: Cutoff energy of the plane waves, eV.
        nac: Whether Born charges come with the calculation. They are not used.
        energy_reference: What energies of displaced supercells are measured from; None without energies.
        source: Where the calculation comes from.
        licence: Licence of the data.
        checks: Measured deviations by name, see `mlip_refine.data.phonons.checks`.
        notes: What the files hold and is not used, a clause each.
    """

    material: str
    formula: str = ""
    space_group: int = 1
    prototype: str = ""
    functional: str | None = None
    cutoff: float | None = None
    nac: bool = False
    energy_reference: str | None = None
    source: str | None = None
    licence: str | None = None
    checks: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Displacement:
    """A supercell with displaced atoms and the change of forces that goes with them.

    Attributes:
        displacement: Displacements of the atoms `[N, 3]`, Å.
        forces: Forces on the atoms `[N, 3]`, eV/Å, minus those of the undisplaced supercell, known or
            estimated.
        energy: Energy of the supercell, eV, absolute as the calculation gave it; None when unknown.
    """

    displacement: Tensor
    forces: Tensor
    energy: float | None = None


@dataclass(frozen=True, eq=False)
class PhononReference:
    """Harmonic reference of one material.

    Attributes:
        name: Unique in a set.
        supercell: N atoms at rest, Å.
        translations: The supercell's lattice translations as permutations.
        symmetry: Its space group, modulo those.
        primitive_matrix: Primitive lattice vectors as columns, in those of the unit cell `[3, 3]`.
        supercell_matrix: Lattice vectors of the supercell as columns, in those of the unit cell `[3, 3]`.
        force_constants: Rows of the primitive cell `[n_prim, N, 3, 3]`, eV/Å², float64, symmetrised; None
            when there are only displacements.
        displacements: Displaced supercells with their forces; may be empty.
        metadata: Origin of the calculation.
    """

    name: str
    supercell: Atoms
    translations: Translations
    symmetry: CrystalSymmetry
    primitive_matrix: Tensor
    supercell_matrix: Tensor
    force_constants: Tensor | None
    displacements: tuple[Displacement, ...]
    metadata: PhononMetadata

    @property
    def n_atoms(self) -> int:
        """Number of atoms of the supercell, N."""
        return len(self.supercell)

    @property
    def primitive_atoms(self) -> list[int]:
        """Atoms of the primitive cell, as indices of the supercell (phonopy's `p2s_map`)."""
        atoms: list[int] = self.translations.primitive_atoms.tolist()
        return atoms

    @property
    def permutations(self) -> Tensor:
        """Translation t moves atom i onto atom `permutations[t, i]`; `[n_translations, N]`."""
        return self.translations.permutations

    def columns(self, atom: int, axis: int) -> Tensor:
        """Return one column of the Hessian: minus the forces per displacement of an atom along an axis.

        Args:
            atom: Index in the supercell.
            axis: 0, 1, 2 for x, y, z.

        Returns:
            `[N, 3]`, eV/Å².

        Raises:
            InputError: There are no force constants.
        """
        force_constants = self._compact()
        images = self.translations
        primitive, translation = images.primitive_index, images.translation_index
        seen = images.inverse[:, atom][translation]
        return force_constants[primitive, seen, :, axis]

    def product(self, v: Tensor) -> Tensor:
        """Multiply the Hessian with directions, without expanding it.

        Args:
            v: Directions `[..., N, 3]`; their precision and device are those of the product.

        Returns:
            Φ v `[..., N, 3]`, eV/Å² times the unit of v.

        Raises:
            InputError: There are no force constants.
        """
        return self.translations.multiply(self._compact().to(v), v)

    def dense(self) -> Tensor:
        """Return the whole Hessian `[N, 3, N, 3]`, eV/Å²: 72 N² bytes, for small cells.

        Raises:
            InputError: There are no force constants.
        """
        return self.translations.expand(self._compact())

    def irreducible(self) -> list[HessianColumn]:
        """Return columns that are the whole Hessian by symmetry.

        The sum of weight times squared norm over them is that over all 3 N columns, for the reference, for
        a model, and for their difference.
        """
        return list(self._irreducible)

    @cached_property
    def _irreducible(self) -> tuple[HessianColumn, ...]:
        return tuple(self.symmetry.irreducible(self.translations))

    def _compact(self) -> Tensor:
        if self.force_constants is None:
            raise InputError(
                f"{self.name} has displacements but no force constants",
                fix="Its displacements do not determine them; use the forces themselves.",
            )
        return self.force_constants
