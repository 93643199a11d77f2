"""The engine on growing batches, of the potential at hand and of one of the size of foundation models."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from mlip_refine.potential import Acceleration, Potential
from mlip_refine.workflows.bench.engine import engine_against_model
from mlip_refine.workflows.bench.jobs import Job
from mlip_refine.workflows.bench.random_model import medium_mace
from mlip_refine.workflows.bench.records import Topic
from mlip_refine.workflows.bench.subject import Effort, Subject
from mlip_refine.workflows.bench.workloads import titanium

GPU_BATCHES = ((4, 54), (20, 54), (100, 54), (400, 54), (925, 54))
CPU_BATCHES = ((1, 16), (4, 16))

# Steps before the timing: what is compiled is compiled within them.
WARM_UP = 12

# Random weights bind no crystal: cold atoms keep their places for as long as this takes.
TEMPERATURE = 100.0


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
