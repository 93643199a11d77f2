"""Lattice thermal conductivity from force constants of second and third order, by phono3py.

Phonons carry heat for as long as scattering among three of them lets them live: κ = Σ C v ⊗ v τ / (N V), with
τ = 1/(2 Γ) from Fermi's golden rule, Γ an angular rate (Togo, Chaput and Tanaka, Phys. Rev. B 91, 094306,
2015). Force constants are those of supercells, as everywhere here: without a non-analytical correction.
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
"""What phono3py does with its mesh: nothing that depends on the orientation of the crystal, on which vectors
span degenerate modes, or on rounding at Γ. On 4 × 4 × 4 points those change κ of NaCl by 3 %."""

_NEAR = 1e-3
"""Places of one atom in two descriptions of a crystal are nearer than this, Å."""


@dataclass(frozen=True)
class ConductivitySettings:
    """How heat is conducted.

    Attributes:
        temperatures: K.
        mesh: Points along each reciprocal vector; or the length, Å, of which a mesh has that density.
        isotopes: Whether the natural mixture of isotopes scatters, too (Tamura, Phys. Rev. B 27, 858, 1983).
        lowest_frequency: A mode below this, THz, is imaginary: the crystal is not stable. Above it acoustic
            modes near Γ may be zero by rounding.
    """

    temperatures: Sequence[float] = (300.0,)
    mesh: tuple[int, int, int] | float = 100.0
    isotopes: bool = False
    lowest_frequency: float = -0.1


@dataclass(frozen=True, eq=False)
class ConductingModes:
    """What every mode contributes, at wave vectors that differ by symmetry.

    Attributes:
        points: Wave vectors `[n_q, 3]`, in the reciprocal lattice.
        weights: Their shares of the mesh `[n_q]`.
        frequencies: `[n_q, n_modes]`, THz.
        velocities: Group velocities `[n_q, n_modes, 3]`, km/s.
        lifetimes: τ `[n_temperatures, n_q, n_modes]`, ps; infinite where nothing scatters.
        heat_capacities: `[n_temperatures, n_q, n_modes]`, eV/K.
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
        temperatures: `[n_temperatures]`, K.
        kappa: `[n_temperatures, 3, 3]`, W/(m K).
        mesh: Points along each reciprocal vector.
        isotopes: Whether isotopes scatter.
        modes: What every mode contributes.
    """

    temperatures: Reals
    kappa: Reals
    mesh: tuple[int, int, int]
    isotopes: bool
    modes: ConductingModes = field(repr=False)

    @property
    def mean(self) -> Reals:
        """A third of the trace `[n_temperatures]`, W/(m K): of a polycrystal with grains of any direction."""
        return np.asarray(np.trace(self.kappa, axis1=1, axis2=2) / 3)


def thermal_conductivity(
    crystal: HarmonicCrystal,
    second: Tensor,
    third: Tensor,
    settings: ConductivitySettings | None = None,
    *,
    harmonic: HarmonicCrystal | None = None,
) -> ThermalConductivity:
    """Find the lattice thermal conductivity of a crystal.

    Args:
        crystal: The crystal of the third-order constants.
        second: Force constants `[n_prim, N, 3, 3]`, eV/Å².
        third: Third-order force constants `[n_prim, N, N, 3, 3, 3]`, eV/Å³.
        settings: Mesh and temperatures.
        harmonic: The crystal of `second`, if that is of another supercell of the same primitive cell, such as
            a larger one.

    Raises:
        InputError: phono3py is missing; or the crystals are not the same.
        MlipRefineError: The crystal is not stable.
    """
    chosen = settings or ConductivitySettings()
    phono3py = require_phono3py()
    pairs = _phono3py(phono3py, crystal, harmonic or crystal)
    pairs.fc2 = _second(harmonic or crystal, second, pairs.phonon_supercell, pairs.phonon_primitive)
    pairs.fc3 = _third(crystal, third, pairs.supercell, pairs.primitive)
    pairs.mesh_numbers = chosen.mesh
    pairs.init_phph_interaction(**INTERACTION)
    pairs.run_phonon_solver()
    _require_stable(pairs.get_phonon_data()[0], chosen.lowest_frequency)
    pairs.run_thermal_conductivity(
        temperatures=np.asarray(chosen.temperatures, dtype=np.float64), is_isotope=chosen.isotopes
    )
    return _result(pairs.thermal_conductivity, chosen.isotopes)


def require_phono3py() -> ModuleType:
    """Phono3py, which comes with an extra of this package.

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


