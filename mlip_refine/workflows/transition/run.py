"""`mlip-refine transition`: what it samples and computes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mlip_refine.errors import SamplingError, StatisticsError
from mlip_refine.losses import EnsembleSource
from mlip_refine.potential import Potential
from mlip_refine.sampling import FrameStore, StatePoint
from mlip_refine.statistics.boundary import BoundaryPoint
from mlip_refine.workflows.base import Run
from mlip_refine.workflows.records import Estimate, write_record
from mlip_refine.workflows.transition.anchors import compute_anchors
from mlip_refine.workflows.transition.assemble import assembled, box_record
from mlip_refine.workflows.transition.boundaries import (
    anchored_surfaces,
    find_boundary,
    further_rungs,
    temperature_beyond,
)
from mlip_refine.workflows.transition.coexistence import (
    coexistence_runs,
    combined,
)
from mlip_refine.workflows.transition.ladder import (
    sample_rungs,
)
from mlip_refine.workflows.transition.prepare import Prepared
from mlip_refine.workflows.transition.records import (
    CoexistenceRecord,
    TransitionFile,
    TransitionResult,
    write_boundary,
)


def run(prepared: Prepared, run: Run) -> TransitionResult:
    """Sample the ladders, anchor them, and find the boundary.

    Raises:
        SamplingError: If a phase does not survive at its anchors, or nowhere.
        StatisticsError: If rungs or windows do not overlap, or there is no boundary within the ladder and its
            extensions that is known well enough, at any pressure.
    """
    section, settings = prepared.section, prepared.free_energy
    frozen = prepared.potential.frozen_copy(settings.dtype, settings.accelerate)
    temperatures = sorted(section.temperature)
    points = prepared.melting.molten(prepared.potential, prepared.points, run.store)
    climbed = sample_rungs(frozen, points, prepared.ladder, "ladder", run.store)
    anchors = compute_anchors(prepared, frozen, points, climbed, run.store)
    for extension in range(section.extensions + 1):
        surfaces = anchored_surfaces(prepared, climbed, anchors)
        boundary = find_boundary(prepared, surfaces)
        wanted = temperature_beyond(surfaces, boundary, temperatures)
        if wanted is None or extension == section.extensions:
            break
        further, start = further_rungs(points, surfaces, wanted)
        stage = f"ladder-extension-{extension + 1}"
        climbed |= sample_rungs(frozen, further, prepared.ladder, stage, run.store, start)
        points |= further
        temperatures = sorted([*temperatures, wanted])
    result = TransitionResult(run.folder, assembled(prepared, surfaces, boundary, anchors))
    write_boundary(run.folder / "boundary.csv", result.file.boundary)
    # Without boxes, and without a boundary, the rest is worth keeping too.
    write_record(run.folder / "transition.json", result.file)
    boxes = run_boxes(prepared, frozen, points, boundary, run.store)
    result = TransitionResult(run.folder, result.file.model_copy(update={"coexistence": tuple(boxes)}))
    write_record(run.folder / "transition.json", result.file)
    _require_boundary(result.file)
    return result


def run_boxes(
    prepared: Prepared,
    frozen: Potential,
    points: Mapping[EnsembleSource, StatePoint],
    boundary: Sequence[tuple[float, BoundaryPoint | None, str]],
    store: FrameStore,
) -> list[CoexistenceRecord]:
    """Run boxes of crystal and liquid at every pressure that is asked for, beside the boundary."""
    if prepared.boxes is None:
        return []
    known = {pressure: found.temperature for pressure, found, _ in boundary if found is not None}
    crystal = next(point for point in points.values() if not point.is_liquid)
    records = []
    for pressure in prepared.boxes.pressures:
        try:
            runs = coexistence_runs(frozen, replace(crystal, pressure=pressure), prepared.boxes, store)
            temperature, note = combined(runs)
        except SamplingError as error:
            runs, temperature, note = [], None, str(error)
        records.append(
            CoexistenceRecord(
                pressure_GPa=pressure,
                temperature=Estimate.refuse("K", note) if temperature is None else Estimate.of(temperature),
                beyond_boundary=temperature - known[pressure] if temperature and pressure in known else None,
                boxes=tuple(box_record(each) for each in runs),
            )
        )
    return records


def _require_boundary(file: TransitionFile) -> None:
    """Refuse a result without a boundary.

    Raises:
        StatisticsError: With what would do.
    """
    if all(point.temperature.refused for point in file.boundary):
        raise StatisticsError(f"there is no boundary: {file.boundary[0].temperature.refused}")
