"""Thermal expansion from fluctuations at constant pressure."""

from abc import abstractmethod

import torch
from torch import Tensor

from mlip_refine.observables.base import Observable, Sample
from mlip_refine.observables.lattice import Lattice


class _Expansion(Observable):
    """(1/⟨x⟩) ∂⟨x⟩/∂T of lengths or volumes x, by cov(x, H)/(kT² ⟨x⟩)."""

    unit = "1/K"

    @abstractmethod
    def sizes(self, sample: Sample) -> Tensor:
        """What expands, of every frame `[n, m]`."""

    def columns(self, sample: Sample) -> Tensor:
        """H, x and x H of every frame `[n, 1 + 2 m]`.

        Raises:
            InputError: The cell is fixed.
        """
        sample.require_free_cell("thermal expansion")
        sizes, enthalpy = self.sizes(sample), sample.enthalpy[:, None]
        # The mean enthalpy drops out of the covariance, and would take its digits along.
        enthalpy = enthalpy - enthalpy.detach().mean()
        return torch.cat([enthalpy, sizes, sizes * enthalpy], dim=1)

    def derive(self, means: Tensor, sample: Sample) -> Tensor:
        """Coefficients `[m]`."""
        sizes, products = means[1:].chunk(2)
        covariance = products - sizes * means[0]
        return covariance / (sample.kt * sample.temperature * sizes)


class ThermalExpansion(_Expansion):
    """Volumetric expansion α = cov(V, U + P V)/(kT² ⟨V⟩), 1/K (Allen and Tildesley 2017, section 2.5).

    The kinetic energy does not depend on V and drops out. With the density exp(-β(U + P V)) dV of the volume
    this is the derivative of ln⟨V⟩ in T at constant P exactly.
    """

    labels = ("alpha",)

    def sizes(self, sample: Sample) -> Tensor:
        """Volume of every frame `[n, 1]`."""
        return sample.volumes[:, None]


class LinearExpansion(_Expansion):
    """Linear expansion of lattice constants, cov(a, U + P V)/(kT² ⟨a⟩), 1/K."""

    def __init__(self, lattice: Lattice) -> None:
        """Take the constants of `lattice`, such as a and c."""
        self.lattice = lattice
        self.labels = tuple(f"alpha_{name}" for name in lattice.labels)

    def sizes(self, sample: Sample) -> Tensor:
        """Lattice constants of every frame `[n, m]`."""
        return self.lattice.columns(sample)
