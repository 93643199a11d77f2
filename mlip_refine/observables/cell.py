"""Volume, density, lattice constants, angles, pressure and stress."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from ase import units
from numpy.typing import NDArray
from torch import Tensor

from mlip_refine.crystals.symmetry import TOLERANCE, symmetry_dataset
from mlip_refine.crystals.tensors import stress_to_voigt
from mlip_refine.errors import InputError
from mlip_refine.observables.base import Observable, Sample
from mlip_refine.quantities import GPA

GRAMS_PER_CM3: float = float(units._amu) * 1e27
"""One amu/Å³ in g/cm³."""

ANGLES: Mapping[str, tuple[int, int]] = {"alpha": (1, 2), "beta": (0, 2), "gamma": (0, 1)}
"""Names of the angles, with the two cell vectors between which each lies."""

_FIRST_WITH_TWO_EQUAL, _FIRST_CUBIC = 75, 195
"""Numbers of space groups: the first tetragonal one (trigonal and hexagonal follow), the first cubic one."""

_ROUNDING = 1e-4


class Volume(Observable):
    """Atomic volume ⟨V⟩/N, Å³/atom."""

    labels = ("volume",)
    unit = "Å³/atom"

    def columns(self, sample: Sample) -> Tensor:
        """Return the atomic volume of every frame `[n, 1]`."""
        return sample.volumes[:, None] / sample.n_atoms


class Density(Observable):
    """Mass density ⟨M/V⟩, g/cm³."""

    labels = ("density",)
    unit = "g/cm³"

    def columns(self, sample: Sample) -> Tensor:
        """Return the density of every frame `[n, 1]`."""
        return (GRAMS_PER_CM3 * sample.masses.sum().double() / sample.volumes)[:, None]


def cell_lengths(cells: Tensor) -> Tensor:
    """Return the lengths of the vectors of cells (rows) `[..., 3, 3]`: `[..., 3]`."""
    lengths: Tensor = cells.norm(dim=-1)
    return lengths


def cell_angles(cells: Tensor) -> Tensor:
    """Return the angles α, β, γ of cells (rows) `[..., 3, 3]`: `[..., 3]`, degrees."""
    unit = cells / cell_lengths(cells)[..., None]
    cosines = [(unit[..., i, :] * unit[..., j, :]).sum(-1) for i, j in ANGLES.values()]
    return torch.rad2deg(torch.arccos(torch.stack(cosines, dim=-1).clamp(-1.0, 1.0)))


class CellAngles(Observable):
    """Angles of the cell, degrees: alpha between b and c, and so on."""

    labels = tuple(ANGLES)
    unit = "°"

    def columns(self, sample: Sample) -> Tensor:
        """Return the angles of every frame `[n, 3]`."""
        return cell_angles(sample.cells)


class Lattice(Observable):
    """Lattice constants of the unit cell from the lengths of the vectors of the box, Å.

    A constant is the mean of length over ratio of the box vectors that show it. The ratio is the length of
    that vector of the ideal crystal in units of the constant. So any box will do: for n x n x n cells of hcp

        Lattice({"a": (n, n, None), "c": (None, None, n)})

    and for its orthorhombic cell, whose second vector is √3 a long, ``{"a": (n, n * 3**0.5, None), ...}``.
    """

    unit = "Å"

    def __init__(self, ratios: Mapping[str, Sequence[float | None]]) -> None:
        """Name the constants.

        Args:
            ratios: By the name of a constant, for each of the three box vectors its length in units of the
                constant, None where it does not show it.

        Raises:
            InputError: Not three ratios above zero, at least one of them given.
        """
        if not ratios:
            raise InputError("no lattice constant is named", expected="at least one with its ratios")
        weights = []
        for name, row in ratios.items():
            given = [r for r in row if r is not None]
            if len(row) != 3 or not given or min(given) <= 0:
                raise InputError(
                    f"the box vectors do not tell the lattice constant {name!r}",
                    found=list(row),
                    expected="three ratios above zero, None for vectors that do not show it",
                )
            weights.append([0.0 if r is None else 1 / (r * len(given)) for r in row])
        self.labels = tuple(ratios)
        self._weights = torch.tensor(weights, dtype=torch.float64)

    @classmethod
    def of_repeats(cls, repeats: Sequence[int]) -> "Lattice":
        """Return constants a, b and c of a unit cell that is repeated along its own three vectors."""
        pairs = enumerate(zip("abc", repeats, strict=True))
        return cls({name: [n if i == j else None for j in range(3)] for i, (name, n) in pairs})

    def columns(self, sample: Sample) -> Tensor:
        """Return the constants of every frame `[n, m]`."""
        return cell_lengths(sample.cells) @ self._weights.T.to(sample.cells)


def conventional_lattice(
    cell: NDArray[np.float64],
    positions: NDArray[np.float64],
    numbers: NDArray[np.int64],
    tolerance: float = TOLERANCE,
) -> Lattice:
    """Return the lattice constants of the conventional unit cell, whatever box the crystal is in.

    Cubic crystals have a; tetragonal, hexagonal and trigonal ones (in hexagonal axes) a and c; others a, b
    and c, in the setting that spglib takes as the standard. A box vector shows a constant if its length is a
    fixed multiple of that constant alone, however the crystal expands. Constants that no vector shows are
    left out.

    Args:
        cell: Cell vectors as rows `[3, 3]`, Å.
        positions: Positions `[n_atoms, 3]`, Å.
        numbers: Atomic numbers `[n_atoms]`.
        tolerance: How far atoms may be from their symmetric places, Å.

    Raises:
        InputError: No symmetry is found, or no vector of the box shows a constant.
    """
    found = symmetry_dataset((cell, np.linalg.solve(cell.T, positions.T).T, numbers), tolerance)
    if found.number >= _FIRST_CUBIC:
        equal_axes = {"a": [0, 1, 2]}
    elif found.number >= _FIRST_WITH_TWO_EQUAL:
        equal_axes = {"a": [0, 1], "c": [2]}
    else:
        equal_axes = {"a": [0], "b": [1], "c": [2]}
    # Columns of the matrix are the box vectors in units of the unit cell's.
    vectors, unit_cell = found.transformation_matrix.T, found.std_lattice
    ratios: dict[str, list[float | None]] = {}
    for name, axes in equal_axes.items():
        constant = np.linalg.norm(unit_cell[axes[0]])
        alone = np.abs(np.delete(vectors, axes, axis=1)).max(axis=1, initial=0.0) <= _ROUNDING
        if alone.any():
            lengths = [float(np.linalg.norm(vector @ unit_cell) / constant) for vector in vectors]
            ratios[name] = [length if shown else None for length, shown in zip(lengths, alone, strict=True)]
    if not ratios:
        raise InputError(
            "no vector of the box shows a lattice constant of the crystal",
            found=f"space group {found.international}, box vectors {np.round(vectors, 3).tolist()} in units "
            "of the unit cell",
            expected="a vector along an axis of the unit cell, or between axes of equal length",
        )
    return Lattice(ratios)


class Pressure(Observable):
    """Total pressure N kT/V - tr σ/3, GPa (Allen and Tildesley 2017, section 2.4).

    σ is the stress of the configuration, tensile positive; frames hold no momenta, so the kinetic part is its
    mean.
    """

    probes: ClassVar[frozenset[str]] = frozenset({"stress"})
    labels = ("pressure",)
    unit = "GPa"

    def columns(self, sample: Sample) -> Tensor:
        """Return the pressure of every frame `[n, 1]`."""
        return -sample.total_stress.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) / GPA


class Stress(Observable):
    """Total stress σ_ij - δ_ij N kT/V in Voigt order, GPa, tensile positive (as ASE's sign).

    σ is the stress of the configuration, (1/V) ∂U/∂ε; frames hold no momenta, so the kinetic part is its
    mean.
    """

    probes: ClassVar[frozenset[str]] = frozenset({"stress"})
    labels = ("xx", "yy", "zz", "yz", "xz", "xy")
    unit = "GPa"

    def columns(self, sample: Sample) -> Tensor:
        """Return the six components of every frame `[n, 6]`."""
        return stress_to_voigt(sample.total_stress) / GPA
