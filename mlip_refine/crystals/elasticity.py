"""Elastic constants at zero temperature, with internal relaxation.

C = (1/V)[∂²U/∂ε² - Λᵀ H⁻¹ Λ] from analytic second derivatives: H = ∂²U/∂u∂u without translations, and
Λ = ∂²U/∂u∂ε, the forces that a strain raises (Born and Huang 1954). The linear strain ε is turned into the
Lagrangian one at the stress of the crystal, so that C is the same in any box, any frame and any supercell.
"""

from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from mlip_refine.crystals.moduli import reuss_average
from mlip_refine.crystals.relaxation import Rest, relax, response
from mlip_refine.crystals.second_order import second_order
from mlip_refine.crystals.symmetry import Symmetry, find_symmetry, primitive_cell
from mlip_refine.crystals.tensors import from_linear_strain, from_mandel, project, to_stress_strain
from mlip_refine.errors import MlipRefineError
from mlip_refine.potential import Potential


@dataclass(frozen=True)
class StaticElasticity:
    """Elastic constants of a crystal at zero temperature, in its own frame.

    Attributes:
        atoms: The crystal at rest.
        symmetry: Symmetry of the crystal.
        constants: C `[6, 6]`, eV/Å³, in the Lagrangian strain at the stress of the crystal.
        clamped: C without internal relaxation: every atom moves with the strain `[6, 6]`, eV/Å³.
        stress: Stress `[3, 3]`, eV/Å³, tensile positive.
        energy: Energy `[]`, eV.
        asymmetry: Largest component of C that the symmetry of the crystal forbids, before projection, eV/Å³.
        softest: Smallest curvature against displacements without strain, eV/Å²; below zero the crystal is no
            minimum. None for one atom, which has no such displacement.
    """

    atoms: Atoms
    symmetry: Symmetry
    constants: Tensor
    clamped: Tensor
    stress: Tensor
    energy: Tensor
    asymmetry: float
    softest: float | None

    @property
    def coefficients(self) -> Tensor:
        """Stress-strain coefficients B `[6, 6]`, eV/Å³; C where there is no stress."""
        return to_stress_strain(self.constants, self.stress)

    @property
    def bulk_modulus(self) -> Tensor:
        """Bulk modulus -V ∂P/∂V with the shape of the cell free, Reuss's average of B `[]`, eV/Å³."""
        return reuss_average(self.coefficients).bulk


def static_elasticity(
    potential: Potential,
    atoms: Atoms,
    rest: Rest = Rest(),  # noqa: B008 - immutable
    *,
    primitive: bool = True,
    symmetrise: bool = True,
    create_graph: bool = False,
) -> StaticElasticity:
    """Relax a crystal and compute its elastic constants.

    Args:
        potential: Potential in float64.
        atoms: The crystal.
        rest: Conditions under which it is at rest. The default holds its cell.
        primitive: Whether to take the primitive cell: the same tensor from fewer derivatives.
        symmetrise: Whether to project the tensors onto the symmetry of the crystal.
        create_graph: Whether to keep the tensors differentiable in the parameters of the potential, with the
            response of the relaxed crystal to them.

    Raises:
        InputError: The potential is in single precision, or atoms lie on each other.
        MlipRefineError: The crystal does not come to rest, parts of it do not interact, or memory runs out.
    """
    crystal = relax(potential, primitive_cell(atoms) if primitive else atoms, rest)
    deformation = response(potential, crystal, rest) if create_graph else None
    structure = potential.graphs.from_atoms(crystal)
    energy = second_order(potential, structure, deformation, create_graph=create_graph)
    symmetry = find_symmetry(np.array(crystal.cell), crystal.positions, crystal.numbers)
    translations = energy.translations @ energy.translations.T
    # What internal displacements relax: Λᵀ H⁻¹ Λ.
    try:
        inner = torch.linalg.solve(energy.force_constants + translations, energy.coupling)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise MlipRefineError(
            "parts of the crystal move against each other without any force: it has no elastic constants"
        ) from error
    relaxation = energy.coupling.T @ inner
    strained = from_mandel(torch.stack([energy.clamped - relaxation, energy.clamped])) / energy.volume
    raw, clamped = from_linear_strain(strained, energy.stress)
    projected = project(raw, symmetry.rotations)
    softest = None
    if len(crystal) > 1:
        matrix = energy.force_constants.detach()
        lift = 2 * torch.linalg.matrix_norm(matrix, 2) * translations
        softest = float(torch.linalg.eigvalsh(matrix + lift)[0])
    return StaticElasticity(
        atoms=crystal,
        symmetry=symmetry,
        constants=projected if symmetrise else raw,
        clamped=project(clamped, symmetry.rotations) if symmetrise else clamped,
        stress=energy.stress,
        energy=energy.energy,
        asymmetry=float((raw - projected).detach().abs().max()),
        softest=softest,
    )
