"""What a run of a verb would take, without running it: its samplings, and the speed of a few steps here.

A verb that can say so has a function `(Prepared) -> Plan`; `Workflow.dry_run` times the plan and returns it
as a `PlanRecord`, which the command line prints for `--dry-run`.
"""

import math
import resource
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from rich.console import Console

from mlip_refine.errors import bytes_in_words
from mlip_refine.interruption import check
from mlip_refine.potential import Potential
from mlip_refine.potential.batching import bytes_of_memory
from mlip_refine.report.tables import plain_table
from mlip_refine.sampling import Length, MDSettings, MolecularDynamics, StatePoint
from mlip_refine.sampling.sampler import memory_of_frames
from mlip_refine.workflows.melt import INTERVAL, MeltSettings
from mlip_refine.workflows.records import Record

STEPS = 50
"""Steps whose time is taken."""

WARM_UP = 5
"""Steps before them."""

MOST_ATOMS = {"cpu": 2000, "cuda": 50_000}
"""Atoms of the timed batch, beyond which speed per atom changes little; a larger batch is timed in part."""

MOST_SECONDS = 120.0
"""Time after which fewer steps have to do."""

ALONE = 0.8
"""Part of a processor that a process has which no other one slows down."""

COPIES_IN_MEMORY = 3
"""How often `memory_of_frames` counts a frame; on disk it is once."""

FILE_BYTES, POINT_BYTES, STATE_BYTES = 30_000, 32_000, 200
"""What a segment takes on disk beside its frames: for itself, every point, and every atom, bytes.

Measured on files of one to eight points; most of it are HDF5's tables.
"""


@dataclass(frozen=True)
class Stage:
    """One sampling of a run.

    Attributes:
        name: Name of the sampling.
        points: State points, with their copies.
        settings: How they are integrated.
        length: How long each is.
        times: How often it is repeated, one after another.
        windows: Copies of every point beside its replicas, such as windows between two Hamiltonians.
        if_needed: Whether the run may do without it.
    """

    name: str
    points: tuple[StatePoint, ...]
    settings: MDSettings
    length: Length
    times: int = 1
    windows: int = 1
    if_needed: bool = False

    @property
    def systems(self) -> int:
        """Number of systems of the batch."""
        return self.windows * sum(point.replicas for point in self.points)

    @property
    def atoms(self) -> int:
        """Number of atoms of the batch."""
        return self.windows * sum(point.replicas * len(point.atoms) for point in self.points)

    def steps(self, default: float) -> int:
        """Return the number of time steps of a system, with a time step, fs, for points without one."""
        step = self.settings.timestep or min((p.timestep or default for p in self.points), default=default)
        equilibration = max(1, round(self.length.equilibration / step)) if self.length.equilibration else 0
        return self.times * (
            equilibration + self.length.frames * max(1, round(self.settings.interval / step))
        )

    @property
    def frames(self) -> int:
        """Number of frames of a system."""
        return self.times * self.length.frames

    @property
    def memory(self) -> int:
        """Bytes that the frames of one time take in memory."""
        return self.windows * memory_of_frames(self.points, self.length.frames)

    @property
    def disk(self) -> int:
        """Bytes that the files of all frames take, about, before they are compressed."""
        frames = self.memory // COPIES_IN_MEMORY
        file = FILE_BYTES + POINT_BYTES * self.windows * len(self.points) + STATE_BYTES * self.atoms
        return self.times * (frames + file * len(self.length.segments()))


@dataclass(frozen=True)
class Plan:
    """Everything that a run samples, from nothing to its end.

    Attributes:
        potential: The potential as it samples (see `Potential.frozen_copy`).
        stages: The samplings in their order.
        notes: What is not in them.
    """

    potential: Potential
    stages: tuple[Stage, ...]
    notes: tuple[str, ...] = ()


class PointRecord(Record):
    """A state point.

    Attributes:
        name: Its name.
        n_atoms: Atoms of a system.
        replicas: Copies.
        temperature_K: Temperature.
        pressure_GPa: Pressure.
        ensemble: Ensemble.
    """

    name: str
    n_atoms: int
    replicas: int
    temperature_K: float  # noqa: N815 - the unit's own case
    pressure_GPa: float  # noqa: N815 - the unit's own case
    ensemble: str


