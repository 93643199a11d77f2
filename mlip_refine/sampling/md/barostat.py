"""What a cell may do: the strains that are free, and the inertia of the cell.

All ensembles with a moving cell are one: the rate of strain is projected onto the symmetric matrices that the
freedom of the cell spans. A fixed cell is the projection onto nothing.
"""

import math

import torch
from torch import Tensor

from mlip_refine.sampling.state_points import CellFreedom

_STRETCHES: dict[CellFreedom, list[list[float]]] = {
    "fixed": [],
    "isotropic": [[1.0, 1.0, 1.0]],
    "hexagonal": [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
    "anisotropic": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
    "triclinic": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
}


def free_strains(freedom: CellFreedom) -> Tensor:
    """Return the strains that a cell may make, symmetric and orthogonal `[n_strains, 3, 3]`, float64.

    A stretch for every group of axes that strain together; triclinic cells have three shears as well.
    """
    stretches = torch.diag_embed(torch.tensor(_STRETCHES[freedom], dtype=torch.float64).reshape(-1, 3))
    if freedom != "triclinic":
        return stretches
    shears = torch.zeros(3, 3, 3, dtype=torch.float64)
    for shear, (i, j) in zip(shears, ((1, 2), (0, 2), (0, 1)), strict=True):
        shear[i, j] = shear[j, i] = 1.0
    return torch.cat([stretches, shears])


def strain_projection(freedom: CellFreedom) -> Tensor:
    """Return the projection of 3 x 3 matrices, flattened, onto the free strains `[9, 9]`, float64.

    It is orthogonal in the inner product tr(AᵀB), in which the kinetic energy of the cell is ½ W tr(g²).
    """
    projection = torch.zeros(9, 9, dtype=torch.float64)
    for matrix in free_strains(freedom):
        flat = matrix.flatten() / matrix.norm()
        projection += torch.outer(flat, flat)
    return projection


def cell_mass(volume: Tensor, bulk_modulus: Tensor, n_atoms: Tensor, kt: Tensor, period: Tensor) -> Tensor:
    """Return the inertia W of the rate of strain that gives volume oscillations a period.

    A volume strain e of all three axes costs ½ (9 K V) e² and moves with ½ (3 W) ė², so
    W = 3 (period / 2π)² K V; an ideal gas adds its own K V = N kT.

    Args:
        volume: Volumes `[n_systems]`, Å³.
        bulk_modulus: Bulk moduli of the static lattices `[n_systems]`, eV/Å³; negative ones count as zero.
        n_atoms: Numbers of atoms `[n_systems]`.
        kt: Thermal energies `[n_systems]`, eV.
        period: Periods of volume oscillations `[n_systems]`, torch-sim time.

    Returns:
        Inertia `[n_systems]`, eV times squared torch-sim time.
    """
    stiffness = bulk_modulus.clamp(min=0.0) * volume + n_atoms * kt
    return 3.0 * (period / (2.0 * math.pi)).square() * stiffness
