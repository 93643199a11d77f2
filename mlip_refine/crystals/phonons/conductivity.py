"""Lattice thermal conductivity from force constants of second and third order, by phono3py.

Phonons carry heat until they scatter with two others: κ = Σ C v ⊗ v τ / (N V), with the lifetime τ = 1/(2 Γ)
from Fermi's golden rule, Γ an angular rate (Togo, Chaput and Tanaka, Phys. Rev. B 91, 094306, 2015). Force
constants are those of supercells, as everywhere here: without a non-analytical correction.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from phonopy.structure.atoms import PhonopyAtoms
from torch import Tensor

from mlip_refine.crystals.phonons.harmonic import HarmonicCrystal
from mlip_refine.crystals.tensors import stress_from_voigt
from mlip_refine.errors import InputError, MlipRefineError

type Reals = NDArray[np.float64]

INTERACTION = {
    "symmetrize_tetrahedra": True,
    "average_degenerate_weights": True,
    "exclude_gamma_acoustic": True,
}
"""Settings of phono3py's mesh: nothing that depends on the orientation of the crystal, on which vectors
span degenerate modes, or on rounding at Γ. On 4 × 4 × 4 points those change κ of NaCl by 3 %."""

_NEAR = 1e-3
"""Largest distance between the places of one atom in two descriptions of a crystal, Å."""


@dataclass(frozen=True)
class ConductivitySettings:
    """Settings of a calculation of the conductivity.

    Attributes:
        temperatures: Temperatures, K.
        mesh: Points along each reciprocal vector; or a length, Å, that sets the density of the mesh.
        isotopes: Whether the natural mixture of isotopes scatters, too (Tamura, Phys. Rev. B 27, 858, 1983).
        lowest_frequency: Frequency, THz, below which a mode is imaginary and the crystal not stable.
            Acoustic modes near Γ may be a little below zero by rounding.
    """

    temperatures: Sequence[float] = (300.0,)
    mesh: tuple[int, int, int] | float = 100.0
    isotopes: bool = False
    lowest_frequency: float = -0.1


@dataclass(frozen=True, eq=False)
class ConductingModes:
    """Contributions of every mode, at wave vectors that differ by symmetry.

    Attributes:
        points: Wave vectors `[n_q, 3]`, in the reciprocal lattice.
        weights: Shares of the mesh that the wave vectors stand for `[n_q]`.
        frequencies: Frequencies `[n_q, n_modes]`, THz.
        velocities: Group velocities `[n_q, n_modes, 3]`, km/s.
        lifetimes: Lifetimes τ `[n_temperatures, n_q, n_modes]`, ps; infinite where nothing scatters.
        heat_capacities: Heat capacities `[n_temperatures, n_q, n_modes]`, eV/K.
        conductivities: Contributions to κ `[n_temperatures, n_q, n_modes, 3, 3]`, W/(m K), of all equivalent
            wave vectors together.
    """

    points: Reals
    weights: Reals
    frequencies: Reals
    velocities: Reals
    lifetimes: Reals
    heat_capacities: Reals
    conductivities: Reals


@dataclass(frozen=True, eq=False)
class ThermalConductivity:
    """Lattice thermal conductivity in the relaxation-time approximation.

    Attributes:
        temperatures: Temperatures `[n_temperatures]`, K.
        kappa: Conductivity tensors `[n_temperatures, 3, 3]`, W/(m K).
        mesh: Points along each reciprocal vector.
        isotopes: Whether isotopes scatter.
        modes: Contributions of every mode.
    """

    temperatures: Reals
    kappa: Reals
    mesh: tuple[int, int, int]
    isotopes: bool
    modes: ConductingModes = field(repr=False)

    @property
    def mean(self) -> Reals:
        """Mean over directions `[n_temperatures]`, W/(m K): that of a polycrystal without texture."""
        return np.asarray(np.trace(self.kappa, axis1=1, axis2=2) / 3)


def thermal_conductivity(
    crystal: HarmonicCrystal,
    second: Tensor,
    third: Tensor,
    settings: ConductivitySettings | None = None,
    *,
    harmonic: HarmonicCrystal | None = None,
) -> ThermalConductivity:
    """Compute the lattice thermal conductivity of a crystal.

    Args:
        crystal: Crystal of the third-order constants.
        second: Force constants `[n_prim, N, 3, 3]`, eV/Å².
        third: Third-order force constants `[n_prim, N, N, 3, 3, 3]`, eV/Å³.
        settings: Mesh and temperatures.
        harmonic: Crystal of `second`, if that has another supercell of the same primitive cell, such as a
            larger one.

    Raises:
        InputError: phono3py is missing; or the crystals are not the same.
        MlipRefineError: The crystal is not stable.
    """
    chosen = settings or ConductivitySettings()
    harmonic = harmonic or crystal
    primitive = crystal.primitive
    # Its supercells have an order of atoms of their own.
    phono3py: Any = require_phono3py().Phono3py(
        PhonopyAtoms(
            symbols=primitive.get_chemical_symbols(),
            cell=primitive.cell.array,
            positions=primitive.positions,
            masses=primitive.get_masses(),
        ),
        supercell_matrix=_supercell_matrix(crystal),
        primitive_matrix=np.eye(3),
        phonon_supercell_matrix=_supercell_matrix(harmonic),
        symprec=crystal.symprec,
    )
    homes, seen = _order(harmonic, phono3py.phonon_supercell, phono3py.phonon_primitive)
    phono3py.fc2 = np.ascontiguousarray(second.numpy()[homes[:, None], seen])
    homes, seen = _order(crystal, phono3py.supercell, phono3py.primitive)
    constants = third.numpy()[homes[:, None, None], seen[:, :, None], seen[:, None, :]]
    phono3py.fc3 = np.ascontiguousarray(constants)
    phono3py.mesh_numbers = chosen.mesh
    phono3py.init_phph_interaction(**INTERACTION)
    phono3py.run_phonon_solver()
    lowest = phono3py.get_phonon_data()[0].min()
    if not lowest > chosen.lowest_frequency:
        raise MlipRefineError(
            f"the crystal is not stable: its lowest frequency is {lowest:.3g} THz, and imaginary "
            "modes conduct no heat. Let it come to rest first, or take a larger supercell"
        )
    phono3py.run_thermal_conductivity(
        temperatures=np.asarray(chosen.temperatures, dtype=np.float64), is_isotope=chosen.isotopes
    )
    return _result(phono3py.thermal_conductivity, chosen.isotopes)


def require_phono3py() -> ModuleType:
    """Import phono3py, which comes with an extra of this package.

    Raises:
        InputError: It is missing.
    """
    try:
        return import_module("phono3py")
    except ImportError:
        raise InputError(
            "thermal conductivity needs phono3py",
            fix="Install it: pip install 'mlip-refine[conductivity]'.",
        ) from None


def _supercell_matrix(crystal: HarmonicCrystal) -> NDArray[np.int64]:
    """Return the lattice vectors of the supercell as columns, in those of the primitive cell `[3, 3]`."""
    return np.rint(np.linalg.inv(crystal.primitive_matrix)).astype(np.int64)


def _order(
    crystal: HarmonicCrystal, supercell: Any, primitive: Any
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return how compact force constants are put in the order of phono3py's atoms.

    Args:
        crystal: Crystal of the constants.
        supercell: The same supercell by phono3py.
        primitive: The same primitive cell by phono3py.

    Returns:
        Rows of the constants `[n_prim]`, and the atoms in each `[n_prim, N]`.

    Raises:
        InputError: They are not the same crystal.
    """
    own = crystal.supercell
    same = len(own) == len(supercell) and np.abs(own.cell.array - supercell.cell).max() < _NEAR
    if same:
        difference = supercell.scaled_positions[:, None] - own.get_scaled_positions()
        distance = np.linalg.norm((difference - np.rint(difference)) @ own.cell.array, axis=-1)
        order: NDArray[np.int64] = distance.argmin(axis=1)
        same = bool(distance.min(axis=1).max() < _NEAR and (own.numbers[order] == supercell.numbers).all())
    if not same:
        raise InputError(
            "force constants of second and third order are of different crystals",
            expected="supercells of the same primitive cell",
            fix="Move one to the cell of the other: harmonic = harmonic.moved(crystal.primitive).",
        )
    translations = crystal.translations
    atoms = order[list(primitive.p2s_map)]
    back = translations.inverse.numpy()[translations.translation_index.numpy()[atoms]]
    return translations.primitive_index.numpy()[atoms], back[:, order]


def _result(found: Any, isotopes: bool) -> ThermalConductivity:
    """Return phono3py's conductivity in our units and axes."""

    def tensors(components: Reals) -> Reals:
        """Return symmetric tensors `[..., 3, 3]` from components in Voigt order `[..., 6]`."""
        return stress_from_voigt(torch.from_numpy(components)).numpy()

    mesh = found.mesh_numbers
    weights = found.grid_weights / np.prod(mesh)
    linewidths = found.gamma[0] + (found.gamma_isotope[0] if isotopes else 0.0)
    with np.errstate(divide="ignore"):
        # Γ is half a width in THz, of the frequency and not the angular one.
        lifetimes = 1 / (4 * np.pi * linewidths)
    modes = ConductingModes(
        points=found.qpoints,
        weights=weights,
        frequencies=found.frequencies,
        velocities=found.group_velocities / 10,
        lifetimes=lifetimes,
        heat_capacities=found.mode_heat_capacities,
        conductivities=tensors(found.mode_kappa[0]) / np.prod(mesh),
    )
    kappa = tensors(found.kappa[0])
    return ThermalConductivity(np.array(found.temperatures), kappa, tuple(mesh.tolist()), isotopes, modes)
