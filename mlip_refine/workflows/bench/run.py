"""What the engine and the streamed gradient cost on this machine, each beside its floor."""

import gc
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from mlip_refine.config import Config
from mlip_refine.errors import InputError, MlipRefineError, nearest
from mlip_refine.potential import Acceleration, Potential
from mlip_refine.progress import progress
from mlip_refine.workflows.bench.engine import engine_against_ase, engine_against_model
from mlip_refine.workflows.bench.gradient import streamed_against_floor
from mlip_refine.workflows.bench.memory import memory_of_frames
from mlip_refine.workflows.bench.random_model import medium_mace
from mlip_refine.workflows.bench.records import BenchResult, Comparison, Machine, Outcome, Topic
from mlip_refine.workflows.bench.workloads import (
    FULL,
    QUICK,
    Effort,
    Subject,
    Workload,
    configured,
    dtype_name,
    parse_size,
    repeated,
    titanium,
)
from mlip_refine.workflows.from_config import load_potential

DEFAULT_MODEL = "titanium-compact"
CPU_INFO = Path("/proc/cpuinfo")

GPU_BATCHES = ((4, 54), (20, 54), (100, 54), (400, 54), (925, 54))
CPU_BATCHES = ((1, 16), (4, 16))

# Steps before the timing: what is compiled is compiled within them.
WARM_UP = 12

# Random weights bind no crystal: cold atoms keep their places for as long as this takes.
TEMPERATURE = 100.0

ACCELERATIONS: tuple[Acceleration, ...] = ("none", "compile", "cueq", "auto")


@dataclass(frozen=True)
class Job:
    """One row of the table before it is measured.

    Attributes:
        topic: What is measured against what.
        model: Name of the potential.
        workload: Systems and ensemble.
        run: Measures it.
        accelerate: How the potential is accelerated.
    """

    topic: Topic
    model: str
    workload: str
    run: Callable[[], Outcome]
    accelerate: str = "none"

    def result(self) -> Comparison:
        """Measure; a row that needs too much memory, or what is not installed, says so instead."""
        try:
            return self._row(self.run(), "")
        except torch.OutOfMemoryError:
            failure = "out of memory"
        except MlipRefineError as error:
            failure = str(error)
        # Only here has the traceback let go of what the row had allocated.
        gc.collect()
        torch.cuda.empty_cache()
        return self._row(None, failure)

    def _row(self, outcome: Outcome | None, failure: str) -> Comparison:
        return Comparison(
            topic=self.topic,
            model=self.model,
            workload=self.workload,
            accelerate=self.accelerate,
            outcome=outcome,
            failure=failure,
        )


def bench(
    config: Config | None = None,
    *,
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    sizes: Sequence[str] = (),
    accelerate: Sequence[str] = (),
    quick: bool = False,
    medium: bool = False,
    trust_pickle: bool = False,
) -> BenchResult:
    """Time the engine and the streamed gradient on this machine, each beside its floor.

    Args:
        config: Its potential, device, state points, replicas and integrator are timed, in the precision of
            its dynamics. `None` times hot titanium, half hcp and half bcc, to which the next four belong.
        model: Name or path, as `Potential.load` takes it; `None` takes `titanium-compact`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`; `None` is `auto`.
        dtype: `float32` or `float64`; `None` is `float32`.
        sizes: Systems x atoms of each, such as `4x54`: the batches of the engine.
        accelerate: Ways to accelerate the potential, a table row each: `none`, `compile`, `cueq` or `auto`.
            Empty takes `none` on the CPU and the first three on a GPU.
        quick: Measure less in half a minute, with larger errors.
        medium: Time a MACE of the size of foundation models on the CPU too; on a GPU that is always done.
        trust_pickle: Load a model file that may run code.

    Returns:
        Rows of numbers; a row that runs out of memory or asks for what is not installed says so.

    Raises:
        InputError: For a potential, device, size or config that cannot be used.
    """
    effort = QUICK if quick else FULL
    if sizes:
        effort = replace(effort, sizes=tuple(parse_size(size) for size in sizes))
    chosen = tuple(_mode(word) for word in accelerate)
    if config is not None:
        _refuse_beside_config(model=model, device=device, dtype=dtype, sizes=sizes)
        potential, name = _of_config(config), config.potential.model
    else:
        name = model or DEFAULT_MODEL
        potential = Potential.load(
            name, default_dtype=dtype or "float32", device=device or "auto", trust_pickle=trust_pickle
        )
    # Before anything runs: its load is that of others.
    machine = this_machine(potential.device, dtype_name(potential))
    modes = chosen or (ACCELERATIONS[:3] if potential.device.type == "cuda" else ("none",))
    with TemporaryDirectory(prefix="mlip-refine-bench-") as folder:
        subject = Subject(Path(name).name, potential, potential.save(Path(folder), "potential")[0])
        jobs = planned(subject, config, modes, effort, medium=medium)
        rows = tuple(_measured(jobs))
    return BenchResult(machine=machine, rows=rows)


