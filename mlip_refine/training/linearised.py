"""Losses around the current parameters: the residuals of targets, and how each of them changes with θ.

A weighted loss w ⟨r²⟩ over k residuals is Σ s² with s = √(w/k) r. What is found here are s and the rows
∂s/∂θ, streamed over frames like every gradient: the adjoints of all residuals are found on leaf tensors, and
a chunk of frames is evaluated once and back-propagated once for each residual that depends on it.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mlip_refine.errors import MlipRefineError
from mlip_refine.losses import EnsembleLoss, EnsembleSource, Loss, LossResult, PotentialLoss
from mlip_refine.potential import Graphs, Potential, Structure
from mlip_refine.training.ensembles import Ensemble
from mlip_refine.training.streaming import Probes, evaluate_losses, work_of

type Rows = tuple[Tensor, Tensor]
"""Residuals s `[k]` and their derivatives in the trainable parameters `[k, P]`."""


def ensemble_rows(
    potential: Potential,
    losses: Sequence[EnsembleLoss],
    ensembles: Mapping[EnsembleSource, Ensemble],
    probes: Mapping[EnsembleSource, Probes],
) -> tuple[dict[str, LossResult], list[Rows]]:
    """Results of losses on ensembles, and their rows, one entry per loss.

    Raises:
        MlipRefineError: If memory runs out for a single system.
    """
    leaves, results = evaluate_losses(losses, ensembles, probes)
    found = []
    for loss in losses:
        residuals = scaled_residuals(loss, results[loss.name])
        rows = blank_rows(potential, len(residuals))
        for source in loss.sources:
            _add_rows(potential, ensembles[source].structures, residuals, leaves[source], rows)
        found.append((residuals.detach(), rows))
    return results, found


def potential_rows(potential: Potential, loss: PotentialLoss) -> tuple[LossResult, Rows]:
    """Result and rows of a loss on the potential itself."""
    result = loss.evaluate(potential)
    residuals = scaled_residuals(loss, result)
    parameters = list(potential.trainable_parameters().values())
    rows = [flat(parameters, g) for g in each_gradient(list(residuals), parameters)]
    return result, (residuals.detach(), torch.stack(rows))


def scaled_residuals(loss: Loss, result: LossResult) -> Tensor:
    """Residuals whose squares add up to the weighted loss `[k]`.

    Raises:
        MlipRefineError: It is no mean of squares.
    """
    if result.residuals is None:
        raise MlipRefineError(f"loss {loss.name!r} gave no residuals, which optimiser gauss_newton needs")
    return math.sqrt(loss.weight / len(result.residuals)) * result.residuals


def blank_rows(potential: Potential, k: int) -> Tensor:
    """Rows of zeros, in the precision of the parameters."""
    parameters = potential.trainable_parameters().values()
    size = sum(p.numel() for p in parameters)
    return torch.zeros(k, size, dtype=potential.dtype, device=potential.device)


def each_gradient(
    values: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Sequence[Tensor]] | None = None,
    *,
    last: bool = True,
) -> list[tuple[Tensor | None, ...]]:
    """Gradients of several scalars, or of weighted sums of the same values, from one graph.

    Args:
        values: Scalars; with weights, tensors that all sums are made of.
        inputs: What they are differentiated in.
        weights: Of every sum, one tensor for each of the values.
        last: Whether the graph may go afterwards.
    """
    count = len(values) if weights is None else len(weights)
    found: list[tuple[Tensor | None, ...]] = []
    for k in range(count):
        outputs, grads = ([values[k]], None) if weights is None else (list(values), list(weights[k]))
        keep = not last or k < count - 1
        found.append(torch.autograd.grad(outputs, inputs, grads, retain_graph=keep, allow_unused=True))
    return found


def flat(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """Gradients of all parameters in one row `[P]`."""
    parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    return torch.cat([part.detach().reshape(-1) for part in parts])


def _add_rows(
    potential: Potential, structures: Sequence[Structure], residuals: Tensor, leaves: Probes, rows: Tensor
) -> None:
    """Add what the frames of one ensemble contribute to the rows."""
    names = [name for name in leaves if not name.endswith("_known")]
    gradients = each_gradient(list(residuals), [leaves[name] for name in names], last=False)
    for work, group in work_of(names).items():
        places = [names.index(name) for name in group]
        # A residual of another ensemble has no gradient here.
        mine = [k for k, g in enumerate(gradients) if any(_some(g[i]) for i in places)]
        if not mine:
            continue
        adjoints = {
            name: _stacked(leaves[name], [gradients[k][i] for k in mine])
            for name, i in zip(group, places, strict=True)
        }
        chosen = _needed(adjoints)
        part = {name: a[:, chosen] for name, a in adjoints.items()}
        jacobian = _jacobian(potential, part)
        for found in potential.in_chunks(work, [structures[i] for i in chosen], jacobian):
            rows[mine] += found


def _jacobian(potential: Potential, adjoints: Probes) -> Callable[[slice, Graphs], Tensor]:
    """Weighted sums of probes of a chunk, differentiated in the parameters `[k, P]`."""
    parameters = list(potential.trainable_parameters().values())

    def evaluate(part: slice, graphs: Graphs) -> Tensor:
        outputs = potential.evaluate(graphs, adjoints, create_graph=True)
        values = [outputs[name] for name in adjoints]
        count = len(next(iter(adjoints.values())))
        weights = [[a[k, part].to(outputs[n]) for n, a in adjoints.items()] for k in range(count)]
        return torch.stack([flat(parameters, g) for g in each_gradient(values, parameters, weights)])

    return evaluate


def _some(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())


def _stacked(leaf: Tensor, gradients: Sequence[Tensor | None]) -> Tensor:
    return torch.stack([torch.zeros_like(leaf) if g is None else g for g in gradients])


def _needed(adjoints: Probes) -> list[int]:
    """Frames with an adjoint."""
    used = torch.stack([a.reshape(*a.shape[:2], -1).any(2).any(0) for a in adjoints.values()]).any(0)
    return used.nonzero().flatten().tolist()
