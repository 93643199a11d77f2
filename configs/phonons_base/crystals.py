"""What the scripts of this folder share: compositions and what is kept, crystals, files, the teacher."""

import csv
import importlib.util
import io
import lzma
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import spglib
from ase import Atoms
from ase.data import atomic_numbers, chemical_symbols
from ase.io import iread
from ase.io.vasp import read_vasp
from teacher import Label, Teacher

type Composition = tuple[tuple[int, int], ...]
"""Atomic numbers and how often they occur, in smallest integers."""

STABLE = -0.1
"""THz: lowest frequency of a material that is at rest."""


def composition(numbers: Sequence[int]) -> Composition:
    """Composition of atoms."""
    counts = Counter(int(z) for z in numbers)
    divisor = int(np.gcd.reduce(list(counts.values())))
    return tuple(sorted((z, n // divisor) for z, n in counts.items()))


def of_formula(formula: str) -> Composition:
    """Composition of a formula without brackets."""
    parts = re.findall(r"([A-Z][a-z]?)(\d*)", formula)
    return composition([z for symbol, n in parts for z in [atomic_numbers[symbol]] * int(n or 1)])


def reduced_formula(found: Composition) -> str:
    """`Al2O3`, elements by alphabet."""
    parts = sorted((chemical_symbols[z], n) for z, n in found)
    return "".join(symbol + (str(n) if n > 1 else "") for symbol, n in parts)


def held_out(found: Composition) -> bool:
    """Whether a composition, of no part of the index, is for validation: one in 25, by its formula."""
    return zlib.crc32(reduced_formula(found).encode()) % 25 == 0


@dataclass(frozen=True)
class Materials:
    """Stable materials of phonondb, and which compositions no frame may have.

    Attributes:
        train: Rows of the index that may be learnt from.
        valid: Those of its validation part.
        kept: Compositions of its test part and of the benchmark of thermal conductivity.
        validation: Compositions of its validation part.
        elements: That the stable materials have.
    """

    train: tuple[dict[str, str], ...]
    valid: tuple[dict[str, str], ...]
    kept: frozenset[Composition]
    validation: frozenset[Composition]
    elements: frozenset[int]

    @classmethod
    def read(cls, index: Path, benchmark: Path) -> "Materials":
        """Read the index and the structures of the benchmark."""
        with index.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        found = {row["file"]: of_formula(row["formula"]) for row in rows}
        kept = {found[r["file"]] for r in rows if r["pft_split"] == "test" or r["in_kappa103"] == "1"}
        kept |= {composition(atoms.numbers) for atoms in iread(benchmark, ":")}
        stable = [row for row in rows if float(row["wmin_THz"]) > STABLE]
        usable = [r for r in stable if found[r["file"]] not in kept]
        return cls(
            train=tuple(r for r in usable if r["pft_split"] == "train"),
            valid=tuple(r for r in usable if r["pft_split"] == "val"),
            kept=frozenset(kept),
            validation=frozenset(found[r["file"]] for r in rows if r["pft_split"] == "val"),
            elements=frozenset(z for r in stable for z, _ in found[r["file"]]),
        )

    def may_train(self, found: Composition) -> bool:
        """Whether a composition is neither kept nor for validation by the index."""
        return found not in self.kept and found not in self.validation


def primitive_cell(archive: Path) -> Atoms:
    """Primitive cell of a material of phonondb."""
    with lzma.open(archive) as packed, tarfile.open(fileobj=io.BytesIO(packed.read())) as files:
        name = next(n for n in files.getnames() if n.endswith("POSCAR-unitcell"))
        cell = read_vasp(io.StringIO(files.extractfile(name).read().decode()))
    return as_primitive(cell, 1e-4) or cell


def as_primitive(cell: Atoms, symprec: float) -> Atoms | None:
    """The primitive cell with its symmetry made exact; None where none is found."""
    found = spglib.standardize_cell(
        (cell.cell.array, cell.get_scaled_positions(), cell.numbers), to_primitive=True, symprec=symprec
    )
    if found is None:
        return None
    lattice, positions, numbers = found
    return Atoms(numbers, cell=lattice, scaled_positions=positions, pbc=True)


def scaled(cell: Atoms, volume: float) -> Atoms:
    """The cell with another volume, Å³."""
    changed = cell.copy()
    changed.set_cell(cell.cell.array * (volume / cell.get_volume()) ** (1 / 3), scale_atoms=True)
    return changed


def load_teacher(file: Path, name: str) -> Teacher:
    """The teacher that a file has, safe against single crystals that it fails on.

    A crystal that it fails on has labels that are no numbers.
    """
    spec = importlib.util.spec_from_file_location("given_teacher", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    label = module.load(name)

    def one(crystal: Atoms) -> Label:
        try:
            return label([crystal])[0]
        except Exception:  # noqa: BLE001  what a foreign potential raises
            nothing = np.full((len(crystal), 3), np.nan)
            return float("nan"), nothing, np.full((3, 3), np.nan)

    def safe(crystals: Sequence[Atoms]) -> list[Label]:
        try:
            return label(crystals)
        except Exception:  # noqa: BLE001
            return [one(crystal) for crystal in crystals]

    return safe


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A file that is there when it is complete, and otherwise not at all."""
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    yield partial
    partial.replace(path)


def unlink_partial(folder: Path) -> None:
    """Remove what an interrupted run has left."""
    for path in folder.glob(".*-*"):
        path.unlink()
