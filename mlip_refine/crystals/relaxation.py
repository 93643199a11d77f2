"""Newton's way to the crystal at rest, and how it moves when the parameters change.

At zero temperature the state of a crystal is where its enthalpy U + P V has no slope, in the displacements of
the atoms and, if the cell is free, in the strain. The strain counts here as a length, times the mean distance
of atoms, so that steps of atoms and of the cell compare.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from mlip_refine.crystals.second_order import Quadratic, quadratic
from mlip_refine.crystals.tensors import mandel_basis
from mlip_refine.errors import MlipRefineError
from mlip_refine.potential import Potential
from mlip_refine.quantities import GPA

Freedom = Literal["atoms", "cell"]
"""What finds its place: the atoms in a cell that is held, or the cell with them."""

AT_REST = 1e-9
"""Largest component of the slope, eV/Å, from where one last step ends: it leaves what rounding leaves."""

_STEPS = 200
_LONGEST = 0.15
"""Longest component of a step, Å."""

_SOFTEST = 1e-4
"""Curvatures count as at least this fraction of the largest, so that no step runs away along a soft mode."""


class Rest(NamedTuple):
    """Conditions under which a crystal is at rest.

    Attributes:
        freedom: Whether the cell is held.
        pressure: On a free cell, GPa.
    """

    freedom: Freedom = "atoms"
    pressure: float = 0.0

    def enthalpy(self, crystal: Quadratic) -> Tensor:
        """U + P V, or U of a cell that is held `[]`, eV."""
        pressure = self.pressure * GPA if self.freedom == "cell" else 0.0
        return crystal.energy + pressure * crystal.volume

    def slope(self, crystal: Quadratic) -> Tensor:
        """Gradient in what is free `[n]` or `[n + 6]`, eV/Å."""
        if self.freedom == "atoms":
            return crystal.gradient[: crystal.n]
        pv = self.pressure * GPA * crystal.volume * _trace(crystal)
        strain = (crystal.gradient[crystal.n :] + pv) / _length(crystal)
        return torch.cat([crystal.gradient[: crystal.n], strain])

    def curvature(self, crystal: Quadratic) -> Tensor:
        """Second derivatives in what is free `[n, n]` or `[n + 6, n + 6]`, eV/Å²; of translations, 1."""
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

    def deformation(self, crystal: Quadratic, step: Tensor) -> tuple[Tensor, Tensor]:
        """Displacements `[N, 3]`, Å, and strain `[3, 3]` of a step in what is free."""
        basis = mandel_basis(step)
        displacements = step[: crystal.n].view(-1, 3)
        if self.freedom == "atoms":
            return displacements, torch.zeros_like(basis[0])
        return displacements, torch.einsum("a,aij->ij", step[crystal.n :] / _length(crystal), basis)


def relax(potential: Potential, atoms: Atoms, rest: Rest) -> Atoms:
    """Let a crystal come to rest by Newton's method, which keeps its symmetry.

    Args:
        potential: In float64.
        atoms: The crystal.
        rest: Under which conditions.

    Raises:
        InputError: The potential is in single precision.
        MlipRefineError: It does not come to rest, or memory runs out.
    """
    here, longest = _expanded(potential, atoms), _LONGEST
    for _ in range(_STEPS):
        moved = _moved(atoms, *rest.deformation(here, _step(rest, here, longest)))
        if rest.slope(here).abs().max() < AT_REST:
            return moved
        there = _expanded(potential, moved)
        if rest.enthalpy(there) <= rest.enthalpy(here) + 1e-12 * here.energy.abs().clamp(min=1.0):
            atoms, here, longest = moved, there, min(2 * longest, _LONGEST)
        else:
            longest /= 4
    raise MlipRefineError(
        f"a crystal of {len(atoms)} atoms does not come to rest in {_STEPS} steps: "
        f"a slope of {float(rest.slope(here).abs().max()):.1e} eV/Å is left"
    )


def response(potential: Potential, atoms: Atoms, rest: Rest) -> tuple[Tensor, Tensor]:
    """How a crystal at rest moves when the parameters change: zero, with the right derivatives.

    The slope g(y, θ) = 0 holds at every θ, so that dy/dθ = -K⁻¹ ∂g/∂θ with K = ∂g/∂y: one step of Newton's
    method with K held.

    Args:
        potential: In float64.
        atoms: The crystal at rest.
        rest: Under which conditions.

    Returns:
        Displacements `[N, 3]`, Å, and strain `[3, 3]`.
    """
    structure = potential.graphs.from_atoms(atoms)
    held = quadratic(potential, structure)
    first = potential.curvature(potential.graphs.collate([structure]))
    strain = torch.einsum("ij,aij->a", first.gradient.strain[0], mandel_basis(held.gradient))
    gradient = torch.cat([first.gradient.positions.reshape(-1), strain])
    slope = rest.slope(Quadratic(held.energy, gradient, held.hessian, held.volume))
    return rest.deformation(held, -torch.linalg.solve(rest.curvature(held), slope))


def _expanded(potential: Potential, atoms: Atoms) -> Quadratic:
    return quadratic(potential, potential.graphs.from_atoms(atoms))


def _step(rest: Rest, crystal: Quadratic, longest: float) -> Tensor:
    """Newton's step with all curvatures above zero, no component longer than allowed, Å."""
    values, modes = torch.linalg.eigh(rest.curvature(crystal))
    curvatures = values.abs().clamp(min=_SOFTEST * float(values.abs().max()))
    step = -modes @ (modes.T @ rest.slope(crystal) / curvatures)
    shortened: Tensor = step * (longest / step.abs().max()).clamp(max=1.0)
    return shortened


def _moved(atoms: Atoms, displacements: Tensor, strain: Tensor) -> Atoms:
    moved: Atoms = atoms.copy()
    deformation = np.eye(3) + strain.cpu().numpy()
    moved.set_cell(np.array(atoms.cell) @ deformation.T, scale_atoms=False)
    moved.positions = atoms.positions @ deformation.T + displacements.cpu().numpy()
    return moved


def _trace(crystal: Quadratic) -> Tensor:
    """The unit tensor in the orthonormal basis `[6]`."""
    trace: Tensor = mandel_basis(crystal.gradient).diagonal(dim1=1, dim2=2).sum(1)
    return trace


def _length(crystal: Quadratic) -> Tensor:
    """Mean distance of atoms, Å; a constant."""
    length: Tensor = (3 * crystal.volume.detach() / crystal.n) ** (1 / 3)
    return length
