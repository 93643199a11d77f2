"""The energy of a crystal to second order in the displacements of its atoms and its strain.

The strain is symmetric, acts on Cartesian vectors, and counts in the orthonormal basis of symmetric tensors
(`mandel_basis`): so the matrix of second derivatives is symmetric, whatever the box and the frame.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mlip_refine.crystals.phonons.hessian import summed
from mlip_refine.crystals.tensors import mandel_basis
from mlip_refine.errors import InputError
from mlip_refine.potential import Curvature, GeometryDerivatives, Graphs, Potential, Structure, Work, deformed

type Gradients = Sequence[Tensor | None]


@dataclass(frozen=True)
class SecondOrderEnergy:
    """Energy of a crystal of N atoms to second order; n = 3N.

    Attributes:
        energy: Energy `[]`, eV.
        gradient: Gradient in the displacements and the strain `[n + 6]`, eV/Å and eV.
        hessian: Second derivatives in both `[n + 6, n + 6]`, eV/Å², eV/Å and eV, symmetric.
        volume: Volume `[]`, Å³.
    """

    energy: Tensor
    gradient: Tensor
    hessian: Tensor
    volume: Tensor

    @property
    def n(self) -> int:
        """Number of displacements, three for each atom."""
        return len(self.gradient) - 6

    @property
    def force_constants(self) -> Tensor:
        """∂²U/∂u∂u `[n, n]`, eV/Å²."""
        return self.hessian[: self.n, : self.n]

    @property
    def coupling(self) -> Tensor:
        """∂²U/∂u∂ε `[n, 6]`, eV/Å."""
        return self.hessian[: self.n, self.n :]

    @property
    def clamped(self) -> Tensor:
        """∂²U/∂ε∂ε, every atom moving with the strain `[6, 6]`, eV."""
        return self.hessian[self.n :, self.n :]

    @property
    def stress(self) -> Tensor:
        """σ `[3, 3]`, eV/Å³, tensile positive."""
        return torch.einsum("a,aij->ij", self.gradient[self.n :], mandel_basis(self.gradient)) / self.volume

    @property
    def translations(self) -> Tensor:
        """The three displacements of all atoms alike, normalised `[n, 3]`."""
        one = torch.eye(3, dtype=self.hessian.dtype, device=self.hessian.device)
        return one.repeat(self.n // 3, 1) / math.sqrt(self.n / 3)


def second_order(
    potential: Potential,
    structure: Structure,
    deformation: tuple[Tensor, Tensor] | None = None,
    *,
    create_graph: bool = False,
) -> SecondOrderEnergy:
    """Expand the energy of a crystal to second order, all directions in batches that suit the device.

    The graph of all directions would take memory as the square of the number of atoms. It is not kept: the
    backward pass evaluates every batch once more.

    Args:
        potential: Potential in float64.
        structure: The crystal.
        deformation: Displacements u `[N, 3]`, Å, and strain ε `[3, 3]` that are applied to the crystal first:
            it is strained, then its atoms are displaced.
        create_graph: Whether everything is differentiable, once, in the parameters and in the deformation.

    Raises:
        InputError: The potential is in single precision.
        MlipRefineError: If memory runs out for a single system.
    """
    if potential.dtype != torch.float64:
        raise InputError(
            "second derivatives of a crystal need double precision",
            found=f"default_dtype: {str(potential.dtype).removeprefix('torch.')}",
            expected="float64",
        )
    expansion = _Expansion(potential, structure)
    like = torch.zeros((), dtype=potential.dtype, device=potential.graphs.device)
    u, strain = deformation or (like.expand(len(structure.positions), 3), like.expand(3, 3))
    if not create_graph:
        return expansion.values(u, strain)
    found: tuple[Tensor, ...] = _Streamed.apply(expansion, u, strain, *expansion.parameters)
    return SecondOrderEnergy(*found)


@dataclass(frozen=True)
class _Expansion:
    """The second derivatives of one crystal, deformed by (u, ε), in one potential."""

    potential: Potential
    structure: Structure

    @property
    def parameters(self) -> list[Tensor]:
        """Trainable parameters of the potential."""
        return list(self.potential.trainable_parameters().values())

    @property
    def copies(self) -> list[Structure]:
        """The crystal once for every direction: displacements, then strains."""
        return [self.structure] * (3 * len(self.structure.positions) + 6)

    def values(self, u: Tensor, strain: Tensor) -> SecondOrderEnergy:
        """Return the expansion without a graph; a forward pass serves several directions for each copy."""
        count, work = len(self.copies), Work.HESSIAN
        # Copy c has the directions c, c + at_once, ...
        at_once = self.potential.chunks(self.copies, work)[0].stop

        def some(part: slice, graphs: Graphs) -> SecondOrderEnergy:
            """Return an expansion whose hessian holds the rows of some copies `[copies, blocks, n + 6]`."""
            with torch.no_grad():
                curvature = self.potential.curvature(_deformed(graphs, u, strain))
                firsts = range(part.start, part.start + count, at_once)
                rows = torch.stack([self._rows(curvature, first) for first in firsts], dim=1)
                found = _with_rows(curvature, rows)
            # Even without a graph of its own a view holds that of its base.
            numbers = (found.energy, found.gradient, found.hessian, found.volume)
            return SecondOrderEnergy(*(x.detach() for x in numbers))

        parts = list(self.potential.in_chunks(work, self.copies[:at_once], some))
        rows = torch.cat([part.hessian for part in parts]).transpose(0, 1).reshape(-1, count)[:count]
        return replace(parts[0], hessian=_symmetric(rows))

    def gradients(self, u: Tensor, strain: Tensor, adjoint: SecondOrderEnergy) -> Iterator[Gradients]:
        """Yield the gradient of adjoint · expansion in u, ε and the parameters, a part for every batch."""
        leaves = [u, strain, *self.parameters]

        def gradient(part: slice, graphs: Graphs) -> Gradients:
            with torch.enable_grad():
                curvature = self.potential.curvature(_deformed(graphs, u, strain))
                found = _with_rows(curvature, self._rows(curvature, part.start, create_graph=True))
                total = (adjoint.hessian[part] * found.hessian).sum()
                if part.start == 0:
                    total = total + adjoint.energy * found.energy + adjoint.volume * found.volume
                    total = total + (adjoint.gradient * found.gradient).sum()
            return torch.autograd.grad(total, leaves, allow_unused=True)

        yield from self.potential.in_chunks(Work.HESSIAN_GRADIENT, self.copies, gradient)

    def _rows(self, curvature: Curvature, first: int, *, create_graph: bool = False) -> Tensor:
        """Return rows `[copies, n + 6]`, one direction for each copy from `first` on; zero past the last."""
        cell = curvature.graphs.cell
        unit = torch.zeros(len(cell), len(self.copies), dtype=cell.dtype, device=cell.device)
        unit.diagonal(first).fill_(1.0)
        strains = torch.einsum("ra,aij->rij", unit[:, -6:], mandel_basis(unit))
        second = curvature.along(unit[:, :-6].reshape(-1, 3), strains, create_graph=create_graph)
        return _flat(second, len(cell))


class _Streamed(torch.autograd.Function):
    """The expansion as a differentiable function of u, ε and the parameters."""

    @staticmethod
    def forward(ctx: Any, expansion: _Expansion, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.expansion = expansion
        # The parameters too, so that autograd notices a change before the backward pass.
        ctx.save_for_backward(*inputs)
        found = expansion.values(*inputs[:2])
        return found.energy, found.gradient, found.hessian, found.volume

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *adjoints: Tensor) -> tuple[Tensor | None, ...]:
        energy, gradient, hessian, volume = adjoints
        u, strain = (x.detach().requires_grad_() for x in ctx.saved_tensors[:2])
        adjoint = SecondOrderEnergy(energy, gradient, _symmetric(hessian), volume)
        total = reduce(summed, ctx.expansion.gradients(u, strain, adjoint))
        return None, *total


def _deformed(graphs: Graphs, u: Tensor, strain: Tensor) -> Graphs:
    """Return a batch of copies of the crystal, each deformed by u and ε."""
    return deformed(graphs, u.repeat(graphs.n_graphs, 1), strain.expand(graphs.n_graphs, 3, 3))


def _with_rows(curvature: Curvature, rows: Tensor) -> SecondOrderEnergy:
    """Return energy, gradient and volume of the first copy, with some rows as the hessian."""
    gradient = _flat(curvature.gradient, curvature.graphs.n_graphs)[0]
    return SecondOrderEnergy(curvature.energy[0], gradient, rows, curvature.graphs.volume[0])


def _symmetric(rows: Tensor) -> Tensor:
    return (rows + rows.T) / 2


def _flat(second: GeometryDerivatives, copies: int) -> Tensor:
    """Return derivatives in displacements and strain, one row for each copy `[copies, n + 6]`."""
    strain = torch.einsum("rij,aij->ra", second.strain, mandel_basis(second.strain))
    return torch.cat([second.positions.reshape(copies, -1), strain], dim=1)
