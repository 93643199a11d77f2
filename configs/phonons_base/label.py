"""Label many crystals near their equilibrium by a foundation potential.

    python label.py PHONONDB BENCHMARK BINARIES FOLDER [--count 15000] [--seed 1] [--model nequix-mp-1]

PHONONDB is a folder with an index.csv, BENCHMARK the structures of the benchmark of thermal conductivity,
BINARIES a gzipped list of structures. Frames go to FOLDER, 100 crystals a file; files that are there are not
made again, so that the same command goes on after an interruption, and any number of files is a fair sample.

First come known structures: of PHONONDB's training and validation parts, of BINARIES, and of single
elements; then structures like these with other elements. A crystal is brought to its volume, relaxed for a
few steps, and labelled at rest, in a small random supercell with displaced atoms and strain, after one and
two steps downhill from there, which take the stiff modes out, and at two other volumes.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import make_supercell
from ase.geometry import minkowski_reduce
from ase.io import write
from candidates import Sources, candidates, known
from crystals import Materials, load_teacher, scaled, unlink_partial, written
from numpy.typing import NDArray
from teacher import Label, Teacher

CHUNK = 100
"""Crystals in a file."""

VOLUMES = (0.10, 0.05)
"""Relative half-widths of the parabolas that find the volume."""

RELAXATION = 6
"""Steps of relaxation."""

STEP = 0.02
"""First step downhill, Å²/eV."""

STEPS = (0.008, 0.1)
"""Shortest and longest, Å²/eV."""

LARGEST_MOVE = 0.08
"""Of an atom in a step, Å."""

STRAIN_STEP = 1 / 30
"""Strain per strain derivative of the energy per atom, 1/eV."""

LARGEST_STRAIN = 0.02
"""In a step."""

ATOMS = (4, 14)
"""Of a supercell."""

RATTLE = (0.02, 0.15)
"""Standard deviations of displacements, Å, log-uniform."""


def main() -> None:
    """Label what is not labelled yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("phonondb", type=Path)
    parser.add_argument("benchmark", type=Path)
    parser.add_argument("binaries", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=15000, help="crystals")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--teacher", type=Path, default=Path(__file__).with_name("teacher.py"))
    parser.add_argument("--model", default="nequix-mp-1")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    unlink_partial(given.folder)
    materials = Materials.read(given.phonondb / "index.csv", given.benchmark)
    sources = Sources.read(materials, given.phonondb, given.binaries)
    teacher = load_teacher(given.teacher, given.model)
    unknown = candidates(sources, given.count, given.seed)
    label_all(teacher, known(sources), given.folder, "known", [given.seed, 2])
    label_all(teacher, unknown, given.folder, "frames", [given.seed, 1])


def label_all(teacher: Teacher, crystals: Sequence[Atoms], folder: Path, name: str, seed: list[int]) -> None:
    """Write the files of some crystals that are not there."""
    print(f"{name}: {len(crystals)} crystals", flush=True)
    for number, first in enumerate(range(0, len(crystals), CHUNK)):
        path = folder / f"{name}-{number:04d}.extxyz"
        if path.exists():
            continue
        started = time.process_time()
        random = np.random.default_rng([*seed, number])
        frames = labelled(teacher, crystals[first : first + CHUNK], random)
        with written(path) as partial:
            write(partial, frames, format="extxyz")
        print(f"{path.name}: {len(frames)} frames, {time.process_time() - started:.1f} CPU-s", flush=True)


def labelled(teacher: Teacher, crystals: Sequence[Atoms], random: np.random.Generator) -> list[Atoms]:
    """All frames of some crystals."""
    frames: list[Atoms] = []
    for width in VOLUMES:
        crystals, scanned = at_best_volume(teacher, crystals, width)
    frames += scanned
    crystals = relaxed(teacher, crystals)
    frames += [frame(*pair, "rest") for pair in zip(crystals, teacher(crystals), strict=True)]
    moved = [displaced(supercell(crystal, random), random) for crystal in crystals]
    for kind in ("rattled", "descent1", "descent2"):
        labels = teacher(moved)
        frames += [frame(*pair, kind) for pair in zip(moved, labels, strict=True)]
        moved = [downhill(c, label[1], STEP) for c, label in zip(moved, labels, strict=True)]
    return [f for f in frames if np.isfinite(f.info["REF_energy"])]


def at_best_volume(
    teacher: Teacher, crystals: Sequence[Atoms], width: float
) -> tuple[list[Atoms], list[Atoms]]:
    """Crystals at the lowest point of a parabola through three volumes, and frames of the outer two."""
    factors = (1 - width, 1.0, 1 + width)
    cells = [scaled(c, f * c.get_volume()) for c in crystals for f in factors]
    labels = teacher(cells)
    frames = [frame(cells[i], labels[i], "volume") for i in range(len(cells)) if i % 3 != 1]
    best = []
    for number, crystal in enumerate(crystals):
        low, middle, high = (labels[3 * number + k][0] for k in range(3))
        curvature = low - 2 * middle + high
        change = width * (low - high) / (2 * curvature) if curvature > 0 else np.sign(low - high)
        change = float(np.nan_to_num(np.clip(change, -2 * width, 2 * width)))
        best.append(scaled(crystal, (1 + change) * crystal.get_volume()))
    return best, frames


