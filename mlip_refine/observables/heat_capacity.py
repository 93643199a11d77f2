"""Heat capacities from fluctuations."""

from typing import Literal

import torch
from ase import units
from torch import Tensor

from mlip_refine.errors import InputError
from mlip_refine.observables.base import Observable, Sample
from mlip_refine.quantities import KB

HeatCapacityUnit = Literal["k_B", "J/mol/K"]

# One k_B per atom in J/mol/K is the gas constant.
_FACTORS: dict[str, float] = {"k_B": 1.0, "J/mol/K": float(units._k * units._Nav)}


class _Fluctuation(Observable):
    """Variance of an energy over k_B (k_B T²) N, and 3/2."""

    def __init__(self, unit: HeatCapacityUnit = "k_B") -> None:
        """Choose the unit.

        Args:
            unit: k_B per atom, or J/mol/K (moles of atoms).

        Raises:
            InputError: Another unit.
        """
        if unit not in _FACTORS:
            raise InputError("unknown unit of a heat capacity", found=unit, expected=", ".join(_FACTORS))
        self.unit: str = unit

    def _moments(self, energy: Tensor) -> Tensor:
        """First two moments of every frame `[n, 2]`, about a constant that keeps the digits."""
        shifted = energy - energy.detach().mean()
        return torch.stack([shifted, shifted.square()], dim=1)

    def derive(self, means: Tensor, sample: Sample) -> Tensor:
        """Heat capacity `[1]` from the first two moments."""
        variance = means[1] - means[0].square()
        configurations = variance / (KB * sample.temperature) ** 2 / sample.n_atoms
        return (_FACTORS[self.unit] * (configurations + 1.5))[None]


class HeatCapacityV(_Fluctuation):
    """C_V = var(U)/(k_B T²) + 3/2 N k_B in a fixed cell, per atom (Allen and Tildesley 2017, section 2.5).

    The first part misses the 3/2 k_B of the centre of mass, which no potential holds: 1.5/N k_B per atom.
    """

    labels = ("C_V",)

    def columns(self, sample: Sample) -> Tensor:
        """First two moments of the energy of every frame `[n, 2]`.

        Raises:
            InputError: The cell moves.
        """
        sample.require_fixed_cell("the heat capacity at constant volume")
        return self._moments(sample.energy)


class HeatCapacityP(_Fluctuation):
    """C_P = var(U + P V)/(k_B T²) + 3/2 N k_B in a moving cell, per atom (Allen and Tildesley 2017, 2.5)."""

    labels = ("C_P",)

    def columns(self, sample: Sample) -> Tensor:
        """First two moments of the enthalpy of every frame `[n, 2]`.

        Raises:
            InputError: The cell is fixed.
        """
        sample.require_free_cell("the heat capacity at constant pressure")
        return self._moments(sample.enthalpy)
