"""How much a material costs, and batches that cost about the same."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matscipy.neighbours import neighbour_list

from mlip_refine.data.phonons import PhononReference
from mlip_refine.errors import InputError
from mlip_refine.potential.batching import Extent


@dataclass(frozen=True)
class PhononCost:
    """What an evaluation of a material takes.

    Attributes:
        name: Of the material.
        extent: Atoms and edges of its supercell.
        columns: How many irreducible columns its Hessian has: evaluations that are all of it.
        displacements: How many displaced supercells there are.
    """

    name: str
    extent: Extent
    columns: int
    displacements: int


def phonon_costs(references: Sequence[PhononReference], cutoff: float) -> list[PhononCost]:
    """List what materials cost.

    Args:
        references: The set.
        cutoff: Of the model, Å; an edge is an ordered pair of atoms within it.
    """
    return [
        PhononCost(
            reference.name,
            Extent(reference.n_atoms, len(neighbour_list("i", reference.supercell, cutoff))),
            len(reference.irreducible()),
            len(reference.displacements),
        )
        for reference in references
    ]


def pack(extents: Sequence[Extent], limit: Extent) -> list[list[int]]:
    """Fill batches up to a limit, the largest members first, each into the first batch where it fits.

    First-fit decreasing (Johnson 1973); of the two shares of the limit, the larger one orders the members.

    Args:
        extents: Of the members.
        limit: Of a batch.

    Returns:
        Numbers of the members of every batch.

    Raises:
        InputError: A member alone is above the limit.
    """
    shares = np.array([extent.over(limit) for extent in extents])
    batches: list[list[int]] = []
    filled: list[Extent] = []
    for member in np.argsort(-shares, kind="stable").tolist():
        extent = extents[member]
        if not extent.fits(limit):
            raise InputError(
                "a material is larger than a batch may be", found=str(extent), expected=f"at most {limit}"
            )
        sums = (Extent(have.atoms + extent.atoms, have.edges + extent.edges) for have in filled)
        place = next((k for k, total in enumerate(sums) if total.fits(limit)), len(batches))
        if place == len(batches):
            batches.append([])
            filled.append(Extent(0, 0))
        batches[place].append(member)
        filled[place] = Extent(filled[place].atoms + extent.atoms, filled[place].edges + extent.edges)
    return batches
