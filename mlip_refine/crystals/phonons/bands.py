"""Band structures along lines of high symmetry, and how those of two crystals differ.

Modes at a wave vector are in ascending order, not connected by their eigenvectors: of all ways to pair the
modes of a model with those of a reference this one has the smallest mean absolute difference, and it depends
neither on where a path begins nor on crossings. Imaginary frequencies are below zero, THz. There is no
non-analytic term.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import numpy as np
from ase import Atoms
from ase.dft.kpoints import parse_path_string
from numpy.typing import NDArray
from phonopy import Phonopy
from phonopy.phonon.band_structure import get_band_qpoints
from scipy.integrate import trapezoid

from mlip_refine.crystals.symmetry import space_group_number
from mlip_refine.errors import InputError

type Floats = NDArray[np.float64]

POINTS = 51
"""Wave vectors on the longest line of a path."""

_FIRST_GROUPS = {
    "cubic": 195,
    "hexagonal": 143,
    "tetragonal": 75,
    "orthorhombic": 16,
    "monoclinic": 3,
    "triclinic": 1,
}
"""Number of the first space group of every crystal family; trigonal crystals count as hexagonal."""

_LATTICE_TOLERANCES = (2e-4, 1e-3, 5e-3)
"""Relative deviations of lengths and angles from those of a symmetric lattice, in the order of trial."""

_DIGITS = 6
"""Decimals in files, a micro-terahertz."""


@dataclass(frozen=True, eq=False)
class BandPath:
    """Lines between points of high symmetry.

    Attributes:
        ends: Labels of both ends of every line, such as `("G", "X")`.
        points: Wave vectors of every line `[n_q, 3]`, in the reciprocal lattice of the primitive cell.
        distances: Along the path `[n_q]`, 1/Å without 2π; lines that do not meet follow without a gap.
    """

    ends: tuple[tuple[str, str], ...]
    points: tuple[Floats, ...]
    distances: tuple[Floats, ...]

    @property
    def ticks(self) -> tuple[tuple[float, str], ...]:
        """Places where lines begin and end, with their labels; `U|K` where they do not meet."""
        ticks = [(float(self.distances[0][0]), self.ends[0][0])]
        for i, (_, end) in enumerate(self.ends):
            following = self.ends[i + 1][0] if i + 1 < len(self.ends) else end
            label = end if end == following else f"{end}|{following}"
            ticks.append((float(self.distances[i][-1]), label))
        return tuple(ticks)


@dataclass(frozen=True, eq=False)
class Bands:
    """Frequencies along a path.

    Attributes:
        path: The path.
        frequencies: Frequencies on every line `[n_q, n_modes]`, THz, ascending.
    """

    path: BandPath
    frequencies: tuple[Floats, ...]

    def as_json(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "ends": [list(pair) for pair in self.path.ends],
            "ticks": [[round(place, _DIGITS), label] for place, label in self.path.ticks],
            "points": [np.round(line, _DIGITS).tolist() for line in self.path.points],
            "distances_per_A": [np.round(line, _DIGITS).tolist() for line in self.path.distances],
            "frequencies_THz": [np.round(line, _DIGITS).tolist() for line in self.frequencies],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read plain data of `as_json`; `KeyError`, `TypeError` or `ValueError` if it is not of that form."""
        ends = tuple((str(first), str(last)) for first, last in data["ends"])
        names = ("points", "distances_per_A", "frequencies_THz")
        points, distances, frequencies = (tuple(np.array(x, dtype=float) for x in data[n]) for n in names)
        return cls(BandPath(ends, points, distances), frequencies)


@dataclass(frozen=True)
class BandErrors:
    """Absolute differences of two band structures, THz.

    Attributes:
        mean: Mean over the length of the path of every band, in ascending order `[n_modes]`.
        largest: Largest difference of every band `[n_modes]`.
        lines: Ends of the line on which each band has its largest difference `[n_modes]`.
        points: Wave vectors of the largest differences `[n_modes]`.
    """

    mean: tuple[float, ...]
    largest: tuple[float, ...]
    lines: tuple[tuple[str, str], ...]
    points: tuple[tuple[float, ...], ...]

    @property
    def mean_of_all(self) -> float:
        """Mean over all bands, THz."""
        return float(np.mean(self.mean))

    def as_json(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "mean_THz": round(self.mean_of_all, _DIGITS),
            "largest_THz": round(max(self.largest), _DIGITS),
            "bands": [
                {
                    "mean_THz": round(mean, _DIGITS),
                    "largest_THz": round(largest, _DIGITS),
                    "line": list(line),
                    "point": [round(x, _DIGITS) for x in point],
                }
                for mean, largest, line, point in zip(
                    self.mean, self.largest, self.lines, self.points, strict=True
                )
            ],
        }


