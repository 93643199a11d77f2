"""Files of molecular dynamics for other programs: series as CSV, frames as extended XYZ."""

import csv
from collections.abc import Iterator, Mapping
from io import StringIO
from pathlib import Path

import torch
from ase import Atoms
from ase.io import write

from mlip_refine.files import write_text, written
from mlip_refine.sampling import Trajectory
from mlip_refine.workflows.md.averages import UNITS, series


def write_series(path: Path, runs: Mapping[str, Trajectory], interval: float) -> None:
    """Write every frame of every replica as a line, those of the equilibration too.

    Args:
        path: Of the CSV file; it appears whole or not at all.
        runs: By name of the point.
        interval: Between frames, fs.
    """
    stream = StringIO()
    lines = csv.writer(stream, lineterminator="\n")
    lines.writerow(
        ["point", "replica", "time_ps", "kept", *(f"{name} ({unit})" for name, unit in UNITS.items())]
    )
    for name, run in runs.items():
        for replica, frame, values in _rows(run):
            kept = int(run.kept[replica, frame])
            lines.writerow([name, replica, (frame + 1) * interval / 1e3, kept, *values])
    write_text(path, stream.getvalue())


def _rows(run: Trajectory) -> Iterator[tuple[int, int, list[float]]]:
    """Replica, frame and its quantities."""
    columns = torch.stack(list(series(run).values()), dim=-1).tolist()
    for replica, frames in enumerate(columns):
        for frame, values in enumerate(frames):
            yield replica, frame, values


def write_frames(path: Path, run: Trajectory, interval: float, skipped: int) -> None:
    """Write the frames that count, with the model's energy (eV) and stress (eV/Å³, tensile positive).

    They are named as `mace_eval_configs` names them: `MACE_energy` and `MACE_stress`. Positions are not
    wrapped into the cell, so that displacements can be followed.

    Args:
        path: Of the file; it appears whole or not at all.
        run: All frames.
        interval: Between frames, fs.
        skipped: Frames of the equilibration.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as partial, partial.open("w", encoding="utf-8") as stream:
        for replica, frame in run.kept.nonzero().tolist():
            if frame >= skipped:
                atoms = _frame(run, replica, frame)
                atoms.info |= {"replica": replica, "time_ps": (frame + 1) * interval / 1e3}
                write(stream, atoms, format="extxyz")


def _frame(run: Trajectory, replica: int, frame: int) -> Atoms:
    positions, cell = run.positions[replica, frame].numpy(), run.cells[replica, frame].numpy()
    atoms = Atoms(run.point.atoms.numbers, positions, cell=cell, pbc=True)
    atoms.info["config_type"] = run.point.name
    atoms.info["MACE_energy"] = float(run.model_energy[replica, frame])
    atoms.info["MACE_stress"] = run.stress[replica, frame].numpy()
    return atoms
