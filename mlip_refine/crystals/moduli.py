"""Moduli of polycrystals: averages of an elastic tensor over all orientations (Hill 1952)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mlip_refine.crystals.tensors import to_mandel


@dataclass(frozen=True)
class Moduli:
    """Isotropic moduli.

    Attributes:
        bulk: Bulk modulus K `[...]`, in the unit of the tensor.
        shear: Shear modulus G `[...]`, in the unit of the tensor.
    """

    bulk: Tensor
    shear: Tensor

    @property
    def poisson(self) -> Tensor:
        """Poisson's ratio ν = (3K - 2G)/(2G + 6K) `[...]`."""
        return (3 * self.bulk - 2 * self.shear) / (2 * self.shear + 6 * self.bulk)

    @property
    def young(self) -> Tensor:
        """Young's modulus E = 9KG/(3K + G) `[...]`."""
        return 9 * self.bulk * self.shear / (3 * self.bulk + self.shear)


def voigt_average(tensor: Tensor) -> Moduli:
    """Return the moduli at uniform strain, an upper bound, of Voigt matrices `[..., 6, 6]`.

    Under pressure they are those of the stress-strain coefficients.
    """
    spherical, total = _invariants(to_mandel(tensor))
    return Moduli(spherical / 3, (total - spherical) / 10)


def reuss_average(tensor: Tensor) -> Moduli:
    """Return the moduli at uniform stress, a lower bound (see `voigt_average`)."""
    spherical, total = _invariants(torch.linalg.inv(to_mandel(tensor)))
    return Moduli(1 / (3 * spherical), 5 / (2 * (total - spherical)))


def hill_average(tensor: Tensor) -> Moduli:
    """Return the means of the two bounds (see `voigt_average`)."""
    upper, lower = voigt_average(tensor), reuss_average(tensor)
    return Moduli((upper.bulk + lower.bulk) / 2, (upper.shear + lower.shear) / 2)


def _invariants(mandel: Tensor) -> tuple[Tensor, Tensor]:
    """Return the spherical part C_iijj/3 and the trace C_ijij, which determine an isotropic average.

    Of an isotropic tensor they are 3K and 3K + 10G.
    """
    return mandel[..., :3, :3].sum((-2, -1)) / 3, mandel.diagonal(dim1=-2, dim2=-1).sum(-1)
