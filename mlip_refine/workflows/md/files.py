"""Files of molecular dynamics for other programs: series and curves as CSV, frames as extended XYZ."""

import csv
from collections.abc import Mapping
from io import StringIO
from pathlib import Path

import torch
from ase import Atoms
from ase.io import write
from torch import Tensor

from mlip_refine.config.sections.md import Dynamics
from mlip_refine.errors import StatisticsError
from mlip_refine.files import write_text, written
from mlip_refine.sampling import Trajectory
from mlip_refine.workflows.md.averages import UNITS, series
from mlip_refine.workflows.md.dynamics import Blocks, dynamics, refused
from mlip_refine.workflows.md.records import DynamicsPoint


def write_series(path: Path, runs: Mapping[str, Trajectory], interval: float) -> None:
    """Write every frame of every replica as a line, those of the equilibration too.

    Args:
        path: Path of the CSV file; it appears whole or not at all.
        runs: Trajectories by name of the point.
        interval: Time between frames, fs.
    """
    stream = StringIO()
    lines = csv.writer(stream, lineterminator="\n")
    lines.writerow(
        ["point", "replica", "time_ps", "kept", *(f"{name} ({unit})" for name, unit in UNITS.items())]
    )
    for name, run in runs.items():
        values = torch.stack(list(series(run).values()), dim=-1).tolist()
        for replica, frames in enumerate(values):
            for frame, row in enumerate(frames):
                kept = int(run.kept[replica, frame])
                lines.writerow([name, replica, (frame + 1) * interval / 1e3, kept, *row])
    write_text(path, stream.getvalue())


def write_frames(path: Path, run: Trajectory, interval: float, skipped: int) -> None:
    """Write the frames that count, with the model's energy (eV) and stress (eV/Å³, tensile positive).

    They are named as `mace_eval_configs` names them: `MACE_energy` and `MACE_stress`. Positions are not
    wrapped into the cell, so that displacements can be followed.

    Args:
        path: Path of the file; it appears whole or not at all.
        run: Trajectory with all frames.
        interval: Time between frames, fs.
        skipped: Number of frames of the equilibration.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as partial, partial.open("w", encoding="utf-8") as stream:
        for replica, frame in run.kept.nonzero().tolist():
            if frame < skipped:
                continue
            positions, cell = run.positions[replica, frame].numpy(), run.cells[replica, frame].numpy()
            atoms = Atoms(run.point.atoms.numbers, positions, cell=cell, pbc=True)
            atoms.info = {
                "config_type": run.point.name,
                "MACE_energy": float(run.model_energy[replica, frame]),
                "MACE_stress": run.stress[replica, frame].numpy(),
                "replica": replica,
                "time_ps": (frame + 1) * interval / 1e3,
            }
            write(stream, atoms, format="extxyz")


def write_dynamics(
    folder: Path, runs: Mapping[str, Trajectory], skipped: int, interval: float, options: Dynamics
) -> tuple[DynamicsPoint, ...]:
    """Evaluate the dynamics of every point, and write its curves, `POINT-times.csv` and `POINT-spectrum.csv`.

    Args:
        folder: Folder of the files.
        runs: Trajectories by name of the point.
        skipped: Number of frames of the equilibration.
        interval: Time between frames, fs.
        options: Options of the config.
    """
    folder.mkdir(exist_ok=True)
    points = []
    for run in runs.values():
        try:
            blocks = Blocks.cut(run, skipped, interval, options.window)
        except StatisticsError as error:
            points.append(refused(run, interval, options, str(error)))
            continue
        point, times, spectrum = dynamics(blocks, options)
        _write_columns(folder / f"{point.name}-times.csv", times)
        _write_columns(folder / f"{point.name}-spectrum.csv", spectrum)
        points.append(point)
    return tuple(points)


def _write_columns(path: Path, columns: Mapping[str, Tensor]) -> None:
    stream = StringIO()
    lines = csv.writer(stream, lineterminator="\n")
    lines.writerow(columns)
    rows = torch.stack([column.double() for column in columns.values()], dim=1).tolist()
    lines.writerows([f"{value:.8g}" for value in row] for row in rows)
    write_text(path, stream.getvalue())
