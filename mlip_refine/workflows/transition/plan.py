"""What a run of `mlip-refine transition` samples, for `--dry-run`."""

from dataclasses import replace
from itertools import product

from mlip_refine.losses import EnsembleSource
from mlip_refine.sampling import StatePoint
from mlip_refine.workflows.free_energy.plan import liquid_path_stages, notes_on_liquids, path_stages
from mlip_refine.workflows.plan import Plan, Stage, melt_stages
from mlip_refine.workflows.transition.coexistence import CoexistenceSettings, box_of
from mlip_refine.workflows.transition.prepare import Prepared


def plan(prepared: Prepared) -> Plan:
    """Return the runs that make liquids, ladders, their extensions, the paths of the anchors, and boxes."""
    section, ladder, settings = prepared.section, prepared.ladder, prepared.free_energy
    rungs, melting = prepared.points, prepared.melting
    melts = {source.name: melt for source, melt in melting.melts.items()}
    stages = melt_stages(rungs.values(), melts, melting.md)
    stages.append(Stage("ladder", tuple(rungs.values()), ladder.md, ladder.length))
    if section.extensions:
        highest = max(section.temperature)
        added = tuple(
            replace(point, name=f"{source.phase}-further-{source.pressure:g}GPa")
            for source, point in rungs.items()
            if source.temperature == highest
        )
        stages.append(
            Stage("extensions", added, ladder.md, ladder.length, times=section.extensions, if_needed=True)
        )
    anchors = [
        replace(
            rungs[EnsembleSource(phase, anchor.temperature, anchor.pressure)],
            ensemble="nvt",
            replicas=settings.replicas,
        )
        for phase, anchor in product(prepared.phases, section.anchors)
    ]
    liquids = [point for point in anchors if point.is_liquid]
    stages += path_stages("anchors", [point for point in anchors if not point.is_liquid], settings)
    stages += liquid_path_stages("anchors", liquids, settings)
    if prepared.boxes is not None:
        crystal = next(point for point in rungs.values() if not point.is_liquid)
        stages += _box_stages(crystal, prepared.boxes)
    frozen = prepared.potential.frozen_copy(settings.dtype, settings.accelerate)
    return Plan(frozen, tuple(stages), notes_on_liquids(liquids, settings))


def _box_stages(crystal: StatePoint, settings: CoexistenceSettings) -> list[Stage]:
    """Return the samplings of boxes of crystal and liquid (see `coexistence_runs`), in cells at rest."""
    atoms = box_of(crystal.atoms, crystal.atoms.cell.array, settings.n_atoms)
    lattices = tuple(
        replace(crystal, name=f"bulk-{t:g}K", temperature=t, replicas=1) for t in settings.starts
    )
    boxes = tuple(
        replace(point, name=f"box-{point.temperature:g}K", atoms=atoms, ensemble="nph", identity="none")
        for point in lattices
    )
    spaced, short, times = settings.spaced, settings.prepared_for, len(settings.pressures)
    return [
        Stage("coexistence, lattices", lattices, spaced, short, times=times),
        # Melt and settle.
        Stage("coexistence, preparation", boxes, spaced, short, times=2 * times),
        Stage("coexistence", boxes, spaced, settings.free_for, times=times),
    ]
