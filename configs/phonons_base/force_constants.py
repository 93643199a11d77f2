"""Force constants of crystals at rest by a foundation potential, as phonopy keeps them.

    python force_constants.py PHONONDB BENCHMARK FOLDER FRAMES... [--count 3000] [--seed 1]

FRAMES are extended XYZ files; their frames with `config_type=rest` are taken, file by file, and within a file
in random order: one of every composition and number of atoms, with forces and stress below `CALM`, and none
that PHONONDB's index keeps for its test or validation, or the benchmark of thermal conductivity has.

FOLDER gets one compressed `phonopy_params.yaml` for every material, forces of displaced supercells in it, and
an index.csv that `mlip-refine` reads: what was calculated is its part `train`; its part `val` are the stable
materials of PHONONDB's validation part, with forces of DFT. What is there is not calculated again, so that
the same command goes on after an interruption.
"""

import argparse
import csv
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import iread
from crystals import (
    Composition,
    Materials,
    as_primitive,
    composition,
    load_teacher,
    reduced_formula,
    unlink_partial,
    written,
)
from phonopy import Phonopy
from phonopy.structure.atoms import PhonopyAtoms
from teacher import Teacher

CALM = (0.15, 0.03)
"""Largest force, eV/Å, and component of the stress, eV/Å³, of a crystal that counts as at rest."""

SYMPREC = 2e-3
"""How far from symmetric the relaxation may have left atoms, Å."""

DISPLACEMENT = 0.02
"""Å."""

LENGTH = 7.0
"""Of the edges of a supercell, about, Å."""

ATOMS = 40
"""Of a supercell, at most, where the primitive cell has no more."""

DISPLACED = 24
"""Displaced supercells of a material, at most."""

SOFTEST = -3.0
"""THz: materials with a mode below this are left out."""

COLUMNS = ("file", "name", "split", "lowest_frequency", "formula", "functional")


