"""`mlip-refine transition`: what it checks, samples and computes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import numpy as np

from mlip_refine.config import Config, Transition
from mlip_refine.errors import InputError, SamplingError, StatisticsError
from mlip_refine.losses import EnsembleSource
from mlip_refine.potential import Potential
from mlip_refine.quantities import GPA, MEV, Measured
from mlip_refine.sampling import FrameStore, Length, StatePoint, Trajectory
from mlip_refine.sampling.sampler import Start
from mlip_refine.statistics.boundary import BoundaryPoint, PhaseState, boundary_point, difference
from mlip_refine.statistics.gibbs_ladder import jackknife_error
from mlip_refine.workflows.base import Run
from mlip_refine.workflows.free_energy.differences import FreeEnergySettings
from mlip_refine.workflows.free_energy.frenkel_ladd import AbsoluteFreeEnergy, absolute_free_energies
from mlip_refine.workflows.from_config import (
    free_energy_settings,
    load_potential,
    md_settings,
    state_points,
    with_timestep,
)
from mlip_refine.workflows.records import Estimate, write_record
from mlip_refine.workflows.transition import required_section
from mlip_refine.workflows.transition.ladder import (
    LadderSettings,
    join_rungs,
    lost_rungs,
    mean_cell,
    mean_cell_at,
    rung_of,
    sample_rungs,
)
from mlip_refine.workflows.transition.records import (
    AnchorRecord,
    BoundaryRecord,
    ClosureRecord,
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
        phases: Starting point of both phases, in the order from, to.
        ladder: How the rungs are sampled.
        free_energy: How absolute free energies are computed.
        min_effective: Least number of independent frames of an estimate.
    """

    name: str
    section: Transition
    potential: Potential
    phases: tuple[StatePoint, StatePoint]
    ladder: LadderSettings
    free_energy: FreeEnergySettings
    min_effective: float


@dataclass(frozen=True)
class _Surfaces:
    """Both phases, and what was left out on the way to them.

    Attributes:
        phases: Gibbs energies of both, in the order from, to.
        used: Trajectories that they rest on, by phase and name.
        lost: Rungs that were not used, one line each.
        anchors: Absolute Gibbs energies.
    """

    phases: tuple[AnchoredSurface, AnchoredSurface]
    used: tuple[dict[str, Trajectory], dict[str, Trajectory]]
    lost: tuple[str, ...]


