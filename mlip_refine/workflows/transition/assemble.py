"""The result of `mlip-refine transition` as the records of its file."""

import math
from collections.abc import Sequence
from itertools import product

import numpy as np

from mlip_refine.losses import EnsembleSource
from mlip_refine.quantities import GPA, MEV, Measured
from mlip_refine.sampling import Trajectory
from mlip_refine.statistics.boundary import BoundaryPoint, PhaseState, difference
from mlip_refine.statistics.gibbs_ladder import jackknife_error
from mlip_refine.workflows.free_energy.frenkel_ladd import AbsoluteFreeEnergy
from mlip_refine.workflows.records import Estimate
from mlip_refine.workflows.transition.anchors import Anchors, size_term
from mlip_refine.workflows.transition.boundaries import Surfaces, common_range
from mlip_refine.workflows.transition.coexistence import (
    CoexistenceRun,
)
from mlip_refine.workflows.transition.ladder import (
    mean_cell_at,
)
from mlip_refine.workflows.transition.prepare import Prepared
from mlip_refine.workflows.transition.records import (
    AnchorRecord,
    BoundaryRecord,
    BoxRecord,
    ClosureRecord,
    DifferenceRecord,
    EndRecord,
    PhaseRecord,
    StateRecord,
    TransitionFile,
)
from mlip_refine.workflows.transition.surface import AnchoredSurface

GRID = 13
"""Temperatures of the curves of ΔG."""


def assembled(
    prepared: Prepared,
    surfaces: Surfaces,
    points: Sequence[tuple[float, BoundaryPoint | None, str]],
    anchors: Anchors,
) -> TransitionFile:
    """Return what is kept of a calculation."""
    section, settings, phases = prepared.section, prepared.free_energy, surfaces.phases
    names = prepared.phases
    firsts = [next(iter(used.values())) for used in surfaces.used]
    differences = []
    for pressure, t in product([point[0] for point in points], np.linspace(*common_range(surfaces), GRID)):
        one, two = (surface.at(t, pressure * GPA) for surface in phases)
        found = difference(one, two, t)
        if found.n_eff < prepared.min_effective:
            # A rung was lost here: what is left is an extrapolation.
            continue
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
    )


def box_record(run: CoexistenceRun) -> BoxRecord:
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
        size_term=size_term(found).scaled(1 / (MEV * len(atoms)), "meV/atom"),
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
