"""Free-energy differences at any state of a finished run of `transition`, for losses to start from."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.interpolate import CubicSpline

from mlip_refine.errors import InputError
from mlip_refine.quantities import Measured
from mlip_refine.workflows.free_energy.records import CELLS, FreeEnergyResult, PhaseFreeEnergy
from mlip_refine.workflows.records import read_text, validated
from mlip_refine.workflows.transition.records import (
    DifferenceRecord,
    TransitionFile,
    read_transition,
    result_file,
)

LEAST = 4
"""Temperatures of a curve of ΔG, below which it is not interpolated."""


def read_difference(
    path: Path, phases: tuple[str, str], temperature: float, pressure: float
) -> FreeEnergyResult:
    """Read a free-energy difference: a file of `free-energy`, or what a run of `transition` says of a state.

    Args:
        path: A file of `free-energy`, a `transition.json`, or the folder of a run of `transition`.
        phases: Names of the phases I and II, of a difference from `transition`.
        temperature: Temperature, K, likewise.
        pressure: Pressure, GPa, likewise.

    Raises:
        InputError: It is none of these, or the run of `transition` does not know the state.
    """
    file = result_file(path)
    if not _of_transition(file):
        return FreeEnergyResult.read(file)
    return difference_at(read_transition(file), str(file), phases, temperature, pressure)


def _of_transition(file: Path) -> bool:
    """Return whether a file calls itself a result of `transition`, or is named as one."""
    try:
        data = json.loads(read_text(file))
    except (InputError, ValueError, RecursionError):
        return file.name == "transition.json"
    return isinstance(data, dict) and str(data.get("format")).startswith("mlip_refine transition")


def difference_at(
    file: TransitionFile, where: str, phases: tuple[str, str], temperature: float, pressure: float
) -> FreeEnergyResult:
    """Return the difference of two phases at a state of a run of `transition`.

    ΔG, both G and the mean cells are cubic splines over the temperatures of the file, at one of its
    pressures; errors are interpolated linearly, for neighbours share them.

    Args:
        file: The result of the run.
        where: Place of the file, for messages.
        phases: Names of the phases I and II, in either order of the run.
        temperature: Temperature, K.
        pressure: Pressure, GPa.

    Raises:
        InputError: The run has other phases, not that pressure, or temperatures on one side only.
    """
    names = file.from_, file.to
    if set(names) != set(phases):
        raise InputError(
            "the run of transition is of other phases",
            where=where,
            found=f"{file.from_} and {file.to}",
            expected=f"{phases[0]} and {phases[1]}",
        )
    mine = _curve(file, where, temperature, pressure)
    grid = np.array([record.temperature_K for record in mine])
    crystals = {phase.phase: phase for phase in file.phases}
    if set(crystals) != set(names) or any(len(record.ends) != 2 for record in mine):
        raise InputError(
            "the run of transition says nothing of atoms and cells",
            where=where,
            expected="a file of this version",
            fix="Finish it anew: mlip-refine transition CONFIG --resume.",
        )
    least = {anchor.phase: anchor.overlap for anchor in sorted(file.anchors, key=lambda a: -a.overlap)}
    ends = []
    for side, name in enumerate(names):
        crystal, states = crystals[name], [record.ends[side] for record in mine]
        cells = np.array([state.cell for state in states])
        ends.append(
            {
                "phase": name,
                "kind": crystal.kind,
                "numbers": crystal.numbers,
                "scaled_positions": crystal.scaled_positions,
                "cell": CubicSpline(grid, cells)(temperature).tolist(),
                "gibbs": _between(grid, [state.gibbs for state in states], temperature),
                "overlap": least.get(name, 0.0),
            }
        )
    delta_g = _between(grid, [record.delta_g for record in mine], temperature)
    if phases != names:
        ends, delta_g = ends[::-1], -delta_g
    in_cells = file.convention.startswith("cells of")
    data = {
        "model_hash": file.model_hash,
        "head": file.head,
        "temperature_K": temperature,
        "pressure_GPa": pressure,
        "n_atoms": len(ends[0]["numbers"]),
        "delta_g": delta_g,
        "from": validated(PhaseFreeEnergy, ends[0], where, "result of transition"),
        "to": validated(PhaseFreeEnergy, ends[1], where, "result of transition"),
        "timestep_fs": file.timestep_fs,
        "settings": {"transition": file.name},
        "convention": CELLS if in_cells else file.convention,
    }
    return validated(FreeEnergyResult, data, where, "result of transition")


def _curve(
    file: TransitionFile, where: str, temperature: float, pressure: float
) -> tuple[DifferenceRecord, ...]:
    """Return ΔG over temperature at a pressure.

    Raises:
        InputError: That pressure, or that temperature, is not in the file.
    """
    pressures = sorted({record.pressure_GPa for record in file.differences})
    mine = [record for record in file.differences if abs(record.pressure_GPa - pressure) < 1e-9]
    if not mine:
        raise InputError(
            "the run of transition has no ΔG at that pressure",
            where=where,
            found=f"{pressure:g} GPa",
            expected=f"one of {', '.join(f'{p:g}' for p in pressures) or '(none)'} GPa",
            fix="Add it to transition.report_at, and go on with --resume: nothing is sampled again.",
        )
    mine.sort(key=lambda record: record.temperature_K)
    grid = np.array([record.temperature_K for record in mine])
    if len(mine) < LEAST or not (np.isfinite(grid).all() and (np.diff(grid) > 0).all()):
        raise InputError(
            "the run of transition has no curve of ΔG",
            where=where,
            found=f"{len(mine)} temperatures at {pressure:g} GPa",
            expected=f"at least {LEAST} that differ",
        )
    if not grid[0] <= temperature <= grid[-1]:
        raise InputError(
            "the run of transition has no ΔG at that temperature",
            where=where,
            found=f"{temperature:g} K",
            expected=f"{grid[0]:g} to {grid[-1]:g} K",
        )
    return tuple(mine)


def _between(grid: np.ndarray, values: Sequence[Measured], at: float) -> Measured:
    """Return a measured number over temperature at one between its temperatures."""
    numbers, errors = [x.value for x in values], [x.se for x in values]
    if not np.isfinite(numbers).all():
        return Measured(float("nan"), float("nan"), values[0].unit)
    value = float(CubicSpline(grid, numbers)(at))
    return Measured(value, float(np.interp(at, grid, errors)), values[0].unit)
