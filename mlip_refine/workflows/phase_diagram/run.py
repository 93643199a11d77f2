"""`mlip-refine phase-diagram`: what it reads, checks and joins."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from mlip_refine.config import Config, Experiment, PhaseDiagram
from mlip_refine.config.units import PRESSURE, TEMPERATURE
from mlip_refine.data.tables import Table, find_table
from mlip_refine.errors import InputError, nearest
from mlip_refine.quantities import Measured
from mlip_refine.statistics.boundary_curve import TriplePoint, triple_points
from mlip_refine.workflows.base import Run
from mlip_refine.workflows.phase_diagram import required_section
from mlip_refine.workflows.phase_diagram.records import (
    FILE,
    ComparedPoint,
    CurveRecord,
    ExperimentRecord,
    OtherRecord,
    PhaseDiagramFile,
    PhaseDiagramResult,
    PointRecord,
    TriplePointRecord,
    read_phase_diagram,
    write_csv,
)
from mlip_refine.workflows.phase_diagram.stability import more_stable
from mlip_refine.workflows.transition.records import TransitionFile, read_transition, result_file

POINTS = 11
"""Pressures of the report, if the config names none."""


@dataclass(frozen=True)
class ReadModel:
    """The model of finished runs, which is not loaded.

    Attributes:
        hash: Hash of the model.
        head: Its head.
        device: That nothing was computed.
    """

    hash: str
    head: str
    device: str = "none: read from finished runs"


@dataclass(frozen=True)
class Column:
    """Measured temperatures of one boundary.

    Attributes:
        phases: Phases of the boundary.
        name: Name of the column.
        source: Publication.
        pressures: Pressures, GPa `[n]`.
        temperatures: Temperatures, K `[n]`, with the standard errors of the table.
    """

    phases: frozenset[str]
    name: str
    source: str
    pressures: tuple[float, ...]
    temperatures: tuple[Measured, ...]


@dataclass(frozen=True)
class Prepared:
    """Everything that a diagram is made from.

    Attributes:
        name: Name of the run.
        potential: The model of the transitions.
        convention: What their free energies are of.
        curves: Their boundaries, not yet interpolated.
        pressures: Pressures of the report, GPa.
        columns: Measured boundaries.
        others: Boundaries of other potentials.
    """

    name: str
    potential: ReadModel
    convention: str
    curves: tuple[CurveRecord, ...]
    pressures: tuple[float, ...]
    columns: tuple[Column, ...]
    others: tuple[OtherRecord, ...]


def prepare(config: Config) -> Prepared:
    """Read the transitions, what was measured, and other potentials.

    Raises:
        InputError: If a file cannot be read, or runs of other models or conventions are mixed.
    """
    section = required_section(config)
    read: list[tuple[Path, TransitionFile]] = []
    for number, name in enumerate(section.transitions):
        path = _file(config.resolve(name), config.where("phase_diagram", "transitions", number))
        read.append((path, read_transition(path)))
    first, model = read[0][1], "of one model, with one convention"
    for path, file in read:
        _require_same(path, file, first, ("model_hash", "head", "convention"), model)
    curves = _chosen([_curve(path, file) for path, file in read], section, config.where)
    others = [
        _other(config.resolve(name), first, config.where("phase_diagram", "compare", number))
        for number, name in enumerate(section.compare or ())
    ]
    return Prepared(
        name=config.name,
        potential=ReadModel(first.model_hash, first.head),
        convention=first.convention,
        curves=curves,
        pressures=_pressures(section, curves),
        columns=_columns(section.experiment, curves, config) if section.experiment else (),
        others=tuple(others),
    )


def run(prepared: Prepared, run: Run) -> PhaseDiagramResult:
    """Interpolate the boundaries, and find where three phases meet."""
    curves = tuple(_interpolated(prepared.curves, curve, prepared.pressures) for curve in prepared.curves)
    points, notes = _triple_points(curves)
    file = PhaseDiagramFile(
        name=prepared.name,
        model_hash=prepared.potential.hash,
        head=prepared.potential.head,
        convention=prepared.convention,
        boundaries=curves,
        triple_points=tuple(points),
        experiment=tuple(_compared(column, curves) for column in prepared.columns),
        others=tuple(
            other.model_copy(
                update={
                    "boundaries": tuple(
                        _interpolated(other.boundaries, curve, prepared.pressures)
                        for curve in other.boundaries
                    )
                }
            )
            for other in prepared.others
        ),
        notes=(*(note for curve in curves for note in curve.notes), *notes),
    )
    write_csv(run.folder / "phase_diagram.csv", file.boundaries)
    return PhaseDiagramResult(run.folder, file)


def _file(path: Path, where: str | None) -> Path:
    """Return the `transition.json` of a run folder, or the file itself.

    Raises:
        InputError: There is none.
    """
    file = result_file(path)
    if not file.exists():
        raise InputError(
            "there is no finished run of transition",
            where=where,
            found=str(file),
            fix="Run mlip-refine transition first; a relative path starts from the folder of the config.",
        )
    return file


def _require_same(
    path: Path, file: TransitionFile, first: TransitionFile, keys: Iterable[str], expected: str
) -> None:
    """Refuse results that do not belong together.

    Raises:
        InputError: With the first thing that differs.
    """
    for key in keys:
        mine, other = getattr(file, key), getattr(first, key)
        if mine != other:
            what = {"model_hash": "model", "head": "head", "convention": "convention of free energies"}[key]
            raise InputError(
                f"the transitions do not belong together: the {what} differs",
                where=str(path),
                found=mine,
                expected=f"{other}, as of {first.name}: all are {expected}",
                fix="Compute it anew, or name it under compare." if key != "convention" else None,
            )


def _curve(path: Path, file: TransitionFile) -> CurveRecord:
    """Return the boundary of a finished run.

    Raises:
        InputError: It has none, or one without errors.
    """
    points, notes, rises = [], [], set()
    for point in file.boundary:
        t = point.temperature.measured
        if t is None or point.slope is None or point.delta_s is None:
            reason = point.temperature.refused or "not known"
            notes.append(f"{file.from_} to {file.to}, {point.pressure_GPa:g} GPa: {reason}")
            continue
        common = point.se_common_K or 0.0
        rises.add(point.delta_s.value > 0)
        try:
            points.append(
                PointRecord(
                    pressure_GPa=point.pressure_GPa, temperature=t, se_common_K=common, slope=point.slope
                )
            )
        except ValidationError as error:
            raise InputError(
                f"the boundary of {file.from_} and {file.to} is not usable",
                where=str(path),
                found=f"{point.pressure_GPa:g} GPa: {t}, slope {point.slope}",
                expected="finite numbers with standard errors",
            ) from error
    if not points:
        raise InputError(
            f"the run has no boundary of {file.from_} and {file.to}",
            where=str(path),
            found=notes[0] if notes else "no pressures",
        )
    pressures = {point.pressure_GPa for point in points}
    if len(rises) > 1 or file.from_ == file.to or len(pressures) < len(points):
        raise InputError(
            f"the boundary of {file.from_} and {file.to} is no function of the pressure",
            where=str(path),
            expected="two phases, different pressures, and one sign of ΔS",
        )
    return CurveRecord(
        from_=file.from_,
        to=file.to,
        upper=file.to if rises.pop() else file.from_,
        name=file.name,
        source=str(path),
        sampled=tuple(points),
        interpolated=(),
        notes=tuple(notes),
    )


def _chosen(
    curves: Sequence[CurveRecord], section: PhaseDiagram, where: Callable[..., str | None]
) -> tuple[CurveRecord, ...]:
    """Return the boundaries that are asked for.

    Raises:
        InputError: For two runs of one boundary, or a phase or boundary that no run has.
    """
    by_phases: dict[frozenset[str], CurveRecord] = {}
    for curve in curves:
        if curve.phases in by_phases:
            raise InputError(
                f"two runs have the boundary of {curve.from_} and {curve.to}",
                where=where("phase_diagram", "transitions"),
                found=f"{by_phases[curve.phases].source} and {curve.source}",
                expected="one run per boundary",
            )
        by_phases[curve.phases] = curve
    known = sorted({phase for curve in curves for phase in curve.phases})
    for number, phase in enumerate(section.phases or ()):
        _require_known(phase, known, where("phase_diagram", "phases", number))
    wanted = list(by_phases)
    if section.boundaries is not None:
        wanted = [frozenset(pair) for pair in section.boundaries]
        for number, pair in enumerate(section.boundaries):
            place = where("phase_diagram", "boundaries", number)
            for phase in pair:
                _require_known(phase, known, place)
            if frozenset(pair) not in by_phases:
                raise InputError(
                    f"no transition has the boundary of {pair[0]} and {pair[1]}",
                    where=place,
                    expected=f"one of {', '.join(curve.title for curve in curves)}",
                )
    shown = set(known if section.phases is None else section.phases)
    chosen = tuple(by_phases[pair] for pair in dict.fromkeys(wanted) if pair <= shown)
    if not chosen:
        raise InputError(
            "there is nothing to show: no boundary lies between the phases",
            where=where("phase_diagram", "phases") or where("phase_diagram"),
            expected=f"both phases of one of {', '.join(curve.title for curve in curves)}",
        )
    return chosen


def _require_known(phase: str, known: Sequence[str], where: str | None) -> None:
    """Refuse a phase that no transition has.

    Raises:
        InputError: With the nearest known name.
    """
    if phase not in known:
        word = nearest(phase, known)
        raise InputError(
            f"no transition has the phase {phase!r}",
            where=where,
            expected=f"one of {', '.join(known)}",
            fix=f"Did you mean {word!r}?" if word else None,
        )


def _pressures(section: PhaseDiagram, curves: Sequence[CurveRecord]) -> tuple[float, ...]:
    """Return the pressures of the report, GPa."""
    wanted = section.pressure
    if wanted is not None:
        return tuple(np.linspace(wanted.from_, wanted.to, wanted.points).tolist())
    sampled = [point.pressure_GPa for curve in curves for point in curve.sampled]
    low, high = min(sampled), max(sampled)
    return tuple(np.linspace(low, high, POINTS).tolist()) if high > low else (low,)


def _columns(wanted: Experiment, curves: Sequence[CurveRecord], config: Config) -> tuple[Column, ...]:
    """Return the measured boundaries.

    Raises:
        InputError: If the table cannot be used, or has no boundary of the diagram.
    """
    table = find_table(wanted.table, config.resolve)
    where = config.where("phase_diagram", "experiment")
    if table.index.name != "pressure":
        raise InputError(
            "the first column of the table is not the pressure",
            where=str(table.path),
            found=table.index.name,
            expected="pressure",
        )
    found = []
    if wanted.columns is not None:
        names = {f"{a}-{b}": curve for curve in curves for a, b in _orders(curve)}
        for name, columns in wanted.columns.items():
            if name not in names:
                word = nearest(name, names)
                raise InputError(
                    f"the diagram has no boundary {name!r}",
                    where=config.where("phase_diagram", "experiment", "columns", name) or where,
                    expected=f"one of {', '.join(f'{c.from_}-{c.to}' for c in curves)}",
                    fix=f"Did you mean {word!r}?" if word else None,
                )
            found += [_column(table, column, names[name]) for column in columns]
    else:
        for curve in curves:
            names_of = [f"T_{a}_{b}" for a, b in _orders(curve)]
            names_of += ["T_melt"] if "liquid" in curve.phases else []
            found += [_column(table, name, curve) for name in names_of if name in table.columns]
    if not found:
        raise InputError(
            "the table has no column of a boundary of the diagram",
            where=str(table.path),
            found=", ".join(list(table.columns)[1:]),
            expected=" or ".join(f"T_{curve.from_}_{curve.to}" for curve in curves),
            fix="Give experiment: {table: ..., columns: {"
            + f"{curves[0].from_}-{curves[0].to}: COLUMN"
            + "}}.",
        )
    return tuple(found)


def _orders(curve: CurveRecord) -> tuple[tuple[str, str], tuple[str, str]]:
    """Return both phases in both orders."""
    return (curve.from_, curve.to), (curve.to, curve.from_)


def _column(table: Table, name: str, curve: CurveRecord) -> Column:
    """Return a column of a table in GPa and K.

    Raises:
        InputError: There is none of that name, or it has no unit of temperature.
    """
    column = table[name]
    to_gpa, _ = PRESSURE.conversion(table.index.unit)
    try:
        factor, offset = TEMPERATURE.conversion(column.unit)
    except PydanticCustomError as error:
        raise InputError(
            f"the column {name} has no unit of temperature",
            where=str(table.path),
            found=f"unit {column.unit}",
            expected=", ".join(TEMPERATURE.units),
        ) from error
    there = np.isfinite(column.values)
    return Column(
        phases=curve.phases,
        name=name,
        source=table.source,
        pressures=tuple((table.index.values[there] * to_gpa).tolist()),
        temperatures=tuple(
            Measured(float(value) * factor + offset, float(se) * factor, "K")
            for value, se in zip(column.values[there], column.uncertainties[there], strict=True)
        ),
    )


def _other(path: Path, first: TransitionFile, where: str | None) -> OtherRecord:
    """Return the boundaries of another potential, from a run of `transition` or `phase-diagram`.

    Raises:
        InputError: There is none, or it has another convention.
    """
    diagram = path / FILE if path.is_dir() else path
    if diagram.name == FILE and diagram.exists():
        other = read_phase_diagram(diagram)
        curves, name, convention = other.boundaries, other.name, other.convention
        model, head = other.model_hash, other.head
    else:
        file = _file(path, where)
        found = read_transition(file)
        curves, name, convention = (_curve(file, found),), found.name, found.convention
        model, head = found.model_hash, found.head
    if convention != first.convention:
        raise InputError(
            f"the run {name} has another convention of free energies: temperatures are not comparable",
            where=where,
            found=convention,
            expected=f"{first.convention}, as of {first.name}",
        )
    return OtherRecord(name=name, model_hash=model, head=head, boundaries=curves)


def _interpolated(
    curves: Sequence[CurveRecord], which: CurveRecord, pressures: Sequence[float]
) -> CurveRecord:
    """Return a boundary with its points at the pressures of the report, and what is stable there."""
    curve = which.curve()
    at = [(pressure, state) for pressure in pressures if (state := curve.at(pressure)) is not None]
    return which.model_copy(
        update={
            "sampled": tuple(
                point.model_copy(update={"more_stable": more_stable(curves, which, point.pressure_GPa)})
                for point in which.sampled
            ),
            "interpolated": tuple(
                PointRecord(
                    pressure_GPa=pressure,
                    temperature=state.temperature,
                    se_common_K=state.common,
                    slope=state.slope,
                    more_stable=more_stable(curves, which, pressure),
                )
                for pressure, state in at
            ),
        }
    )


def _triple_points(curves: Sequence[CurveRecord]) -> tuple[list[TriplePointRecord], list[str]]:
    """Return where three phases coexist, and remarks on boundaries that do not meet."""
    found, notes = [], []
    phases = sorted({phase for curve in curves for phase in curve.phases})
    for three in combinations(phases, 3):
        mine = [curve for curve in curves if curve.phases <= set(three)]
        if len(mine) < 2:
            continue
        points = triple_points([curve.curve() for curve in mine])
        if not points:
            titles = " and ".join(curve.title for curve in mine)
            notes.append(f"{titles} do not meet within the sampled pressures")
        found += [_triple_point(three, len(mine), point) for point in points]
    return found, notes


def _triple_point(phases: tuple[str, str, str], boundaries: int, point: TriplePoint) -> TriplePointRecord:
    """Return the record of a triple point."""
    return TriplePointRecord(
        phases=phases,
        boundaries=boundaries if point.mismatch is not None else 2,
        pressure=point.pressure,
        temperature=point.temperature,
        covariance_K_GPa=point.covariance,
        mismatch_sigma=point.mismatch,
    )


def _compared(column: Column, curves: Sequence[CurveRecord]) -> ExperimentRecord:
    """Return a measured boundary with the deviations of the potential from it."""
    (which,) = (curve for curve in curves if curve.phases == column.phases)
    curve, points = which.curve(), []
    for pressure, measured in zip(column.pressures, column.temperatures, strict=True):
        state, deviation = curve.at(pressure), None
        if state is not None:
            known = 0.0 if math.isnan(measured.se) else measured.se
            deviation = state.temperature - Measured(measured.value, known, "K")
        points.append(ComparedPoint(pressure_GPa=pressure, temperature=measured, deviation=deviation))
    squares = [point.deviation.value**2 for point in points if point.deviation is not None]
    return ExperimentRecord(
        from_=which.from_,
        to=which.to,
        column=column.name,
        source=column.source,
        points=tuple(points),
        rms_K=math.sqrt(sum(squares) / len(squares)) if squares else None,
    )
