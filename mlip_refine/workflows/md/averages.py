"""Series and averages of a trajectory: energy, enthalpy, volume, density, pressure and the cell.

Energy and enthalpy are those of the configurations, without the 3/2 kT per atom that is the same for all
phases. The temperature is that of the momenta. The pressure has its kinetic part N kT/V, with the temperature
that is held in nvt and npt, and in nve and nph, which hold none, with that of the momenta.
"""

import csv
from collections.abc import Mapping
from io import StringIO
from math import sqrt
from pathlib import Path
from types import EllipsisType

import torch
from torch import Tensor

from mlip_refine.errors import StatisticsError
from mlip_refine.files import write_text
from mlip_refine.observables.cell import ANGLES, GRAMS_PER_CM3, cell_angles, cell_lengths
from mlip_refine.quantities import GPA, KB, Measured
from mlip_refine.sampling import StatePoint, Trajectory
from mlip_refine.sampling.md.barostat import strain_projection
from mlip_refine.statistics import require_effective
from mlip_refine.workflows.md.records import Average

UNITS = {
    "energy": "eV/atom",
    "enthalpy": "eV/atom",
    "volume": "Å³/atom",
    "density": "g/cm³",
    "temperature": "K",
    "pressure": "GPa",
    "a": "Å",
    "b": "Å",
    "c": "Å",
    "alpha": "°",
    "beta": "°",
    "gamma": "°",
}
CELL = ("a", "b", "c", *ANGLES)

_STRAIN = 1e-4


def series(run: Trajectory, frames: Tensor | EllipsisType = ...) -> dict[str, Tensor]:
    """Return every quantity of every frame `[...]`, in the units of `UNITS`.

    In npt and nph the enthalpy is U + P V with the pressure that is held, else with the one of the frame.

    Args:
        run: The trajectory.
        frames: Mask `[replicas, n_frames]` of the frames to take, replica after replica; by default all, in
            their grid.
    """
    point, n, cells = run.point, run.n_atoms, run.cells[frames]
    volume = torch.linalg.det(cells).abs()
    kinetic = 2.0 * run.kinetic_energy[frames] / (KB * point.degrees_of_freedom)
    temperature = point.temperature if point.ensemble in ("nvt", "npt") else kinetic
    pressure = -run.stress[frames].diagonal(dim1=-2, dim2=-1).mean(-1) + n * KB * temperature / volume
    held_pressure = pressure if point.freedom == "fixed" else point.pressure * GPA
    found = {
        "energy": run.model_energy[frames] / n,
        "enthalpy": (run.model_energy[frames] + held_pressure * volume) / n,
        "volume": volume / n,
        "density": float(point.atoms.get_masses().sum()) * GRAMS_PER_CM3 / volume,
        "temperature": kinetic,
        "pressure": pressure / GPA,
        **_cell(cells),
    }
    return {name: found[name] for name in UNITS}


def averages(run: Trajectory, minimum: float) -> dict[str, Average]:
    """Return mean and standard error of every quantity, or why frames are too few for them.

    Args:
        run: The trajectory; the frames that were kept count.
        minimum: Least number of independent frames.
    """
    known, exact = series(run, run.kept), held(run.point)
    result = {}
    for name, unit in UNITS.items():
        if name in exact:
            result[name] = Average.of(Measured(exact[name], 0.0, unit), independent_frames=None)
            continue
        if not run.n_kept:
            reason = "no frame after the equilibration counts"
            result[name] = Average.refuse(unit, reason, independent_frames=0.0)
            continue
        values = known[name]
        independent = run.n_kept / run.inefficiency(values)
        try:
            # One frame has no spread to take an error from.
            what = f"the average of {name}"
            require_effective(independent, max(minimum, 2.0), what, run.n_kept, "frames")
        except StatisticsError as error:
            result[name] = Average.refuse(unit, str(error), independent_frames=independent)
        else:
            mean = Measured(float(values.mean()), float(values.std()) / sqrt(independent), unit)
            result[name] = Average.of(mean, independent_frames=independent)
    return result


def held(point: StatePoint) -> dict[str, float]:
    """Return the exact quantities that no free strain of the cell changes.

    They are all quantities of a fixed cell, and the angles of hcp in npt.
    """
    cell = torch.from_numpy(point.atoms.cell.array.copy())
    strains = strain_projection(point.freedom).reshape(9, 3, 3) * _STRAIN
    strained = cell @ (torch.eye(3, dtype=cell.dtype) + strains)
    here, there = _cell(cell), _cell(strained)
    exact = {name: float(here[name]) for name in CELL if float((there[name] - here[name]).abs().max()) < 1e-9}
    if point.freedom == "fixed":
        volume = float(torch.linalg.det(cell).abs())
        exact["volume"] = volume / len(point.atoms)
        exact["density"] = float(point.atoms.get_masses().sum()) * GRAMS_PER_CM3 / volume
    return exact


def _cell(cells: Tensor) -> dict[str, Tensor]:
    """Return lengths (Å) and angles (degrees; α between b and c) of cells, rows `[..., 3, 3]`."""
    values = torch.cat([cell_lengths(cells), cell_angles(cells)], dim=-1)
    return dict(zip(CELL, values.unbind(-1), strict=True))


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