def _refuse_beside_config(**options: object) -> None:
    given = [name for name, value in options.items() if value]
    if given:
        raise InputError(
            "a config says by itself what is timed",
            found=f"a config and {', '.join(given)}",
            fix="Leave out either the config or the options.",
        )


def _of_config(config: Config) -> Potential:
    """The potential of a config in the precision of its dynamics."""
    section = config.potential.model_copy(update={"default_dtype": config.sampling.dtype})
    return load_potential(config.model_copy(update={"potential": section}))


def _mode(word: str) -> Acceleration:
    for mode in ACCELERATIONS:
        if mode == word:
            return mode
    near = nearest(word, ACCELERATIONS)
    raise InputError(
        "no such acceleration",
        found=word,
        expected=f"any of {', '.join(ACCELERATIONS)}",
        fix=f"Did you mean {near!r}?" if near else None,
    )


def planned(
    subject: Subject, config: Config | None, modes: Sequence[Acceleration], effort: Effort, *, medium: bool
) -> list[Job]:
    """The rows that will be measured, in order.

    Batches grow on a GPU, where they pay, with the potential at hand and with a large one; on the CPU only
    with the large one and if it is asked for.
    """
    batches, cells = _workloads(config, subject.potential, effort)
    gpu = subject.potential.device.type == "cuda"
    growing = [subject] if gpu and config is None else []
    if gpu or medium:
        growing.append(medium_subject(subject.potential.device, subject.dtype, subject.file.parent))
    return [
        *_engine_jobs(subject, batches, modes, effort),
        *_other_jobs(subject, cells.under("nvt"), effort),
        *scaling_jobs(growing, modes, effort),
    ]


def _workloads(
    config: Config | None, potential: Potential, effort: Effort
) -> tuple[list[Workload], Workload]:
    """Batches for the engine, and the systems that ASE runs one by one."""
    if config is None:
        return [titanium(*size) for size in effort.sizes], titanium(*effort.cells)
    workload = configured(config, potential)
    return [workload], repeated(workload, effort.cells[0])


def _engine_jobs(
    subject: Subject, batches: Sequence[Workload], modes: Sequence[Acceleration], effort: Effort
) -> Iterator[Job]:
    for mode in modes:
        for workload in batches:
            for batch in (workload.under("nvt"), workload.under("npt")):
                run = partial(engine_against_model, subject, batch, effort, mode)
                yield Job(Topic.ENGINE, subject.name, batch.label, run, mode)


def _other_jobs(subject: Subject, cells: Workload, effort: Effort) -> Iterator[Job]:
    frames, (few, many), n_atoms = effort.frames, effort.memory_frames, len(cells.points[0].atoms)
    rows = {
        Topic.ASE: (cells.label, engine_against_ase),
        Topic.GRADIENT: (f"{frames} frames of {n_atoms} atoms", streamed_against_floor),
        Topic.MEMORY: (f"{many} and {few} frames of {n_atoms} atoms", memory_of_frames),
    }
    for topic, (workload, run) in rows.items():
        yield Job(topic, subject.name, workload, partial(run, subject, cells, effort))


def _measured(jobs: Sequence[Job]) -> Iterator[Comparison]:
    with progress("bench", len(jobs)) as tick:
        for i, job in enumerate(jobs, start=1):
            yield job.result()
            tick(i)


def scaling_jobs(
    subjects: Sequence[Subject], accelerate: Sequence[Acceleration], effort: Effort
) -> Iterator[Job]:
    """The engine against the bare model in NVT, for every potential, acceleration and batch."""
    short = replace(effort, rounds=3, duration=4.0, steps=4, equilibration=WARM_UP)
    for subject in subjects:
        batches = GPU_BATCHES if subject.potential.device.type == "cuda" else CPU_BATCHES
        for mode in accelerate:
            for size in batches:
                workload = titanium(*size, TEMPERATURE).under("nvt")
                run = partial(engine_against_model, subject, workload, short, mode)
                yield Job(Topic.ENGINE, subject.name, workload.label, run, mode)


def medium_subject(device: torch.device, dtype: str, folder: Path) -> Subject:
    """A MACE of the size of MACE-MP's `medium`, with random weights."""
    potential = Potential.from_module(medium_mace([22]), copy=False, default_dtype=dtype, device=str(device))
    return Subject("medium, random weights", potential, potential.save(folder, "medium")[0])


def this_machine(device: torch.device, dtype: str) -> Machine:
    """Describe the machine, and the device of it that works."""
    return Machine(
        processor=_processor(),
        cores=_cores(),
        threads=torch.get_num_threads(),
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        python=platform.python_version(),
        torch=torch.__version__,
        mace=version("mace-torch"),
        dtype=dtype,
    )


def _processor() -> str:
    """Model of the CPU; `platform` does not know it on Linux."""
    if CPU_INFO.exists():
        for line in CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
