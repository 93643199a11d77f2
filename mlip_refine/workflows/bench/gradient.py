"""The streamed gradient of an ensemble against its floor: the same passes on batches that are ready."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mlip_refine.losses import EnsembleSource
from mlip_refine.potential import Graphs, Potential
from mlip_refine.sampling import StatePoint, Trajectory
from mlip_refine.training.ensembles.ensemble import Ensemble
from mlip_refine.training.gradients.streaming import backpropagate, probe_energies
from mlip_refine.workflows.bench.records import Outcome
from mlip_refine.workflows.bench.timing import Side, compare
from mlip_refine.workflows.bench.workloads import Effort, Subject, Workload

# Thermal displacements of titanium at its transition, Å.
_AMPLITUDE = 0.12


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
