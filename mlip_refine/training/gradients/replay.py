"""Gradients and curvature of batch losses: of a whole batch at once where it fits into memory, else streamed.

What does not fit is gone over twice. The outputs of all chunks are found without a graph, the losses of the
whole batch on those leaf tensors give the adjoint of every output, and a second pass back-propagates these,
chunk by chunk with a graph. A loss is normalised over its batch all the same: the gradient does not change.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mlip_refine.losses import BatchLoss, LossResult
from mlip_refine.potential import Graphs, Potential, Structure, Work
from mlip_refine.potential.batching import Systems
from mlip_refine.training.gradients.jacobian import blank_rows, each_gradient, flat
from mlip_refine.training.gradients.streaming import accumulate
from mlip_refine.training.replay_batches import LabelledFrame, labels

type Gradients = Sequence[Tensor | None]

SIGNS = 8
"""Samples of the curvature from every frame."""


def backpropagate_batch(
    potential: Potential, losses: Sequence[BatchLoss], frames: Sequence[LabelledFrame], scale: float
) -> dict[str, LossResult]:
    """Add the gradients of losses on one batch to those of the parameters.

    Args:
        potential: The model.
        losses: What is evaluated on the batch; each counts with its weight.
        frames: The batch.
        scale: Factor on the weights.

    Returns:
        Every loss by name, without graphs.

    Raises:
        MlipRefineError: If memory runs out for a single system.
    """
    batch = _Batch(potential, losses, frames, scale)
    whole = potential.chunker.at_once(Work.FORCES_GRADIENT, batch.systems, batch.at_once)
    if whole is None:
        return batch.streamed()
    results, gradients = whole[0]
    accumulate(batch.parameters, gradients)
    return results


def linearise_batch(
    potential: Potential,
    losses: Sequence[BatchLoss],
    frames: Sequence[LabelledFrame],
    scale: float,
    signs: torch.Generator,
) -> tuple[dict[str, LossResult], Tensor, Tensor]:
    """Losses on one batch, their gradient, and samples of their curvature.

    Args:
        potential: The model.
        losses: What is evaluated on the batch; each counts with its weight.
        frames: The batch.
        scale: Factor on the weights.
        signs: Draws the samples.

    Returns:
        Every loss by name, the gradient `[P]`, and rows `[R, P]` such that the mean of rowsᵀ rows over draws
        is the Gauss-Newton matrix JᵀDJ of the batch, where D are the second derivatives of the losses in
        energies, forces and stress, of each in itself.

    Raises:
        MlipRefineError: If memory runs out for a single system.
    """
    return _Batch(potential, losses, frames, scale).linearised(signs)


def batch_value(
    potential: Potential, losses: Sequence[BatchLoss], frames: Sequence[LabelledFrame], scale: float
) -> float:
    """Weighted sum of losses on one batch."""
    batch = _Batch(potential, losses, frames, scale)
    return float(batch.evaluated(batch.outputs())[1])


@dataclass(frozen=True)
class _Batch:
    potential: Potential
    losses: Sequence[BatchLoss]
    frames: Sequence[LabelledFrame]
    scale: float

    @cached_property
    def parameters(self) -> list[Tensor]:
        return list(self.potential.trainable_parameters().values())

    @cached_property
    def structures(self) -> list[Structure]:
        return [frame.structure for frame in self.frames]

    @cached_property
    def systems(self) -> Systems:
        return Systems.of_structures(self.structures)

    @cached_property
    def probes(self) -> frozenset[str]:
        return frozenset().union(*(loss.probes for loss in self.losses))

    def evaluated(self, outputs: Mapping[str, Tensor]) -> tuple[dict[str, LossResult], Tensor]:
        """Every loss without its graph, and their weighted sum."""
        wanted = labels(self.frames, self.potential.device, self.potential.dtype)
        results = {loss.name: loss.evaluate(outputs, wanted) for loss in self.losses}
        terms = [self.scale * loss.weight * results[loss.name].value for loss in self.losses]
        bare = {name: replace(result, value=result.value.detach()) for name, result in results.items()}
        return bare, torch.stack(terms).sum()

    def at_once(self) -> tuple[dict[str, LossResult], Gradients]:
        """Losses and gradients of the whole batch in one evaluation."""
        graphs = self.potential.graphs.collate(self.structures)
        results, total = self.evaluated(self.potential.evaluate(graphs, self.probes, create_graph=True))
        return results, torch.autograd.grad(total, self.parameters, allow_unused=True)

    def streamed(self) -> dict[str, LossResult]:
        """Add the gradients chunk by chunk."""
        leaves = {name: values.requires_grad_() for name, values in self.outputs().items()}
        results, total = self.evaluated(leaves)
        adjoints = torch.autograd.grad(
            total, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        named = dict(zip(leaves, adjoints, strict=True))

        def gradients(part: slice, graphs: Graphs) -> Gradients:
            found = self.potential.evaluate(graphs, self.probes, create_graph=True)
            weights = [named[name][self.rows(name, part)] for name in found]
            return torch.autograd.grad(list(found.values()), self.parameters, weights, allow_unused=True)

        for found in self.potential.in_chunks(Work.FORCES_GRADIENT, self.structures, gradients):
            accumulate(self.parameters, found)
        return results

    def linearised(self, signs: torch.Generator) -> tuple[dict[str, LossResult], Tensor, Tensor]:
        """Losses, gradient and samples of the curvature, frame by frame."""
        leaves = {name: values.requires_grad_() for name, values in self.outputs().items()}
        results, total = self.evaluated(leaves)
        inputs = list(leaves.values())
        first = torch.autograd.grad(
            total, inputs, create_graph=True, allow_unused=True, materialize_grads=True
        )
        # Row sums of the second derivatives: the losses are sums over outputs, so these are diagonal.
        sums = torch.stack([g.sum() for g in first]).sum()
        second = (
            torch.autograd.grad(sums, inputs, allow_unused=True, materialize_grads=True)
            if sums.requires_grad
            else [torch.zeros_like(x) for x in inputs]
        )
        slopes = {name: g.detach() for name, g in zip(leaves, first, strict=True)}
        roots = {name: (d.clamp(min=0) / SIGNS).sqrt() for name, d in zip(leaves, second, strict=True)}
        gradient = torch.zeros((), dtype=self.potential.dtype)
        rows = blank_rows(self.potential, SIGNS * len(self.structures))
        for i, structure in enumerate(self.structures):

            def gradients(_: slice, graphs: Graphs, i: int = i) -> list[Gradients]:
                found = self.potential.evaluate(graphs, self.probes, create_graph=True)
                place = {name: self.rows(name, slice(i, i + 1)) for name in found}
                weights = [[slopes[name][place[name]] for name in found]]
                weights += [
                    [roots[n][place[n]] * _random_signs(found[n], signs) for n in found] for _ in range(SIGNS)
                ]
                return list(each_gradient(list(found.values()), self.parameters, weights))

            (found,) = self.potential.in_chunks(Work.FORCES_GRADIENT, [structure], gradients)
            one, *others = (flat(self.parameters, g) for g in found)
            gradient = gradient + one
            rows[SIGNS * i : SIGNS * (i + 1)] = torch.stack(others)
        return results, gradient, rows

    def outputs(self) -> dict[str, Tensor]:
        """What the losses ask for, of the whole batch, without a graph."""

        def evaluate(_: slice, graphs: Graphs) -> dict[str, Tensor]:
            with torch.no_grad():
                found = self.potential.evaluate(graphs, self.probes)
            return {name: values.detach() for name, values in found.items()}

        parts = list(self.potential.in_chunks(Work.FORCES, self.structures, evaluate))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def rows(self, probe: str, part: slice) -> slice:
        """Where the output of some of the systems lies in that of the batch."""
        atoms = self.systems.offsets.atoms
        return slice(atoms[part.start], atoms[part.stop]) if probe == "forces" else part


def _random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Tensor of 1 and -1."""
    return (2 * torch.randint(0, 2, like.shape, generator=generator) - 1).to(like)
