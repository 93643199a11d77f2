"""Molecular dynamics for its own sake: every phase at every temperature and pressure, in one batch."""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

from mlip_refine.config import MD, Config
from mlip_refine.errors import InputError, SamplingError
from mlip_refine.files import write_json
from mlip_refine.losses import EnsembleSource
from mlip_refine.potential import Potential
from mlip_refine.sampling import FrameStore, Length, MDSettings, StatePoint, Trajectory, sample
from mlip_refine.sampling.md.settings import resolved
from mlip_refine.sampling.state_points import SERIES, Ensemble
from mlip_refine.workflows.from_config import (
    crystal,
    identity,
    load_potential,
    md_settings,
    require_phase,
    timestep,
    with_timestep,
)
from mlip_refine.workflows.md.averages import averages
from mlip_refine.workflows.md.dynamics_files import write_dynamics
from mlip_refine.workflows.md.dynamics_tables import write_dynamics_figures
from mlip_refine.workflows.md.files import write_frames, write_series
from mlip_refine.workflows.md.records import MDPoint, MDResult, Speed
from mlip_refine.workflows.md.tables import write_md_figures
from mlip_refine.workflows.run_folder import open_run_folder, packages

LAYOUT = """{folder}
├── config.yaml   the config with every default
├── frames/       sampled frames (HDF5)
├── md.json       averages with errors
├── series.csv    energy, volume, pressure and cell of every frame
├── speed.json    how fast it was
├── dynamics/     correlations and spectra, with dynamics, and dynamics.json
├── extxyz/       the frames that count, with export: true
└── *.png         energy, volume and pressure over time"""

STAGE = "md"


@dataclass(frozen=True)
class RecordedLength(Length):
    """A length whose first frames are the equilibration.

    It ends with a segment, so that an interrupted equilibration is not begun anew.

    Attributes:
        skipped: Frames of the equilibration, among `frames`.
    """

    skipped: int = 0

    def segments(self) -> list[int]:
        """Frames of every segment."""
        parts = (self.skipped, self.frames - self.skipped)
        return [n for frames in parts if frames for n in Length(0.0, frames, self.segment).segments()]


@dataclass(frozen=True)
class _Run:
    """What a run samples: points with the time step, friction and barostat time that each has."""

    config: Config
    folder: Path
    store: FrameStore
    potential: Potential
    points: dict[str, StatePoint]
    phases: dict[str, str]
    settings: MDSettings
    steps_per_frame: int
    length: RecordedLength

    @property
    def interval(self) -> float:
        """Time between frames as it is, a whole number of steps, fs."""
        return self.steps_per_frame * timestep(self.config)


def md(config: Config, *, resume: bool = False, opened: Callable[[Path], None] = lambda _: None) -> MDResult:
    """Run molecular dynamics and average.

    A point that lost all its replicas has no averages and says why; it does not take the others along.

    Args:
        config: What to do; it has a section `md`.
        resume: Go on with a run that was interrupted.
        opened: Called with the run folder, once the input has been checked.

    Returns:
        What `md.json` holds.

    Raises:
        InputError: For bad input; nothing has been overwritten.
    """
    run = _prepare(config, resume=resume)
    opened(run.folder)
    runs, speed = _timed(run)
    points = tuple(_point(run, trajectory) for trajectory in runs.values())
    result = MDResult(run.folder, config.name, run.potential.hash, points, speed)
    write_series(run.folder / "series.csv", runs, run.interval)
    if _section(config).export:
        for name, trajectory in runs.items():
            write_frames(
                run.folder / "extxyz" / f"{name}.extxyz", trajectory, run.interval, run.length.skipped
            )
    if speed is not None:
        write_json(run.folder / "speed.json", asdict(speed))
    write_json(run.folder / "md.json", result.as_json())
    _write_dynamics(run, runs)
    if config.output.figures:
        write_md_figures(run.folder)
    if not config.output.keep_frames:
        shutil.rmtree(run.store.folder, ignore_errors=True)
    return result


def _write_dynamics(run: _Run, runs: dict[str, Trajectory]) -> None:
    options = _section(run.config).dynamics
    if options is None:
        return
    name, model = run.config.name, run.potential.hash
    write_dynamics(run.folder, name, model, runs, run.length.skipped, run.interval, options)
    if run.config.output.figures:
        write_dynamics_figures(run.folder)


def _section(config: Config) -> MD:
    if config.md is None:
        raise InputError(
            "there is nothing to run: the config has no section md",
            where=config.where(),
            expected="md with at least a temperature",
        )
    return config.md