def main() -> None:
    """Calculate what is not there yet, and write the index."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("phonondb", type=Path)
    parser.add_argument("benchmark", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("frames", type=Path, nargs="+")
    parser.add_argument("--count", type=int, default=3000, help="materials")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--teacher", type=Path, default=Path(__file__).with_name("teacher.py"))
    parser.add_argument("--model", default="nequix-mp-1")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    unlink_partial(given.folder)
    materials = Materials.read(given.phonondb / "index.csv", given.benchmark)
    teacher = load_teacher(given.teacher, given.model)
    validation = validation_rows(materials, given.phonondb, given.folder)
    write_index(given.folder, validation)
    done, started, spent = 0, time.monotonic(), time.process_time()
    for crystal in at_rest(given.frames, materials, given.seed):
        if done == given.count:
            break
        done += calculated(teacher, crystal, given.folder)
        if done % 50 == 0:
            write_index(given.folder, validation)
            passed, cpu = time.monotonic() - started, time.process_time() - spent
            print(f"{done} materials, {passed:.0f} s, {cpu:.0f} CPU-s", flush=True)
    write_index(given.folder, validation)
    print(f"{done} materials in all", flush=True)


def at_rest(paths: Sequence[Path], materials: Materials, seed: int) -> Iterator[Atoms]:
    """Primitive cells of frames at rest."""
    seen: set[tuple[Composition, int]] = set()
    for number, path in enumerate(paths):
        found = [atoms for atoms in iread(path, ":") if atoms.info["config_type"] == "rest"]
        for i in np.random.default_rng([seed, number]).permutation(len(found)):
            own = composition(found[i].numbers)
            if not calm(found[i]) or not materials.may_train(own):
                continue
            crystal = as_primitive(found[i], SYMPREC)
            if crystal is None or (own, len(crystal)) in seen:
                continue
            seen.add((own, len(crystal)))
            yield crystal


def calm(frame: Atoms) -> bool:
    """Whether a frame is at rest."""
    largest = np.abs(frame.arrays["REF_forces"]).max(), np.abs(frame.info["REF_stress"]).max()
    return bool(largest[0] < CALM[0] and largest[1] < CALM[1])


def calculated(teacher: Teacher, crystal: Atoms, folder: Path) -> bool:
    """Whether there is a file of a crystal, which is written if it is not there: some are of no use."""
    name = f"{reduced_formula(composition(crystal.numbers))}-{len(crystal)}"
    path, refused = folder / f"{name}.yaml.xz", folder / f"{name}.refused"
    frequency = folder / f"{name}.thz"
    if refused.exists():
        return False
    if path.exists() and frequency.exists():
        return True
    phonon, lowest = phonons(teacher, crystal)
    if phonon is None:
        refused.touch()
        return False
    with written(path) as partial:
        saved = phonon.save(partial.with_suffix(""), settings=_SETTINGS, compression="xz")
        Path(saved).replace(partial)
    with written(frequency) as partial:
        partial.write_text(f"{lowest:.4f}\n")
    return True


_SETTINGS = {
    "force_sets": True,
    "displacements": True,
    "force_constants": False,
    "born_effective_charge": False,
}


def phonons(teacher: Teacher, crystal: Atoms) -> tuple[Phonopy | None, float]:
    """Forces of displaced supercells less those at rest, and the lowest frequency, THz."""
    places = crystal.get_scaled_positions()
    cell = PhonopyAtoms(numbers=crystal.numbers, cell=crystal.cell.array, scaled_positions=places)
    phonon = Phonopy(cell, np.diag(multiples(crystal)), primitive_matrix=np.eye(3))
    phonon.generate_displacements(distance=DISPLACEMENT)
    moved = phonon.supercells_with_displacements
    if len(moved) > DISPLACED:
        return None, 0.0
    labels = teacher([as_ase(c) for c in (phonon.supercell, *moved)])
    forces = np.array([label[1] for label in labels])
    if not np.isfinite(forces).all():
        return None, 0.0
    phonon.forces = forces[1:] - forces[0]
    phonon.produce_force_constants(show_drift=False)
    phonon.symmetrize_force_constants(show_drift=False)
    phonon.run_mesh([4, 4, 4], is_gamma_center=True)
    lowest = float(phonon.get_mesh_dict()["frequencies"].min())
    return (phonon, lowest) if lowest > SOFTEST else (None, lowest)


def multiples(crystal: Atoms) -> list[int]:
    """How often to repeat a cell along its vectors: alike along equal ones."""
    lengths, length = crystal.cell.lengths(), LENGTH
    while True:
        found = [max(1, round(length / edge)) for edge in lengths]
        if np.prod(found) * len(crystal) <= ATOMS or max(found) == 1:
            return found
        length *= 0.95


def as_ase(cell: PhonopyAtoms) -> Atoms:
    """The same cell."""
    return Atoms(cell.numbers, cell=cell.cell, scaled_positions=cell.scaled_positions, pbc=True)


def validation_rows(materials: Materials, phonondb: Path, folder: Path) -> list[dict[str, str]]:
    """Stable materials of the validation part, with forces of DFT."""
    return [
        {
            "file": os.path.relpath((phonondb / row["file"]).resolve(), folder.resolve()),
            "name": row["mpid"],
            "split": "val",
            "lowest_frequency": row["wmin_THz"],
            "formula": row["formula"],
            "functional": "PBEsol",
        }
        for row in materials.valid
    ]


def write_index(folder: Path, validation: Sequence[dict[str, str]]) -> None:
    """Write index.csv, with all that is in the folder."""
    found = sorted(folder.glob("*.thz"))
    rows = [
        {
            "file": f"{path.stem}.yaml.xz",
            "name": path.stem,
            "split": "train",
            "lowest_frequency": path.read_text().strip(),
            "formula": path.stem.split("-", maxsplit=1)[0],
            "functional": "PBE",
        }
        for path in found
    ]
    with written(folder / "index.csv") as partial, partial.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*validation, *rows])


if __name__ == "__main__":
    main()
