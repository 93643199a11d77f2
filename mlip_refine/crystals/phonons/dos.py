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
"""Width of a mode over the largest frequency: with a mesh of 15 points overlaps then settle to 0.001."""

_NARROWEST = 0.01
"""Smallest width, where no mode has a frequency worth mentioning, THz."""

_REACH = 4.0
"""Half the range of a Gaussian in its width: what lies beyond is 6e-5 of a mode."""

_PER_WIDTH = 4
"""Frequencies per width, so that sums over them are integrals."""

_DIGITS = 6


@dataclass(frozen=True, eq=False)
class DensityOfStates:
    """States per frequency of one primitive cell.

    Attributes:
        frequencies: Evenly spaced frequencies `[n]`, THz; imaginary ones are below zero.
        states: States per frequency `[n]`, 1/THz; their integral is the number of modes.
    """

    frequencies: Floats
    states: Floats

    @property
    def n_modes(self) -> float:
        """Integral of the density: the number of modes."""
        return float(self.states.sum() * (self.frequencies[1] - self.frequencies[0]))

    def as_json(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "frequencies_THz": np.round(self.frequencies, _DIGITS).tolist(),
            "states_per_THz": np.round(self.states, _DIGITS).tolist(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read plain data of `as_json`; `KeyError`, `TypeError` or `ValueError` if it is not of that form."""
        return cls(*(np.array(data[name], dtype=float) for name in ("frequencies_THz", "states_per_THz")))


def densities_of_states(
    phonons: Sequence[Phonopy], width: float | None = None
) -> tuple[DensityOfStates, ...]:
    """Compute the densities of states of several crystals at the same frequencies.

    Modes are Gaussians. Unlike that of tetrahedra their integral on a grid is the number of modes even where
    bands are flat, and two densities differ no more than their frequencies do.

    Args:
        phonons: Phonopy's objects with frequencies on a mesh (`phonon_properties`): a reference and models.
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
    densities = []
    for phonon in phonons:
        found = phonon.run_total_dos(
            sigma=sigma,
            freq_min=ends[0],
            freq_max=ends[1],
            freq_pitch=sigma / _PER_WIDTH,
            use_tetrahedron_method=False,
        )
        densities.append(DensityOfStates(np.array(found.frequency_points), np.array(found.dos)))
    return tuple(densities)


def overlap(model: DensityOfStates, reference: DensityOfStates) -> float:
    """Return the share of states that two densities have in common, ∫min(g, g')dω/∫max(g, g')dω: 0 to 1.

    Raises:
        InputError: They are not at the same frequencies.
    """
    if not np.array_equal(model.frequencies, reference.frequencies):
        raise InputError(
            "the densities of states are not at the same frequencies", fix="Compute them in one call."
        )
    common = np.minimum(model.states, reference.states).sum()
    return float(common / np.maximum(model.states, reference.states).sum())
