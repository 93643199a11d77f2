"""Elastic constants of a crystal at temperature, from the fluctuations of stress in a fixed cell."""

from typing import ClassVar

import torch
from torch import Tensor

from mlip_refine.crystals.moduli import voigt_average
from mlip_refine.crystals.symmetry import INDEPENDENT, Symmetry
from mlip_refine.crystals.tensors import (
    adiabatic,
    from_linear_strain,
    isothermal_from_fluctuations,
    project,
    stress_from_voigt,
    stress_to_voigt,
    to_mandel,
    to_stress_strain,
)
from mlip_refine.observables.base import Observable, Sample
from mlip_refine.quantities import GPA, KB
from mlip_refine.statistics import kish_size

_UPPER = tuple(torch.triu_indices(6, 6).tolist())
_PAIRS = len(_UPPER[0])
_BORN = [*range(6 + _PAIRS, 6 + 2 * _PAIRS), 12 + 2 * _PAIRS]
"""Columns that are zero on frames without a Born term."""
_KNOWN = _BORN[-1]
"""Column that says which ones have it."""


class FluctuationElasticity(Observable):
    """Independent elastic constants C, or B, of a crystal in a fixed cell, GPa, by fluctuations.

    C^T = ⟨C^B⟩ - (V/kT) cov(σ, σ) + (N kT/V)(δ_ik δ_jl + δ_il δ_jk) in the Lagrangian strain (Squire, Holt
    and Hoover 1969); adiabatic, C^S = C^T + (T V/C_v) λλ with λ = cov(σ, U)/(kT²) - (N k/V) δ and
    C_v = var(U)/(kT²) + 3/2 N k (Wallace 1972). The tensor is given the symmetry of the crystal, and its
    constants are those in the crystal's standard axes.

    The Born term is needed on some of the frames only; its part of the error is that of these.
    """

    probes: ClassVar[frozenset[str]] = frozenset({"stress", "born"})
    unit = "GPa"

    def __init__(self, symmetry: Symmetry, *, adiabatic: bool = False, stress_strain: bool = False) -> None:
        """Choose what to tell.

        Args:
            symmetry: Of the ideal crystal, in the frame of the frames.
            adiabatic: Whether to give C^S in place of C^T.
            stress_strain: Whether to give the symmetric part of the stress-strain coefficients B at the mean
                total stress (see `to_stress_strain`) in place of C: what sound and strained cells show.
        """
        self.symmetry, self.adiabatic, self.stress_strain = symmetry, adiabatic, stress_strain
        self.labels = INDEPENDENT[symmetry.laue]

    def columns(self, sample: Sample) -> Tensor:
        """Moments of stress and energy, and the Born term where it is known `[n, 57]`."""
        sample.require_fixed_cell("elastic constants by fluctuations")
        stress = stress_to_voigt(sample.probe("stress")) - _typical_stress(sample)
        energy = sample.energy - sample.energy.detach().mean()
        born, known = sample.probe("born"), sample.probes.get("born_known")
        known = torch.ones_like(energy) if known is None else known.double()
        squares = (stress[:, :, None] * stress[:, None, :])[:, *_UPPER]
        symmetric = ((born + born.mT) / 2)[:, *_UPPER]
        parts = [stress, squares, symmetric * known[:, None], stress * energy[:, None]]
        return torch.cat([*parts, torch.stack([known, energy, energy.square()], dim=1)], dim=1)

    def derive(self, means: Tensor, sample: Sample) -> Tensor:
        """The constants `[m]`, GPa."""
        tensor = self.coefficients(means, sample) if self.stress_strain else self.tensor(means, sample)
        return self.symmetry.constants_of(tensor) / GPA

    def deviations(self, columns: Tensor, means: Tensor, log_weights: Tensor) -> Tensor:
        """As of any observable, but the spread of the Born term is that of the frames that have one.

        A frame with weight w_i has the weight v_i = w_i k_i/Σ w k in the mean of the Born term, k_i being 1
        where it is known. The error of that mean has 1 - Σv² where that of all frames has 1 - Σw².
        """
        found = columns - means
        mine = columns[:, _KNOWN] > 0
        left = 1 - 1 / kish_size(log_weights[mine]) if bool(mine.any()) else means.new_zeros(())
        found[:, _BORN] *= ((1 - 1 / kish_size(log_weights)) / left).sqrt()
        return found

    def coefficients(self, means: Tensor, sample: Sample) -> Tensor:
        """Symmetric part of B `[6, 6]`, eV/Å³, otherwise as `tensor`."""
        tensor = to_stress_strain(self.tensor(means, sample), self.stress(means, sample))
        return (tensor + tensor.mT) / 2

    def stress(self, means: Tensor, sample: Sample) -> Tensor:
        """Mean total stress `[3, 3]`, eV/Å³."""
        kinetic = (sample.n_atoms * sample.kt / sample.volumes).mean()
        eye = torch.eye(3, dtype=means.dtype, device=means.device)
        return stress_from_voigt(means[:6] + _typical_stress(sample)) - kinetic * eye

    def tensor(self, means: Tensor, sample: Sample) -> Tensor:
        """The whole tensor C `[6, 6]`, eV/Å³, without symmetry, in the frame of the frames."""
        stress, squares, born, with_energy, rest = means.split([6, _PAIRS, _PAIRS, 6, 3])
        known, energy, square = rest
        volume, n_atoms, kt = sample.volumes.mean(), sample.n_atoms, sample.kt
        constants = isothermal_from_fluctuations(
            from_linear_strain(_full(born / known), stress_from_voigt(stress + _typical_stress(sample))),
            _full(squares) - stress[:, None] * stress[None, :],
            n_atoms,
            sample.temperature,
            volume,
        )
        if not self.adiabatic:
            return constants
        per_kelvin = 1.0 / (kt * sample.temperature)
        eye = torch.eye(3, dtype=means.dtype, device=means.device)
        thermal = stress_from_voigt(with_energy - stress * energy) * per_kelvin - n_atoms * KB / volume * eye
        heat_capacity = (square - energy.square()) * per_kelvin + 1.5 * n_atoms * KB
        return adiabatic(constants, thermal, heat_capacity, sample.temperature, volume)


