"""Quasi-harmonic thermal expansion: the volume where U(V) + F_vib(V, T) + P V is smallest.

The crystal is at rest under several pressures, so that its shape and its atoms are those of lowest energy
at every volume, not of lowest free energy: what vibrations do to the shape at a volume is left out. Vinet's
equation of state is fitted to free energies at every temperature (Togo and Tanaka, Scr. Mater. 108, 1, 2015).
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.polynomial import Polynomial
from numpy.typing import NDArray
from phonopy import run_qha
from phonopy.qha.qha import QHAResult
from scipy.interpolate import CubicSpline

from mlip_refine.crystals.phonons.pressed_crystals import PressedCrystal, lattice_constants
from mlip_refine.crystals.phonons.thermodynamics import ZERO
from mlip_refine.errors import InputError, StatisticsError
from mlip_refine.quantities import GPA, KB

type Floats = NDArray[np.float64]

LEAST = 5
"""Volumes: entropies and heat capacities are polynomials of fourth degree in the volume."""

_STEPS, _FINEST, _COARSEST = 200, 1.0, 5.0
"""Temperatures at which equations of state are fitted: how many, and their distance in K."""

_FROZEN = 1e-2
"""Heat capacities below this, k_B per atom, are too small to divide by."""

_DEGREE = 3
"""Of polynomials in ln V that give lattice constants."""

_DIGITS = 10
"""In files, all told: expansion is small in K⁻¹."""


@dataclass(frozen=True, eq=False)
class QuasiHarmonic:
    """A crystal under one pressure at temperatures.

    Attributes:
        pressure_GPa: Pressure.
        temperatures_K: `[n_T]`.
        volume_A3_per_atom: `[n_T]`.
        expansion_per_K: Volumetric, (1/V) ∂V/∂T `[n_T]`.
        heat_capacity_kB_per_atom: At constant pressure `[n_T]`.
        bulk_modulus_GPa: Isothermal `[n_T]`.
        gibbs_eV_per_atom: U + F_vib + P V `[n_T]`.
        entropy_kB_per_atom: `[n_T]`.
        gruneisen: Thermodynamic α B_T V/C_V `[n_T]`; NaN where no mode is excited.
        lattice: Constants of the conventional unit cell by name: lengths a, b, c, Å, and angles alpha, beta,
            gamma, degrees, that depend on the volume `[n_T]`; equal lengths only once.
        linear_expansion_per_K: Of those lengths `[n_T]`.
        volumes_A3_per_atom: Those that were calculated, ascending `[n_V]`.
        energies_eV_per_atom: Without vibrations, there `[n_V]`.
    """

    pressure_GPa: float  # noqa: N815 - the unit's own case
    temperatures_K: Floats  # noqa: N815 - the unit's own case
    volume_A3_per_atom: Floats  # noqa: N815 - the unit's own case
    expansion_per_K: Floats  # noqa: N815 - the unit's own case
    heat_capacity_kB_per_atom: Floats  # noqa: N815 - the unit's own case
    bulk_modulus_GPa: Floats  # noqa: N815 - the unit's own case
    gibbs_eV_per_atom: Floats  # noqa: N815 - the unit's own case
    entropy_kB_per_atom: Floats  # noqa: N815 - the unit's own case
    gruneisen: Floats
    lattice: Mapping[str, Floats]
    linear_expansion_per_K: Mapping[str, Floats]  # noqa: N815 - the unit's own case
    volumes_A3_per_atom: Floats  # noqa: N815 - the unit's own case
    energies_eV_per_atom: Floats  # noqa: N815 - the unit's own case

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {one.name: _plain(getattr(self, one.name)) for one in fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read plain data; `KeyError`, `TypeError` or `ValueError` if it is not this."""
        return cls(**{one.name: _read(data[one.name]) for one in fields(cls)})


def quasi_harmonic(
    crystals: Sequence[PressedCrystal],
    temperatures: Sequence[float],
    mesh: Sequence[int],
    pressure: float = 0.0,
) -> QuasiHarmonic:
    """Thermal expansion, and what goes with it, of a crystal.

    Args:
        crystals: Under five pressures or more.
        temperatures: K, at zero or above.
        mesh: Points along each reciprocal vector. Even numbers are taken as the next odd ones, so that Γ is
            among the points and the mesh is as symmetric as the crystal.
        pressure: Under which the crystal expands, GPa.

    Raises:
        InputError: Fewer than five crystals, or no temperature or one below zero.
        StatisticsError: A crystal has imaginary modes, or the free energy has no minimum between the
            smallest and the largest volume.
    """
    wanted = np.array(sorted(set(temperatures)), dtype=float)
    if not len(wanted) or wanted[0] < 0:
        raise InputError("no such temperatures", found=list(temperatures), expected="some, none below zero")
    if len(crystals) < LEAST:
        raise InputError("too few volumes", found=len(crystals), expected=f"at least {LEAST} pressures")
    ordered = sorted(crystals, key=lambda one: one.phonon.primitive.volume)
    points = [n | 1 for n in mesh]
    for one in ordered:
        _require_stable(one, points)
    grid = _temperatures(wanted[-1])
    return _results(ordered, wanted, _fitted(ordered, grid, points, pressure), pressure)


