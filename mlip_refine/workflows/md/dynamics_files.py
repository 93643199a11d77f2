"""Files of `md.dynamics`: numbers as JSON, curves as CSV."""

import csv
from collections.abc import Mapping
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor

from mlip_refine.config.sections.md import Dynamics
from mlip_refine.errors import StatisticsError
from mlip_refine.files import write_json, write_text
from mlip_refine.sampling import Trajectory
from mlip_refine.workflows.md.dynamics import Blocks, dynamics, refused
from mlip_refine.workflows.md.dynamics_records import DynamicsPoint, DynamicsResult


def write_dynamics(
    folder: Path,
    name: str,
    model_hash: str,
    runs: Mapping[str, Trajectory],
    skipped: int,
    interval: float,
    options: Dynamics,
) -> DynamicsResult:
    """Evaluate every point and write `dynamics.json` and `dynamics/POINT-*.csv`.

    Args:
        folder: The run folder.
        name: Of the run.
        model_hash: Of the potential.
        runs: By name of the point.
        skipped: Frames of the equilibration.
        interval: Between frames, fs.
        options: Of the config.

    Returns:
        What `dynamics.json` holds.
    """
    curves = folder / "dynamics"
    curves.mkdir(exist_ok=True)
    points = [_point(curves, run, skipped, interval, options) for run in runs.values()]
    result = DynamicsResult(folder, name, model_hash, tuple(points))
    write_json(folder / "dynamics.json", result.as_json())
    return result


def _point(folder: Path, run: Trajectory, skipped: int, interval: float, options: Dynamics) -> DynamicsPoint:
    try:
        blocks = Blocks.cut(run, skipped, interval, options.window)
    except StatisticsError as error:
        return refused(run, interval, options, str(error))
    point, times, spectrum = dynamics(blocks, options)
    _write_csv(folder / f"{point.name}-times.csv", times)
    _write_csv(folder / f"{point.name}-spectrum.csv", spectrum)
    return point


def _write_csv(path: Path, columns: Mapping[str, Tensor]) -> None:
    stream = StringIO()
    lines = csv.writer(stream, lineterminator="\n")
    lines.writerow(columns)
    rows = torch.stack([column.double() for column in columns.values()], dim=1).tolist()
    lines.writerows([f"{value:.8g}" for value in row] for row in rows)
    write_text(path, stream.getvalue())
