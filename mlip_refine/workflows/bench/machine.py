"""Where a bench runs."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from mlip_refine.workflows.bench.records import Machine

_CPU_INFO = Path("/proc/cpuinfo")


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
    if _CPU_INFO.exists():
        for line in _CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
