"""Elastic constants of a crystal at temperature: from fluctuations of stress, or from strained cells.

Both give the independent constants in the standard axes of the crystal, isothermal unless asked otherwise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from mlip_refine.crystals.moduli import voigt_average
from mlip_refine.crystals.symmetry import INDEPENDENT, SINGULAR, Symmetry
from mlip_refine.crystals.tensors import (
    adiabatic,
    from_linear_strain,
    from_stress_strain,
    isothermal_from_fluctuations,
    project,
    stress_from_voigt,
    stress_to_voigt,
    to_mandel,
    to_stress_strain,
)
from mlip_refine.observables.base import Observable, Sample
from mlip_refine.observables.cell import Stress
from mlip_refine.quantities import GPA, KB
from mlip_refine.statistics import kish_size

_UPPER = tuple(torch.triu_indices(6, 6).tolist())
"""Rows and columns of the upper triangle of a symmetric matrix `[6, 6]`, 21 of each."""


class _Moments(NamedTuple):
    """What `FluctuationElasticity` averages, of every frame or as means: `[..., width]` each.

    Stresses are relative to a typical one, energies to the mean energy.

    Attributes:
        stress: Stress of the configuration in Voigt order, width 6.
        stress_squares: Upper triangle of the products of its components, width 21.
        born: Upper triangle of the Born term, width 21; zero on frames where it was not evaluated.
        stress_energy: Products of stress and energy, width 6.
        born_known: 1 on frames whose Born term was evaluated, else 0, width 1.
        energy: Energy, width 1.
        energy_square: Square of the energy, width 1.
    """

    stress: Tensor
    stress_squares: Tensor
    born: Tensor
    stress_energy: Tensor
    born_known: Tensor
    energy: Tensor
    energy_square: Tensor

    def packed(self) -> Tensor:
        """Return all blocks side by side `[..., 57]`."""
        return torch.cat(self, dim=-1)

    @classmethod
    def unpacked(cls, columns: Tensor) -> Self:
        """Return the blocks of columns or means `[..., 57]`."""
        return cls(*columns.split([6, 21, 21, 6, 1, 1, 1], dim=-1))


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
        """Choose the kind of constants.

        Args:
            symmetry: Symmetry of the ideal crystal, in the frame of the samples.
            adiabatic: Whether to give C^S in place of C^T.
            stress_strain: Whether to give the symmetric part of the stress-strain coefficients B at the mean
                total stress (see `to_stress_strain`) in place of C: what sound and strained cells show.
        """
        self.symmetry, self.adiabatic, self.stress_strain = symmetry, adiabatic, stress_strain
        self.labels = INDEPENDENT[symmetry.laue]

    def columns(self, sample: Sample) -> Tensor:
        """Return moments of stress and energy, and the Born term where it is known `[n, 57]`."""
        sample.require_fixed_cell("elastic constants by fluctuations")
        stress = stress_to_voigt(sample.probe("stress")) - _typical_stress(sample)
        energy = (sample.energy - sample.energy.detach().mean())[:, None]
        born, born_known = sample.probe("born"), sample.mask("born")[:, None]
        return _Moments(
            stress=stress,
            stress_squares=(stress[:, :, None] * stress[:, None, :])[:, *_UPPER],
            born=((born + born.mT) / 2)[:, *_UPPER] * born_known,
            stress_energy=stress * energy,
            born_known=born_known,
            energy=energy,
            energy_square=energy.square(),
        ).packed()

    def derive(self, means: Tensor, sample: Sample) -> Tensor:
        """Return the constants `[m]`, GPa."""
        tensor = self.coefficients(means, sample) if self.stress_strain else self.tensor(means, sample)
        return self.symmetry.constants_of(tensor) / GPA

    def deviations(self, columns: Tensor, means: Tensor, log_weights: Tensor) -> Tensor:
        """Return deviations whose spread of the Born term is that of the frames that have one.

        A frame with weight w_i has the weight v_i = w_i k_i/Σ w k in the mean of the Born term, k_i being 1
        where it is known. The error of that mean has 1 - Σv² where that of all frames has 1 - Σw².
        """
        mine = _Moments.unpacked(columns).born_known[:, 0] > 0
        left = 1 - 1 / kish_size(log_weights[mine]) if bool(mine.any()) else means.new_zeros(())
        scale = ((1 - 1 / kish_size(log_weights)) / left).sqrt()
        found = _Moments.unpacked(columns - means)
        return found._replace(born=found.born * scale, born_known=found.born_known * scale).packed()

    def coefficients(self, means: Tensor, sample: Sample) -> Tensor:
        """Return the symmetric part of B `[6, 6]`, eV/Å³, in the frame of the sample."""
        tensor = to_stress_strain(self.tensor(means, sample), self.stress(means, sample))
        return (tensor + tensor.mT) / 2

    def stress(self, means: Tensor, sample: Sample) -> Tensor:
        """Return the mean total stress `[3, 3]`, eV/Å³."""
        kinetic = (sample.n_atoms * sample.kt / sample.volumes).mean()
        eye = torch.eye(3, dtype=means.dtype, device=means.device)
        return stress_from_voigt(_Moments.unpacked(means).stress + _typical_stress(sample)) - kinetic * eye

    def tensor(self, means: Tensor, sample: Sample) -> Tensor:
        """Return the whole tensor C `[6, 6]`, eV/Å³, without symmetry, in the frame of the sample."""
        m = _Moments.unpacked(means)
        volume, n_atoms, kt = sample.volumes.mean(), sample.n_atoms, sample.kt
        constants = isothermal_from_fluctuations(
            from_linear_strain(
                _symmetric(m.born / m.born_known), stress_from_voigt(m.stress + _typical_stress(sample))
            ),
            _symmetric(m.stress_squares) - m.stress[:, None] * m.stress[None, :],
            n_atoms,
            sample.temperature,
            volume,
        )
        if not self.adiabatic:
            return constants
        per_kelvin = 1.0 / (kt * sample.temperature)
        eye = torch.eye(3, dtype=means.dtype, device=means.device)
        stress_energy = stress_from_voigt(m.stress_energy - m.stress * m.energy)
        thermal_stress = stress_energy * per_kelvin - n_atoms * KB / volume * eye
        heat_capacity = (m.energy_square - m.energy.square())[0] * per_kelvin + 1.5 * n_atoms * KB
        return adiabatic(constants, thermal_stress, heat_capacity, sample.temperature, volume)


class FluctuationModuli(FluctuationElasticity):
    """K, G, E (GPa) and ν of a polycrystal by Voigt's average of the coefficients B (Hill 1952)."""

    unit = ""

    def __init__(self, symmetry: Symmetry, *, adiabatic: bool = False) -> None:
        """Choose the kind of constants, as for `FluctuationElasticity`."""
        super().__init__(symmetry, adiabatic=adiabatic, stress_strain=True)
        self.labels = ("K", "G", "E", "nu")

    def derive(self, means: Tensor, sample: Sample) -> Tensor:
        """Return K, G, E, ν `[4]`."""
        moduli = voigt_average(self.coefficients(means, sample))
        elastic = [moduli.bulk / GPA, moduli.shear / GPA, moduli.young / GPA]
        return torch.stack([*elastic, moduli.poisson])


