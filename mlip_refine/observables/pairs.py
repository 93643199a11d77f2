"""Vectors between pairs of atoms within a distance, over all periodic images that reach that far."""

from collections.abc import Iterator
from itertools import product

import torch
from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor

from mlip_refine.errors import InputError
from mlip_refine.observables.base import Sample


def atoms_of(sample: Sample, symbol: str | None, where: str) -> Tensor:
    """Indices of the atoms of an element, of all atoms if it is None.

    Raises:
        InputError: The sample has none.
    """
    if symbol is None:
        return torch.arange(sample.n_atoms, device=sample.positions.device)
    found = torch.from_numpy(sample.numbers == atomic_numbers.get(symbol, -1)).nonzero().flatten()
    if not len(found):
        have = ", ".join(sorted({chemical_symbols[z] for z in sample.numbers}))
        raise InputError(f"{where}: no atom of the element", found=symbol, expected=f"one of {have}")
    return found.to(sample.positions.device)


def separations(positions: Tensor, cells: Tensor, centres: Tensor, others: Tensor) -> Tensor:
    """Differences of atoms in units of the cell vectors, nearest image along each `[n, c, o, 3]`.

    Args:
        positions: `[n, n_atoms, 3]`, Å.
        cells: Rows `[n, 3, 3]`, Å.
        centres: Indices `[c]`.
        others: Indices `[o]`.
    """
    fractional = torch.linalg.solve(cells, positions, left=False)
    difference: Tensor = fractional[:, None, others] - fractional[:, centres, None]
    return difference - difference.round()


def image_shifts(cells: Tensor, distance: float) -> Tensor:
    """Cells whose atoms can lie within a distance `[n_images, 3]`, the home cell alone where that is enough.

    A separation of s + m cell vectors, |s| ≤ ½, is at least |s + m| heights of the cell long.

    Args:
        cells: Rows `[n, 3, 3]`, Å.
        distance: Å.
    """
    # The rows of the inverse transpose are the reciprocal vectors, one over a height long.
    largest = (distance * torch.linalg.inv(cells).mT.norm(dim=-1)).amax(0)
    reach = [int(r) for r in (largest + 0.5 - 1e-12).floor()]
    shifts = list(product(*(range(-r, r + 1) for r in reach)))
    return torch.tensor(shifts, dtype=cells.dtype, device=cells.device)


def image_distances(separation: Tensor, cells: Tensor, shifts: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Vectors `[n, c, o, 3]` and distances `[n, c, o]` of every image in turn, Å.

    Args:
        separation: Of `separations` `[n, c, o, 3]`.
        cells: Rows `[n, 3, 3]`, Å.
        shifts: Of `image_shifts` `[n_images, 3]`.
    """
    home = torch.einsum("ncoi,nij->ncoj", separation, cells)
    for offset in torch.einsum("mi,nij->mnj", shifts, cells):
        vectors = home + offset[:, None, None]
        yield vectors, vectors.norm(dim=-1)
