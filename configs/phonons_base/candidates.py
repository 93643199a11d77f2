"""Crystals that might exist: known structures with elements of other compounds."""

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pymatgen.analysis.prototypes
from ase import Atoms
from ase.build import bulk
from ase.data import atomic_numbers, chemical_symbols
from crystals import Composition, Materials, composition, primitive_cell, scaled
from pymatgen.core import Element, Structure

GROUPS = (
    *("Li Na K Rb Cs", "Be Mg Ca Sr Ba", "Sc Y La Lu", "Ti Zr Hf", "V Nb Ta", "Cr Mo W", "Mn Tc Re"),
    *("Fe Co Ni Pd Pt Rh Ir Ru Os", "Cu Ag Au", "Zn Cd Hg Mg", "B Al Ga In Sc", "Tl In K Rb", "C Si Ge Sn"),
    *("Pb Sn Sr Ba", "N P As Sb Bi", "O S Se Te", "F Cl Br I"),
)
"""Elements that stand for one another."""

ANIONS = frozenset((7, 8, 9, 15, 16, 17, 33, 34, 35, 51, 52, 53))
"""N, O, F, P, S, Cl, As, Se, Br, Sb, Te, I."""

SHARES = {"substituted": 0.65, "prototype": 0.25, "binary": 0.10}

NEITHER = frozenset((1, 2, 10, 18, 36, 54))
"""Hydrogen and the noble gases, not put into prototypes."""

LARGEST = 14
"""Atoms of a primitive cell."""

PER_COMPOSITION = 2
"""Crystals of one composition, at most."""

ELEMENTARY = {"fcc": 1.0, "bcc": 1.0, "hcp": 1.0, "diamond": 1.3, "sc": 1.15}
"""Structures that every element is put into, and what that does to the volume of an atom."""

METALLIC = 0.2
"""Share of prototypes whose charges need not balance."""

TRIES = 400
"""Per wanted crystal, before the search ends."""


@dataclass(frozen=True)
class Sources:
    """Where candidates come from.

    Attributes:
        materials: Materials of phonondb.
        known: Structures of its training part, by id.
        valid: Those of its validation part.
        binaries: Other structures of two elements, by id.
        prototypes: Prototypes of the AFLOW library, by name.
        volumes: Atomic volume of every element, Å³.
    """

    materials: Materials
    known: tuple[tuple[str, Atoms], ...]
    valid: tuple[tuple[str, Atoms], ...]
    binaries: tuple[tuple[str, Atoms], ...]
    prototypes: tuple[tuple[str, Atoms], ...]
    volumes: dict[int, float]

    @classmethod
    def read(cls, materials: Materials, phonondb: Path, binaries: Path) -> "Sources":
        """Read all structures."""
        known, valid = (
            tuple((row["mpid"], primitive_cell(phonondb / row["file"])) for row in rows)
            for rows in (materials.train, materials.valid)
        )
        return cls(
            materials=materials,
            known=known,
            valid=valid,
            binaries=tuple(_binaries(binaries, materials)),
            prototypes=tuple(_prototypes()),
            volumes=_volumes([cell for _, cell in known]),
        )


def known(sources: Sources) -> list[Atoms]:
    """Structures as they are: of phonondb's training and validation parts, of two elements, of one."""
    materials = sources.materials
    found = [_named(cell, "phonondb", name) for name, cell in (*sources.known, *sources.valid)]
    found += [_named(cell, "binary", name) for name, cell in sources.binaries]
    for z in sorted(materials.elements - NEITHER - {7, 8, 9, 17, 35, 53}):
        for name, factor in ELEMENTARY.items():
            cell = bulk(chemical_symbols[z], name, a=3.0, **({"c": 4.9} if name == "hcp" else {}))
            cell = scaled(cell, factor * sources.volumes[z] * len(cell))
            found.append(_named(cell, "element", f"{name}-{chemical_symbols[z]}"))
    return [crystal for crystal in found if composition(crystal.numbers) not in materials.kept]


def _named(cell: Atoms, source: str, name: str) -> Atoms:
    crystal = cell.copy()
    crystal.info = {"material": name, "source": source}
    return crystal


def candidates(sources: Sources, count: int, seed: int) -> list[Atoms]:
    """Crystals in random order, `info["material"]` their names and `info["source"]` their kind.

    None has a composition that the index keeps or validates on, and every composition comes at most
    `PER_COMPOSITION` times.
    """
    random = np.random.default_rng([seed, 0])
    makers = {"substituted": _substituted, "prototype": _decorated, "binary": _other_binary}
    seen: Counter[Composition] = Counter()
    found: list[Atoms] = []
    for kind, share in SHARES.items():
        wanted, tries = round(share * count), 0
        mine: list[Atoms] = []
        while len(mine) < wanted and tries < TRIES * wanted:
            tries += 1
            crystal = makers[kind](sources, random)
            if crystal is None:
                continue
            own = composition(crystal.numbers)
            if seen[own] >= PER_COMPOSITION or not sources.materials.may_train(own):
                continue
            seen[own] += 1
            crystal.info["source"] = kind
            mine.append(crystal)
        found += mine
    return [found[i] for i in random.permutation(len(found))]