class RestStrain(FluctuationElasticity):
    """Strain that would bring a fixed cell to a pressure, to first order: -S^T (σ + P).

    Its diagonal components in the standard axes of the crystal give the lattice constants at that pressure
    without a run at constant pressure, where the crystal is near it. The second order is not in the errors:
    of titanium 3 GPa away it is 0.03 % of a and 0.1 % of c.
    """

    unit = ""

    def __init__(self, symmetry: Symmetry, pressure: float = 0.0) -> None:
        """Choose a pressure, GPa."""
        super().__init__(symmetry)
        self.pressure, self.labels = pressure, ("xx", "yy", "zz")

    def derive(self, means: Tensor, sample: Sample) -> Tensor:
        """Return the diagonal components `[3]`."""
        rotations = self.symmetry.rotations.to(means)
        tensor = project(self.tensor(means, sample), rotations)
        eye = torch.eye(3, dtype=means.dtype, device=means.device)
        excess = self.stress(means, sample) + self.pressure * GPA * eye
        # Components that the symmetry of the crystal forbids are noise.
        stress = (rotations @ excess @ rotations.mT).mean(0)
        mandel = torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, 2.0]).to(means).sqrt()
        strain = -torch.linalg.solve(to_mandel(tensor), mandel * stress_to_voigt(stress)) / mandel
        turn = self.symmetry.to_standard.to(means)
        return (turn @ stress_from_voigt(strain) @ turn.T).diagonal()