class StageRecord(Record):
    """One sampling of a run.

    Attributes:
        name: Name of the sampling.
        points: Its state points.
        windows: Hamiltonians in which each of them is sampled.
        systems: Systems of the batch.
        atoms: Atoms of the batch.
        steps: Time steps of every system.
        frames: Frames of every system.
        hours: Estimated time here.
        memory_bytes: What its frames take in memory.
        disk_bytes: What its frames take on disk, about.
        if_needed: Whether the run may do without it.
    """

    name: str
    points: tuple[PointRecord, ...]
    windows: int
    systems: int
    atoms: int
    steps: int
    frames: int
    hours: float
    memory_bytes: int
    disk_bytes: int
    if_needed: bool


class PlanRecord(Record):
    """What a run would take here.

    Attributes:
        verb: The verb.
        device: Where was timed.
        timed_atoms: Atoms of the batch that was timed.
        timed_steps: Steps that were timed.
        atom_steps_per_second: Speed: the median of the steps.
        stages: The samplings.
        hours: Estimated time of those that every run has.
        hours_at_most: The same with those that a run may do without.
        frames_memory_bytes: What the frames of the largest sampling take in memory.
        process_memory_bytes: Memory of this process, or on its GPU, at most until now.
        machine_memory_bytes: Memory of this machine.
        disk_bytes: What all frames take on disk, about.
        notes: What is not in the estimate.
    """

    verb: str
    device: str
    timed_atoms: int
    timed_steps: int
    atom_steps_per_second: float
    stages: tuple[StageRecord, ...]
    hours: float
    hours_at_most: float
    frames_memory_bytes: int
    process_memory_bytes: int
    machine_memory_bytes: int
    disk_bytes: int
    notes: tuple[str, ...]


def melt_stages(
    points: Iterable[StatePoint], melts: Mapping[str, MeltSettings], md: MDSettings
) -> list[Stage]:
    """Return the samplings that `melted` makes liquids in.

    Args:
        points: State points.
        melts: How the liquids among them are made, by the names of their points.
        md: Integrator settings.
    """
    stages = []
    alone = {point.name: replace(point, replicas=1) for point in points}
    for duration in sorted({melt.duration for melt in melts.values()}):
        some = tuple(alone[name] for name, melt in melts.items() if melt.duration == duration)
        spaced = replace(md, interval=min(INTERVAL, duration / 60))
        length = Length(duration / 3, max(1, round(2 * duration / 3 / spaced.interval)))
        stages.append(Stage(f"melt, {duration:g} fs hot and as long cool", some, spaced, length, times=2))
    return stages


def estimate(verb: str, plan: Plan) -> PlanRecord:
    """Time a few steps of the costliest sampling of a plan, and return what all of it takes.

    The time of a sampling is that of its atoms and steps; reading, melting checks and statistics are not in
    it.

    Args:
        verb: Name of the verb.
        plan: The plan.

    Raises:
        SamplingError: For a point that cannot be set up.
    """
    costliest = max(plan.stages, key=lambda stage: stage.atoms * stage.times * stage.length.frames)
    timing = _timed(plan.potential, costliest)
    step, speed = timing.timestep, timing.atoms / timing.seconds
    stages = tuple(
        StageRecord(
            name=stage.name,
            points=tuple(_point(point) for point in stage.points),
            windows=stage.windows,
            systems=stage.systems,
            atoms=stage.atoms,
            steps=(n := stage.steps(step)),
            frames=stage.frames,
            hours=stage.atoms * n / speed / 3600,
            memory_bytes=stage.memory,
            disk_bytes=stage.disk,
            if_needed=stage.if_needed,
        )
        for stage in plan.stages
    )
    return PlanRecord(
        verb=verb,
        device=str(plan.potential.device),
        timed_atoms=timing.atoms,
        timed_steps=timing.steps,
        atom_steps_per_second=speed,
        stages=stages,
        hours=sum(stage.hours for stage in stages if not stage.if_needed),
        hours_at_most=sum(stage.hours for stage in stages),
        frames_memory_bytes=max(stage.memory_bytes for stage in stages),
        process_memory_bytes=_peak_memory(plan.potential.device),
        machine_memory_bytes=bytes_of_memory(),
        disk_bytes=sum(stage.disk_bytes for stage in stages),
        notes=(*plan.notes, *_busy(plan.potential.device, timing)),
    )


