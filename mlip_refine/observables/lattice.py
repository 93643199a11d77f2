"""Lattice constants and angles."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mlip_refine.errors import InputError
from mlip_refine.observables.base import Observable, Sample

ANGLES: Mapping[str, tuple[int, int]] = {"alpha": (1, 2), "beta": (0, 2), "gamma": (0, 1)}
"""Between which two cell vectors each angle lies."""


def cell_lengths(cells: Tensor) -> Tensor:
    """Lengths of the vectors of cells (rows) `[..., 3, 3]`: `[..., 3]`."""
    lengths: Tensor = cells.norm(dim=-1)
    return lengths


def cell_angles(cells: Tensor) -> Tensor:
    """Angles α, β, γ of cells (rows) `[..., 3, 3]`: `[..., 3]`, degrees."""
    unit = cells / cell_lengths(cells)[..., None]
    cosines = [(unit[..., i, :] * unit[..., j, :]).sum(-1) for i, j in ANGLES.values()]
    return torch.rad2deg(torch.arccos(torch.stack(cosines, dim=-1).clamp(-1.0, 1.0)))


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
        for name, row in ratios.items():
            given = [r for r in row if r is not None]
            if len(row) != 3 or not given or min(given) <= 0:
                raise InputError(
                    f"the box vectors do not tell the lattice constant {name!r}",
                    found=list(row),
                    expected="three ratios above zero, None for vectors that do not show it",
                )
        self.labels = tuple(ratios)
        self._weights = torch.tensor([_mean(row) for row in ratios.values()], dtype=torch.float64)

    @classmethod
    def of_repeats(cls, repeats: Sequence[int]) -> "Lattice":
        """Constants a, b and c of a unit cell that is repeated along its own three vectors."""
        pairs = enumerate(zip("abc", repeats, strict=True))
        return cls({name: [n if i == j else None for j in range(3)] for i, (name, n) in pairs})

    def columns(self, sample: Sample) -> Tensor:
        """Constants of every frame `[n, m]`."""
        return cell_lengths(sample.cells) @ self._weights.T.to(sample.cells)


def _mean(row: Sequence[float | None]) -> list[float]:
    """Weights of the three lengths in a constant."""
    count = sum(r is not None for r in row)
    return [0.0 if r is None else 1 / (r * count) for r in row]


class CellAngles(Observable):
    """Angles of the cell, degrees: alpha between b and c, and so on."""

    labels = tuple(ANGLES)
    unit = "°"

    def columns(self, sample: Sample) -> Tensor:
        """Angles of every frame `[n, 3]`."""
        return cell_angles(sample.cells)
