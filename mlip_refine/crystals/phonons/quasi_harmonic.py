"""Quasi-harmonic thermal expansion: the volume at which U(V) + F_vib(V, T) + P V is smallest.

The crystal is at rest under several pressures, so that its shape and its atoms are those of lowest energy
at every volume, not of lowest free energy: the effect of vibrations on the shape is left out. Vinet's
equation of state is fitted to free energies at every temperature (Togo and Tanaka, Scr. Mater. 108, 1, 2015).
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from ase.cell import Cell
from numpy.polynomial import Polynomial
from numpy.typing import NDArray
from phonopy import Phonopy, run_qha
from phonopy.qha.qha import QHAResult
from scipy.interpolate import CubicSpline

from mlip_refine.crystals.elasticity import static_elasticity
from mlip_refine.crystals.phonons.harmonic import DISPLACEMENT, HarmonicCrystal, Method
from mlip_refine.crystals.phonons.thermodynamics import ZERO
from mlip_refine.crystals.relaxation import Rest
from mlip_refine.crystals.symmetry import TOLERANCE, symmetry_dataset
from mlip_refine.errors import InputError, StatisticsError
from mlip_refine.potential import Potential
from mlip_refine.quantities import GPA, KB

type Floats = NDArray[np.float64]

LEAST = 5
"""Fewest volumes: entropies and heat capacities are polynomials of fourth degree in the volume."""

_STEPS, _FINEST, _COARSEST = 200, 1.0, 5.0
"""Number of temperatures at which equations of state are fitted, and limits of their distance, K."""

_FROZEN = 1e-2
"""Heat capacities below this, k_B per atom, are too small to divide by."""

_DEGREE = 3
"""Degree of the polynomials in ln V that give lattice constants."""

_DIGITS = 10
"""Significant digits in files: expansion is small in K⁻¹."""

_SAME = 1e-6
"""Lengths, relative, and angles, degrees, that differ by less in every cell are the same."""

_STIFFENING = 4.0
"""Derivative of the bulk modulus in the pressure, as most crystals have it."""


@dataclass(frozen=True, eq=False)
class CompressedCrystal:
    """A crystal at rest under a pressure, with its energy and its vibrations.

    Attributes:
        crystal: Crystal at rest.
        pressure: Pressure, GPa.
        energy: Energy of its primitive cell without vibrations, eV.
        phonon: Phonopy's object with force constants.
    """

    crystal: HarmonicCrystal
    pressure: float
    energy: float
    phonon: Phonopy


def compressed_crystals(
    potential: Potential,
    crystal: HarmonicCrystal,
    pressures: Sequence[float],
    method: Method = "hessian",
    displacement: float = DISPLACEMENT,
) -> tuple[CompressedCrystal, ...]:
    """Relax a crystal under several pressures, and find its force constants there.

    Args:
        potential: Potential in float64.
        crystal: Crystal to start from.
        pressures: Pressures, GPa; below zero for larger volumes.
        method: Method for the force constants.
        displacement: Displacement of one atom where these are differences of forces, Å.

    Returns:
        The crystals, that under the largest pressure first.

    Raises:
        InputError: The potential is in single precision, or does not know an element.
        MlipRefineError: A crystal does not come to rest, or memory runs out for a single system.
    """
    done: list[CompressedCrystal] = []
    for pressure in sorted(set(pressures), key=abs):
        near = min(done, key=lambda one: abs(one.pressure - pressure)).crystal if done else crystal
        rest = near.at_rest(potential, Rest("cell", pressure))
        energy = float(potential.energies([potential.graphs.from_atoms(rest.primitive)])[0])
        phonon = rest.phonopy(rest.force_constants(potential, method, displacement))
        done.append(CompressedCrystal(rest, pressure, energy, phonon))
    return tuple(sorted(done, key=lambda one: -one.pressure))


def pressures_of_volumes(
    potential: Potential, crystal: HarmonicCrystal, ratios: Sequence[float], pressure: float = 0.0
) -> tuple[float, ...]:
    """Estimate the pressures under which a crystal has some volumes, GPa.

    Murnaghan's P = (B/B')[(V₀/V)^B' - 1] with B' = 4 (Proc. Natl. Acad. Sci. 30, 244, 1944).

    Args:
        potential: Potential in float64.
        crystal: Crystal at rest under the pressure.
        ratios: Volumes over the volume of the crystal.
        pressure: Pressure of the crystal, GPa.

    Raises:
        InputError: The potential is in single precision, or does not know an element.
        StatisticsError: The crystal does not resist pressure.
        MlipRefineError: The crystal does not come to rest.
    """
    elastic = static_elasticity(potential, crystal.primitive, Rest("cell", pressure))
    bulk = float(elastic.bulk_modulus) / GPA
    if bulk <= 0:
        raise StatisticsError(
            f"the crystal does not resist pressure: its bulk modulus is {bulk:.3g} GPa",
            needed="a crystal that is stable under strain",
        )
    return tuple(pressure + bulk / _STIFFENING * (ratio**-_STIFFENING - 1) for ratio in ratios)


def lattice_constants(crystals: Sequence[HarmonicCrystal]) -> dict[str, Floats]:
    """Return the constants of the conventional unit cell of one crystal at several volumes.

    Args:
        crystals: The crystals, whose lattice vectors correspond.

    Returns:
        By name, values of every crystal `[n]`: lengths a, b, c, Å, equal ones only once, and those angles
        alpha, beta, gamma, degrees, that differ among the crystals.
    """
    cells = [one.primitive for one in crystals]
    first = cells[0]
    crystal = (first.cell.array, first.get_scaled_positions(), first.numbers)
    # One setting for all: that of a monoclinic or triclinic cell could change from one volume to the next.
    setting = np.linalg.inv(symmetry_dataset(crystal, TOLERANCE).transformation_matrix).T
    constants = np.array([Cell(setting @ cell.cell.array).cellpar() for cell in cells])
    lengths, angles = constants[:, :3], constants[:, 3:]
    found = {
        name: lengths[:, i]
        for i, name in enumerate("abc")
        if not any(np.allclose(lengths[:, i], lengths[:, j], rtol=_SAME, atol=0) for j in range(i))
    }
    names = enumerate(("alpha", "beta", "gamma"))
    return found | {name: angles[:, i] for i, name in names if np.ptp(angles[:, i]) > _SAME}


@dataclass(frozen=True, eq=False)
class QuasiHarmonicResult:
    """A crystal under one pressure at temperatures.

    Attributes:
        pressure_GPa: Pressure.
        temperatures_K: Temperatures `[n_T]`.
        volume_A3_per_atom: Volumes at the temperatures `[n_T]`.
        expansion_per_K: Volumetric expansion, (1/V) ∂V/∂T `[n_T]`.
        heat_capacity_kB_per_atom: Heat capacity at constant pressure `[n_T]`.
        bulk_modulus_GPa: Isothermal bulk modulus `[n_T]`.
        gibbs_eV_per_atom: Gibbs free energy, U + F_vib + P V `[n_T]`.
        entropy_kB_per_atom: Entropy `[n_T]`.
        gruneisen: Thermodynamic Grüneisen parameter α B_T V/C_V `[n_T]`; NaN where no mode is excited.
        lattice: Constants of the conventional unit cell by name: lengths a, b, c, Å, and angles alpha, beta,
            gamma, degrees, that depend on the volume `[n_T]`; equal lengths only once.
        linear_expansion_per_K: Expansion of those lengths `[n_T]`.
        volumes_A3_per_atom: Volumes of the calculated crystals, ascending `[n_V]`.
        energies_eV_per_atom: Their energies without vibrations `[n_V]`.
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
        """Return plain data for JSON."""
        return {one.name: _plain(getattr(self, one.name)) for one in fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read plain data of `as_json`; `KeyError`, `TypeError` or `ValueError` if it is not of that form."""
        return cls(**{one.name: _read(data[one.name]) for one in fields(cls)})


def quasi_harmonic(
    crystals: Sequence[CompressedCrystal],
    temperatures: Sequence[float],
    mesh: Sequence[int],
    pressure: float = 0.0,
) -> QuasiHarmonicResult:
    """Compute the thermal expansion of a crystal, and the properties that come with it.

    Args:
        crystals: The crystal under five pressures or more.
        temperatures: Temperatures, K, at zero or above.
        mesh: Points along each reciprocal vector. Even numbers are taken as the next odd ones, so that Γ is
            among the points and the mesh is as symmetric as the crystal.
        pressure: Pressure under which the crystal expands, GPa.

    Raises:
        InputError: Fewer than five crystals, or no temperature or one below zero.
        StatisticsError: A crystal has imaginary modes, or the free energy has no minimum between the
            smallest and the largest volume.
    """
    wanted = np.array(sorted(set(temperatures)), dtype=float)
    if not len(wanted) or wanted[0] < 0:
        raise InputError("temperatures must be given, none below zero", found=list(temperatures))
    if len(crystals) < LEAST:
        raise InputError("too few volumes", found=len(crystals), expected=f"at least {LEAST} pressures")
    ordered = sorted(crystals, key=lambda one: one.phonon.primitive.volume)
    points = [n | 1 for n in mesh]
    for one in ordered:
        on_mesh = one.phonon.run_mesh(points)
        q, mode = np.unravel_index(on_mesh.frequencies.argmin(), on_mesh.frequencies.shape)
        lowest = float(on_mesh.frequencies[q, mode])
        if lowest < -ZERO:  # a mode that is counted at some volumes only would bend F_vib(V)
            per_atom = one.phonon.primitive.volume / len(one.phonon.primitive)
            place = ", ".join(f"{x:.3g}" for x in on_mesh.qpoints[q])
            raise StatisticsError(
                f"the crystal under {one.pressure:g} GPa ({per_atom:.4g} Å³ per atom) is unstable: "
                f"{-lowest:.3g}i THz at the wave vector ({place})",
                needed="pressures under which all modes are real; F_vib has no meaning otherwise",
            )
    # From zero to beyond the highest temperature: phonopy takes differences between neighbours.
    step = min(max(wanted[-1] / _STEPS, _FINEST), _COARSEST)
    grid: Floats = step * np.arange(np.ceil(wanted[-1] / step) + 3)
    found = _fitted(ordered, grid, points, pressure)

    def at(values: Floats) -> Floats:
        interpolated: Floats = CubicSpline(found.temperatures, values)(wanted)
        return interpolated

    n = len(ordered[0].phonon.primitive)
    volume, expansion = at(found.equilibrium_volumes), at(found.thermal_expansion)
    bulk, capacity = at(found.bulk_moduli), at(found.heat_capacity_P.heat_capacities)
    stretching = expansion * bulk * volume
    at_constant_volume = capacity - expansion * stretching * wanted
    unknown, known = np.full(len(wanted), np.nan), at_constant_volume > _FROZEN * n * KB
    lattice, rates = _lattice(ordered, volume)
    return QuasiHarmonicResult(
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
        energies_eV_per_atom=np.array([one.energy for one in ordered]) / n,
    )


def _fitted(
    crystals: Sequence[CompressedCrystal], grid: Floats, mesh: Sequence[int], pressure: float
) -> QHAResult:
    """Fit equations of state to the free energies at the temperatures of a grid.

    Temperatures whose minimum is not between the volumes, or was not found by a fit, are refused.
    """
    with warnings.catch_warnings():
        # They are about lattice constants, which are not used, and temperatures, which are checked below.
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
    smallest, largest = float(found.volumes.min()), float(found.volumes.max())
    # Where a fit fails phonopy leaves the temperature out, and one more after the last.
    missing = sorted(set(grid[:-1].tolist()) - set(found.temperatures.tolist()))
    known = list(zip(found.temperatures.tolist(), found.equilibrium_volumes.tolist(), strict=True))
    outside = [(t, v) for t, v in known if not smallest <= v <= largest]
    if missing or outside:
        n = len(crystals[0].phonon.primitive)
        temperature, volume = outside[0] if outside else (missing[0], float("nan"))
        smaller, pressures = volume < smallest, [one.pressure for one in crystals]
        extreme = max(pressures) if smaller else min(pressures)
        raise StatisticsError(
            f"the free energy has no minimum between the volumes {smallest / n:.4g} and {largest / n:.4g} Å³ "
            f"per atom: found {volume / n:.4g} at {temperature:g} K",
            needed=f"pressures {'above' if smaller else 'below'} {extreme:.4g} GPa, or lower temperatures",
        )
    return found


def _lattice(
    crystals: Sequence[CompressedCrystal], volume: Floats
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Return lattice constants at volumes of the primitive cell, and ∂ln x/∂ln V of the lengths."""
    known = np.log([one.phonon.primitive.volume for one in crystals])
    constants, rates = {}, {}
    for name, values in lattice_constants([one.crystal for one in crystals]).items():
        is_length = name in "abc"
        fit = Polynomial.fit(known, np.log(values) if is_length else values, _DEGREE)
        found = fit(np.log(volume))
        constants[name] = np.exp(found) if is_length else found
        if is_length:
            rates[name] = fit.deriv()(np.log(volume))
    return constants, rates


def _plain(value: Any) -> Any:
    """Return numbers, arrays and mappings of them as plain data, rounded; not finite becomes None."""
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, float):
        return value
    return [float(f"{x:.{_DIGITS}g}") if np.isfinite(x) else None for x in value.tolist()]


def _read(value: Any) -> Any:
    """Return what `_plain` was given, with NaN for None."""
    if isinstance(value, Mapping):
        return {name: _read(entry) for name, entry in value.items()}
    return np.array(value, dtype=float) if isinstance(value, list) else float(value)
