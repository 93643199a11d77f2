"""What the engine and the streamed gradient cost on this machine, each beside its floor."""

import gc
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch

from mlip_refine.config import Config
from mlip_refine.errors import InputError, MlipRefineError, nearest
from mlip_refine.potential import Acceleration, Potential
from mlip_refine.progress import progress
from mlip_refine.workflows.bench.engine import engine_against_ase, engine_against_model
from mlip_refine.workflows.bench.gradient import memory_of_frames, streamed_against_floor
from mlip_refine.workflows.bench.records import BenchResult, Comparison, Machine, Outcome, Topic
from mlip_refine.workflows.bench.workloads import (
    FULL,
    QUICK,
    Effort,
    Subject,
    Workload,
    configured,
    dtype_name,
    medium_mace,
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
        outcome, failure = None, ""
        try:
            outcome = self.run()
        except torch.OutOfMemoryError:
            failure = "out of memory"
        except MlipRefineError as error:
            failure = str(error)
        if outcome is None:
            # Only here has the traceback let go of what the row had allocated.
            gc.collect()
            torch.cuda.empty_cache()
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
    for word in accelerate:
        if word not in ACCELERATIONS:
            near = nearest(word, ACCELERATIONS)
            raise InputError(
                "no such acceleration",
                found=word,
                expected=f"any of {', '.join(ACCELERATIONS)}",
                fix=f"Did you mean {near!r}?" if near else None,
            )
    chosen = cast("tuple[Acceleration, ...]", tuple(accelerate))
    if config is not None:
        options = {"model": model, "device": device, "dtype": dtype, "sizes": sizes}
        given = [option for option, value in options.items() if value]
        if given:
            raise InputError(
                "a config says by itself what is timed",
                found=f"a config and {', '.join(given)}",
                fix="Leave out either the config or the options.",
            )
        # In the precision of its dynamics.
        section = config.potential.model_copy(update={"default_dtype": config.sampling.dtype})
        potential = load_potential(config.model_copy(update={"potential": section}))
        name = section.model
    else:
        name = model or DEFAULT_MODEL
        potential = Potential.load(
            name, default_dtype=dtype or "float32", device=device or "auto", trust_pickle=trust_pickle
        )
    # Before anything runs: its load is that of others.
    machine = this_machine(potential.device, dtype_name(potential))
    modes = chosen or (ACCELERATIONS[:3] if potential.device.type == "cuda" else ("none",))
    rows = []
    with TemporaryDirectory(prefix="mlip-refine-bench-") as folder:
        subject = Subject(Path(name).name, potential, potential.save(Path(folder), "potential")[0])
        jobs = planned(subject, config, modes, effort, medium=medium)
        with progress("bench", len(jobs)) as tick:
            for job in jobs:
                rows.append(job.result())
                tick(len(rows))
    return BenchResult(machine=machine, rows=tuple(rows))


def planned(
    subject: Subject, config: Config | None, modes: Sequence[Acceleration], effort: Effort, *, medium: bool
) -> list[Job]:
    """The rows that will be measured, in order.

    Batches grow on a GPU, where they pay, with the potential at hand and with a large one; on the CPU only
    with the large one and if it is asked for.
    """
    if config is None:
        batches, cells = [titanium(*size) for size in effort.sizes], titanium(*effort.cells)
    else:
        batches = [configured(config, subject.potential)]
        cells = repeated(batches[0], effort.cells[0])
    both = [batch for workload in batches for batch in (workload.under("nvt"), workload.under("npt"))]
    jobs = engine_jobs(subject, both, modes, effort)

    cells, frames, (few, many) = cells.under("nvt"), effort.frames, effort.memory_frames
    of_atoms = f"frames of {len(cells.points[0].atoms)} atoms"
    for topic, label, measure in (
        (Topic.ASE, cells.label, engine_against_ase),
        (Topic.GRADIENT, f"{frames} {of_atoms}", streamed_against_floor),
        (Topic.MEMORY, f"{many} and {few} {of_atoms}", memory_of_frames),
    ):
        jobs.append(Job(topic, subject.name, label, partial(measure, subject, cells, effort)))

    gpu = subject.potential.device.type == "cuda"
    growing = [subject] if gpu and config is None else []
    if gpu or medium:
        growing.append(medium_subject(subject.potential.device, subject.dtype, subject.file.parent))
    sizes = GPU_BATCHES if gpu else CPU_BATCHES
    batches = [titanium(*size, TEMPERATURE).under("nvt") for size in sizes]
    short = replace(effort, rounds=3, duration=4.0, steps=4, equilibration=WARM_UP)
    return jobs + [job for each in growing for job in engine_jobs(each, batches, modes, short)]


def engine_jobs(
    subject: Subject, batches: Sequence[Workload], modes: Sequence[Acceleration], effort: Effort
) -> list[Job]:
    """The engine against the bare model, for every acceleration and batch."""
    return [
        Job(
            Topic.ENGINE,
            subject.name,
            batch.label,
            partial(engine_against_model, subject, batch, effort, mode),
            mode,
        )
        for mode in modes
        for batch in batches
    ]


def medium_subject(device: torch.device, dtype: str, folder: Path) -> Subject:
    """A MACE of the size of MACE-MP's `medium`, with random weights."""
    potential = Potential.from_module(medium_mace([22]), copy=False, default_dtype=dtype, device=str(device))
    return Subject("medium, random weights", potential, potential.save(folder, "medium")[0])


def this_machine(device: torch.device, dtype: str) -> Machine:
    """Describe the machine, and the device of it that works."""
    # `platform` does not know the model of the CPU on Linux.
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return Machine(
        processor=models[0] if models else platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        python=platform.python_version(),
        torch=torch.__version__,
        mace=version("mace-torch"),
        dtype=dtype,
    )