def _prepare(config: Config, *, resume: bool) -> _Run:
    """Check everything that can be checked before a file is written, then open the run folder."""
    section, given = _section(config), config
    sources = _sources(config, section)
    potential = load_potential(config).frozen_copy(config.sampling.dtype, config.sampling.accelerate)
    points = [_state_point(config, section, source, potential) for source in sources]
    config = with_timestep(config, potential, points)
    if section.interval < timestep(config):
        raise InputError(
            "frames cannot be closer than steps",
            where=config.where("md", "interval"),
            found=f"interval {section.interval:g} fs",
            expected=f"at least one time step ({timestep(config):g} fs)",
        )
    settings = md_settings(config, interval=section.interval)
    points = resolved(potential, points, settings)
    steps = max(1, round(section.interval / timestep(config)))
    skipped, frames = (
        _frames(t, steps * timestep(config)) for t in (section.equilibration, section.duration)
    )
    segment = max(1, round(section.segment / section.interval))
    length = RecordedLength(0.0, skipped + frames, segment, skipped)
    folder = open_run_folder(given, resume=resume)
    store = FrameStore(folder / "frames", {"seed": config.seed, "packages": packages()})
    named, phases = {p.name: p for p in points}, {s.name: s.phase for s in sources}
    return _Run(config, folder, store, potential, named, phases, settings, steps, length)


def _frames(duration: float, interval: float) -> int:
    """Frames that cover a time; the small number forgives rounding."""
    return math.ceil(duration / interval - 1e-6)


def _sources(config: Config, section: MD) -> list[EnsembleSource]:
    phases = list(config.phases) if section.phases is None else section.phases
    for i, name in enumerate(phases):
        require_phase(config, name, "md", config.where("md", "phases", i))
    if not phases:
        raise InputError("there is nothing to run: the config has no phases", where=config.where("md"))
    return [EnsembleSource(*state) for state in product(phases, section.temperature, section.pressure)]


def _state_point(config: Config, section: MD, source: EnsembleSource, potential: Potential) -> StatePoint:
    atoms = crystal(config, source.phase)
    potential.graphs.species(atoms.numbers)
    freedom = section.cell or config.phases[source.phase].cell_freedom
    fixed: dict[str, Ensemble] = {"npt": "nvt", "nph": "nve"}
    ensemble: Ensemble = section.ensemble
    return StatePoint(
        name=source.name,
        atoms=atoms,
        temperature=source.temperature,
        pressure=source.pressure,
        ensemble=fixed.get(ensemble, ensemble) if freedom == "fixed" else ensemble,
        cell_freedom=freedom,
        replicas=section.replicas,
        thermostat=section.thermostat,
        identity=identity(config, source.phase, section.identity),
    )


def _timed(run: _Run) -> tuple[dict[str, Trajectory], Speed | None]:
    """Sample what is not there yet, and how fast that was."""
    before, started = _stamps(run), time.monotonic()
    runs = _sampled(run)
    seconds = time.monotonic() - started
    after = _stamps(run)
    fresh = sum(n for i, n in enumerate(run.length.segments()) if before[i] != after[i])
    if not fresh:
        return runs, None
    steps = fresh * run.steps_per_frame
    atoms = sum(len(p.atoms) * p.replicas for p in run.points.values())
    return runs, Speed(steps, seconds, steps * atoms / seconds, str(run.potential.device))


def _stamps(run: _Run) -> list[int | None]:
    """When every segment was written."""
    paths = [run.store.path(STAGE, i) for i in range(len(run.length.segments()))]
    return [path.stat().st_mtime_ns if path.exists() else None for path in paths]


def _sampled(run: _Run) -> dict[str, Trajectory]:
    points, seed = list(run.points.values()), run.config.seed
    try:
        return sample(
            run.potential, points, run.settings, run.length, seed=seed, stage=STAGE, store=run.store
        )
    except SamplingError:
        # Raised at the end, when a point lost all its replicas: the others are in the store.
        stored = _stored(run)
        if stored is None:
            raise
        return stored


def _stored(run: _Run) -> dict[str, Trajectory] | None:
    """What the store holds, if that is all of the run."""
    whole: dict[str, Trajectory] = {}
    for i in range(len(run.length.segments())):
        segment = run.store.read(STAGE, i, run.points, None)
        if segment is None:
            return None
        whole = {name: whole[name].extend(t) if whole else t for name, t in segment[0].items()}
    return whole


def _point(run: _Run, trajectory: Trajectory) -> MDPoint:
    point, section = trajectory.point, _section(run.config)
    cut = {name: getattr(trajectory, name)[:, run.length.skipped :] for name in (*SERIES, "kept")}
    production = replace(trajectory, **cut)
    return MDPoint(
        name=point.name,
        phase=run.phases[point.name],
        n_atoms=trajectory.n_atoms,
        temperature_K=point.temperature,
        pressure_GPa=point.pressure,
        ensemble=point.ensemble,
        thermostat=point.thermostat,
        cell_freedom=point.freedom,
        identity=point.identity,
        timestep_fs=timestep(run.config),
        interval_fs=run.interval,
        friction_per_ps=point.friction if point.langevin else None,
        barostat_time_fs=point.barostat_time if point.freedom != "fixed" else None,
        replicas=section.replicas,
        steps=run.length.frames * run.steps_per_frame,
        equilibration_ps=run.length.skipped * run.interval / 1e3,
        frames_kept=production.n_kept,
        frames_discarded=production.kept.numel() - production.n_kept,
        averages=averages(production, run.config.sampling.min_effective_frames),
        verdicts=trajectory.verdicts,
    )
