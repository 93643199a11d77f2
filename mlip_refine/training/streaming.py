"""Exact gradients of losses on ensembles, in memory that does not grow with the number of frames.

Pass one evaluates the probes of all frames in chunks, without a graph. The loss on those leaf tensors gives
the adjoint of every probe of every frame. Pass two goes over them again, chunk by chunk with a graph, and
back-propagates the adjoints: Σ_i (∂L/∂U_i) ∂U_i/∂θ + (∂L/∂σ_i) : ∂σ_i/∂θ + ..., which is the full gradient
whatever the loss.

Gauss-Newton needs the residuals of targets one by one, and how each of them changes with θ. A weighted loss
w ⟨r²⟩ over k residuals is Σ s² with s = √(w/k) r. What is found are s and the rows ∂s/∂θ, streamed like every
gradient: the adjoints of all residuals are found on leaf tensors, and a chunk of frames is evaluated once and
back-propagated once for each residual that depends on it. Rows are kept in the memory of the CPU.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from mlip_refine.data.kept_rows import evaluate_rows
from mlip_refine.errors import MlipRefineError
from mlip_refine.losses import EnsembleLoss, EnsembleSource, Loss, LossResult, PotentialLoss
from mlip_refine.observables.base import Probe, Probes, values_of
from mlip_refine.potential import Graphs, Potential, Structure, Work
from mlip_refine.training.ensemble import Ensemble

LARGEST = 16.0
"""Most memory for rows, GiB."""

SAME = 1e-6
"""Largest part of a loss by which it may differ from the mean square of its residuals."""

type Strides = Mapping[str, int]
"""Probes beside the energy, each on every so many frames."""

type Gradients = Sequence[Tensor | None]
"""Gradients in the trainable parameters, in their order; `None` where there is none."""

type Rows = tuple[Tensor, Tensor]
"""Residuals s `[k]` and their derivatives in the trainable parameters `[k, P]`."""

SECOND_DERIVATIVES = frozenset({"born"})
"""Probes that are evaluated by themselves, on the frames that need them."""


def wanted_probes(losses: Iterable[EnsembleLoss]) -> dict[EnsembleSource, dict[str, int]]:
    """What the losses ask for of every source, beside the energy."""
    wanted: dict[EnsembleSource, dict[str, int]] = {}
    for loss in losses:
        for source in loss.sources:
            mine = wanted.setdefault(source, {})
            for probe, stride in wanted_by(loss).items():
                mine[probe] = min(stride, mine.get(probe, stride))
    return wanted


def wanted_by(loss: Loss) -> dict[str, int]:
    """What one loss asks for, beside the energy."""
    return {probe: loss.strides.get(probe, 1) for probe in sorted(loss.probes - {"energy"})}


def probe_energies(
    potential: Potential, ensembles: Mapping[EnsembleSource, Ensemble]
) -> dict[EnsembleSource, Tensor]:
    """Pass one: energies of all frames `[n]`, eV, without a graph."""
    return {source: potential.energies(ensemble.structures) for source, ensemble in ensembles.items()}


def further_probes(
    potential: Potential, structures: Sequence[Structure], wanted: Strides
) -> dict[str, Tensor | Probe]:
    """Pass one of what is wanted beside the energy: float64, on the CPU, without a graph.

    Probes with a stride are known on every so many frames only.
    """
    found: dict[str, Tensor | Probe] = {}
    for probe, stride in wanted.items():
        work = Work.BORN if probe in SECOND_DERIVATIVES else Work.FORCES

        def evaluate(_: slice, graphs: Graphs, probe: str = probe) -> list[Tensor]:
            return list(potential.evaluate(graphs, (probe,))[probe].detach().double().cpu())

        values = torch.stack(evaluate_rows(potential, work, structures[::stride], evaluate, probe))
        found[probe] = with_gaps(values, len(structures), stride)
    return found


def with_gaps(values: Tensor, n: int, stride: int) -> Tensor | Probe:
    """Return the values of every so many of n frames as a probe of all of them."""
    if stride == 1:
        return values
    whole, mask = values.new_zeros(n, *values.shape[1:]), values.new_zeros(n)
    whole[::stride], mask[::stride] = values, 1.0
    return Probe(whole, mask)


def ensemble_losses(
    losses: Sequence[EnsembleLoss],
    ensembles: Mapping[EnsembleSource, Ensemble],
    probes: Mapping[EnsembleSource, Probes],
) -> tuple[dict[str, LossResult], dict[EnsembleSource, dict[str, Tensor]]]:
    """Evaluate the losses on leaf tensors.

    Returns:
        The result of every loss by name, and ∂(weighted sum of losses)/∂probe `[n, ...]` per source.
    """
    leaves, results = evaluate_losses(losses, ensembles, probes)
    if results:
        torch.stack([loss.weight * results[loss.name].value for loss in losses]).sum().backward()
    adjoints: dict[EnsembleSource, dict[str, Tensor]] = {}
    for source, mine in leaves.items():
        values = {name: values_of(leaf) for name, leaf in mine.items()}
        adjoints[source] = {n: torch.zeros_like(v) if v.grad is None else v.grad for n, v in values.items()}
    return results, adjoints


def evaluate_losses(
    losses: Sequence[EnsembleLoss],
    ensembles: Mapping[EnsembleSource, Ensemble],
    probes: Mapping[EnsembleSource, Probes],
) -> tuple[dict[EnsembleSource, dict[str, Tensor | Probe]], dict[str, LossResult]]:
    """Probes as leaf tensors, and the losses on them by name."""
    leaves: dict[EnsembleSource, dict[str, Tensor | Probe]] = {source: {} for source in probes}
    for source, mine in probes.items():
        for name, probe in mine.items():
            values = values_of(probe).detach().clone().requires_grad_()
            leaves[source][name] = Probe(values, probe.mask) if isinstance(probe, Probe) else values
    frames = {source: ensembles[source].frames(leaf) for source, leaf in leaves.items()}
    return leaves, {loss.name: loss.evaluate({s: frames[s] for s in loss.sources}) for loss in losses}


def work_of(probes: Iterable[str]) -> dict[Work, list[str]]:
    """Probes that are differentiated together, and what work that is."""
    first = [name for name in probes if name not in SECOND_DERIVATIVES]
    second = [name for name in probes if name in SECOND_DERIVATIVES]
    work = Work.GRADIENT if first == ["energy"] else Work.FORCES_GRADIENT
    return {kind: names for kind, names in ((work, first), (Work.BORN_GRADIENT, second)) if names}


def backpropagate(
    potential: Potential, structures: Sequence[Structure], adjoints: Mapping[str, Tensor]
) -> None:
    """Pass two: add Σ_i adjoint_i · ∂probe_i/∂θ to the gradients of the parameters, chunk by chunk.

    A chunk is added once its gradient is complete: one that runs out of memory on the way leaves no trace.

    Raises:
        MlipRefineError: If memory runs out for a single system.
    """
    parameters = list(potential.trainable_parameters().values())
    for work, names in work_of(adjoints).items():
        used = torch.stack([adjoints[name].reshape(len(adjoints[name]), -1).any(1) for name in names]).any(0)
        chosen = used.nonzero().flatten().tolist()
        gradients = partial(_chunk_gradients, potential, {name: adjoints[name][chosen] for name in names})
        for found in potential.in_chunks(work, [structures[i] for i in chosen], gradients):
            accumulate(parameters, found)


def _chunk_gradients(
    potential: Potential, adjoints: Mapping[str, Tensor], part: slice, graphs: Graphs
) -> Gradients:
    """Σ_i adjoint_i · ∂probe_i/∂θ over a chunk."""
    outputs = potential.evaluate(graphs, adjoints, create_graph=True)
    values = [outputs[name] for name in adjoints]
    weights = [adjoint[part].to(outputs[name]) for name, adjoint in adjoints.items()]
    parameters = list(potential.trainable_parameters().values())
    return torch.autograd.grad(values, parameters, weights, allow_unused=True)


def accumulate(parameters: Sequence[Tensor], gradients: Gradients) -> None:
    """Add gradients to those of the parameters."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            # A copy: autograd may hand out one tensor for several parameters.
            parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)


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
) -> list[Gradients]:
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