def _phono3py(phono3py: ModuleType, crystal: HarmonicCrystal, harmonic: HarmonicCrystal) -> Any:
    """phono3py's object for one primitive cell and two supercells, which have an order of their own."""
    primitive = crystal.primitive
    cell = PhonopyAtoms(
        symbols=primitive.get_chemical_symbols(),
        cell=primitive.cell.array,
        positions=primitive.positions,
        masses=primitive.get_masses(),
    )
    return phono3py.Phono3py(
        cell,
        supercell_matrix=_multiples(crystal),
        primitive_matrix=np.eye(3),
        phonon_supercell_matrix=_multiples(harmonic),
        symprec=crystal.symprec,
    )


def _multiples(crystal: HarmonicCrystal) -> NDArray[np.int64]:
    """Lattice vectors of the supercell as columns, in those of the primitive cell `[3, 3]`."""
    return np.rint(np.linalg.inv(crystal.primitive_matrix)).astype(np.int64)


def _second(crystal: HarmonicCrystal, constants: Tensor, supercell: Any, primitive: Any) -> Reals:
    """Force constants in phono3py's order of atoms."""
    order = _order(crystal, supercell)
    homes, seen = _rows(crystal, order, primitive.p2s_map)
    return np.ascontiguousarray(constants.numpy()[homes[:, None], seen])


def _third(crystal: HarmonicCrystal, constants: Tensor, supercell: Any, primitive: Any) -> Reals:
    """Third-order force constants in phono3py's order of atoms."""
    order = _order(crystal, supercell)
    homes, seen = _rows(crystal, order, primitive.p2s_map)
    rows = constants.numpy()[homes[:, None, None], seen[:, :, None], seen[:, None, :]]
    return np.ascontiguousarray(rows)


def _rows(
    crystal: HarmonicCrystal, order: NDArray[np.int64], first: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which rows of compact constants `[n_prim]`, and which atoms in them `[n_prim, N]`, in another order."""
    translations = crystal.translations
    atoms = order[list(first)]
    back = translations.inverse.numpy()[translations.translation_index.numpy()[atoms]]
    return translations.primitive_index.numpy()[atoms], back[:, order]


def _order(crystal: HarmonicCrystal, supercell: Any) -> NDArray[np.int64]:
    """Which atom of the crystal every atom of a supercell of phono3py's is `[N]`.

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
    return order


def _require_stable(frequencies: Reals, lowest: float) -> None:
    if not frequencies.min() > lowest:
        raise MlipRefineError(
            f"the crystal is not stable: its lowest frequency is {frequencies.min():.3g} THz, and imaginary "
            "modes conduct no heat. Let it come to rest first, or take a larger supercell"
        )


def _result(found: Any, isotopes: bool) -> ThermalConductivity:
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
        conductivities=_tensors(found.mode_kappa[0]) / np.prod(mesh),
    )
    kappa = _tensors(found.kappa[0])
    return ThermalConductivity(np.array(found.temperatures), kappa, tuple(mesh.tolist()), isotopes, modes)


def _tensors(components: Reals) -> Reals:
    """Symmetric tensors `[..., 3, 3]` from xx, yy, zz, yz, xz, xy `[..., 6]`."""
    return stress_from_voigt(torch.from_numpy(components)).numpy()
