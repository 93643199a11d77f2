"""Isothermal elastic constants from the stress of strained cells."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from mlip_refine.observables.crystal import SINGULAR, Symmetry
from mlip_refine.observables.tensors import from_stress_strain, stress_from_voigt, to_stress_strain


@dataclass(frozen=True)
class Deformation:
    """Strains that show every independent constant of a crystal.

    Attributes:
        symmetry: Of the crystal.
        strain: Size of the one component that each strain has.
        directions: Voigt components that are strained, as few as will do.
        basis: Tensors of the symmetry, one for each independent constant `[m, 6, 6]`, in the crystal's frame.
    """

    symmetry: Symmetry
    strain: float
    directions: tuple[int, ...]
    basis: Tensor

    @classmethod
    def of(cls, symmetry: Symmetry, strain: float) -> Self:
        """Choose the strains for a symmetry."""
        basis = _basis(symmetry)
        chosen: list[int] = []
        for direction in range(6):
            if _rank(basis, [*chosen, direction]) > _rank(basis, chosen):
                chosen.append(direction)
        return cls(symmetry, strain, tuple(chosen), basis)

    @property
    def strains(self) -> tuple[tuple[float, ...], ...]:
        """Components (xx, yy, zz, yz, xz, xy), every direction with both signs."""
        return tuple(
            tuple(sign * self.strain if i == direction else 0.0 for i in range(6))
            for direction in self.directions
            for sign in (1.0, -1.0)
        )


def deformation_constants(
    deformation: Deformation, stress: Tensor, errors: Tensor, *, stress_strain: bool = False
) -> tuple[Tensor, Tensor]:
    """Independent constants C, or B, from the mean total stress of strained cells.

    B_ijkl = dσ_ij/dε_kl by central differences, C from B at the stress between, and the constants by least
    squares over all components.

    Args:
        deformation: Strains.
        stress: Total stress of every strained cell `[2 n_directions, 6]`, in any unit.
        errors: Standard errors of the components, of the same shape.
        stress_strain: Give the symmetric part of the stress-strain coefficients B in place of C.

    Returns:
        Constants and their standard errors `[m]`, in the unit of the stress.
    """
    directions = list(deformation.directions)
    # A shear strain has two equal components off the diagonal.
    steps = torch.tensor([1.0 if d < 3 else 2.0 for d in directions], dtype=stress.dtype)
    steps = (2 * deformation.strain * steps)[:, None]
    columns = (stress[0::2] - stress[1::2]) / steps
    spread = (errors[0::2].square() + errors[1::2].square()).sqrt() / steps
    between, nothing = stress_from_voigt(stress.mean(0)), torch.zeros(6, 6, dtype=stress.dtype)
    terms = from_stress_strain(nothing, between)[:, directions].T
    basis = deformation.basis.to(stress)
    design = basis[:, :, directions].permute(2, 1, 0).reshape(-1, len(basis))
    solve = torch.linalg.pinv(design)
    constants = solve @ (columns + terms).reshape(-1)
    if stress_strain:
        constants = constants + deformation.symmetry.constants_of(to_stress_strain(nothing, between))
    return constants, (solve.square() @ spread.reshape(-1).square()).sqrt()


def _basis(symmetry: Symmetry) -> Tensor:
    """A tensor of the symmetry for each independent constant, which is 1 in it and 0 in the others."""
    invariant = symmetry.invariants()
    values = torch.stack([torch.stack(list(symmetry.independent(t).values())) for t in invariant])
    basis: Tensor = torch.einsum("mk,kij->mij", torch.linalg.pinv(values, rtol=SINGULAR), invariant)
    return basis


def _rank(basis: Tensor, directions: list[int]) -> int:
    if not directions:
        return 0
    return int(torch.linalg.matrix_rank(basis[:, :, directions].reshape(len(basis), -1), rtol=SINGULAR))