def relaxed(teacher: Teacher, crystals: Sequence[Atoms]) -> list[Atoms]:
    """Some steps of atoms and cell downhill, their length by Barzilai and Borwein (1988)."""
    crystals, lengths = list(crystals), [STEP] * len(crystals)
    before: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    for _ in range(RELAXATION):
        labels = teacher(crystals)
        places = [c.get_scaled_positions(wrap=False) for c in crystals]
        now = list(zip(places, (forces for _, forces, _ in labels), strict=True))
        for number, crystal in enumerate(crystals):
            if before:
                lengths[number] = step_length(crystal, before[number], now[number], lengths[number])
            forces, stress = labels[number][1:]
            if np.isfinite(forces).all() and np.isfinite(stress).all():
                crystals[number] = strained_back(downhill(crystal, forces, lengths[number]), stress)
        before = now
    return crystals


def step_length(
    crystal: Atoms,
    before: tuple[NDArray[np.float64], NDArray[np.float64]],
    now: tuple[NDArray[np.float64], NDArray[np.float64]],
    last: float,
) -> float:
    """Å²/eV, from what the last step changed."""
    moved = (now[0] - before[0]) @ crystal.cell.array
    change = before[1] - now[1]
    product = float((moved * change).sum())
    if not product > 0:
        return last
    return float(np.clip((moved**2).sum() / product, *STEPS))


def strained_back(crystal: Atoms, stress: NDArray[np.float64]) -> Atoms:
    """A step of the cell against its stress."""
    strain = -STRAIN_STEP * crystal.get_volume() / len(crystal) * (stress + stress.T) / 2
    strain *= min(1.0, LARGEST_STRAIN / max(1e-12, np.abs(strain).max()))
    changed = crystal.copy()
    changed.set_cell(crystal.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    return changed


def downhill(crystal: Atoms, forces: NDArray[np.float64], length: float) -> Atoms:
    """A step of the atoms along their forces."""
    step = length * np.nan_to_num(forces)
    step *= min(1.0, LARGEST_MOVE / max(1e-12, np.linalg.norm(step, axis=1).max()))
    changed = crystal.copy()
    changed.positions += step
    return changed


def supercell(crystal: Atoms, random: np.random.Generator) -> Atoms:
    """A random supercell, not too narrow, of about as many atoms as `ATOMS` says."""
    low, high = (max(1, n // len(crystal)) for n in ATOMS)
    best = crystal.copy()
    for _ in range(12):
        a, b, c = _factors(int(random.integers(low, high + 1)), random)
        shears = [int(random.integers(n)) for n in (b, c, c)]
        matrix = np.array([[a, 0, 0], [shears[0], b, 0], [shears[1], shears[2], c]])
        matrix = matrix[np.ix_(*[random.permutation(3)] * 2)]
        found = make_supercell(crystal, matrix)
        found.set_cell(minkowski_reduce(found.cell.array)[0])
        found.wrap()
        found.info = dict(crystal.info)
        if found.cell.lengths().min() > 2.8:
            return found
        best = found
    return best


def _factors(number: int, random: np.random.Generator) -> tuple[int, int, int]:
    first = int(random.choice([n for n in range(1, number + 1) if number % n == 0]))
    rest = number // first
    second = int(random.choice([n for n in range(1, rest + 1) if rest % n == 0]))
    return first, second, rest // second


def displaced(crystal: Atoms, random: np.random.Generator) -> Atoms:
    """Atoms out of place, and three times in five the cell strained."""
    moved = crystal.copy()
    if random.random() < 0.6:
        strain = random.normal(0, 0.015, (3, 3))
        strain = np.clip((strain + strain.T) / 2, -0.03, 0.03)
        strain -= np.eye(3) * np.trace(strain) / 3
        volume = random.uniform(0.93, 1.08) * crystal.get_volume()
        moved.set_cell(crystal.cell.array @ (np.eye(3) + strain), scale_atoms=True)
        moved = scaled(moved, volume)
    spread = np.exp(random.uniform(*np.log(RATTLE)))
    moved.positions += random.normal(0, spread, moved.positions.shape)
    return moved


def frame(crystal: Atoms, label: Label, kind: str) -> Atoms:
    """A crystal with its labels."""
    energy, forces, stress = label
    made = Atoms(crystal.numbers, positions=np.round(crystal.positions, 6), cell=crystal.cell, pbc=True)
    made.info = {key: crystal.info[key] for key in ("material", "source")}
    made.info |= {"config_type": kind, "REF_energy": round(float(energy), 6)}
    made.info["REF_stress"] = np.round(np.ravel(stress), 7)
    made.arrays["REF_forces"] = np.round(forces, 5)
    return made


if __name__ == "__main__":
    main()