def _each_residual(residuals: Tensor, inputs: Sequence[Tensor], *, keep: bool = False) -> list[Gradients]:
    """Gradients of each of the residuals `[k]`."""
    chosen = torch.eye(len(residuals), dtype=residuals.dtype, device=residuals.device)
    return each_gradient([residuals], inputs, [[one] for one in chosen], keep=keep)


def flat(parameters: Sequence[Tensor], gradients: Gradients) -> Tensor:
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
        adjoints = {}
        for name, i in zip(group, places, strict=True):
            blank = torch.zeros_like(values_of(leaves[name]))
            found = [gradients[k][i] for k in mine]
            adjoints[name] = torch.stack([blank if g is None else g for g in found])
        used = torch.stack([a.reshape(*a.shape[:2], -1).any(2).any(0) for a in adjoints.values()]).any(0)
        chosen = used.nonzero().flatten().tolist()
        jacobian = partial(_chunk_jacobian, potential, {name: a[:, chosen] for name, a in adjoints.items()})
        for part in potential.in_chunks(work, [structures[i] for i in chosen], jacobian):
            rows[mine] += part


def _chunk_jacobian(
    potential: Potential, adjoints: Mapping[str, Tensor], part: slice, graphs: Graphs
) -> Tensor:
    """Σ_i adjoint_i · ∂probe_i/∂θ over a chunk, for `[k, n, ...]` adjoints of every probe: rows `[k, P]`."""
    parameters = list(potential.trainable_parameters().values())
    outputs = potential.evaluate(graphs, adjoints, create_graph=True)
    values = [outputs[name] for name in adjoints]
    count = len(next(iter(adjoints.values())))
    weights = [[a[k, part].to(outputs[n]) for n, a in adjoints.items()] for k in range(count)]
    return torch.stack([flat(parameters, g) for g in each_gradient(values, parameters, weights)])
