"""Peak memory of the streamed gradient, each time in a process of its own.

    python -m mlip_refine.workflows.bench.memory JOB.json

prints what one process needed, as JSON.
"""

import json
import math
import resource
import subprocess
import sys
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from ase import Atoms

from mlip_refine.errors import MlipRefineError
from mlip_refine.files import write_json
from mlip_refine.potential import Potential, Structure
from mlip_refine.quantities import Measured
from mlip_refine.sampling import StatePoint
from mlip_refine.workflows.bench.gradient import rattled_ensemble, streamed_gradient
from mlip_refine.workflows.bench.records import Outcome
from mlip_refine.workflows.bench.workloads import Effort, Subject, Workload

MEBIBYTE = 2**20

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Process:
    """What one process does; everything that JSON can hold."""

    model: str
    head: str
    device: str
    dtype: str
    threads: int
    n_frames: int
    numbers: list[int]
    positions: list[list[float]]
    cell: list[list[float]]
    temperature: float

    @property
    def point(self) -> StatePoint:
        """The state whose frames are made up."""
        return StatePoint(
            "bench", Atoms(self.numbers, self.positions, cell=self.cell, pbc=True), self.temperature
        )


def memory_of_frames(subject: Subject, workload: Workload, effort: Effort) -> Outcome:
    """Compare the peak memory of the streamed gradient for many frames with that for few.

    On the CPU it is the largest resident set of the whole process, interpreter and frames included; on a GPU
    what torch allocated there.
    """
    with ThreadPoolExecutor() as pool:
        few, many = pool.map(partial(_peak, subject, workload.points[0]), effort.memory_frames)
    return Outcome(
        ours=Measured(many["peak"] / MEBIBYTE, math.nan, "MiB"),
        reference=Measured(few["peak"] / MEBIBYTE, math.nan, "MiB"),
        ratio=Measured(many["peak"] / few["peak"], math.nan, ""),
        details={"loaded_MiB": few["loaded"] / MEBIBYTE, "frames_MiB": many["frames"] / MEBIBYTE},
    )


def _peak(subject: Subject, point: StatePoint, n_frames: int) -> dict[str, float]:
    potential, atoms = subject.potential, point.atoms
    job = Process(
        model=str(subject.file),
        head=potential.head,
        device=str(potential.device),
        dtype=subject.dtype,
        threads=torch.get_num_threads(),
        n_frames=n_frames,
        numbers=atoms.numbers.tolist(),
        positions=atoms.positions.tolist(),
        cell=atoms.cell.array.tolist(),
        temperature=point.temperature,
    )
    path = subject.file.with_name(f"memory-{n_frames}.json")
    write_json(path, asdict(job))
    command = [sys.executable, "-W", "ignore", "-m", __name__, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own module
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise MlipRefineError(f"the process that measures memory for {n_frames} frames failed: {reason[0]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(job: Process) -> dict[str, float]:
    """Peak memory of this process after one streamed gradient, bytes: `peak`, `loaded` and `frames`.

    `loaded` is the peak before there are frames, `frames` the size of the frames themselves.
    """
    torch.set_num_threads(job.threads)
    potential = Potential.load(job.model, head=job.head, default_dtype=job.dtype, device=job.device)
    loaded = peak_memory(potential.device)
    ensemble = rattled_ensemble(potential, job.point, job.n_frames)
    streamed_gradient(potential, ensemble)
    frames = held_by(ensemble.structures)
    return {"peak": peak_memory(potential.device), "loaded": loaded, "frames": frames}


def held_by(structures: Iterable[Structure]) -> int:
    """Memory of structures, bytes; what several of them share counts once."""
    tensors = (tensor for structure in structures for tensor in vars(structure).values())
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def peak_memory(device: torch.device) -> float:
    """Largest memory so far, bytes: of this process on the CPU, of torch's tensors on a GPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return _peak_resident()


def _peak_resident() -> float:
    """Largest resident set of this process, bytes.

    `getrusage` would do, but on Linux its peak survives `exec`: a new process starts with that of its parent.
    """
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else 1024 * peak)


def main() -> None:
    """Do the job of a file."""
    warnings.simplefilter("ignore")
    job = Process(**json.loads(Path(sys.argv[1]).read_text()))
    sys.stdout.write(json.dumps(measure(job)) + "\n")


if __name__ == "__main__":
    main()