def print_plan(console: Console, plan: PlanRecord) -> None:
    """Print what a run would take.

    Args:
        console: Console to print to.
        plan: The plan, timed.
    """
    table = plain_table(f"what {plan.verb} would sample")
    for heading in ("sampling", "points", "systems", "atoms", "steps", "frames", "disk", "hours"):
        table.add_column(heading, justify="left" if heading == "sampling" else "right", overflow="fold")
    for stage in plan.stages:
        table.add_row(
            stage.name + (" (if needed)" if stage.if_needed else ""),
            f"{len(stage.points)}" + (f" x {stage.windows}" if stage.windows > 1 else ""),
            f"{stage.systems:,}",
            f"{stage.atoms:,}",
            f"{stage.steps:,}",
            f"{stage.frames:,}",
            bytes_in_words(stage.disk_bytes),
            f"{stage.hours:.2g}",
        )
    console.print(table)
    console.print()
    named: set[tuple[str, ...]] = set()
    lines = []
    for stage in plan.stages:
        names = tuple(f"{point.name} (N = {point.n_atoms})" for point in stage.points)
        if names not in named:
            lines.append(f"{stage.name}: {', '.join(names)}")
        named.add(names)
    hours = f"{plan.hours:.2g} hours"
    if plan.hours_at_most > plan.hours:
        hours += f", {plan.hours_at_most:.2g} if all is needed"
    lines += [
        f"time     {hours} on this {plan.device}: {plan.atom_steps_per_second:,.0f} atom·steps/s, the "
        f"median of {plan.timed_steps} steps of {plan.timed_atoms} atoms",
        f"memory   {bytes_in_words(plan.process_memory_bytes)} now, and "
        f"{bytes_in_words(plan.frames_memory_bytes)} for frames, of "
        f"{bytes_in_words(plan.machine_memory_bytes)}",
        f"disk     about {bytes_in_words(plan.disk_bytes)}; output.keep_frames: false frees it at the end",
        *(f"note: {note}" for note in plan.notes),
        "nothing was written",
    ]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class _Timing:
    """The steps that were timed.

    Attributes:
        timestep: Time step, fs.
        atoms: Atoms of the batch.
        steps: Number of steps.
        seconds: Median of their times.
        cores: Processors that this process had meanwhile, on average.
    """

    timestep: float
    atoms: int
    steps: int
    seconds: float
    cores: float


def _busy(device: torch.device, timing: _Timing) -> tuple[str, ...]:
    """Return the note that other processes slow the machine down, if they do."""
    if device.type != "cpu" or timing.cores > ALONE:
        return ()
    share = f"{timing.cores:.0%} of a processor"
    return (f"the machine is busy: this process had {share}, and the estimate is for a machine as busy",)


def _timed(potential: Potential, stage: Stage) -> _Timing:
    """Take the time of a few steps of a batch, or of a part of it."""
    systems = [point for point in stage.points for _ in range(point.replicas * stage.windows)]
    limit = MOST_ATOMS[potential.device.type]
    # Evenly from all points: they may differ in size and density.
    every = math.ceil(sum(len(point.atoms) for point in systems) / limit)
    some = [replace(p, name=f"{p.name}:{i}", replicas=1) for i, p in enumerate(systems[::every])]
    dynamics = MolecularDynamics.prepare(potential, some, stage.settings, seed=1)
    dynamics.advance(WARM_UP)
    seconds, cpu, wall = list[float](), time.process_time(), time.perf_counter()
    while len(seconds) < STEPS and (len(seconds) < WARM_UP or sum(seconds) < MOST_SECONDS):
        check()
        _wait(potential.device)
        started = time.perf_counter()
        dynamics.advance(1)
        _wait(potential.device)
        seconds.append(time.perf_counter() - started)
    # Single steps that build neighbours or judge a backend do not sway the median.
    atoms = sum(len(point.atoms) for point in some)
    cores = (time.process_time() - cpu) / (time.perf_counter() - wall)
    return _Timing(float(dynamics.timestep), atoms, len(seconds), statistics.median(seconds), cores)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(device: torch.device) -> int:
    """Return the most memory that this process had until now, on the GPU if it computes there, bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Kilobytes, but bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _point(point: StatePoint) -> PointRecord:
    """Return the record of a state point."""
    return PointRecord(
        name=point.name,
        n_atoms=len(point.atoms),
        replicas=point.replicas,
        temperature_K=point.temperature,
        pressure_GPa=point.pressure,
        ensemble=point.ensemble,
    )
