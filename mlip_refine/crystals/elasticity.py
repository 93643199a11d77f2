"""Elastic constants at zero temperature, with all atoms where their strained neighbours leave them.

C = (1/V)[∂²U/∂ε² - Λᵀ H⁻¹ Λ] from analytic second derivatives: H = ∂²U/∂u∂u without translations, and
Λ = ∂²U/∂u∂ε, the forces that a strain raises (Born and Huang 1954). The linear strain ε is turned into the
Lagrangian one at the stress of the crystal, so that C is the same in any box, any frame and any supercell.
"""

from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from mlip_refine.crystals.relaxation import Rest, relax, response
from mlip_refine.crystals.second_order import Quadratic, quadratic
from mlip_refine.crystals.symmetry import Symmetry, crystal_symmetry, primitive_cell
from mlip_refine.crystals.tensors import from_linear_strain, from_mandel, project, to_stress_strain
from mlip_refine.potential import Potential


@dataclass(frozen=True)
class StaticElasticity:
    """Elastic constants of a crystal at zero temperature, in its own frame.

    Attributes:
        atoms: The crystal at rest for which they hold.
        symmetry: Its symmetry.
        constants: C `[6, 6]`, eV/Å³, in the Lagrangian strain at the stress of the crystal.
        clamped: C without internal relaxation: every atom moves with the strain `[6, 6]`, eV/Å³.
        stress: `[3, 3]`, eV/Å³, tensile positive.
        energy: `[]`, eV.
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


def static_elasticity(
    potential: Potential,
    atoms: Atoms,
    rest: Rest = Rest(),  # noqa: B008 - immutable
    *,
    primitive: bool = True,
    symmetrise: bool = True,
    create_graph: bool = False,
) -> StaticElasticity:
    """Let a crystal come to rest and find its elastic constants.

    Args:
        potential: In float64.
        atoms: The crystal.
        rest: Under which conditions it is at rest. The default holds its cell.
        primitive: Take the primitive cell of the crystal: the same tensor from fewer derivatives.
        symmetrise: Project the tensors onto the symmetry of the crystal.
        create_graph: Keep the tensors differentiable in the parameters, what is free following them.

    Raises:
        InputError: The potential is in single precision, or atoms lie on each other.
        MlipRefineError: The crystal does not come to rest, or memory runs out.
    """
    crystal = relax(potential, primitive_cell(atoms) if primitive else atoms, rest)
    deformation = response(potential, crystal, rest) if create_graph else None
    structure = potential.graphs.from_atoms(crystal)
    energy = quadratic(potential, structure, deformation, create_graph=create_graph)
    symmetry = crystal_symmetry(np.array(crystal.cell), crystal.positions, crystal.numbers)
    raw = _constants(energy, energy.clamped - _softening(energy))
    constants, clamped = raw, _constants(energy, energy.clamped)
    projected = project(raw, symmetry.rotations)
    if symmetrise:
        constants, clamped = projected, project(clamped, symmetry.rotations)
    return StaticElasticity(
        atoms=crystal,
        symmetry=symmetry,
        constants=constants,
        clamped=clamped,
        stress=energy.stress,
        energy=energy.energy,
        asymmetry=float((raw - projected).detach().abs().max()),
        softest=_softest(energy),
    )


def _constants(crystal: Quadratic, second: Tensor) -> Tensor:
    """C from second derivatives in the strain `[6, 6]`, eV, in the orthonormal basis."""
    return from_linear_strain(from_mandel(second) / crystal.volume, crystal.stress)


def _softening(crystal: Quadratic) -> Tensor:
    """Λᵀ H⁻¹ Λ `[6, 6]`, eV: what internal displacements relax."""
    lifted = crystal.force_constants + crystal.translations @ crystal.translations.T
    softening: Tensor = crystal.coupling.T @ torch.linalg.solve(lifted, crystal.coupling)
    return softening


def _softest(crystal: Quadratic) -> float | None:
    if crystal.n == 3:
        return None
    matrix = crystal.force_constants.detach()
    lift = 2 * torch.linalg.matrix_norm(matrix, 2) * crystal.translations @ crystal.translations.T
    return float(torch.linalg.eigvalsh(matrix + lift)[0])
