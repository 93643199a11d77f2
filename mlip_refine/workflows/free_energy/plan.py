"""What a run of `mlip-refine free-energy` samples, for `--dry-run`."""

from collections.abc import Sequence
from dataclasses import replace

from mlip_refine.sampling import StatePoint
from mlip_refine.workflows.free_energy.differences import FreeEnergySettings
from mlip_refine.workflows.free_energy.run import Prepared
from mlip_refine.workflows.plan import Plan, Stage, melt_stages

WINDOWS = 9
"""Windows that are assumed of a liquid where a pilot finds their number: those of some 128 atoms."""


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
    liquids = [point for point in points if point not in crystals]
    if liquids:
        isotropic = tuple(replace(point, ensemble="npt", cell_freedom="isotropic") for point in liquids)
        stages.append(Stage("cells of liquids", isotropic, settings.md, settings.liquid_cells))
    stages += liquid_path_stages("free-energy", liquids, settings)
    frozen = prepared.potential.frozen_copy(settings.dtype, settings.accelerate)
    return Plan(frozen, tuple(stages), notes_on_liquids(liquids, settings))


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


def liquid_path_stages(name: str, points: Sequence[StatePoint], settings: FreeEnergySettings) -> list[Stage]:
    """Return the samplings of paths of liquids that evaluate the potential (see `liquid_free_energies`).

    Args:
        name: Name of the stage.
        points: Liquids, with their copies per window.
        settings: How free energies are computed.
    """
    if not points:
        return []
    path, md = settings.liquid, settings.md
    return [
        Stage(f"{name}, liquids", tuple(points), md, path.fit),
        Stage(f"{name}, windows of liquids", tuple(points), md, path.ladder, windows=path.windows or WINDOWS),
    ]


def notes_on_liquids(points: Sequence[StatePoint], settings: FreeEnergySettings) -> tuple[str, ...]:
    """Return what is assumed of the paths of liquids, or is not in their stages."""
    if not points:
        return ()
    notes = ["fluids without the potential, to which the paths of liquids lead, are not in the estimate"]
    if settings.liquid.windows is None:
        notes.append(f"a pilot finds the number of windows of a liquid; {WINDOWS} are assumed")
    return tuple(notes)