def _typical_stress(sample: Sample) -> Tensor:
    """Return a constant near the mean stress `[6]`, so that variances keep their digits."""
    return stress_to_voigt(sample.probe("stress").detach().mean(0))


def _symmetric(upper: Tensor) -> Tensor:
    """Return the symmetric matrix `[6, 6]` of its upper triangle `[21]`."""
    index = tuple(torch.tensor(i, device=upper.device) for i in _UPPER)
    matrix = upper.new_zeros(6, 6).index_put(index, upper)
    return matrix + matrix.triu(1).mT


@dataclass(frozen=True)
class Deformation:
    """Strains that determine every independent constant of a crystal.

    Attributes:
        symmetry: Symmetry of the crystal.
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
        # The basis tensor of a constant has 1 in it and 0 in the others.
        invariant = symmetry.invariants()
        values = torch.stack([torch.stack(list(symmetry.independent(t).values())) for t in invariant])
        basis = torch.einsum("mk,kij->mij", torch.linalg.pinv(values, rtol=SINGULAR), invariant)
        chosen: list[int] = []
        rank = 0
        for direction in range(6):
            columns = basis[:, :, [*chosen, direction]].reshape(len(basis), -1)
            with_it = int(torch.linalg.matrix_rank(columns, rtol=SINGULAR))
            if with_it > rank:
                chosen.append(direction)
                rank = with_it
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
    """Return the independent constants C, or B, from the mean total stress of a cell and its strained ones.

    B_ijkl = dσ_ij/dε_kl by central differences, C from B at the stress of the cell, and the constants by
    least squares over all components. Central differences miss a term of third order, the strain squared
    times fourth derivatives: of titanium at 923 K and strains of 1.5 % about 1 % of C11, at 0.75 % a quarter
    of that. Statistical errors do not include it.

    Args:
        deformation: The strains.
        stress: Total stress of the cell itself and of every strained one `[1 + 2 n_directions, 6]`, in any
            unit. The mean over both signs would be off by the second order of the strain.
        stress_strain: Whether to give the symmetric part of the stress-strain coefficients B in place of C.

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
    constants: Tensor = torch.linalg.pinv(design) @ (columns + terms).reshape(-1)
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
        """Return the six components of every frame `[n, 6]`."""
        return Stress().columns(sample)

    def derive(self, means: Tensor, sample: Sample) -> Tensor:  # noqa: ARG002 - as of any observable
        """Return the combinations `[m]`."""
        return self.slopes @ means


type Errors = Callable[[Observable], Sequence[float]]
"""Function that returns the standard errors of an observable on the frames of one cell."""


def errors_of_stresses(
    function: Callable[[Tensor], Tensor], stress: Tensor, cells: Sequence[Errors]
) -> list[float]:
    """Return standard errors of a function of the mean stresses of independent cells.

    The contribution of a cell is the error of the series of its own combination of components: xx, yy and zz
    of one cell are anything but independent.

    Args:
        function: Differentiable function of stresses `[n_cells, 6]`, GPa, that gives `[m]`.
        stress: Total mean stresses `[n_cells, 6]`, GPa.
        cells: Standard errors on the frames of each cell.
    """
    slopes = torch.autograd.functional.jacobian(function, stress.detach())
    errors = [list(of(_Combinations(slopes[:, i]))) for i, of in enumerate(cells)]
    found: list[float] = torch.tensor(errors, dtype=torch.float64).norm(dim=0).tolist()
    return found
