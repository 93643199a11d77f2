"""Exact gradients of losses on ensembles, in memory that does not grow with the number of frames.

Pass one evaluates the probes of all frames in chunks, without a graph. The loss on those leaf tensors gives
the adjoint of every frame's probe. Pass two goes over the frames again, chunk by chunk with a graph, and
back-propagates the adjoints: Σ_i (∂L/∂U_i) ∂U_i/∂θ, which is the full gradient whatever the loss.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mlip_refine.losses import EnsembleLoss, EnsembleSource, LossResult
from mlip_refine.potential import Graphs, Potential, Structure, Work
from mlip_refine.training.ensembles import Ensemble


def probe_energies(
    potential: Potential, ensembles: Mapping[EnsembleSource, Ensemble]
) -> dict[EnsembleSource, Tensor]:
    """Pass one: energies of all frames `[n]`, eV, without a graph."""
    return {source: potential.energies(ensemble.structures) for source, ensemble in ensembles.items()}


def ensemble_losses(
    losses: Sequence[EnsembleLoss],
    ensembles: Mapping[EnsembleSource, Ensemble],
    energies: Mapping[EnsembleSource, Tensor],
) -> tuple[dict[str, LossResult], dict[EnsembleSource, Tensor]]:
    """Evaluate the losses on leaf tensors.

    Returns:
        The result of every loss by name, and ∂(weighted sum of losses)/∂U `[n]` per source.
    """
    leaves = {source: energy.detach().clone().requires_grad_() for source, energy in energies.items()}
    frames = {source: ensembles[source].frames(leaf) for source, leaf in leaves.items()}
    results = {loss.name: loss.evaluate({s: frames[s] for s in loss.sources}) for loss in losses}
    if results:
        torch.stack([loss.weight * results[loss.name].value for loss in losses]).sum().backward()
    return results, {source: _adjoint(leaf) for source, leaf in leaves.items()}


def backpropagate(potential: Potential, structures: Sequence[Structure], adjoint: Tensor) -> None:
    """Pass two: add Σ_i adjoint_i ∂U_i/∂θ to the gradients of the parameters, chunk by chunk.

    A chunk is added once its gradient is complete: one that runs out of memory on the way leaves no trace.

    Raises:
        MlipRefineError: If memory runs out for a single system.
    """
    parameters = list(potential.trainable_parameters().values())

    def gradients(part: slice, graphs: Graphs) -> tuple[Tensor | None, ...]:
        energy = potential.evaluate(graphs)["energy"]
        return torch.autograd.grad(energy, parameters, adjoint[part].to(energy), allow_unused=True)

    for found in potential.in_chunks(Work.GRADIENT, structures, gradients):
        _accumulate(parameters, found)


def _accumulate(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            # A copy: autograd may hand out one tensor for several parameters.
            parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)


def _adjoint(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
