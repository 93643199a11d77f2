"""Enthalpy, heat capacities, thermal expansion and bulk modulus."""

from abc import abstractmethod
from typing import Literal

import torch
from ase import units
from torch import Tensor

from mlip_refine.errors import InputError
from mlip_refine.observables.base import Observable, Sample
from mlip_refine.observables.cell import Lattice
from mlip_refine.quantities import GPA, KB

HeatCapacityUnit = Literal["k_B", "J/mol/K"]

# One k_B per atom in J/mol/K is the gas constant.
_HEAT_CAPACITY_UNITS: dict[str, float] = {"k_B": 1.0, "J/mol/K": float(units._k * units._Nav)}


class Enthalpy(Observable):
    """Enthalpy of the configurations ⟨U + P V⟩/N, eV/atom, P the pressure of the state.

    The kinetic part, 3/2 kT per atom, is the same for all phases and left out. A fixed cell gives the
    enthalpy at P as far as P is its pressure.
    """

    labels = ("enthalpy",)
    unit = "eV/atom"

    def columns(self, sample: Sample) -> Tensor:
        """Return the enthalpy of every frame `[n, 1]`."""
        return (sample.enthalpy / sample.n_atoms)[:, None]


class _EnergyFluctuation(Observable):
    """Variance of an energy over k_B (k_B T²) N, and 3/2 for the kinetic energy."""

    def __init__(self, unit: HeatCapacityUnit = "k_B") -> None:
        """Choose the unit.

        Args:
            unit: k_B per atom, or J/mol/K (moles of atoms).

        Raises:
            InputError: Another unit.
        """
        if unit not in _HEAT_CAPACITY_UNITS:
            allowed = ", ".join(_HEAT_CAPACITY_UNITS)
            raise InputError("unknown unit of a heat capacity", found=unit, expected=allowed)
        self.unit: str = unit

    def _moments(self, energy: Tensor) -> Tensor:
        """Return the first two moments of every frame `[n, 2]`, about a constant that keeps the digits."""
        shifted = energy - energy.detach().mean()
        return torch.stack([shifted, shifted.square()], dim=1)

    def derive(self, means: Tensor, sample: Sample) -> Tensor:
        """Return the heat capacity `[1]` from the first two moments."""
        variance = means[1] - means[0].square()
        configurations = variance / (KB * sample.temperature) ** 2 / sample.n_atoms
        return (_HEAT_CAPACITY_UNITS[self.unit] * (configurations + 1.5))[None]


class HeatCapacityV(_EnergyFluctuation):
    """C_V = var(U)/(k_B T²) + 3/2 N k_B in a fixed cell, per atom (Allen and Tildesley 2017, section 2.5).

    The first part misses the 3/2 k_B of the centre of mass, which no potential holds: 1.5/N k_B per atom.
    """

    labels = ("C_V",)

    def columns(self, sample: Sample) -> Tensor:
        """Return the first two moments of the energy of every frame `[n, 2]`.

        Raises:
            InputError: The cell moves.
        """
        sample.require_fixed_cell("the heat capacity at constant volume")
        return self._moments(sample.energy)


class HeatCapacityP(_EnergyFluctuation):
    """C_P = var(U + P V)/(k_B T²) + 3/2 N k_B in a moving cell, per atom (Allen and Tildesley 2017, 2.5)."""

    labels = ("C_P",)

    def columns(self, sample: Sample) -> Tensor:
        """Return the first two moments of the enthalpy of every frame `[n, 2]`.

        Raises:
            InputError: The cell is fixed.
        """
        sample.require_free_cell("the heat capacity at constant pressure")
        return self._moments(sample.enthalpy)


class _Expansion(Observable):
    """(1/⟨x⟩) ∂⟨x⟩/∂T of lengths or volumes x, by cov(x, H)/(kT² ⟨x⟩)."""

    unit = "1/K"

    @abstractmethod
    def sizes(self, sample: Sample) -> Tensor:
        """Return the lengths or volumes of every frame `[n, m]`."""

    def columns(self, sample: Sample) -> Tensor:
        """Return H, x and x H of every frame `[n, 1 + 2 m]`.

        Raises:
            InputError: The cell is fixed.
        """
        sample.require_free_cell("thermal expansion")
        sizes, enthalpy = self.sizes(sample), sample.enthalpy[:, None]
        # The mean enthalpy drops out of the covariance, and would take its digits along.
        enthalpy = enthalpy - enthalpy.detach().mean()
        return torch.cat([enthalpy, sizes, sizes * enthalpy], dim=1)

    def derive(self, means: Tensor, sample: Sample) -> Tensor:
        """Return the coefficients `[m]`."""
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
        """Return the volume of every frame `[n, 1]`."""
        return sample.volumes[:, None]


class LinearExpansion(_Expansion):
    """Linear expansion of lattice constants, cov(a, U + P V)/(kT² ⟨a⟩), 1/K."""

    def __init__(self, lattice: Lattice) -> None:
        """Take the constants of `lattice`, such as a and c."""
        self.lattice = lattice
        self.labels = tuple(f"alpha_{name}" for name in lattice.labels)

    def sizes(self, sample: Sample) -> Tensor:
        """Return the lattice constants of every frame `[n, m]`."""
        return self.lattice.columns(sample)


class BulkModulus(Observable):
    """Isothermal bulk modulus K_T = kT ⟨V⟩/var(V), GPa (Allen and Tildesley 2017, section 2.5).

    With the density exp(-β(U + P V)) dV of the volume this is -⟨V⟩ d P/d⟨V⟩ of the sampled ensemble exactly.
    """

    labels = ("K_T",)
    unit = "GPa"

    def columns(self, sample: Sample) -> Tensor:
        """Return V and V² of every frame `[n, 2]`, Å³ and Å⁶.

        Raises:
            InputError: The cell is fixed.
        """
        sample.require_free_cell("the bulk modulus")
        return torch.stack([sample.volumes, sample.volumes.square()], dim=1)

    def derive(self, means: Tensor, sample: Sample) -> Tensor:
        """Return K_T `[1]`."""
        return (sample.kt * means[0] / (means[1] - means[0].square()) / GPA)[None]
