"""Exact gradients of losses on ensembles, in memory that does not grow with the number of frames.

Pass one evaluates the probes of all frames in chunks, without a graph. The loss on those leaf tensors gives
the adjoint of every probe of every frame. Pass two goes over them again, chunk by chunk with a graph, and
back-propagates the adjoints: Σ_i (∂L/∂U_i) ∂U_i/∂θ + (∂L/∂σ_i) : ∂σ_i/∂θ + ..., which is the full gradient
whatever the loss.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mlip_refine.losses import EnsembleLoss, EnsembleSource, Loss, LossResult
from mlip_refine.observables.base import Probe, Probes, values_of
from mlip_refine.potential import Graphs, Potential, Structure, Work
from mlip_refine.training.ensembles.ensemble import Ensemble

type Strides = Mapping[str, int]
"""Probes beside the energy, each on every so many frames."""

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

        def evaluate(_: slice, graphs: Graphs, probe: str = probe) -> Tensor:
            return potential.evaluate(graphs, (probe,))[probe].detach().double().cpu()

        values = torch.cat(list(potential.in_chunks(work, structures[::stride], evaluate)))
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
    return results, {
        source: {name: _adjoint(values_of(leaf)) for name, leaf in mine.items()}
        for source, mine in leaves.items()
    }


def evaluate_losses(
    losses: Sequence[EnsembleLoss],
    ensembles: Mapping[EnsembleSource, Ensemble],
    probes: Mapping[EnsembleSource, Probes],
) -> tuple[dict[EnsembleSource, dict[str, Tensor | Probe]], dict[str, LossResult]]:
    """Probes as leaf tensors, and the losses on them by name."""
    leaves = {source: {name: _leaf(probe) for name, probe in mine.items()} for source, mine in probes.items()}
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
    for work, names in work_of(adjoints).items():
        used = torch.stack([adjoints[name].reshape(len(adjoints[name]), -1).any(1) for name in names]).any(0)
        chosen = used.nonzero().flatten().tolist()
        part = {name: adjoints[name][chosen] for name in names}
        _backpropagate(potential, [structures[i] for i in chosen], part, work)


def _backpropagate(
    potential: Potential, structures: Sequence[Structure], adjoints: Mapping[str, Tensor], work: Work
) -> None:
    parameters = list(potential.trainable_parameters().values())

    def gradients(part: slice, graphs: Graphs) -> tuple[Tensor | None, ...]:
        outputs = potential.evaluate(graphs, adjoints, create_graph=True)
        values = [outputs[name] for name in adjoints]
        weights = [adjoint[part].to(outputs[name]) for name, adjoint in adjoints.items()]
        return torch.autograd.grad(values, parameters, weights, allow_unused=True)

    for found in potential.in_chunks(work, structures, gradients):
        accumulate(parameters, found)


def accumulate(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Add gradients to those of the parameters."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            # A copy: autograd may hand out one tensor for several parameters.
            parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)


def _leaf(probe: Tensor | Probe) -> Tensor | Probe:
    values = values_of(probe).detach().clone().requires_grad_()
    return Probe(values, probe.mask) if isinstance(probe, Probe) else values


def _adjoint(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