def band_path(primitive: Atoms, n: int = POINTS) -> BandPath:
    """Return the lines of high symmetry of a crystal, in the reciprocal lattice of the cell as it is given.

    Points and labels are those of Setyawan and Curtarolo (Comput. Mater. Sci. 49, 299, 2010) of the Bravais
    lattice, as ASE has them.

    Args:
        primitive: Primitive cell with any choice of lattice vectors.
        n: Wave vectors on the longest line; the others have theirs at the same distances.

    Raises:
        InputError: The lattice has less symmetry than the crystal: the cell is not precise enough.
    """
    number, path = space_group_number(primitive), None
    # The smallest tolerance at which the lattice is as symmetric as the crystal.
    for tolerance in _LATTICE_TOLERANCES:
        family = primitive.cell.get_bravais_lattice(eps=tolerance).crystal_family
        if _FIRST_GROUPS[family] >= max(first for first in _FIRST_GROUPS.values() if first <= number):
            path = primitive.cell.bandpath(npoints=0, eps=tolerance)
            break
    if path is None:
        raise InputError(
            "the cell has less symmetry than the atoms in it",
            found=f"space group {number} in a {family} lattice",
            fix="Give its lattice vectors with more digits, or let it come to rest.",
        )
    sections = parse_path_string(path.path)
    ends = tuple(pair for section in sections for pair in pairwise(section))
    reciprocal = np.linalg.inv(primitive.cell.array)
    corners = [[path.special_points[label] for label in section] for section in sections]
    points = tuple(np.array(line) for line in get_band_qpoints(corners, n, reciprocal))
    distances, start = [], 0.0
    for line in points:
        steps = np.linalg.norm(np.diff(line, axis=0) @ reciprocal.T, axis=1)
        along = start + np.concatenate([[0.0], np.cumsum(steps)])
        distances.append(along)
        start = float(along[-1])
    return BandPath(ends, points, tuple(distances))


def bands(phonon: Phonopy, path: BandPath) -> Bands:
    """Compute the frequencies of a crystal along a path.

    Args:
        phonon: Phonopy's object with force constants.
        path: Path of this crystal, or of another cell whose lattice vectors correspond.
    """
    found = np.array(phonon.run_qpoints(np.concatenate(path.points)).frequencies)
    ends = np.cumsum([len(line) for line in path.points])[:-1]
    return Bands(path, tuple(np.split(np.sort(found, axis=1), ends)))


def band_errors(model: Bands, reference: Bands) -> BandErrors:
    """Return the absolute differences of every band; imaginary frequencies are numbers below zero.

    Raises:
        InputError: The two are not of one path and one number of modes.
    """
    shapes = [[line.shape for line in one.frequencies] for one in (model, reference)]
    if shapes[0] != shapes[1] or model.path.ends != reference.path.ends:
        raise InputError(
            "the band structures are not of one path",
            found=model.path.ends,
            expected=str(reference.path.ends),
        )
    lines = zip(model.frequencies, reference.frequencies, strict=True)
    differences = [np.abs(mine - theirs) for mine, theirs in lines]
    distances = reference.path.distances
    length = sum(along[-1] - along[0] for along in distances)
    areas = [trapezoid(d, along, axis=0) for d, along in zip(differences, distances, strict=True)]
    every = np.concatenate(differences)
    worst = every.argmax(axis=0)
    points = np.concatenate(reference.path.points)[worst]
    owners = np.repeat(np.arange(len(distances)), [len(d) for d in differences])[worst]
    return BandErrors(
        mean=tuple((np.sum(areas, axis=0) / length).tolist()),
        largest=tuple(every.max(axis=0).tolist()),
        lines=tuple(reference.path.ends[i] for i in owners),
        points=tuple(tuple(point) for point in points.tolist()),
    )
