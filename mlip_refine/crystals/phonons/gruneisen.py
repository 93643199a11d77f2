"""Mode Grüneisen parameters γ = -∂ln ω/∂ln V from force constants at three volumes.

The cells of the outer volumes are at rest under a little more and a little less pressure, so that the shape
of the cell and the atoms in it follow the volume as they do in an experiment, in crystals of any symmetry.
Then α V B_T = Σγ C_V over modes is the expansion of the volume, whatever the shape does; with cells that
are only scaled it would be so in cubic crystals alone.

The change of ω² of a mode is v†ΔD v, where modes of one frequency are first told apart by ΔD, as phonopy has
it (Togo, J. Phys. Soc. Jpn. 92, 012001, 2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from phonopy import Phonopy, PhonopyGruneisen

from mlip_refine.crystals.phonons.harmonic import HarmonicCrystal
from mlip_refine.crystals.phonons.pressed_crystals import pressures_of_volumes
from mlip_refine.crystals.phonons.thermodynamics import ZERO
from mlip_refine.crystals.relaxation import Rest
from mlip_refine.errors import InputError, StatisticsError
from mlip_refine.potential import Potential
from mlip_refine.quantities import HBAR, KB

type Floats = NDArray[np.float64]

CHANGE = 0.01
"""Difference of the outer volumes, of the volume: γ is then wrong by some 1e-4 of itself."""

_DIGITS = 6


class Mode(NamedTuple):
    """One mode.

    Attributes:
        parameter: γ.
        frequency: THz.
        point: Wave vector, in the reciprocal lattice of the primitive cell.
    """

    parameter: float
    frequency: float
    point: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Gruneisen:
    """Mode Grüneisen parameters on a mesh.

    Attributes:
        volumes: Of the primitive cells, smallest first `[3]`, Å³.
        points: Irreducible wave vectors `[n_q, 3]`, in the reciprocal lattice of the primitive cell.
        weights: Of the wave vectors, in sum 1 `[n_q]`.
        frequencies: At the volume in the middle `[n_q, n_modes]`, THz; imaginary ones are below zero.
        parameters: γ `[n_q, n_modes]`, NaN where `counted` is not.
        counted: Modes that are real `[n_q, n_modes]`, without translations.
        imaginary: Modes that are not, without translations `[n_q, n_modes]`.
    """

    volumes: tuple[float, float, float]
    points: Floats
    weights: Floats
    frequencies: Floats
    parameters: Floats
    counted: NDArray[np.bool_]
    imaginary: NDArray[np.bool_]

    @property
    def imaginary_share(self) -> float:
        """Share of modes that are imaginary: they have no γ and are in no mean."""
        return float(self.weights @ self.imaginary.mean(axis=1))

    @property
    def lowest(self) -> Mode:
        """The mode with the smallest γ."""
        return self._mode(int(np.nanargmin(self.parameters)))

    @property
    def highest(self) -> Mode:
        """The mode with the largest γ."""
        return self._mode(int(np.nanargmax(self.parameters)))

    def mean(self, temperature: float) -> float:
        """Mean of γ over real modes, each with its heat capacity; NaN at 0 K.

        Args:
            temperature: K.
        """
        if temperature <= 0:
            return float("nan")
        half = np.pi * HBAR * 1e-3 * np.where(self.counted, self.frequencies, 1.0) / (KB * temperature)
        # Beyond 300 the heat capacity of a mode underflows, and sinh soon overflows.
        capacities = np.where(self.counted, (half / np.sinh(half.clip(max=300.0))) ** 2, 0.0)
        weights = self.weights[:, None] * capacities
        return float((weights * np.nan_to_num(self.parameters)).sum() / weights.sum())

    def as_json(self, temperatures: Sequence[float]) -> dict[str, Any]:
        """Plain data, with means at temperatures, K."""
        means = [self.mean(temperature) for temperature in temperatures]
        return {
            "volumes_A3": [round(volume, _DIGITS) for volume in self.volumes],
            "temperatures_K": list(temperatures),
            "mean": [round(mean, _DIGITS) if np.isfinite(mean) else None for mean in means],
            "lowest": _plain(self.lowest),
            "highest": _plain(self.highest),
            "imaginary_share": self.imaginary_share,
            "lowest_frequency_THz": round(float(self.frequencies.min()), _DIGITS),
        }

    def modes_as_json(self) -> dict[str, Any]:
        """Plain data of every mode: by wave vector, the parameter of one that does not count is None."""
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
    """A crystal at rest under a little more and a little less pressure, the smaller one first.

    Args:
        potential: In float64.
        crystal: At rest under the pressure.
        pressure: GPa.
        change: Difference of their volumes, of the volume.

    Raises:
        InputError: The potential is in single precision, or does not know an element.
        StatisticsError: The crystal does not resist pressure.
        MlipRefineError: A crystal does not come to rest.
    """
    pressures = pressures_of_volumes(potential, crystal, (1 - change / 2, 1 + change / 2), pressure)
    smaller, larger = (crystal.at_rest(potential, Rest("cell", one)) for one in pressures)
    return smaller, larger


def gruneisen(phonon: Phonopy, smaller: Phonopy, larger: Phonopy, mesh: Sequence[int]) -> Gruneisen:
    """Mode Grüneisen parameters of a crystal.

    Args:
        phonon: At its volume, with force constants; the lattice vectors of all three correspond.
        smaller: At a smaller volume.
        larger: At a larger volume.
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
    translations = _translations(points, frequencies)
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


def _translations(points: Floats, frequencies: Floats) -> NDArray[np.bool_]:
    """The three modes at Γ nearest to zero."""
    three = np.zeros(frequencies.shape, dtype=bool)
    for q in np.flatnonzero(np.abs(points - np.rint(points)).max(axis=1) < 1e-8):
        three[q, np.argsort(np.abs(frequencies[q]))[:3]] = True
    return three


def _plain(mode: Mode) -> dict[str, Any]:
    return {
        "parameter": round(mode.parameter, _DIGITS),
        "frequency_THz": round(mode.frequency, _DIGITS),
        "point": [round(x, _DIGITS) for x in mode.point],
    }