def _substituted(sources: Sources, random: np.random.Generator) -> Atoms | None:
    small = [pair for pair in sources.known if len(pair[1]) <= LARGEST]
    return _exchanged(*small[random.integers(len(small))], sources, random)


def _other_binary(sources: Sources, random: np.random.Generator) -> Atoms | None:
    return _exchanged(*sources.binaries[random.integers(len(sources.binaries))], sources, random)


def _exchanged(name: str, cell: Atoms, sources: Sources, random: np.random.Generator) -> Atoms | None:
    """A structure with some of its elements replaced by others of their group."""
    own = sorted({int(z) for z in cell.numbers})
    chosen = random.permutation(own)[: random.integers(1, len(own) + 1)]
    change: dict[int, int] = {}
    for z in chosen.tolist():
        taken = {*own, *change.values()}
        others = [q for q in _group(z) if q in sources.materials.elements and q not in taken]
        if others:
            change[z] = int(random.choice(others))
    if not change:
        return None
    return _renamed(cell, change, name, sources)


def _group(z: int) -> list[int]:
    symbol = chemical_symbols[z]
    return sorted({atomic_numbers[s] for group in GROUPS if symbol in group.split() for s in group.split()})


def _renamed(cell: Atoms, change: dict[int, int], name: str, sources: Sources) -> Atoms:
    """A structure with other elements, its volume changed like the sum over the atoms."""
    crystal = cell.copy()
    crystal.numbers = np.array([change.get(int(z), int(z)) for z in cell.numbers])
    before, after = (sum(sources.volumes[int(z)] for z in c.numbers) for c in (cell, crystal))
    crystal = scaled(crystal, cell.get_volume() * after / before)
    crystal.info["material"] = f"{name}-{crystal.get_chemical_formula()}"
    return crystal


def _decorated(sources: Sources, random: np.random.Generator) -> Atoms | None:
    """A prototype with any elements: the most frequent an anion, charges balanced, or an alloy."""
    name, cell = sources.prototypes[random.integers(len(sources.prototypes))]
    kinds = [z for z, _ in Counter(cell.numbers.tolist()).most_common()]
    metals = sorted(sources.materials.elements - ANIONS - NEITHER)
    alloy = random.random() < METALLIC
    change = {}
    for number, z in enumerate(kinds):
        pool = metals if alloy or number else sorted(sources.materials.elements & ANIONS)
        change[z] = int(random.choice(pool))
    if len(set(change.values())) < len(kinds):
        return None
    numbers = [change[z] for z in cell.numbers.tolist()]
    if not alloy and not balanced(composition(numbers)):
        return None
    crystal = cell.copy()
    crystal.numbers = np.array(numbers)
    crystal = scaled(crystal, sum(sources.volumes[z] for z in numbers))
    crystal.info["material"] = f"{name}-{crystal.get_chemical_formula()}"
    return crystal


def balanced(found: Composition) -> bool:
    """Whether common oxidation states of the elements, one each, add up to no charge."""
    states = [Element.from_Z(z).common_oxidation_states for z, _ in found]
    return any(sum(q * n for q, (_, n) in zip(s, found, strict=True)) == 0 for s in product(*states))


def _binaries(path: Path, materials: Materials) -> Iterator[tuple[str, Atoms]]:
    """Structures of a gzipped JSON list with pymatgen's structures."""
    with gzip.open(path) as stream:
        rows = json.load(stream)
    for row in rows:
        structure = Structure.from_dict(row["structure"])
        cell = _cell(structure)
        if len(cell) <= LARGEST and materials.elements.issuperset(cell.numbers.tolist()):
            yield row["mp_id"], cell


def _prototypes() -> Iterator[tuple[str, Atoms]]:
    """Ordered prototypes of two to four elements that pymatgen has of the AFLOW library."""
    path = Path(pymatgen.analysis.prototypes.__file__).parent / "aflow_prototypes.json.gz"
    with gzip.open(path) as stream:
        rows = json.load(stream)
    for row in rows:
        structure = Structure.from_dict(row["snl"])
        if len(structure) <= LARGEST and structure.is_ordered and 2 <= len(structure.composition) <= 4:
            yield str(row["tags"]["aflow"]), _cell(structure)


def _cell(structure: Structure) -> Atoms:
    """Species without their charges."""
    numbers = [site.specie.Z for site in structure]
    lattice = structure.lattice.matrix
    return Atoms(numbers, cell=lattice, scaled_positions=structure.frac_coords, pbc=True)


def _volumes(cells: list[Atoms]) -> dict[int, float]:
    """Volumes of atoms that add up to those of cells, by least squares, drawn weakly to 15 Å³."""
    counts = np.array([np.bincount(cell.numbers, minlength=120) for cell in cells], dtype=float)
    volumes = np.array([cell.get_volume() for cell in cells])
    found = np.linalg.solve(counts.T @ counts + np.eye(120), counts.T @ volumes + 15.0)
    return {z: max(3.0, float(v)) for z, v in enumerate(found)}
