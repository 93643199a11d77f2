"""Losses around the current parameters: the residuals of targets, and how each of them changes with θ.

A weighted loss w ⟨r²⟩ over k residuals is Σ s² with s = √(w/k) r. What is found here are s and the rows
∂s/∂θ, streamed over frames like every gradient: the adjoints of all residuals are found on leaf tensors, and
a chunk of frames is evaluated once and back-propagated once for each residual that depends on it. Rows are
kept in the memory of the CPU.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mlip_refine.errors import MlipRefineError
from mlip_refine.losses import EnsembleLoss, EnsembleSource, Loss, LossResult, PotentialLoss
from mlip_refine.observables.base import Probes, values_of
from mlip_refine.potential import Graphs, Potential, Structure
from mlip_refine.training.ensembles.ensemble import Ensemble
from mlip_refine.training.gradients.streaming import evaluate_losses, work_of

LARGEST = 16.0
"""Most memory for rows, GiB."""

SAME = 1e-6
"""Largest part of a loss by which it may differ from the mean square of its residuals."""

type Rows = tuple[Tensor, Tensor]
"""Residuals s `[k]` and their derivatives in the trainable parameters `[k, P]`."""


def ensemble_rows(
    potential: Potential,
    losses: Sequence[EnsembleLoss],
    ensembles: Mapping[EnsembleSource, Ensemble],
    probes: Mapping[EnsembleSource, Probes],
) -> tuple[dict[str, LossResult], Rows]:
    """Results of losses on ensembles by name, and the rows of all of them.

    Raises:
        MlipRefineError: If a loss has no residuals, or memory runs out.
    """
    leaves, results = evaluate_losses(losses, ensembles, probes)
    if not losses:
        return results, (torch.zeros(0), blank_rows(potential, 0))
    residuals = torch.cat([scaled_residuals(loss, results[loss.name]) for loss in losses])
    rows = blank_rows(potential, len(residuals))
    for source, mine in leaves.items():
        _add_rows(potential, ensembles[source].structures, residuals, mine, rows)
    return results, (residuals.detach(), rows)


def potential_rows(potential: Potential, loss: PotentialLoss) -> tuple[LossResult, Rows]:
    """Result and rows of a loss on the potential itself, part by part where the loss goes so.

    Raises:
        MlipRefineError: If the loss has no residuals, or memory runs out.
    """
    parameters = list(potential.trainable_parameters().values())
    parts: list[Tensor] = []

    def add(residuals: Tensor) -> None:
        rows = blank_rows(potential, len(residuals))
        for row, found in zip(rows, _each_residual(residuals, parameters), strict=True):
            row.copy_(flat(parameters, found))
        parts.append(rows)

    result = loss.linearise(potential, add)
    residuals = scaled_residuals(loss, result).detach()
    return result, (residuals, math.sqrt(loss.weight / len(residuals)) * torch.cat(parts))


def scaled_residuals(loss: Loss, result: LossResult) -> Tensor:
    """Residuals whose squares add up to the weighted loss `[k]`.

    Raises:
        MlipRefineError: It is no mean of squares.
    """
    if result.residuals is None:
        raise MlipRefineError(f"loss {loss.name!r} gave no residuals, which optimiser gauss_newton needs")
    residuals, value = result.residuals.reshape(-1), float(result.value.detach())
    mean = float(residuals.detach().square().mean())
    if math.isfinite(mean) and abs(mean - value) > SAME * abs(value):
        raise MlipRefineError(
            f"loss {loss.name!r} is {value:g}, but the mean square of its residuals {mean:g}"
        )
    return math.sqrt(loss.weight / len(residuals)) * residuals


def blank_rows(potential: Potential, k: int) -> Tensor:
    """Rows of zeros, in the precision of the parameters, on the CPU.

    Raises:
        MlipRefineError: If they are too large.
    """
    size = sum(p.numel() for p in potential.trainable_parameters().values())
    gib = k * size * torch.finfo(potential.dtype).bits / 8 / 2**30
    if gib > LARGEST:
        raise MlipRefineError(
            f"derivatives of {k} residuals in {size} parameters take {gib:.0f} GiB: make replay.batch_size "
            "smaller, freeze parameters with potential.freeze, or set training.optimiser: adam"
        )
    return torch.zeros(k, size, dtype=potential.dtype)


def each_gradient(
    values: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Sequence[Tensor]],
    *,
    keep: bool = False,
) -> list[tuple[Tensor | None, ...]]:
    """Gradients of several weighted sums of the same values, from one graph.

    Args:
        values: What all sums are made of.
        inputs: What they are differentiated in.
        weights: Weights of every sum, one tensor for each of the values.
        keep: Whether the graph is needed again.
    """
    last = len(weights) - 1
    return [
        torch.autograd.grad(list(values), inputs, list(w), retain_graph=keep or k < last, allow_unused=True)
        for k, w in enumerate(weights)
    ]


def _each_residual(
    residuals: Tensor, inputs: Sequence[Tensor], *, keep: bool = False
) -> list[tuple[Tensor | None, ...]]:
    """Gradients of each of the residuals `[k]`."""
    chosen = torch.eye(len(residuals), dtype=residuals.dtype, device=residuals.device)
    return each_gradient([residuals], inputs, [[one] for one in chosen], keep=keep)


def flat(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """Gradients of all parameters in one row `[P]`, on the CPU."""
    parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    return torch.cat([part.detach().reshape(-1) for part in parts]).cpu()


def _add_rows(
    potential: Potential, structures: Sequence[Structure], residuals: Tensor, leaves: Probes, rows: Tensor
) -> None:
    """Add what the frames of one ensemble contribute to the rows."""
    names = list(leaves)
    gradients = _each_residual(residuals, [values_of(leaf) for leaf in leaves.values()], keep=True)
    for work, group in work_of(names).items():
        places = [names.index(name) for name in group]
        # A residual of another ensemble has no gradient here.
        mine = [
            k
            for k, gradient in enumerate(gradients)
            if any(g is not None and bool(g.any()) for g in (gradient[i] for i in places))
        ]
        if not mine:
            continue
        adjoints = {
            name: _stacked(values_of(leaves[name]), [gradients[k][i] for k in mine])
            for name, i in zip(group, places, strict=True)
        }
        chosen = _needed(adjoints)
        part = {name: a[:, chosen] for name, a in adjoints.items()}
        jacobian = _jacobian(potential, part)
        for found in potential.in_chunks(work, [structures[i] for i in chosen], jacobian):
            rows[mine] += found


def _jacobian(potential: Potential, adjoints: Mapping[str, Tensor]) -> Callable[[slice, Graphs], Tensor]:
    """Weighted sums of probes of a chunk, differentiated in the parameters `[k, P]`."""
    parameters = list(potential.trainable_parameters().values())

    def evaluate(part: slice, graphs: Graphs) -> Tensor:
        outputs = potential.evaluate(graphs, adjoints, create_graph=True)
        values = [outputs[name] for name in adjoints]
        count = len(next(iter(adjoints.values())))
        weights = [[a[k, part].to(outputs[n]) for n, a in adjoints.items()] for k in range(count)]
        return torch.stack([flat(parameters, g) for g in each_gradient(values, parameters, weights)])

    return evaluate


def _stacked(leaf: Tensor, gradients: Sequence[Tensor | None]) -> Tensor:
    return torch.stack([torch.zeros_like(leaf) if g is None else g for g in gradients])


def _needed(adjoints: Mapping[str, Tensor]) -> list[int]:
    """Frames with an adjoint."""
    used = torch.stack([a.reshape(*a.shape[:2], -1).any(2).any(0) for a in adjoints.values()]).any(0)
    return used.nonzero().flatten().tolist()