class FluctuationModuli(FluctuationElasticity):
    """K, G, E (GPa) and ν of a polycrystal by Voigt's average of the coefficients B (Hill 1952)."""

    unit = ""

    def __init__(self, symmetry: Symmetry, *, adiabatic: bool = False) -> None:
        """Choose what to tell, as for `FluctuationElasticity`."""
        super().__init__(symmetry, adiabatic=adiabatic, stress_strain=True)
        self.labels = ("K", "G", "E", "nu")

    def derive(self, means: Tensor, sample: Sample) -> Tensor:
        """K, G, E, ν `[4]`."""
        moduli = voigt_average(self.coefficients(means, sample))
        elastic = [moduli.bulk / GPA, moduli.shear / GPA, moduli.young / GPA]
        return torch.stack([*elastic, moduli.poisson])


class RestStrain(FluctuationElasticity):
    """Strain that would bring a fixed cell to a pressure, to first order: -S^T (σ + P).

    Its diagonal components in the standard axes of the crystal tell the lattice constants at that pressure
    without a run at constant pressure, where the crystal is near it. The second order is not in the errors:
    of titanium 3 GPa away it is 0.03 % of a and 0.1 % of c.
    """

    unit = ""

    def __init__(self, symmetry: Symmetry, pressure: float = 0.0) -> None:
        """Choose a pressure, GPa."""
        super().__init__(symmetry)
        self.pressure, self.labels = pressure, ("xx", "yy", "zz")

    def derive(self, means: Tensor, sample: Sample) -> Tensor:
        """Diagonal components `[3]`."""
        rotations = self.symmetry.rotations.to(means)
        tensor = project(self.tensor(means, sample), rotations)
        eye = torch.eye(3, dtype=means.dtype, device=means.device)
        excess = self.stress(means, sample) + self.pressure * GPA * eye
        # What the symmetry of the crystal forbids is noise.
        stress = (rotations @ excess @ rotations.mT).mean(0)
        mandel = torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, 2.0]).to(means).sqrt()
        strain = -torch.linalg.solve(to_mandel(tensor), mandel * stress_to_voigt(stress)) / mandel
        turn = self.symmetry.to_standard.to(means)
        return (turn @ stress_from_voigt(strain) @ turn.T).diagonal()


def _typical_stress(sample: Sample) -> Tensor:
    """A constant near the mean stress `[6]`, so that variances keep their digits."""
    return stress_to_voigt(sample.probe("stress").detach().mean(0))


def _full(upper: Tensor) -> Tensor:
    """The symmetric matrix `[6, 6]` of its upper triangle."""
    matrix = upper.new_zeros(6, 6)
    matrix = matrix.index_put(_index(upper), upper)
    return matrix + matrix.triu(1).mT


def _index(like: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(i, device=like.device) for i in _UPPER)
