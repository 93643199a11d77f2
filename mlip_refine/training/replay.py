"""Replay of labelled frames: their labels, gradients and curvature of batch losses, and held-out errors.

A batch is evaluated at once where it fits into memory. What does not fit is gone over twice: the outputs of
all chunks are found without a graph, the losses of the whole batch on those leaf tensors give the adjoint of
every output, and a second pass back-propagates these, chunk by chunk with a graph. A loss is normalised over
its batch all the same: the gradient does not change.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mlip_refine.data import Frame
from mlip_refine.data.frames import EVEN, LabelName
from mlip_refine.losses import BatchLoss, LossResult
from mlip_refine.potential import Graphs, Potential, Structure, Work
from mlip_refine.potential.batching import Systems
from mlip_refine.quantities import GPA
from mlip_refine.training.streaming import Gradients, accumulate, blank_rows, each_gradient, flat

SIGNS = 8
"""Samples of the curvature from every frame."""


@dataclass(frozen=True)
class LabelledFrame:
    """A structure with those labels that it has.

    Attributes:
        structure: With neighbours.
        energy: eV, or `None`.
        forces: `[n_atoms, 3]`, eV/Å, or `None`.
        stress: `[3, 3]`, eV/Å³, tensile positive, or `None`.
        weights: Factors of the squared errors of energy, forces and stress.
        source: File and frame, for messages.
    """

    structure: Structure
    energy: float | None
    forces: Tensor | None
    stress: Tensor | None
    weights: Mapping[LabelName, float] = EVEN
    source: str = ""

    @classmethod
    def from_frame(cls, potential: Potential, frame: Frame) -> Self:
        """Find the neighbours of a frame."""
        positions, cell = torch.as_tensor(np.array(frame.positions)), torch.as_tensor(np.array(frame.cell))
        structure = potential.graphs.structure(positions, cell, potential.graphs.species(frame.numbers))
        forces = None if frame.forces is None else torch.as_tensor(np.array(frame.forces))
        stress = None if frame.stress is None else torch.as_tensor(np.array(frame.stress))
        return cls(structure, frame.energy, forces, stress, frame.weights, frame.source)


def labels(frames: Sequence[LabelledFrame], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Labels of a batch, as `losses.Replay` reads them."""
    real: dict[str, Any] = {"device": device, "dtype": dtype}
    blank = torch.zeros(3, 3)
    found = {
        "energy": torch.tensor([f.energy or 0.0 for f in frames], **real),
        "forces": torch.cat(
            [torch.zeros_like(f.structure.positions) if f.forces is None else f.forces for f in frames]
        ).to(**real),
        "stress": torch.stack([blank if f.stress is None else f.stress for f in frames]).to(**real),
        "n_atoms": torch.tensor([len(f.structure.positions) for f in frames], **real),
    }
    for name in EVEN:
        found[f"has_{name}"] = torch.tensor([getattr(f, name) is not None for f in frames], **real)
        found[f"{name}_weight"] = torch.tensor([f.weights[name] for f in frames], **real)
    return found


def labelled_by(potential: Potential, frames: Sequence[LabelledFrame]) -> list[LabelledFrame]:
    """Return the frames with energies, forces and stresses of a potential as their labels.

    Raises:
        MlipRefineError: If memory runs out for a single system.
    """

    def labelled(part: slice, graphs: Graphs) -> list[LabelledFrame]:
        with torch.no_grad():
            out = potential.evaluate(graphs, ("energy", "forces", "stress"))
        out = {name: values.detach().cpu() for name, values in out.items()}
        forces = out["forces"].split([len(f.structure.positions) for f in frames[part]])
        return [
            replace(frame, energy=float(energy), forces=mine, stress=stress)
            for frame, energy, mine, stress in zip(
                frames[part], out["energy"], forces, out["stress"], strict=True
            )
        ]

    found = potential.in_chunks(Work.FORCES, [f.structure for f in frames], labelled)
    return [frame for part in found for frame in part]


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

            def gradients(_where: slice, graphs: Graphs, i: int = i) -> list[Gradients]:
                found = self.potential.evaluate(graphs, self.probes, create_graph=True)
                place = {name: self.rows(name, slice(i, i + 1)) for name in found}
                weights = [[slopes[name][place[name]] for name in found]]
                for _ in range(SIGNS):
                    coins = {n: torch.randint(0, 2, x.shape, generator=signs) for n, x in found.items()}
                    weights.append([roots[n][place[n]] * (2 * coins[n] - 1).to(x) for n, x in found.items()])
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


@dataclass(frozen=True)
class HeldOutErrors:
    """Mean absolute errors on held-out frames; `None` for what none of them is labelled with.

    Attributes:
        energy_mae_mev_per_atom: Energy per atom, meV.
        forces_mae_mev_per_A: Force components, meV/Å.
        stress_mae_gpa: Stress components, GPa.
        n_frames: Frames that were measured.
    """

    energy_mae_mev_per_atom: float | None
    forces_mae_mev_per_A: float | None  # noqa: N815 - the unit's own case
    stress_mae_gpa: float | None
    n_frames: int


def held_out_errors(potential: Potential, frames: Sequence[LabelledFrame]) -> HeldOutErrors:
    """Errors of a potential on held-out frames, in chunks.

    Raises:
        MlipRefineError: If memory runs out for a single system.
    """

    def deviations(part: slice, graphs: Graphs) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            out = potential.evaluate(graphs, ("energy", "forces", "stress"))
        ref = labels(frames[part], potential.device, potential.dtype)
        has = {name: ref[f"has_{name}"] > 0 for name in EVEN}
        has["forces"] = has["forces"].repeat_interleave(ref["n_atoms"].long())
        errors = {name: (out[name] - ref[name])[has[name]].detach().abs() for name in EVEN}
        return errors["energy"] / ref["n_atoms"][has["energy"]], errors["forces"], errors["stress"]

    parts = potential.in_chunks(Work.FORCES, [f.structure for f in frames], deviations)
    energy, forces, stress = (torch.cat(values) for values in zip(*parts, strict=True))
    return HeldOutErrors(
        energy_mae_mev_per_atom=1e3 * float(energy.mean()) if len(energy) else None,
        forces_mae_mev_per_A=1e3 * float(forces.mean()) if len(forces) else None,
        stress_mae_gpa=float(stress.mean()) / GPA if len(stress) else None,
        n_frames=len(frames),
    )
