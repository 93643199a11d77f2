"""Elastic constants at temperatures: fixed cells are sampled, and their stress tells."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mlip_refine.config import Config, Elastic
from mlip_refine.data import Table, experimental_table, read_table
from mlip_refine.losses import EnsembleSource
from mlip_refine.observables.base import Observable, measure
from mlip_refine.observables.crystal import INDEPENDENT, Symmetry, crystal_symmetry
from mlip_refine.observables.deformation import Deformation, deformation_constants
from mlip_refine.observables.elasticity import FluctuationElasticity, FluctuationModuli, RestStrain
from mlip_refine.observables.frames import sample_of
from mlip_refine.observables.pressure import Pressure
from mlip_refine.observables.stress import Stress
from mlip_refine.potential import Potential
from mlip_refine.quantities import Measured
from mlip_refine.report.thermal_elastic import ThermalElasticPoint
from mlip_refine.sampling import FrameStore, GoodFrames, StatePoint, Trajectory, sample
from mlip_refine.statistics import require_effective
from mlip_refine.training.streaming import further_probes
from mlip_refine.workflows.setup import md_settings, sampling_length, state_points, timestep, with_timestep

STAGE = "elastic"


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
) -> tuple[ThermalElasticPoint, ...]:
    """Sample the cells of `elastic.temperature` and find their elastic constants.

    What was sampled before an interruption is not sampled again.

    Args:
        config: With sections `elastic` and `sampling`.
        potential: In float64.
        phases: Names of crystals.
        folder: Run folder; frames are kept below it.

    Raises:
        InputError: For a table that does not have the temperatures.
        SamplingError: If a crystal does not survive.
        StatisticsError: If the frames are too few or too correlated.
    """
    section = config.elastic
    table = _table(config, section.table)
    states = [_state(config, potential, source) for source in _sources(section, phases, table)]
    needed = [source for state in states for source in _sampled(section, state)]
    points = state_points(config, needed, potential, config.sampling.replicas)
    config = with_timestep(config, potential, points.values())
    frozen = potential.frozen_copy(config.sampling.dtype, config.sampling.accelerate)
    store = FrameStore(folder / "frames", {"seed": config.seed})
    runs: dict[str, Trajectory] = {}
    # One batch per crystal and temperature: what is done is kept if a later one is interrupted.
    for state in states:
        mine = [points[s] for s in _sampled(section, state)]
        stage = f"{STAGE}-{state.source.name}"
        runs |= sample(
            frozen,
            mine,
            md_settings(config),
            sampling_length(config),
            seed=config.seed,
            stage=stage,
            store=store,
        )
    return tuple(
        p for state in states for p in _points(config, potential, state, points, runs, _targets(table, state))
    )


def _table(config: Config, name: str | None) -> Table | None:
    if name is None:
        return None
    path = config.resolve(name)
    return read_table(path) if path.is_file() else experimental_table(name)


def _sources(section: Elastic, phases: Sequence[str], table: Table | None) -> list[EnsembleSource]:
    return [
        EnsembleSource(phase, t, 0.0, _lattice(table, t))
        for phase in phases
        for t in section.temperature or ()
    ]


def _lattice(table: Table | None, temperature: float) -> tuple[float, ...]:
    if table is None:
        return ()
    return tuple(table.target(axis, temperature).value for axis in "ac" if axis in table.columns)


def _targets(table: Table | None, state: _State) -> dict[str, Measured]:
    """Measured constants."""
    if table is None:
        return {}
    names = [n for n in INDEPENDENT[state.symmetry.laue] if n in table.columns]
    found = {n: table.target(n, state.source.temperature) for n in names}
    return {n: Measured(t.value, t.uncertainty, t.unit) for n, t in found.items()}


def _state(config: Config, potential: Potential, source: EnsembleSource) -> _State:
    point = state_points(config, [source], potential, 1)[source]
    atoms = point.atoms
    symmetry = crystal_symmetry(atoms.cell.array, atoms.positions, atoms.numbers)
    deformation = Deformation.of(symmetry, config.elastic.strain)
    strained = tuple(replace(source, strain=strain) for strain in deformation.strains)
    return _State(source, point, symmetry, deformation, strained)


def _sampled(section: Elastic, state: _State) -> list[EnsembleSource]:
    own = [replace(state.source, strain=(0.0,) * 6)] if "fluctuation" in section.method else []
    return own + (list(state.strained) if "deformation" in section.method else [])


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
        mine = [s for s in _sampled(config.elastic, state) if any(s.strain) == (method == "deformation")]
        trajectories = [runs[points[s].name] for s in mine]
        by = _by_fluctuation if method == "fluctuation" else _by_deformation
        values = by(config, potential, state, [t.good() for t in trajectories])
        found.append(
            ThermalElasticPoint(
                name=state.source.name,
                phase=state.source.phase,
                method=method,
                kind=config.elastic.kind if method == "fluctuation" else "isothermal",
                temperature_K=state.source.temperature,
                lattice_A=state.source.lattice,
                n_atoms=len(state.point.atoms),
                frames=sum(len(t.good()) for t in trajectories),
                atom_steps=_atom_steps(config, trajectories),
                **values,
                targets=targets,
                verdicts=tuple(v for t in trajectories for v in t.verdicts),
            )
        )
    return found


def _atom_steps(config: Config, runs: Sequence[Trajectory]) -> int:
    per_frame = max(1, round(config.sampling.interval / timestep(config)))
    return sum(per_frame * run.kept.numel() * run.n_atoms for run in runs)


def _by_fluctuation(
    config: Config, potential: Potential, state: _State, runs: Sequence[GoodFrames]
) -> dict[str, Any]:
    (frames,) = runs
    _require_frames(config, frames)
    structures = potential.graphs.frames(frames.positions, frames.cells, frames.point.atoms.numbers)
    born = further_probes(potential, structures, {"born": config.elastic.born_every})
    seen = sample_of(frames, born)
    adiabatic = config.elastic.kind == "adiabatic"

    def values(observable: Observable) -> dict[str, Measured]:
        return dict(zip(observable.labels, measure(observable, seen, frames.inefficiency), strict=True))

    moduli = values(FluctuationModuli(state.symmetry, adiabatic=adiabatic))
    units = {"K": "GPa", "G": "GPa", "nu": ""}
    return {
        "constants": values(FluctuationElasticity(state.symmetry, adiabatic=adiabatic)),
        "isothermal": values(FluctuationElasticity(state.symmetry)),
        "moduli": {name: replace(m, unit=units[name]) for name, m in moduli.items()},
        "pressure": values(Pressure())["pressure"],
        "rest_strain": values(RestStrain(state.symmetry)),
    }


def _by_deformation(
    config: Config,
    potential: Potential,  # noqa: ARG001 - as the other method has it
    state: _State,
    runs: Sequence[GoodFrames],
) -> dict[str, Any]:
    for frames in runs:
        _require_frames(config, frames)
    measured = [measure(Stress(), sample_of(frames), frames.inefficiency) for frames in runs]
    stress = torch.tensor([[m.value for m in row] for row in measured], dtype=torch.float64)
    errors = torch.tensor([[m.se for m in row] for row in measured], dtype=torch.float64)
    values, spread = deformation_constants(state.deformation, stress, errors)
    labels = INDEPENDENT[state.symmetry.laue]
    pairs = zip(labels, values.tolist(), spread.tolist(), strict=True)
    constants = {name: Measured(value, error, "GPa") for name, value, error in pairs}
    return {
        "constants": constants,
        "isothermal": constants,
        "moduli": {},
        "pressure": Measured(
            -float(stress[:, :3].mean()),
            float(errors[:, :3].square().sum().sqrt()) / errors[:, :3].numel(),
            "GPa",
        ),
        "rest_strain": {},
    }


def _require_frames(config: Config, frames: GoodFrames) -> None:
    pressure = -frames.stress.diagonal(dim1=1, dim2=2).mean(-1)
    independent = len(frames) / frames.inefficiency(pressure)
    minimum = config.sampling.min_effective_frames
    what = f"the stress of {frames.point.name}"
    require_effective(independent, minimum, what, have_length=len(frames), unit="frames")
