"""Mode Grüneisen parameters γ = -∂ln ω/∂ln V from force constants at three volumes.

The cells of the outer volumes are at rest under a little more and a little less pressure, so that the shape
of the cell and the atoms in it follow the volume as they do in an experiment, in crystals of any symmetry.
Then α V B_T = Σγ C_V over modes is the expansion of the volume, whatever the shape does; with cells that
are only scaled it would be so in cubic crystals alone.

The change of ω² of a mode is v†ΔD v, where modes of one frequency are first told apart by ΔD, as phonopy has
it (Togo, J. Phys. Soc. Jpn. 92, 012001, 2023).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from phonopy import Phonopy, PhonopyGruneisen

from mlip_refine.crystals.phonons.harmonic import HarmonicCrystal
from mlip_refine.crystals.phonons.quasi_harmonic import pressures_of_volumes
from mlip_refine.crystals.phonons.thermodynamics import ZERO
from mlip_refine.crystals.relaxation import Rest
from mlip_refine.errors import InputError, StatisticsError
from mlip_refine.potential import Potential
from mlip_refine.quantities import HBAR, IMAGINARY, KB

type Floats = NDArray[np.float64]

CHANGE = 0.01
"""Difference of the outer volumes over the volume: γ is then wrong by a fraction of about 1e-4."""

_DIGITS = 6


class Mode(NamedTuple):
    """One mode.

    Attributes:
        parameter: Grüneisen parameter γ.
        frequency: Frequency, THz.
        point: Wave vector, in the reciprocal lattice of the primitive cell.
    """

    parameter: float
    frequency: float
    point: tuple[float, ...]

    def as_json(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "parameter": round(self.parameter, _DIGITS),
            "frequency_THz": round(self.frequency, _DIGITS),
            "point": [round(x, _DIGITS) for x in self.point],
        }


@dataclass(frozen=True, eq=False)
class Gruneisen:
    """Mode Grüneisen parameters on a mesh.

    Attributes:
        volumes: Volumes of the primitive cells, smallest first `[3]`, Å³.
        points: Irreducible wave vectors `[n_q, 3]`, in the reciprocal lattice of the primitive cell.
        weights: Weights of the wave vectors, which add up to 1 `[n_q]`.
        frequencies: Frequencies at the middle volume `[n_q, n_modes]`, THz; imaginary ones are below zero.
        parameters: Grüneisen parameters γ `[n_q, n_modes]`, NaN for modes that are not `counted`.
        counted: Whether a mode is real, and no translation `[n_q, n_modes]`.
        imaginary: Whether a mode is imaginary, and no translation `[n_q, n_modes]`.
    """

    volumes: tuple[float, float, float]
    points: Floats
    weights: Floats
    frequencies: Floats
    parameters: Floats
    counted: NDArray[np.bool_]
    imaginary: NDArray[np.bool_]

    @property
    def unstable(self) -> bool:
        """Whether modes are imaginary beyond rounding (`IMAGINARY`)."""
        return bool((self.imaginary & (self.frequencies < IMAGINARY)).any())

    @property
    def imaginary_share(self) -> float:
        """Share of modes that are imaginary, and have no γ."""
        return float(self.weights @ self.imaginary.mean(axis=1))

    @property
    def lowest(self) -> Mode:
        """Mode with the smallest γ."""
        return self._mode(int(np.nanargmin(self.parameters)))

    @property
    def highest(self) -> Mode:
        """Mode with the largest γ."""
        return self._mode(int(np.nanargmax(self.parameters)))

    def mean(self, temperature: float) -> float:
        """Return the mean of γ over modes, weighted with their heat capacities; NaN at 0 K.

        Args:
            temperature: Temperature, K.

        Raises:
            StatisticsError: Modes are imaginary: what is left of the mean says nothing about expansion.
        """
        if self.unstable:
            raise StatisticsError(
                f"{100 * self.imaginary_share:.2g} % of the modes are imaginary, the lowest at "
                f"{self.frequencies.min():.3g} THz"
            )
        if temperature <= 0:
            return float("nan")
        half = np.pi * HBAR * 1e-3 * np.where(self.counted, self.frequencies, 1.0) / (KB * temperature)
        # Beyond 300 the heat capacity of a mode underflows, and sinh soon overflows.
        capacities = np.where(self.counted, (half / np.sinh(half.clip(max=300.0))) ** 2, 0.0)
        weights = self.weights[:, None] * capacities
        return float((weights * np.nan_to_num(self.parameters)).sum() / weights.sum())

    def as_json(self, temperatures: Sequence[float]) -> dict[str, Any]:
        """Return plain data for JSON, with means at temperatures, K; `refused` says why there are none."""
        refused, means = None, [math.nan] * len(temperatures)
        try:
            means = [self.mean(temperature) for temperature in temperatures]
        except StatisticsError as error:
            refused = str(error)
        return {
            "volumes_A3": [round(volume, _DIGITS) for volume in self.volumes],
            "temperatures_K": list(temperatures),
            "mean": [round(mean, _DIGITS) if np.isfinite(mean) else None for mean in means],
            "refused": refused,
            "lowest": self.lowest.as_json(),
            "highest": self.highest.as_json(),
            "imaginary_share": self.imaginary_share,
            "lowest_frequency_THz": round(float(self.frequencies.min()), _DIGITS),
        }

    def modes_as_json(self) -> dict[str, Any]:
        """Return plain data of every mode for JSON; the parameter of a mode that is not counted is None."""
        parameters = np.round(self.parameters, _DIGITS).astype(object)
        parameters[~self.counted] = None
        return {
            "points": np.round(self.points, _DIGITS).tolist(),
            "weights": self.weights.tolist(),
            "frequencies_THz": np.round(self.frequencies, _DIGITS).tolist(),
            "parameters": parameters.tolist(),
        }

    def _mode(self, flat: int) -> Mode:
        q, mode = np.unravel_index(flat, self.parameters.shape)
        point = tuple(self.points[q].tolist())
        return Mode(float(self.parameters[q, mode]), float(self.frequencies[q, mode]), point)


def outer_volumes(
    potential: Potential, crystal: HarmonicCrystal, pressure: float = 0.0, change: float = CHANGE
) -> tuple[HarmonicCrystal, HarmonicCrystal]:
    """Relax a crystal under a little more and a little less pressure.

    Args:
        potential: Potential in float64.
        crystal: Crystal at rest under the pressure.
        pressure: Pressure, GPa.
        change: Difference of the two volumes over the volume of the crystal.

    Returns:
        The smaller crystal and the larger one.

    Raises:
        InputError: The potential is in single precision, or does not know an element.
        StatisticsError: The crystal does not resist pressure.
        MlipRefineError: A crystal does not come to rest.
    """
    pressures = pressures_of_volumes(potential, crystal, (1 - change / 2, 1 + change / 2), pressure)
    smaller, larger = (crystal.at_rest(potential, Rest("cell", one)) for one in pressures)
    return smaller, larger


def gruneisen(phonon: Phonopy, smaller: Phonopy, larger: Phonopy, mesh: Sequence[int]) -> Gruneisen:
    """Compute the mode Grüneisen parameters of a crystal.

    Args:
        phonon: Phonopy's object with force constants; the lattice vectors of all three correspond.
        smaller: The same at a smaller volume.
        larger: The same at a larger volume.
        mesh: Points along each reciprocal vector, with Γ among them.

    Raises:
        InputError: The volumes do not ascend.
        StatisticsError: No mode is real.
    """
    small, middle, large = (float(one.primitive.volume) for one in (smaller, phonon, larger))
    if not small < middle < large:
        raise InputError(
            "the volumes of a Grüneisen parameter do not ascend",
            found=f"{small:.6g}, {middle:.6g} and {large:.6g} Å³",
            expected="a smaller one, that of the crystal, a larger one",
        )
    three = PhonopyGruneisen(phonon, larger, smaller)
    with np.errstate(divide="ignore", invalid="ignore"):
        three.set_mesh(list(mesh), is_gamma_center=True)
    found: Any = three.get_mesh()
    points, weights, frequencies, _, parameters = (np.array(values) for values in found)
    # The three modes at Γ nearest to zero.
    translations = np.zeros(frequencies.shape, dtype=bool)
    for q in np.flatnonzero(np.abs(points - np.rint(points)).max(axis=1) < 1e-8):
        translations[q, np.argsort(np.abs(frequencies[q]))[:3]] = True
    counted = (frequencies >= ZERO) & ~translations
    if not counted.any():
        raise StatisticsError("no mode of the crystal is real", needed="a crystal that is not unstable")
    return Gruneisen(
        volumes=(small, middle, large),
        points=points,
        weights=weights / weights.sum(),
        frequencies=frequencies,
        parameters=np.where(counted, parameters, np.nan),
        counted=counted,
        imaginary=~counted & ~translations,
    )
