"""Elastic constants at temperatures: fixed cells are sampled, and their stress tells."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mlip_refine.config import Config, Elastic
from mlip_refine.crystals.symmetry import INDEPENDENT, Symmetry, crystal_symmetry
from mlip_refine.data import Table, find_table
from mlip_refine.errors import StatisticsError
from mlip_refine.losses import EnsembleSource
from mlip_refine.losses.base import UNSTRAINED
from mlip_refine.losses.elastic.targets import constants_of, lattice_of
from mlip_refine.observables.base import Observable, Probe, measure, sample_of, values_of
from mlip_refine.observables.cell import Pressure
from mlip_refine.observables.elasticity import (
    Deformation,
    FluctuationElasticity,
    FluctuationModuli,
    RestStrain,
)
from mlip_refine.potential import Potential
from mlip_refine.quantities import Measured
from mlip_refine.sampling import FrameStore, Length, StatePoint, Trajectory, sample
from mlip_refine.statistics import require_effective
from mlip_refine.training.gradients.streaming import further_probes, with_gaps
from mlip_refine.workflows.elastic.strained_cells import MODULI, of_strained_cells
from mlip_refine.workflows.elastic.thermal_records import ThermalElasticPoint
from mlip_refine.workflows.from_config import (
    md_settings,
    sampling_length,
    state_points,
    timestep,
    with_timestep,
)

STAGE = "elastic"

SEGMENT = 1000.0
"""Time between two writes to disk, fs: what an interruption costs at most, and going on for longer."""


@dataclass(frozen=True)
class _State:
    """A cell at a temperature, its symmetry, and the strained cells that go with it."""

    source: EnsembleSource
    point: StatePoint
    symmetry: Symmetry
    deformation: Deformation
    strained: tuple[EnsembleSource, ...]


def thermal_elasticity(
    config: Config, potential: Potential, phases: Sequence[str], folder: Path
) -> Iterator[tuple[ThermalElasticPoint, ...]]:
    """Sample the cells of `elastic.temperature` and find their elastic constants, one state after the other.

    What was sampled before, in whole segments, is not sampled again, also where more frames are wanted now.
    Where frames are too few or too correlated, a point has the reason in place of its constants.

    Args:
        config: With sections `elastic` and `sampling`.
        potential: In float64.
        phases: Names of crystals.
        folder: Run folder; frames are kept below it.

    Yields:
        The points of a state, one for each method.

    Raises:
        InputError: For a table that does not have the temperatures.
        SamplingError: If a crystal does not survive.
    """
    section = config.elastic
    table = None if section.table is None else find_table(section.table, config.resolve)
    states = [_state(config, potential, source) for source in _sources(section, phases, table)]
    needed = [source for state in states for source in _sampled(section, state)]
    points = state_points(config, needed, potential, config.sampling.replicas)
    config = with_timestep(config, potential, points.values())
    frozen = potential.frozen_copy(config.sampling.dtype, config.sampling.accelerate)
    store = FrameStore(folder / "frames", {"seed": config.seed})
    # One batch per crystal and temperature: what is done is kept if a later one is interrupted.
    for state in states:
        runs = sample(
            frozen,
            [points[s] for s in _sampled(section, state)],
            md_settings(config),
            _length(config),
            seed=config.seed,
            stage=f"{STAGE}-{state.source.name}",
            store=store,
        )
        yield tuple(_points(config, potential, state, points, runs, _targets(table, state)))


def _length(config: Config) -> Length:
    """As of any sampling, but in segments."""
    segment = max(1, round(SEGMENT / config.sampling.interval))
    return replace(sampling_length(config), segment=segment)


def _sources(section: Elastic, phases: Sequence[str], table: Table | None) -> list[EnsembleSource]:
    return [
        EnsembleSource(phase, t, 0.0, () if table is None else lattice_of(table, t))
        for phase in phases
        for t in section.temperature or ()
    ]


def _targets(table: Table | None, state: _State) -> dict[str, Measured]:
    """Measured constants."""
    if table is None:
        return {}
    found = constants_of(table, state.source.temperature)
    return {n: Measured(*found[n], "GPa") for n in INDEPENDENT[state.symmetry.laue] if n in found}


def _state(config: Config, potential: Potential, source: EnsembleSource) -> _State:
    point = state_points(config, [source], potential, 1)[source]
    atoms = point.atoms
    symmetry = crystal_symmetry(atoms.cell.array, atoms.positions, atoms.numbers)
    deformation = Deformation.of(symmetry, config.elastic.strain)
    strained = tuple(replace(source, strain=strain) for strain in deformation.strains)
    return _State(source, point, symmetry, deformation, strained)


def _sampled(section: Elastic, state: _State) -> list[EnsembleSource]:
    own = replace(state.source, strain=UNSTRAINED)
    return [own, *(state.strained if "deformation" in section.method else ())]


def _points(
    config: Config,
    potential: Potential,
    state: _State,
    points: Mapping[EnsembleSource, StatePoint],
    runs: Mapping[str, Trajectory],
    targets: Mapping[str, Measured],
) -> list[ThermalElasticPoint]:
    found = []
    for method in config.elastic.method:
        own, *strained = _sampled(config.elastic, state)
        mine = [own, *strained] if method == "deformation" else [own]
        trajectories = [runs[points[s].name] for s in mine]
        by = _by_fluctuation if method == "fluctuation" else _by_deformation
        try:
            values = by(config, potential, state, trajectories)
        except StatisticsError as error:
            values = {"refused": str(error)}
        found.append(
            ThermalElasticPoint(
                name=state.source.name,
                phase=state.source.phase,
                method=method,
                kind=config.elastic.kind if method == "fluctuation" else "isothermal",
                temperature_K=state.source.temperature,
                lattice_A=state.source.lattice,
                n_atoms=len(state.point.atoms),
                frames=sum(t.n_kept for t in trajectories),
                atom_steps=_atom_steps(config, trajectories),
                **values,
                targets=targets,
                verdicts=tuple(v for t in trajectories for v in t.verdicts),
            )
        )
    return found


def _atom_steps(config: Config, runs: Sequence[Trajectory]) -> int:
    section, step = config.sampling, timestep(config)
    first = max(1, round(section.equilibration / step)) if section.equilibration > 0 else 0
    per_frame = max(1, round(section.interval / step))
    return sum((first + per_frame * run.kept.shape[1]) * len(run.kept) * run.n_atoms for run in runs)


def _by_fluctuation(
    config: Config, potential: Potential, state: _State, runs: Sequence[Trajectory]
) -> dict[str, Any]:
    (run,) = runs
    _require_frames(config, run)
    seen = sample_of(run, {"born": _born(config, potential, run)})
    adiabatic = config.elastic.kind == "adiabatic"

    def values(observable: Observable) -> dict[str, Measured]:
        return dict(zip(observable.labels, measure(observable, seen, run.inefficiency), strict=True))

    def constants(**options: bool) -> dict[str, Measured]:
        return values(FluctuationElasticity(state.symmetry, **options))

    moduli = values(FluctuationModuli(state.symmetry, adiabatic=adiabatic))
    return {
        "constants": constants(adiabatic=adiabatic),
        "isothermal": constants(),
        "stress_strain": constants(adiabatic=adiabatic, stress_strain=True),
        "moduli": {name: replace(m, unit=MODULI[name]) for name, m in moduli.items()},
        "pressure": values(Pressure())["pressure"],
        "rest_strain": values(RestStrain(state.symmetry)),
    }


def _born(config: Config, potential: Potential, run: Trajectory) -> torch.Tensor | Probe:
    """The Born term of every so many frames.

    Raises:
        StatisticsError: It is known on too few.
    """
    every, minimum = config.elastic.born_every, config.sampling.min_effective_frames
    positions, numbers = run.positions[run.kept][::every], run.point.atoms.numbers
    what = f"the Born term of {run.point.name}, of one frame in {every},"
    require_effective(len(positions), minimum, what, have_length=run.n_kept, unit="frames")
    # Neighbours are found for these frames alone.
    structures = potential.graphs.frames(positions, run.cells[run.kept][::every], numbers)
    born = further_probes(potential, structures, {"born": 1})["born"]
    return with_gaps(values_of(born), run.n_kept, every)


def _by_deformation(
    config: Config,
    potential: Potential,  # noqa: ARG001 - as the other method has it
    state: _State,
    runs: Sequence[Trajectory],
) -> dict[str, Any]:
    for run in runs:
        _require_frames(config, run)
    found = of_strained_cells(state.deformation, runs)
    return found | {"isothermal": found["constants"]}


def _require_frames(config: Config, run: Trajectory) -> None:
    pressure = -run.stress[run.kept].diagonal(dim1=1, dim2=2).mean(-1)
    independent = run.n_kept / run.inefficiency(pressure)
    minimum = config.sampling.min_effective_frames
    what = f"the stress of {run.point.name}"
    require_effective(independent, minimum, what, have_length=run.n_kept, unit="frames")
