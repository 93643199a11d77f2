"""Which kind of structure a crystal has: what a split into training and test must not tear apart."""

from collections import Counter, defaultdict
from math import gcd
from string import ascii_uppercase

import spglib
from ase import Atoms
from ase.data import chemical_symbols

from mlip_refine.errors import InputError


def reduced_formula(atoms: Atoms) -> str:
    """Return the reduced formula, elements in alphabetical order: `Al2O3`."""
    counts = {chemical_symbols[z]: n for z, n in Counter(atoms.numbers.tolist()).items()}
    common = gcd(*counts.values())
    return "".join(f"{symbol}{_count(counts[symbol] // common)}" for symbol in sorted(counts))


def space_group_and_prototype(atoms: Atoms, symprec: float) -> tuple[int, str]:
    """Return the number of the space group, and a label of the prototype.

    The label holds the anonymous formula, the space group, and for every element how many atoms each of its
    orbits has in the primitive cell: rock salt is `AB_225_1_1`. It does not depend on the choice of origin,
    as letters of Wyckoff positions do, and different prototypes may share one.

    Args:
        atoms: Any cell of the crystal.
        symprec: How far atoms may be from symmetric places, Å.

    Raises:
        InputError: Not even the identity is found: atoms are on top of each other.
    """
    cell = (atoms.cell.tolist(), atoms.get_scaled_positions().tolist(), atoms.numbers.tolist())
    dataset = spglib.get_symmetry_dataset(cell, symprec=symprec)
    if dataset is None:
        raise InputError(
            "no symmetry is found", found=str(atoms.symbols), fix="Check positions, and symprec."
        )
    orbits: dict[int, set[int]] = defaultdict(set)
    for orbit, primitive in zip(dataset.crystallographic_orbits, dataset.mapping_to_primitive, strict=True):
        orbits[int(orbit)].add(int(primitive))
    by_element: dict[int, list[int]] = defaultdict(list)
    for first, members in sorted(orbits.items()):
        by_element[int(atoms.numbers[first])].append(len(members))
    sizes = sorted((sum(own), sorted(own)) for own in by_element.values())
    common = gcd(*(total for total, _ in sizes))
    formula = "".join(f"{ascii_uppercase[k]}{_count(n // common)}" for k, (n, _) in enumerate(sizes))
    labels = ["+".join(map(str, own)) for _, own in sizes]
    return int(dataset.number), "_".join([formula, str(dataset.number), *labels])


def _count(n: int) -> str:
    return str(n) if n > 1 else ""
