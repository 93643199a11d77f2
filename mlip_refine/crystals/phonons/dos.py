"""Densities of vibrational states, and how much two of them have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from phonopy import Phonopy

from mlip_refine.errors import InputError

type Floats = NDArray[np.float64]

_WIDTH = 0.02
"""Of a mode, of the largest frequency: with a mesh of 15 points overlaps have then settled to 0.001."""

_NARROWEST = 0.01
"""Width where no mode has a frequency to speak of, THz."""

_REACH = 4.0
"""Of a Gaussian, in its width: what lies beyond is 6e-5 of a mode."""

_PER_WIDTH = 4
"""Frequencies per width: sums over them are integrals."""

_DIGITS = 6


@dataclass(frozen=True, eq=False)
class DensityOfStates:
    """States per frequency of one primitive cell.

    Attributes:
        frequencies: Evenly spaced `[n]`, THz; imaginary ones are below zero.
        states: `[n]`, 1/THz; their integral is the number of modes.
    """

    frequencies: Floats
    states: Floats

    @property
    def n_modes(self) -> float:
        """The integral."""
        return float(self.states.sum() * (self.frequencies[1] - self.frequencies[0]))

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "frequencies_THz": np.round(self.frequencies, _DIGITS).tolist(),
            "states_per_THz": np.round(self.states, _DIGITS).tolist(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read plain data; `KeyError`, `TypeError` or `ValueError` if it is not this."""
        return cls(*(np.array(data[name], dtype=float) for name in ("frequencies_THz", "states_per_THz")))


def densities_of_states(
    phonons: Sequence[Phonopy], width: float | None = None
) -> tuple[DensityOfStates, ...]:
    """Densities of states of several crystals at the same frequencies.

    Modes are Gaussians. Unlike that of tetrahedra their integral on a grid is the number of modes even where
    bands are flat, and two densities differ no more than their frequencies do.

    Args:
        phonons: With frequencies on a mesh (`phonon_properties`); a reference and models at the same time.
        width: Standard deviation, THz; None takes 2 % of the largest frequency, imaginary ones included.

    Raises:
        InputError: A mesh is missing.
    """
    meshes: list[Any] = [phonon.mesh for phonon in phonons]
    if any(one is None for one in meshes):
        raise InputError("a density of states needs frequencies on a mesh", fix="Run phonon_properties.")
    lowest = min(float(one.frequencies.min()) for one in meshes)
    highest = max(float(one.frequencies.max()) for one in meshes)
    sigma = width or max(_WIDTH * max(-lowest, highest), _NARROWEST)
    ends = (lowest - _REACH * sigma, highest + _REACH * sigma)
    return tuple(_density(phonon, sigma, ends) for phonon in phonons)


def overlap(model: DensityOfStates, reference: DensityOfStates) -> float:
    """Share of states that two densities have in common, ∫min(g, g')dω/∫max(g, g')dω: 0 to 1.

    Raises:
        InputError: They are not at the same frequencies.
    """
    if not np.array_equal(model.frequencies, reference.frequencies):
        raise InputError(
            "the densities of states are not at the same frequencies", fix="Find them in one call."
        )
    common = np.minimum(model.states, reference.states).sum()
    return float(common / np.maximum(model.states, reference.states).sum())


def _density(phonon: Phonopy, sigma: float, ends: tuple[float, float]) -> DensityOfStates:
    found = phonon.run_total_dos(
        sigma=sigma,
        freq_min=ends[0],
        freq_max=ends[1],
        freq_pitch=sigma / _PER_WIDTH,
        use_tetrahedron_method=False,
    )
    return DensityOfStates(np.array(found.frequency_points), np.array(found.dos))
