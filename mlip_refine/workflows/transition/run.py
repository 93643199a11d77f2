"""`mlip-refine transition`: what it checks, samples and computes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import numpy as np

from mlip_refine.config import Coexistence, Config, Transition
from mlip_refine.errors import InputError, SamplingError, StatisticsError
from mlip_refine.losses import EnsembleSource
from mlip_refine.potential import Potential
from mlip_refine.quantities import GPA, MEV, Measured
from mlip_refine.sampling import FrameStore, Length, MDSettings, StatePoint, Trajectory
from mlip_refine.sampling.monitoring.phase_identity import require_ovito
from mlip_refine.sampling.sampler import Start
from mlip_refine.statistics.boundary import BoundaryPoint, PhaseState, boundary_point, difference
from mlip_refine.statistics.gibbs_ladder import jackknife_error
from mlip_refine.training.tracker import stage_seed
from mlip_refine.workflows.base import Run
from mlip_refine.workflows.free_energy.cells import LiquidCell, liquid_cell
from mlip_refine.workflows.free_energy.differences import FreeEnergySettings
from mlip_refine.workflows.free_energy.finite_size import compared
from mlip_refine.workflows.free_energy.frenkel_ladd import AbsoluteFreeEnergy, absolute_free_energies
from mlip_refine.workflows.free_energy.liquid_path import liquid_free_energies
from mlip_refine.workflows.free_energy.records import LIMIT
from mlip_refine.workflows.from_config import (
    free_energy_settings,
    load_potential,
    md_settings,
    melting,
    state_points,
    with_timestep,
)
from mlip_refine.workflows.melt import Melting
from mlip_refine.workflows.records import Estimate, write_record
from mlip_refine.workflows.transition import required_section
from mlip_refine.workflows.transition.coexistence import (
    CoexistenceRun,
    CoexistenceSettings,
    box_of,
    coexistence_runs,
    combined,
    require_room,
)
from mlip_refine.workflows.transition.ladder import (
    LadderSettings,
    join_rungs,
    lost_rungs,
    mean_cell,
    mean_cell_at,
    sample_rungs,
)
from mlip_refine.workflows.transition.records import (
    AnchorRecord,
    BoundaryRecord,
    BoxRecord,
    ClosureRecord,
    CoexistenceRecord,
    DifferenceRecord,
    EndRecord,
    PhaseRecord,
    StateRecord,
    TransitionFile,
    TransitionResult,
    write_boundary,
)
from mlip_refine.workflows.transition.surface import Anchor, AnchoredSurface

GRID = 13
"""Temperatures of the curves of ΔG."""

SEGMENT = 2000.0
"""Time between two writes of the ladder to disk, fs."""


@dataclass(frozen=True)
class Prepared:
    """Everything that a calculation starts from.

    Attributes:
        name: Name of the run.
        section: The section `transition` of the config.
        potential: The potential.
        points: NPT state points of the ladder, in starting cells; liquids that are to be molten still as
            crystals.
        melting: Which of them are to be molten, and how.
        ladder: How the rungs are sampled.
        free_energy: How absolute free energies are computed.
        min_effective: Least number of independent frames of an estimate.
        convention: What Gibbs energies are of: cells of N atoms, or the thermodynamic limit.
        boxes: How boxes of crystal and liquid are made and run; `None` for none.
    """

    name: str
    section: Transition
    potential: Potential
    points: Mapping[EnsembleSource, StatePoint]
    melting: Melting
    ladder: LadderSettings
    free_energy: FreeEnergySettings
    min_effective: float
    convention: str
    boxes: CoexistenceSettings | None = None

    @property
    def phases(self) -> tuple[str, str]:
        """Names of both phases, in the order from, to."""
        return self.section.from_, self.section.to


type Climbed = dict[EnsembleSource, Trajectory]
type Anchors = dict[EnsembleSource, AbsoluteFreeEnergy]


@dataclass(frozen=True)
class _Surfaces:
    """Both phases, and what was left out on the way to them.

    Attributes:
        phases: Gibbs energies of both, in the order from, to.
        used: Trajectories that they rest on.
        lost: Rungs that were not used, one line each.
    """

    phases: tuple[AnchoredSurface, AnchoredSurface]
    used: tuple[Climbed, Climbed]
    lost: tuple[str, ...]


def prepare(config: Config) -> Prepared:
    """Check the input, and turn the config into state points and settings.

    Raises:
        InputError: For bad input.
    """
    section = required_section(config)
    potential = load_potential(config)
    sources = [
        EnsembleSource(name, t, p)
        for name, t, p in product(
            (section.from_, section.to), sorted(section.temperature), sorted(section.pressure)
        )
    ]
    found = state_points(config, sources, potential, section.replicas)
    points = {s: replace(p, ensemble="npt", thermostat="langevin") for s, p in found.items()}
    convention = compared(
        points[sources[0]],
        points[sources[-1]],
        config.free_energy.finite_size,
        "transition",
        config.where("transition"),
    )
    if section.coexistence is not None:
        atoms = next(point.atoms for point in points.values() if not point.is_liquid)
        box = box_of(atoms, atoms.cell.array, section.coexistence.n_atoms)
        require_room(box, potential.graphs.cutoff, config.where("transition", "coexistence", "n_atoms"))
    config = with_timestep(config, potential, points.values())
    frames = max(1, round(section.duration / section.interval))
    length = Length(section.equilibration, frames, max(1, round(SEGMENT / section.interval)))
    md = md_settings(config, interval=section.interval)
    return Prepared(
        name=config.name,
        section=section,
        potential=potential,
        points=points,
        melting=melting(config, points),
        ladder=LadderSettings(md, length, config.seed),
        free_energy=free_energy_settings(config),
        min_effective=config.sampling.min_effective_frames,
        convention=convention,
        boxes=None if section.coexistence is None else _box_settings(config, section.coexistence, md),
    )


def _box_settings(config: Config, section: Coexistence, md: MDSettings) -> CoexistenceSettings:
    """Return how boxes of crystal and liquid are made and run.

    Raises:
        InputError: Unless one phase is a crystal and the other is molten from it.
    """
    transition = required_section(config)
    names = transition.from_, transition.to
    melts = {name: melt for name in names if (melt := config.phases[name].melt) is not None}
    if len(melts) != 1 or next(iter(melts.values())).from_ not in names:
        raise InputError(
            "coexistence is of a crystal and its melt",
            where=config.where("transition", "coexistence"),
            found=f"{names[0]} and {names[1]}",
            expected="one phase with melt, from the other one",
        )
    require_ovito()
    return CoexistenceSettings(
        n_atoms=section.n_atoms,
        starts=section.starts,
        pressures=section.pressure,
        heat=next(iter(melts.values())).temperature,
        preparation=section.preparation,
        duration=section.duration,
        md=md,
        seed=config.seed,
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
    anchors = _anchors(prepared, frozen, points, climbed, run.store)
    for extension in range(section.extensions + 1):
        surfaces = _surfaces(prepared, climbed, anchors)
        boundary = _boundary(prepared, surfaces)
        wanted = _beyond(surfaces, boundary, temperatures)
        if wanted is None or extension == section.extensions:
            break
        further, start = _further_rungs(points, climbed, wanted)
        stage = f"ladder-extension-{extension + 1}"
        climbed |= sample_rungs(frozen, further, prepared.ladder, stage, run.store, start)
        points |= further
        temperatures = sorted([*temperatures, wanted])
    boxes = _coexistence(prepared, frozen, points, boundary, run.store)
    result = TransitionResult(run.folder, _file(prepared, surfaces, boundary, anchors, boxes))
    write_boundary(run.folder / "boundary.csv", result.file.boundary)
    # Without a boundary the rest is worth keeping too.
    write_record(run.folder / "transition.json", result.file)
    _require_boundary(result.file)
    return result


def _anchors(
    prepared: Prepared,
    frozen: Potential,
    rungs: Mapping[EnsembleSource, StatePoint],
    climbed: Climbed,
    store: FrameStore,
) -> Anchors:
    """Compute the absolute free energies of both phases, each in the mean cell of the rung of its anchor.

    Raises:
        SamplingError: If a phase did not survive at an anchor.
        StatisticsError: If windows do not overlap, or frames do not determine a finite-size term.
    """
    settings, lost = prepared.free_energy, lost_rungs(climbed)
    crystals, liquids = dict[EnsembleSource, StatePoint](), dict[EnsembleSource, LiquidCell]()
    for phase, anchor in product(prepared.phases, prepared.section.anchors):
        source = EnsembleSource(phase, anchor.temperature, anchor.pressure)
        if source in lost:
            raise SamplingError(
                f"there is no anchor where the phase does not survive: {lost[source]}; choose another "
                "transition.anchor"
            )
        point = replace(rungs[source], ensemble="nvt", replicas=settings.replicas)
        if point.is_liquid:
            liquids[source] = liquid_cell(point, climbed[source])
        else:
            crystals[source] = point.with_cell(mean_cell(climbed[source]))
    limit = {point.name for point in crystals.values()} if prepared.convention == LIMIT else set()
    found: dict[str, AbsoluteFreeEnergy] = {}
    if crystals:
        found |= absolute_free_energies(
            frozen,
            list(crystals.values()),
            settings.md,
            settings.ladder,
            seed=settings.seed,
            stage="anchors",
            store=store,
            limit=limit,
        )
    if liquids:
        found |= liquid_free_energies(
            frozen,
            list(liquids.values()),
            settings.md,
            settings.liquid,
            seed=stage_seed(settings.seed, "liquid"),
            stage="liquid-anchors",
            store=store,
        )
    return {source: found[source.name] for source in (*crystals, *liquids)}


def _surfaces(prepared: Prepared, climbed: Climbed, anchors: Anchors) -> _Surfaces:
    """Join the rungs that can be used, and anchor them."""
    lost = lost_rungs(climbed)
    surfaces, used = [], []
    for phase in prepared.phases:
        mine = {s: run for s, run in climbed.items() if s.phase == phase and s not in lost}
        known = [
            Anchor(source.temperature, source.pressure * GPA, found.gibbs, _size_term(found))
            for source, found in anchors.items()
            if source.phase == phase
        ]
        surface = AnchoredSurface(
            join_rungs(phase, list(mine.values())),
            known,
            liquid=next(iter(mine.values())).point.is_liquid,
            limit=prepared.convention == LIMIT,
        )
        surfaces.append(surface)
        used.append(mine)
    return _Surfaces((surfaces[0], surfaces[1]), (used[0], used[1]), tuple(lost.values()))


def _boundary(prepared: Prepared, surfaces: _Surfaces) -> list[tuple[float, BoundaryPoint | None, str]]:
    """Return pressure, GPa, point of the boundary or None, and the reason for none."""
    section, (one, two) = prepared.section, surfaces.phases
    low = max(surface.ladder.temperatures[0] for surface in surfaces.phases)
    high = min(surface.ladder.temperatures[1] for surface in surfaces.phases)
    points = []
    for pressure in sorted(section.report_at or section.pressure):
        found, note = boundary_point(
            partial(one.at, pressure=pressure * GPA), partial(two.at, pressure=pressure * GPA), low, high
        )
        if found is not None and (refusal := _refusal(prepared, found)):
            found, note = None, refusal
        points.append((pressure, found, note))
    return points


def _refusal(prepared: Prepared, found: BoundaryPoint) -> str:
    """Return why a point of the boundary is refused, with what would do; empty if it is not."""
    t, least, most = found.temperature, prepared.min_effective, prepared.section.max_error
    if found.difference.n_eff < least:
        return (
            f"{found.difference.n_eff:.1f} independent frames at {t.value:.0f} K are fewer than {least:g} "
            "(sampling.min_effective_frames): sample longer, or at temperatures and pressures nearer to it"
        )
    if most is not None and t.se > most:
        return (
            f"{t} has a larger error than transition.max_error = {most:g} K, {found.common:.2g} K of it from "
            f"the anchors: sample about {(t.se / most) ** 2:.2g} times as long (transition.duration, and "
            "free_energy.production for the anchors)"
        )
    return ""


def _common_range(surfaces: _Surfaces) -> tuple[float, float]:
    """Return the temperatures that both phases are known at, lowest and highest, K."""
    ranges = [surface.ladder.temperatures for surface in surfaces.phases]
    return max(low for low, _ in ranges), min(high for _, high in ranges)


def _beyond(
    surfaces: _Surfaces,
    points: Sequence[tuple[float, BoundaryPoint | None, str]],
    temperatures: Sequence[float],
) -> float | None:
    """Return the temperature by which the ladder grows towards a boundary outside it, K; None if by none.

    A phase that did not survive on that side cannot be followed there.
    """
    one, two = surfaces.phases
    ends = _common_range(surfaces)
    for pressure in (pressure for pressure, found, _ in points if found is None):
        gaps = [
            float(two.at(t, pressure * GPA, errors=False).gibbs[0])
            - float(one.at(t, pressure * GPA, errors=False).gibbs[0])
            for t in ends
        ]
        if gaps[0] * gaps[1] <= 0:
            continue
        # The boundary lies on the side on which ΔG is closer to zero.
        if abs(gaps[1]) < abs(gaps[0]):
            edge, wanted = temperatures[-1] == ends[1], 2 * temperatures[-1] - temperatures[-2]
        else:
            edge, wanted = temperatures[0] == ends[0], 2 * temperatures[0] - temperatures[1]
        if edge and wanted > 0:
            return wanted
    return None


def _further_rungs(
    points: Mapping[EnsembleSource, StatePoint], climbed: Climbed, temperature: float
) -> tuple[dict[EnsembleSource, StatePoint], Start]:
    """Return rungs at a further temperature, and what they start from: last frames of the nearest ones."""
    further, start = {}, {}
    for source in {replace(each, temperature=temperature) for each in points}:
        nearest = min(
            (s for s in points if (s.phase, s.pressure) == (source.phase, source.pressure)),
            key=lambda s: abs(s.temperature - temperature),
        )
        further[source] = replace(points[nearest], name=source.name, temperature=temperature)
        if climbed[nearest].n_kept:
            start[source.name] = climbed[nearest].last()
    return dict(sorted(further.items())), start


def _file(
    prepared: Prepared,
    surfaces: _Surfaces,
    points: Sequence[tuple[float, BoundaryPoint | None, str]],
    anchors: Anchors,
    boxes: Sequence[CoexistenceRecord],
) -> TransitionFile:
    """Return what is kept of a calculation."""
    section, settings, phases = prepared.section, prepared.free_energy, surfaces.phases
    names = prepared.phases
    firsts = [next(iter(used.values())) for used in surfaces.used]
    differences = []
    for pressure, t in product([point[0] for point in points], np.linspace(*_common_range(surfaces), GRID)):
        one, two = (surface.at(t, pressure * GPA) for surface in phases)
        found = difference(one, two, t)
        differences.append(
            DifferenceRecord(
                temperature_K=float(t),
                pressure_GPa=pressure,
                delta_g=found.delta_g,
                se_common=found.delta_g_common,
                ends=tuple(
                    EndRecord(
                        gibbs=_gibbs(state),
                        cell=mean_cell_at(surface.ladder, first.point, t, pressure * GPA).tolist(),
                    )
                    for state, surface, first in zip((one, two), phases, firsts, strict=True)
                ),
            )
        )
    return TransitionFile(
        name=prepared.name,
        model_hash=prepared.potential.hash,
        head=prepared.potential.head,
        from_=section.from_,
        to=section.to,
        convention=prepared.convention,
        timestep_fs=settings.timestep,
        seed=settings.seed,
        settings=section.model_dump(mode="json", by_alias=True),
        boundary=tuple(_point(*point) for point in points),
        anchors=tuple(_anchor(source, found) for source, found in anchors.items()),
        closures=tuple(
            ClosureRecord(
                phase=name,
                temperatures_K=(closure.first[0], closure.second[0]),
                pressures_GPa=(closure.first[1] / GPA, closure.second[1] / GPA),
                difference=closure.difference,
            )
            for name, each in zip(names, phases, strict=True)
            for closure in each.closures()
        ),
        differences=tuple(differences),
        states=tuple(
            _state(name, each, run)
            for name, each, used in zip(names, phases, surfaces.used, strict=True)
            for run in used.values()
        ),
        lost=surfaces.lost,
        phases=tuple(_phase(name, first) for name, first in zip(names, firsts, strict=True)),
        coexistence=tuple(boxes),
    )


def _coexistence(
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
        runs = coexistence_runs(frozen, replace(crystal, pressure=pressure), prepared.boxes, store)
        temperature, note = combined(runs)
        records.append(
            CoexistenceRecord(
                pressure_GPa=pressure,
                temperature=Estimate.refuse("K", note) if temperature is None else Estimate.of(temperature),
                beyond_boundary=temperature - known[pressure] if temperature and pressure in known else None,
                boxes=tuple(_box(each) for each in runs),
            )
        )
    return records


def _box(run: CoexistenceRun) -> BoxRecord:
    """Return the record of a box."""
    return BoxRecord(
        start_K=run.start,
        n_atoms=run.n_atoms,
        outcome=run.outcome,
        temperature=run.temperature,
        crystal_share=run.crystal_share,
        equilibration_ps=run.equilibration / 1e3,
        times_ps=tuple(time / 1e3 for time in run.times),
        temperatures_K=run.temperatures,
        crystal_shares=run.shares,
    )


def _phase(name: str, run: Trajectory) -> PhaseRecord:
    """Return the record of the atoms of a phase; of a liquid, those of a frame of its first rung."""
    atoms = run.point.atoms.copy()
    if run.point.is_liquid:
        positions, cells = run.last()
        atoms.set_cell(cells[0].numpy())
        atoms.positions = positions[0].numpy()
    return PhaseRecord(
        phase=name,
        kind="liquid" if run.point.is_liquid else "crystal",
        numbers=atoms.numbers.tolist(),
        scaled_positions=np.round(atoms.get_scaled_positions(wrap=False), 12).tolist(),
    )


def _gibbs(state: PhaseState) -> Measured:
    """Return G of a phase with all its errors, meV/atom."""
    se = math.hypot(jackknife_error(state.gibbs), state.anchor_se)
    return Measured(float(state.gibbs[0]), se, "meV/atom")


def _point(pressure: float, found: BoundaryPoint | None, note: str) -> BoundaryRecord:
    """Return the record of the boundary at one pressure."""
    if found is None:
        return BoundaryRecord(pressure_GPa=pressure, temperature=Estimate.refuse("K", note))
    gap = found.difference
    return BoundaryRecord(
        pressure_GPa=pressure,
        temperature=Estimate.of(found.temperature),
        se_common_K=found.common,
        slope=found.slope,
        delta_s=gap.delta_s,
        delta_h=gap.delta_h,
        delta_v=gap.delta_v,
        independent_frames=gap.n_eff,
    )


def _anchor(source: EnsembleSource, found: AbsoluteFreeEnergy) -> AnchorRecord:
    """Return the record of an absolute free energy."""
    atoms = found.point.atoms
    return AnchorRecord(
        phase=source.phase,
        temperature_K=source.temperature,
        pressure_GPa=source.pressure,
        n_atoms=len(atoms),
        volume_A3_per_atom=float(atoms.cell.volume) / len(atoms),
        method="uhlenbeck_ford" if found.point.is_liquid else "frenkel_ladd",
        gibbs=found.gibbs.scaled(1 / (MEV * len(atoms)), "meV/atom"),
        size_term=_size_term(found).scaled(1 / (MEV * len(atoms)), "meV/atom"),
        overlap=found.overlap,
    )


def _state(name: str, surface: AnchoredSurface, run: Trajectory) -> StateRecord:
    """Return the record of a phase at one rung."""
    point = run.point
    state = surface.at(point.temperature, point.pressure * GPA)
    return StateRecord(
        phase=name,
        temperature_K=point.temperature,
        pressure_GPa=point.pressure,
        n_atoms=run.n_atoms,
        frames=run.n_kept,
        gibbs=_gibbs(state),
        enthalpy=Measured(float(state.enthalpy[0]), jackknife_error(state.enthalpy), "meV/atom"),
        volume=Measured(float(state.volume[0]), jackknife_error(state.volume), "Å³/atom"),
    )


def _size_term(found: AbsoluteFreeEnergy) -> Measured:
    """Return the finite-size term of an anchor's cell, eV; 0 where it is part of the convention."""
    return Measured(found.size_term or 0.0, found.size_term_se, "eV")


def _require_boundary(file: TransitionFile) -> None:
    """Refuse a result without a boundary.

    Raises:
        StatisticsError: With what would do.
    """
    if all(point.temperature.refused for point in file.boundary):
        raise StatisticsError(f"there is no boundary: {file.boundary[0].temperature.refused}")
