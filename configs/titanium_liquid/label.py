"""Label frames of molecular dynamics by a foundation potential, with the energies of DFT.

    python label.py DFT FOLDER FRAMES... [--model nequix-oam-1] [--teacher FILE]

DFT are labelled frames of crystals; FRAMES are what `mlip-refine md` exports, one file for every state.
FOLDER gets dft.extxyz, the crystals of DFT that are not extreme; train.extxyz and valid.extxyz, the labelled
frames, of every state the last sixth for validation; and labels.json, which tells how far the potential is
from DFT on the crystals. Energies are shifted, by one number per atom, to those of DFT on these.
"""

import argparse
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import read, write
from numpy.typing import NDArray

TEACHER = Path(__file__).parents[1] / "phonons_base" / "teacher.py"

VOLUME = (14.8, 23.0)
"""Of an atom of a frame of DFT, Å³."""

LARGEST_ENERGY = -6.95
"""eV/atom."""

LARGEST_FORCE = 9.0
"""Component, eV/Å."""

COMPARED = 200
"""Frames of DFT that the potential is compared with."""

VALID = 6
"""One frame in so many, at the end of every state, is for validation."""

BATCH = 8

type Label = tuple[float, NDArray[np.float64], NDArray[np.float64]]


def main() -> None:
    """Write the frames."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("dft", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("frames", type=Path, nargs="+")
    parser.add_argument("--teacher", type=Path, default=TEACHER)
    parser.add_argument("--model", default="nequix-oam-1")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    label = load(given.teacher, given.model)
    dft = [frame for frame in read(given.dft, ":") if usable(frame)]
    write(given.folder / "dft.extxyz", dft, format="extxyz")
    shift = compare(label, dft, given.seed, given.folder / "labels.json")
    parts: dict[str, list[Atoms]] = {"train": [], "valid": []}
    for path in sorted(given.frames):
        frames = read(path, ":")
        found = [
            labelled(*pair, path.stem, shift) for pair in zip(frames, batches(label, frames), strict=True)
        ]
        kept = len(found) - max(1, len(found) // VALID)
        parts["train"] += found[:kept]
        parts["valid"] += found[kept:]
    for name, frames in parts.items():
        write(given.folder / f"{name}.extxyz", frames, format="extxyz")
        print(f"{name}: {len(frames)} frames, {sum(map(len, frames))} atoms")


def load(file: Path, model: str) -> Callable[[Sequence[Atoms]], list[Label]]:
    """The teacher that a file has."""
    spec = importlib.util.spec_from_file_location("given_teacher", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(model)


def usable(frame: Atoms) -> bool:
    """Whether a frame of DFT is not extreme."""
    near = VOLUME[0] < frame.get_volume() / len(frame) < VOLUME[1]
    near &= frame.info["REF_energy"] / len(frame) < LARGEST_ENERGY
    return bool(near and np.abs(frame.arrays["REF_forces"]).max() < LARGEST_FORCE)


def compare(
    label: Callable[[Sequence[Atoms]], list[Label]], dft: Sequence[Atoms], seed: int, path: Path
) -> float:
    """Energy per atom that DFT has beyond the potential, eV; the errors that are left go to a file."""
    chosen = np.random.default_rng(seed).permutation(len(dft))[:COMPARED]
    frames = [dft[i] for i in sorted(chosen.tolist())]
    labels = batches(label, frames)
    beyond = np.array([(f.info["REF_energy"] - x[0]) / len(f) for f, x in zip(frames, labels, strict=True)])
    shift = float(np.median(beyond))
    forces = [x[1] - f.arrays["REF_forces"] for f, x in zip(frames, labels, strict=True)]
    stress = [x[2] - np.reshape(f.info["REF_stress"], (3, 3)) for f, x in zip(frames, labels, strict=True)]
    found = {
        "frames": len(frames),
        "shift_eV_per_atom": shift,
        "energy_mae_meV_per_atom": 1e3 * float(np.abs(beyond - shift).mean()),
        "forces_mae_meV_per_A": 1e3 * float(np.abs(np.concatenate(forces)).mean()),
        "stress_mae_GPa": 160.2177 * float(np.abs(stress).mean()),
    }
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    return shift


def batches(label: Callable[[Sequence[Atoms]], list[Label]], frames: Sequence[Atoms]) -> list[Label]:
    """Labels of frames, a few at a time."""
    bare = [Atoms(f.numbers, positions=f.positions, cell=f.cell, pbc=True) for f in frames]
    return [x for first in range(0, len(bare), BATCH) for x in label(bare[first : first + BATCH])]


def labelled(frame: Atoms, label: Label, state: str, shift: float) -> Atoms:
    """A frame with its labels."""
    energy, forces, stress = label
    made = Atoms(
        frame.numbers, positions=np.round(frame.positions, 5), cell=np.round(frame.cell, 6), pbc=True
    )
    made.info["config_type"] = state.split("-", maxsplit=1)[0]
    made.info["state"] = state
    made.info["REF_energy"] = round(float(energy) + shift * len(frame), 6)
    made.info["REF_stress"] = np.round(np.ravel(stress), 7)
    made.arrays["REF_forces"] = np.round(forces, 5)
    return made


if __name__ == "__main__":
    main()