def _fitted(
    crystals: Sequence[PressedCrystal], grid: Floats, mesh: Sequence[int], pressure: float
) -> QHAResult:
    with warnings.catch_warnings():
        # Phonopy's own lattice constants are of the supercell, and what it leaves out is found below.
        warnings.simplefilter("ignore", UserWarning)
        try:
            found = run_qha(
                [one.phonon for one in crystals],
                grid,
                internal_energies=[one.energy for one in crystals],
                mesh=list(mesh),
                pressure=pressure,
                exclude_gamma_acoustic=True,
            )
        except RuntimeError as error:
            problem = f"no equation of state can be fitted to the free energies: {error}"
            raise StatisticsError(problem, needed="other pressures") from error
    _require_inside(crystals, found, grid)
    return found


def _results(
    crystals: Sequence[PressedCrystal], wanted: Floats, found: QHAResult, pressure: float
) -> QuasiHarmonic:
    n = len(crystals[0].phonon.primitive)

    def at(values: Floats) -> Floats:
        interpolated: Floats = CubicSpline(found.temperatures, values)(wanted)
        return interpolated

    volume, expansion = at(found.equilibrium_volumes), at(found.thermal_expansion)
    bulk, capacity = at(found.bulk_moduli), at(found.heat_capacity_P.heat_capacities)
    stretching = expansion * bulk * volume
    at_constant_volume = capacity - expansion * stretching * wanted
    unknown, known = np.full(len(wanted), np.nan), at_constant_volume > _FROZEN * n * KB
    lattice, rates = _lattice(crystals, volume)
    return QuasiHarmonic(
        pressure_GPa=pressure,
        temperatures_K=wanted,
        volume_A3_per_atom=volume / n,
        expansion_per_K=expansion,
        heat_capacity_kB_per_atom=capacity / KB / n,
        bulk_modulus_GPa=bulk / GPA,
        gibbs_eV_per_atom=at(found.gibbs_free_energies) / n,
        entropy_kB_per_atom=at(found.entropy_temperature) / KB / n,
        gruneisen=np.divide(stretching, at_constant_volume, out=unknown, where=known),
        lattice=lattice,
        linear_expansion_per_K={name: rate * expansion for name, rate in rates.items()},
        volumes_A3_per_atom=found.volumes / n,
        energies_eV_per_atom=np.array([one.energy for one in crystals]) / n,
    )


def _temperatures(highest: float) -> Floats:
    """From zero to beyond the highest one: phonopy takes differences between neighbours."""
    step = min(max(highest / _STEPS, _FINEST), _COARSEST)
    grid: Floats = step * np.arange(np.ceil(highest / step) + 3)
    return grid


def _lattice(
    crystals: Sequence[PressedCrystal], volume: Floats
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Lattice constants at volumes of the primitive cell, and ∂ln x/∂ln V of the lengths among them."""
    known = np.log([one.phonon.primitive.volume for one in crystals])
    constants, rates = {}, {}
    for name, values in lattice_constants([one.crystal for one in crystals]).items():
        is_length = name in "abc"
        course = Polynomial.fit(known, np.log(values) if is_length else values, _DEGREE)
        found = course(np.log(volume))
        constants[name] = np.exp(found) if is_length else found
        if is_length:
            rates[name] = course.deriv()(np.log(volume))
    return constants, rates


def _require_stable(one: PressedCrystal, mesh: Sequence[int]) -> None:
    found = one.phonon.run_mesh(list(mesh))
    q, mode = np.unravel_index(found.frequencies.argmin(), found.frequencies.shape)
    lowest = float(found.frequencies[q, mode])
    if lowest < -ZERO:  # a mode that counts at some volumes alone would bend F_vib(V)
        volume = one.phonon.primitive.volume / len(one.phonon.primitive)
        point = ", ".join(f"{x:.3g}" for x in found.qpoints[q])
        raise StatisticsError(
            f"the crystal under {one.pressure:g} GPa ({volume:.4g} Å³ per atom) is unstable: "
            f"{-lowest:.3g}i THz at the wave vector ({point})",
            needed="pressures under which all modes are real; F_vib has no meaning otherwise",
        )


def _require_inside(crystals: Sequence[PressedCrystal], found: QHAResult, grid: Floats) -> None:
    """Refuse a minimum that is not between the volumes, or that no fit has found."""
    smallest, largest = float(found.volumes.min()), float(found.volumes.max())
    n = len(crystals[0].phonon.primitive)
    # Where a fit fails phonopy leaves the temperature out, and one more after the last.
    missing = sorted(set(grid[:-1].tolist()) - set(found.temperatures.tolist()))
    known = list(zip(found.temperatures.tolist(), found.equilibrium_volumes.tolist(), strict=True))
    outside = [(t, v) for t, v in known if not smallest <= v <= largest]
    if not missing and not outside:
        return
    smaller = bool(outside) and outside[0][1] < smallest
    pressures = [one.pressure for one in crystals]
    temperature, volume = outside[0] if outside else (missing[0], float("nan"))
    extreme = max(pressures) if smaller else min(pressures)
    raise StatisticsError(
        f"the free energy has no minimum between the volumes {smallest / n:.4g} and {largest / n:.4g} Å³ per "
        f"atom: found {volume / n:.4g} at {temperature:g} K",
        needed=f"pressures {'above' if smaller else 'below'} {extreme:.4g} GPa, or lower temperatures",
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, float):
        return value
    return [float(f"{x:.{_DIGITS}g}") if np.isfinite(x) else None for x in value.tolist()]


def _read(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _read(entry) for name, entry in value.items()}
    return np.array(value, dtype=float) if isinstance(value, list) else float(value)
