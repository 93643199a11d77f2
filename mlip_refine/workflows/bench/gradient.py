"""The streamed gradient of an ensemble: its time and its peak memory, each against its floor.

The floor of the time is that of the same passes on batches that are ready; many frames should need the
memory of few. Memory is measured in a process of its own each time:

    python -m mlip_refine.workflows.bench.gradient JOB.json

prints what one process needed, as JSON.
"""

import json
import math
import resource
import subprocess
import sys
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from mlip_refine.errors import MlipRefineError
from mlip_refine.files import write_json
from mlip_refine.losses import EnsembleSource
from mlip_refine.potential import Graphs, Potential, Structure
from mlip_refine.quantities import Measured
from mlip_refine.sampling import StatePoint, Trajectory
from mlip_refine.training.ensemble import Ensemble
from mlip_refine.training.streaming import backpropagate, probe_energies
from mlip_refine.workflows.bench.records import Outcome
from mlip_refine.workflows.bench.timing import Side, compare
from mlip_refine.workflows.bench.workloads import Effort, Subject, Workload

# Thermal displacements of titanium at its transition, Å.
_AMPLITUDE = 0.12

MEBIBYTE = 2**20

_STATUS = Path("/proc/self/status")


def streamed_against_floor(subject: Subject, workload: Workload, effort: Effort) -> Outcome:
    """Time the gradient of a mean energy over an ensemble, streamed and at its floor.

    The floor is one forward without a graph and one forward and backward of every frame, on batches of the
    same size that are on the device already.
    """
    potential, point = subject.potential, workload.points[0]
    ensemble = rattled_ensemble(potential, point, effort.frames)
    ready = [potential.graphs.collate(ensemble.structures[s]) for s in potential.chunks(ensemble.structures)]
    pairs = compare(
        Side(lambda: streamed_gradient(potential, ensemble), effort.frames),
        Side(lambda: _floor(potential, ready, effort.frames), effort.frames),
        effort,
        potential.device,
        "frames/s",
    )
    return pairs.outcome(pairs.time_ratio, {"batches": len(ready)})


def rattled_ensemble(potential: Potential, point: StatePoint, n_frames: int) -> Ensemble:
    """Frames of a crystal with Gaussian displacements, as if the potential had drawn them."""
    noise = np.random.default_rng(0).normal(0.0, _AMPLITUDE, (1, n_frames, len(point.atoms), 3))
    none = torch.zeros(1, n_frames, dtype=torch.float64)
    trajectory = Trajectory(
        point=point,
        positions=torch.from_numpy(point.atoms.positions + noise),
        cells=torch.from_numpy(point.atoms.cell.array).expand(1, n_frames, 3, 3),
        model_energy=none,
        bias_energy=none,
        stress=none[..., None, None].expand(1, n_frames, 3, 3),
        kinetic_energy=none,
        kept=torch.ones(1, n_frames, dtype=torch.bool),
    )
    return Ensemble.from_trajectory(potential, trajectory, "bench")


def streamed_gradient(potential: Potential, ensemble: Ensemble) -> Mapping[str, Tensor]:
    """The gradient of the mean energy of an ensemble, by both passes of the streaming evaluator."""
    source = EnsembleSource("bench", ensemble.point.temperature, ensemble.point.pressure)
    energies = probe_energies(potential, {source: ensemble})[source]
    _clear(potential)
    backpropagate(potential, ensemble.structures, {"energy": torch.full_like(energies, 1 / len(energies))})
    return _gradients(potential)


def _floor(potential: Potential, ready: list[Graphs], n_frames: int) -> Mapping[str, Tensor]:
    with torch.no_grad():
        for graphs in ready:
            potential.evaluate(graphs)
    _clear(potential)
    for graphs in ready:
        energy = potential.evaluate(graphs)["energy"]
        energy.backward(torch.full_like(energy, 1 / n_frames))
    return _gradients(potential)


def _clear(potential: Potential) -> None:
    for parameter in potential.trainable_parameters().values():
        parameter.grad = None


def _gradients(potential: Potential) -> Mapping[str, Tensor]:
    named = potential.trainable_parameters().items()
    return {name: p.grad for name, p in named if p.grad is not None}


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
    # `getrusage` would do, but on Linux its peak survives `exec`: a process starts with that of its parent.
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
