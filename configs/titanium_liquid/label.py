"""Label frames of molecular dynamics by a foundation potential, with the energies of DFT.

    python label.py DFT FOLDER FRAMES... [--held-out DFT...] [--model nequix-oam-1] [--teacher FILE]

DFT are labelled frames of crystals; FRAMES are what `mlip-refine md` exports, one file for every state.
FOLDER gets dft.extxyz, the crystals of DFT that are not extreme; train.extxyz and valid.extxyz, the labelled
frames, of every state the last sixth for validation; and labels.json, which tells how far the potential is
from DFT on the crystals. Energies are shifted, by one number per atom, to those of DFT on crystals as hot and
as dense as the labelled frames; README.md says why it is one number.
"""

import argparse
import importlib.util
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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

HOT = 1000
"""Crystals of DFT from dynamics above this temperature, K, give the shift."""

DENSE = (15.0, 20.6)
"""Volume of an atom of the crystals that give the shift, Å³."""

UNLIKE = ("inter", "diamond")
"""In the kind of a frame: crowded or open as no titanium is that the labelled frames show."""

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
    parser.add_argument("--held-out", type=Path, nargs="*", default=[])
    parser.add_argument("--teacher", type=Path, default=TEACHER)
    parser.add_argument("--model", default="nequix-oam-1")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    label = load(given.teacher, given.model)
    dft = [frame for frame in read(given.dft, ":") if usable(frame)]
    write(given.folder / "dft.extxyz", dft, format="extxyz")
    found = {"fitted": compare(label, dft)}
    if given.held_out:
        held = [frame for path in given.held_out for frame in read(path, ":") if usable(frame)]
        found["held out"] = compare(label, held)
    (given.folder / "labels.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    shift = found["fitted"]["shift_eV_per_atom"]
    parts: dict[str, list[Atoms]] = {"train": [], "valid": []}
    for path in sorted(given.frames):
        frames = read(path, ":")
        made = [labelled(*x, path.stem, shift) for x in zip(frames, batches(label, frames), strict=True)]
        kept = len(made) - max(1, len(made) // VALID)
        parts["train"] += made[:kept]
        parts["valid"] += made[kept:]
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


def compare(label: Callable[[Sequence[Atoms]], list[Label]], dft: Sequence[Atoms]) -> dict[str, Any]:
    """How far the potential is from DFT: the shift, and what it leaves, of every trajectory.

    Frames of one trajectory share a cell and its mesh of k-points, and so an error of that mesh: each
    trajectory counts once, whatever its number of frames. The standard error is over trajectories.
    """
    chosen = [frame for frame in dft if like_labelled(frame)]
    runs: dict[str, list[float]] = defaultdict(list)
    forces, stress = [], []
    for frame, found in zip(chosen, batches(label, chosen), strict=True):
        kind = f"{frame.info['config_type']}, {frame.info['traj']}"
        runs[kind].append((frame.info["REF_energy"] - found[0]) / len(frame))
        forces.append(np.abs(found[1] - frame.arrays["REF_forces"]).mean())
        stress.append(np.abs(found[2] - np.reshape(frame.info["REF_stress"], (3, 3))).mean())
    means = {kind: float(np.mean(x)) for kind, x in runs.items()}
    values = np.array(list(means.values()))
    return {
        "frames": len(chosen),
        "trajectories": len(runs),
        "shift_eV_per_atom": float(values.mean()),
        "shift_se_eV_per_atom": float(values.std(ddof=1) / np.sqrt(len(values))),
        "spread_of_trajectories_meV_per_atom": 1e3 * float(values.std(ddof=1)),
        "forces_mae_meV_per_A": 1e3 * float(np.mean(forces)),
        "stress_mae_GPa": 160.2177 * float(np.mean(stress)),
        "beyond_meV_per_atom": {kind: round(1e3 * x, 1) for kind, x in means.items()},
    }


def like_labelled(frame: Atoms) -> bool:
    """Whether a frame of DFT is as hot and as dense as what is labelled."""
    dense = DENSE[0] < frame.get_volume() / len(frame) < DENSE[1]
    return dense and frame.info["T"] > HOT and not any(x in frame.info["config_type"] for x in UNLIKE)


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
