"""Isothermal elastic constants from the stress of strained cells.

Central differences miss a term of third order, the strain squared times fourth derivatives: of titanium at
923 K and strains of 1.5 % about 1 % of C11, at 0.75 % a quarter of that. The errors do not know it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from mlip_refine.crystals.symmetry import SINGULAR, Symmetry
from mlip_refine.crystals.tensors import from_stress_strain, stress_from_voigt, to_stress_strain
from mlip_refine.observables.base import Observable, Sample
from mlip_refine.observables.stress import Stress


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


def deformation_constants(deformation: Deformation, stress: Tensor, *, stress_strain: bool = False) -> Tensor:
    """Independent constants C, or B, from the mean total stress of a cell and its strained ones.

    B_ijkl = dσ_ij/dε_kl by central differences, C from B at the stress of the cell, and the constants by
    least squares over all components.

    Args:
        deformation: Strains.
        stress: Total stress of the cell itself and of every strained one `[1 + 2 n_directions, 6]`, in any
            unit. The mean over both signs would be off by the second order of the strain.
        stress_strain: Give the symmetric part of the stress-strain coefficients B in place of C.

    Returns:
        Constants `[m]`, in the unit of the stress.
    """
    directions = list(deformation.directions)
    # A shear strain has two equal components off the diagonal.
    steps = torch.tensor([1.0 if d < 3 else 2.0 for d in directions], dtype=stress.dtype)
    steps = (2 * deformation.strain * steps)[:, None]
    columns = (stress[1::2] - stress[2::2]) / steps
    own, nothing = stress_from_voigt(stress[0]), torch.zeros(6, 6, dtype=stress.dtype)
    terms = from_stress_strain(nothing, own)[:, directions].T
    basis = deformation.basis.to(stress)
    design = basis[:, :, directions].permute(2, 1, 0).reshape(-1, len(basis))
    solve = torch.linalg.pinv(design)
    constants: Tensor = solve @ (columns + terms).reshape(-1)
    if stress_strain:
        constants = constants + deformation.symmetry.constants_of(to_stress_strain(nothing, own))
    return constants


class _Combinations(Observable):
    """Linear combinations of the mean components of the stress of one cell."""

    probes = Stress.probes
    unit = Stress.unit

    def __init__(self, slopes: Tensor) -> None:
        """Take the slopes in the six components `[m, 6]`."""
        self.slopes, self.labels = slopes, tuple(str(i) for i in range(len(slopes)))

    def columns(self, sample: Sample) -> Tensor:
        """Six components of every frame `[n, 6]`."""
        return Stress().columns(sample)

    def derive(self, means: Tensor, sample: Sample) -> Tensor:  # noqa: ARG002 - as of any observable
        """The combinations `[m]`."""
        return self.slopes @ means


type Errors = Callable[[Observable], Sequence[float]]
"""Standard errors of an observable on the frames of one cell."""


def errors_of_stresses(
    function: Callable[[Tensor], Tensor], stress: Tensor, cells: Sequence[Errors]
) -> list[float]:
    """Standard errors of a function of the mean stresses of independent cells.

    Each cell adds to an error what the series of its own combination of components tells: xx, yy and zz of
    one cell are anything but independent.

    Args:
        function: Of `[n_cells, 6]`, GPa, differentiable; gives `[m]`.
        stress: Total mean stresses `[n_cells, 6]`, GPa.
        cells: Errors on the frames of each.
    """
    slopes = torch.autograd.functional.jacobian(function, stress.detach())
    errors = [list(of(_Combinations(slopes[:, i]))) for i, of in enumerate(cells)]
    found: list[float] = torch.tensor(errors, dtype=torch.float64).norm(dim=0).tolist()
    return found


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
