"""Frames to train on and to validate with, from labelled ones.

    python collect.py PHONONDB BENCHMARK FOLDER FRAMES... [--most N] [--seed 1]

Left out are frames far from rest (`LARGEST_FORCE`, `LARGEST_STRESS`, `LARGEST_ENERGY`) and all compositions
of the index's test part and of the benchmark of thermal conductivity. Compositions of its validation part,
and one in 25 of the others, go to FOLDER/valid.extxyz, the rest to FOLDER/train.extxyz, in random order; at
most N frames of a kind `--most` takes (`--most volume=5000`). FOLDER/elements.json has energies of atoms, by
least squares on the training frames, and what an untrained model must know besides.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase.data import atomic_numbers
from crystals import Composition, Materials, composition, held_out, written
from numpy.typing import NDArray

LARGEST_FORCE = 10.0
"""Component, eV/Å."""

LARGEST_STRESS = 0.25
"""Component, eV/Å³."""

LARGEST_ENERGY = 2.5
"""Distance from the energies of atoms, eV/atom."""

VALID = 2000
"""Frames for validation, at most."""


@dataclass(frozen=True)
class Frame:
    """What decides on a frame, and its text."""

    text: str
    composition: Composition
    counts: NDArray[np.float64]
    energy: float
    kind: str
    source: str

    @property
    def n_atoms(self) -> int:
        """Number of atoms."""
        return int(self.counts.sum())


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("phonondb", type=Path)
    parser.add_argument("benchmark", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("frames", type=Path, nargs="+")
    parser.add_argument("--most", nargs="*", default=[], help="such as volume=5000")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    materials = Materials.read(given.phonondb / "index.csv", given.benchmark)
    frames = [f for path in given.frames for f in calm_frames(path) if f.composition not in materials.kept]
    print(f"{len(frames)} calm frames of compositions that are not kept")
    energies = atom_energies(frames)
    frames = [f for f in frames if abs(excess(f, energies)) < LARGEST_ENERGY]
    valid = [f for f in frames if f.composition in materials.validation or held_out(f.composition)]
    chosen = {id(f) for f in valid}
    train = [f for f in frames if id(f) not in chosen]
    energies = atom_energies(train)
    most = {kind: int(n) for kind, n in (word.split("=") for word in given.most)}
    random = np.random.default_rng(given.seed)
    train = limited([train[i] for i in random.permutation(len(train))], most)
    known = {z for f in train for z, _ in f.composition}
    valid = [valid[i] for i in random.permutation(len(valid)) if known.issuperset(dict(valid[i].composition))]
    given.folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("valid", valid[:VALID])):
        with written(given.folder / f"{name}.extxyz") as partial:
            partial.write_text("".join(f.text for f in part))
        print(
            f"{name}: {len(part)} frames, {sum(f.n_atoms for f in part)} atoms, "
            f"{len({f.composition for f in part})} compositions, {dict(Counter(f.source for f in part))}, "
            f"{dict(Counter(f.kind for f in part))}"
        )
    spread = float(np.std([excess(f, energies) for f in train]))
    print(f"{len(known)} elements, energies spread by {spread:.3f} eV/atom")
    found = {str(z): energies[z] for z in sorted(known)}
    (given.folder / "elements.json").write_text(json.dumps({"E0s": found}, indent=1) + "\n")


def calm_frames(path: Path) -> Iterator[Frame]:
    """Frames with small forces and stress, read as text: `ase.io.read` takes minutes for as many."""
    with path.open() as stream:
        for line in stream:
            n = int(line)
            header = stream.readline()
            rows = [stream.readline() for _ in range(n)]
            cells = [row.split() for row in rows]
            forces = np.array([row[4:7] for row in cells], dtype=float)
            stress = np.array(_quoted(header, "REF_stress").split(), dtype=float)
            if not (np.abs(forces).max() < LARGEST_FORCE and np.abs(stress).max() < LARGEST_STRESS):
                continue
            numbers = [atomic_numbers[row[0]] for row in cells]
            yield Frame(
                text=f"{n}\n{header}{''.join(rows)}",
                composition=composition(numbers),
                counts=np.bincount(numbers, minlength=120).astype(float),
                energy=float(re.search(r"REF_energy=(\S+)", header)[1]),
                kind=re.search(r"config_type=(\S+)", header)[1],
                source=re.search(r"source=(\S+)", header)[1],
            )


def _quoted(header: str, key: str) -> str:
    return re.search(rf'{key}="([^"]*)"', header)[1]


def atom_energies(frames: Sequence[Frame]) -> NDArray[np.float64]:
    """Energies of atoms by number, eV: least squares of energies per atom, without what is far off."""
    kept = list(frames)
    for _ in range(3):
        shares = np.array([f.counts / f.n_atoms for f in kept])
        energies = np.array([f.energy / f.n_atoms for f in kept])
        found = np.linalg.lstsq(shares, energies, rcond=None)[0]
        kept = [f for f in kept if abs(excess(f, found)) < LARGEST_ENERGY]
    return found


def excess(frame: Frame, energies: NDArray[np.float64]) -> float:
    """Energy of a frame beyond that of its atoms, eV/atom."""
    return (frame.energy - float(frame.counts @ energies)) / frame.n_atoms


def limited(frames: Sequence[Frame], most: dict[str, int]) -> list[Frame]:
    """Not more frames of a kind than wanted."""
    counts: Counter[str] = Counter()
    kept = []
    for frame in frames:
        counts[frame.kind] += 1
        if counts[frame.kind] <= most.get(frame.kind, len(frames)):
            kept.append(frame)
    return kept


if __name__ == "__main__":
    main()
