"""What a run of `mlip-refine free-energy` samples, for `--dry-run`."""

from collections.abc import Sequence
from dataclasses import replace

from mlip_refine.sampling import StatePoint
from mlip_refine.workflows.free_energy.differences import FreeEnergySettings
from mlip_refine.workflows.free_energy.run import Prepared
from mlip_refine.workflows.plan import Plan, Stage, melt_stages, uncounted


def plan(prepared: Prepared) -> Plan:
    """Return the runs that find the cells, and the paths."""
    settings, melting = prepared.settings, prepared.melting
    sources = sorted({source for loss in prepared.losses for source in loss.sources})
    points = [
        replace(prepared.points[s], replicas=settings.replicas, ensemble="nvt", name=s.name) for s in sources
    ]
    melts = {s.name: melt for s, melt in melting.melts.items() if s in sources}
    crystals = [point for point in points if not point.is_liquid and point.name not in melts]
    stages = melt_stages(points, melts, melting.md)
    if free := tuple(point for point in crystals if point.cell_freedom != "fixed"):
        cells = settings.cells
        stages.append(Stage("cells", free, cells.md, cells.length, times=cells.iterations))
    stages += path_stages("free-energy", crystals, settings)
    frozen = prepared.potential.frozen_copy(settings.dtype, settings.accelerate)
    return Plan(frozen, tuple(stages), uncounted(points, "the path of"))


def path_stages(name: str, points: Sequence[StatePoint], settings: FreeEnergySettings) -> list[Stage]:
    """Return the samplings of Frenkel-Ladd paths (see `absolute_free_energies`).

    Args:
        name: Name of the stage.
        points: Crystals, with their copies per window.
        settings: How free energies are computed.
    """
    if not points:
        return []
    ladder = settings.ladder
    return [
        Stage(f"{name}, reference", tuple(points), settings.md, ladder.fit),
        Stage(f"{name}, windows", tuple(points), settings.md, ladder.ladder, windows=ladder.windows),
    ]
