"""A crystal in words: its lattice constants, and another phase that it became."""

import math
from collections.abc import Sequence

from mlip_refine.crystals.symmetry import CrystalLattice


def lattice_in_words(lattice: CrystalLattice) -> str:
    """Return the lattice constants of the conventional and the primitive cell in one line."""
    conventional, primitive = map(cell_in_words, (lattice.conventional_A_deg, lattice.primitive_A_deg))
    if conventional == primitive:
        return f"conventional and primitive cell {conventional}"
    return f"conventional cell {conventional}; primitive cell {primitive}"


def other_phase(given: CrystalLattice, space_group: str) -> str:
    """Return a note on a crystal that has another space group at rest than it was given in."""
    return (
        f"relaxation changed the space group from {given.space_group} to {space_group}: "
        "this is another phase than the one given"
    )


def cell_in_words(cell: Sequence[float]) -> str:
    """Return what is free in the shape of a cell, such as ``a 2.9311, c 4.6512 Å, γ 120°``.

    Args:
        cell: a, b, c (Å), α, β, γ (°).
    """

    def same(i: int, j: int) -> bool:
        return math.isclose(cell[i], cell[j], rel_tol=1e-5)

    lengths = [i for i in range(3) if not any(same(i, j) for j in range(i))]
    angles = [i for i in range(3, 6) if not math.isclose(cell[i], 90.0, abs_tol=1e-3)]
    if len(angles) == 3 and same(3, 4) and same(4, 5):
        angles = angles[:1]
    parts = [", ".join(f"{'abc'[i]} {cell[i]:.4f}" for i in lengths) + " Å"]
    return ", ".join(parts + [f"{'αβγ'[i - 3]} {cell[i]:.5g}°" for i in angles])