def prepare(config: Config) -> Prepared:
    """Check the input, and turn the config into state points and settings.

    Raises:
        InputError: For bad input.
    """
    section = required_section(config)
    potential = load_potential(config)
    middle, low = section.anchors[0].temperature, min(section.pressure)
    sources = [EnsembleSource(name, middle, low) for name in (section.from_, section.to)]
    points = state_points(config, sources, potential, section.replicas)
    first, second = (
        replace(points[source], name=source.phase, ensemble="npt", thermostat="langevin")
        for source in sources
    )
    _require_same_composition(first, second, config.where("transition"))
    config = with_timestep(config, potential, points.values())
    frames = max(1, round(section.duration / section.interval))
    length = Length(section.equilibration, frames, max(1, round(SEGMENT / section.interval)))
    md = md_settings(config, interval=section.interval)
    return Prepared(
        name=config.name,
        section=section,
        potential=potential,
        phases=(first, second),
        ladder=LadderSettings(md, length, section.replicas, config.seed),
        free_energy=free_energy_settings(config),
        min_effective=config.sampling.min_effective_frames,
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
    climbed = _climb(prepared, frozen, temperatures, "ladder", run.store)
    anchors = _anchors(prepared, frozen, climbed, run.store)
    for extension in range(section.extensions + 1):
        surfaces = _surfaces(prepared, climbed, anchors)
        points = _boundary(prepared, surfaces)
        wanted = _beyond(surfaces, points, temperatures)
        if wanted is None or extension == section.extensions:
            break
        start = _from_nearest(prepared, climbed, wanted)
        climbed |= _climb(prepared, frozen, [wanted], f"ladder-extension-{extension + 1}", run.store, start)
        temperatures = sorted([*temperatures, wanted])
    result = TransitionResult(run.folder, _file(prepared, surfaces, points, anchors))
    write_boundary(run.folder / "boundary.csv", result.file.boundary)
    # Without a boundary the rest is worth keeping too.
    write_record(run.folder / "transition.json", result.file)
    _require_boundary(result.file)
    return result


def _climb(
    prepared: Prepared,
    frozen: Potential,
    temperatures: Sequence[float],
    stage: str,
    store: FrameStore,
    start: Start | None = None,
) -> dict[str, Trajectory]:
    """Sample the rungs of both phases at some temperatures and all pressures, in one batch."""
    points = [
        rung_of(phase, t, p, prepared.ladder.replicas)
        for phase in prepared.phases
        for t, p in product(temperatures, sorted(prepared.section.pressure))
    ]
    return sample_rungs(frozen, points, prepared.ladder, stage, store, start)


def _anchors(
    prepared: Prepared, frozen: Potential, climbed: Mapping[str, Trajectory], store: FrameStore
) -> list[tuple[StatePoint, AbsoluteFreeEnergy]]:
    """Compute the absolute free energies of both phases, each in the mean cell of the rung of its anchor.

    Raises:
        SamplingError: If a phase did not survive at an anchor.
        StatisticsError: If windows do not overlap.
    """
    points, lost = [], lost_rungs(climbed)
    for phase, anchor in product(prepared.phases, prepared.section.anchors):
        rung = rung_of(phase, anchor.temperature, anchor.pressure, prepared.free_energy.replicas)
        if rung.name in lost:
            raise SamplingError(
                f"there is no anchor where the phase does not survive: {lost[rung.name]}; choose another "
                "transition.anchor"
            )
        points.append(replace(rung.with_cell(mean_cell(climbed[rung.name])), ensemble="nvt"))
    settings = prepared.free_energy
    found = absolute_free_energies(
        frozen,
        points,
        settings.md,
        settings.ladder,
        seed=settings.seed,
        stage="anchors",
        store=store,
    )
    return [(point, found[point.name]) for point in points]


def _surfaces(
    prepared: Prepared,
    climbed: Mapping[str, Trajectory],
    anchors: Sequence[tuple[StatePoint, AbsoluteFreeEnergy]],
) -> _Surfaces:
    """Join the rungs that can be used, and anchor them."""
    lost = lost_rungs(climbed)
    surfaces, used = [], []
    for phase in prepared.phases:
        mine = {
            name: run
            for name, run in climbed.items()
            if name.startswith(f"{phase.name}-") and name not in lost
        }
        known = [
            Anchor(point.temperature, point.pressure * GPA, found.gibbs, 0.0)
            for point, found in anchors
            if point.name in mine
        ]
        surfaces.append(AnchoredSurface(join_rungs(phase.name, list(mine.values())), known))
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


def _from_nearest(prepared: Prepared, climbed: Mapping[str, Trajectory], temperature: float) -> Start:
    """Return the last frames of the nearest rungs, for rungs at a further temperature to start from."""
    start = {}
    for phase, pressure in product(prepared.phases, prepared.section.pressure):
        mine = [
            run
            for run in climbed.values()
            if run.point.name.startswith(f"{phase.name}-") and run.point.pressure == pressure and run.n_kept
        ]
        if mine:
            nearest = min(mine, key=lambda run: abs(run.point.temperature - temperature))
            start[rung_of(phase, temperature, pressure, 1).name] = nearest.last()
    return start


def _file(
    prepared: Prepared,
    surfaces: _Surfaces,
    points: Sequence[tuple[float, BoundaryPoint | None, str]],
    anchors: Sequence[tuple[StatePoint, AbsoluteFreeEnergy]],
) -> TransitionFile:
    """Return what is kept of a calculation."""
    section, settings, phases = prepared.section, prepared.free_energy, surfaces.phases
    names = section.from_, section.to
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
        convention=_convention(prepared),
        timestep_fs=settings.timestep,
        seed=settings.seed,
        settings=section.model_dump(mode="json", by_alias=True),
        boundary=tuple(_point(*point) for point in points),
        anchors=tuple(
            _anchor(name, point, found)
            for name in names
            for point, found in anchors
            if point.name.startswith(f"{name}-")
        ),
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


def _anchor(name: str, point: StatePoint, found: AbsoluteFreeEnergy) -> AnchorRecord:
    """Return the record of an absolute free energy."""
    n = len(point.atoms)
    return AnchorRecord(
        phase=name,
        temperature_K=point.temperature,
        pressure_GPa=point.pressure,
        n_atoms=n,
        volume_A3_per_atom=float(point.atoms.cell.volume) / n,
        method="frenkel_ladd",
        gibbs=found.gibbs.scaled(1 / (MEV * n), "meV/atom"),
        size_term=0.0,
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


def _convention(prepared: Prepared) -> str:
    return f"cells of {len(prepared.phases[0].atoms)} atoms"


def _require_boundary(file: TransitionFile) -> None:
    """Refuse a result without a boundary.

    Raises:
        StatisticsError: With what would do.
    """
    if all(point.temperature.refused for point in file.boundary):
        raise StatisticsError(f"there is no boundary: {file.boundary[0].temperature.refused}")


def _require_same_composition(one: StatePoint, two: StatePoint, where: str | None) -> None:
    """Refuse phases whose atoms are not the same, or in other numbers.

    Raises:
        InputError: With both formulas.
    """
    formulas = [point.atoms.get_chemical_formula() for point in (one, two)]
    if formulas[0] != formulas[1]:
        raise InputError(
            "finite-size errors cancel only between cells of the same atoms",
            where=where,
            found=f"{one.name}: {formulas[0]}, {two.name}: {formulas[1]}",
            expected="equal numbers of each element",
        )
