"""Relaxation of crystals by Newton's method, and how the relaxed crystal responds to the parameters.

At zero temperature the state of a crystal is where its enthalpy U + P V has no slope, in the displacements of
the atoms and, if the cell is free, in the strain. The strain counts here as a length, times the mean distance
of atoms, so that steps of atoms and of the cell compare.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from mlip_refine.crystals.second_order import SecondOrderEnergy, second_order
from mlip_refine.crystals.tensors import mandel_basis
from mlip_refine.errors import MlipRefineError
from mlip_refine.potential import Potential
from mlip_refine.quantities import GPA

Freedom = Literal["atoms", "cell"]
"""What relaxes: the atoms in a cell that is held, or the cell with them."""

AT_REST = 1e-9
"""Largest component of the slope, eV/Å, below which one last step ends the relaxation at rounding."""

_STEPS = 200
_LONGEST = 0.15
"""Longest component of a step, Å."""

_SOFTEST = 1e-4
"""Curvatures count as at least this fraction of the largest, so that no step runs away along a soft mode."""


class Rest(NamedTuple):
    """Conditions under which a crystal is at rest.

    Attributes:
        freedom: Whether only the atoms relax, or the cell with them.
        pressure: Pressure on a free cell, GPa.
    """

    freedom: Freedom = "atoms"
    pressure: float = 0.0

    def enthalpy(self, crystal: SecondOrderEnergy) -> Tensor:
        """Return U + P V, or U of a cell that is held `[]`, eV."""
        pressure = self.pressure * GPA if self.freedom == "cell" else 0.0
        return crystal.energy + pressure * crystal.volume

    def slope(self, crystal: SecondOrderEnergy) -> Tensor:
        """Return the gradient of the enthalpy in the free variables `[n]` or `[n + 6]`, eV/Å."""
        if self.freedom == "atoms":
            return crystal.gradient[: crystal.n]
        pv = self.pressure * GPA * crystal.volume * _trace(crystal)
        strain = (crystal.gradient[crystal.n :] + pv) / _length(crystal)
        return torch.cat([crystal.gradient[: crystal.n], strain])

    def curvature(self, crystal: SecondOrderEnergy) -> Tensor:
        """Return its second derivatives `[n, n]` or `[n + 6, n + 6]`, eV/Å²; for translations they are 1."""
        lift = crystal.translations @ crystal.translations.T
        if self.freedom == "atoms":
            return crystal.force_constants + lift
        trace, length = _trace(crystal), _length(crystal)
        # V(ε) = V det(1 + ε): the second derivative of P V.
        pv = torch.outer(trace, trace) - torch.eye(6, dtype=trace.dtype, device=trace.device)
        strain = (crystal.clamped + self.pressure * GPA * crystal.volume * pv) / length**2
        coupling = crystal.coupling / length
        above = torch.cat([crystal.force_constants + lift, coupling], dim=1)
        return torch.cat([above, torch.cat([coupling.T, strain], dim=1)])

    def deformation(self, crystal: SecondOrderEnergy, step: Tensor) -> tuple[Tensor, Tensor]:
        """Return displacements `[N, 3]`, Å, and strain `[3, 3]` of a step in the free variables."""
        basis = mandel_basis(step)
        displacements = step[: crystal.n].view(-1, 3)
        if self.freedom == "atoms":
            return displacements, torch.zeros_like(basis[0])
        return displacements, torch.einsum("a,aij->ij", step[crystal.n :] / _length(crystal), basis)


def relax(potential: Potential, atoms: Atoms, rest: Rest) -> Atoms:
    """Relax a crystal by Newton's method, which keeps its symmetry.

    Args:
        potential: Potential in float64.
        atoms: The crystal.
        rest: Conditions under which it is at rest.

    Raises:
        InputError: The potential is in single precision.
        MlipRefineError: The crystal does not come to rest, or memory runs out.
    """
    here, longest = second_order(potential, potential.graphs.from_atoms(atoms)), _LONGEST
    for _ in range(_STEPS):
        slope = rest.slope(here)
        # Newton's step with all curvatures above zero, no component longer than allowed.
        values, modes = torch.linalg.eigh(rest.curvature(here))
        curvatures = values.abs().clamp(min=_SOFTEST * float(values.abs().max()))
        step = -modes @ (modes.T @ slope / curvatures)
        step = step * (longest / step.abs().max()).clamp(max=1.0)
        displacements, strain = (x.cpu().numpy() for x in rest.deformation(here, step))
        moved: Atoms = atoms.copy()
        deformation = np.eye(3) + strain
        moved.set_cell(np.array(atoms.cell) @ deformation.T, scale_atoms=False)
        moved.positions = atoms.positions @ deformation.T + displacements
        if slope.abs().max() < AT_REST:
            return moved
        there = second_order(potential, potential.graphs.from_atoms(moved))
        if rest.enthalpy(there) <= rest.enthalpy(here) + 1e-12 * here.energy.abs().clamp(min=1.0):
            atoms, here, longest = moved, there, min(2 * longest, _LONGEST)
        else:
            longest /= 4
    raise MlipRefineError(
        f"a crystal of {len(atoms)} atoms does not come to rest in {_STEPS} steps: "
        f"a slope of {float(rest.slope(here).abs().max()):.1e} eV/Å is left"
    )


def response(potential: Potential, atoms: Atoms, rest: Rest) -> tuple[Tensor, Tensor]:
    """Return how a crystal at rest moves with the parameters: zero, with the right derivatives.

    The slope g(y, θ) = 0 holds at every θ, so that dy/dθ = -K⁻¹ ∂g/∂θ with K = ∂g/∂y: one step of Newton's
    method with K held.

    Args:
        potential: Potential in float64.
        atoms: The crystal at rest.
        rest: Conditions under which it is at rest.

    Returns:
        Displacements `[N, 3]`, Å, and strain `[3, 3]`.
    """
    structure = potential.graphs.from_atoms(atoms)
    held = second_order(potential, structure)
    first = potential.curvature(potential.graphs.collate([structure]))
    strain = torch.einsum("ij,aij->a", first.gradient.strain[0], mandel_basis(held.gradient))
    gradient = torch.cat([first.gradient.positions.reshape(-1), strain])
    slope = rest.slope(SecondOrderEnergy(held.energy, gradient, held.hessian, held.volume))
    return rest.deformation(held, -torch.linalg.solve(rest.curvature(held), slope))


def _trace(crystal: SecondOrderEnergy) -> Tensor:
    """Return the unit tensor in the orthonormal basis `[6]`."""
    trace: Tensor = mandel_basis(crystal.gradient).diagonal(dim1=1, dim2=2).sum(1)
    return trace


def _length(crystal: SecondOrderEnergy) -> Tensor:
    """Return the mean distance of atoms, Å; a constant."""
    length: Tensor = (3 * crystal.volume.detach() / crystal.n) ** (1 / 3)
    return length
