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
from mlip_refine.potential import Curvature, Graphs, Potential, Second, Structure, Work, deformed

type Gradients = Sequence[Tensor | None]


@dataclass(frozen=True)
class Quadratic:
    """Energy of a crystal of N atoms to second order; n = 3N.

    Attributes:
        energy: `[]`, eV.
        gradient: In the displacements and the strain `[n + 6]`, eV/Å and eV.
        hessian: `[n + 6, n + 6]`, eV/Å², eV/Å and eV, symmetric.
        volume: `[]`, Å³.
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


def quadratic(
    potential: Potential,
    structure: Structure,
    deformation: tuple[Tensor, Tensor] | None = None,
    *,
    create_graph: bool = False,
) -> Quadratic:
    """Find the energy of a crystal to second order, all directions in batches that suit the device.

    The graph of all directions would take memory as the square of the number of atoms. It is not kept: what
    is back-propagated is found once more, batch by batch.

    Args:
        potential: In float64.
        structure: The crystal.
        deformation: Strain it first by ε `[3, 3]`, then displace its atoms by u `[N, 3]`, Å: (u, ε).
        create_graph: Make everything differentiable, once, in the parameters and in the deformation.

    Raises:
        InputError: The potential is in single precision.
        MlipRefineError: If memory runs out for a single system.
    """
    if potential.dtype != torch.float64:
        raise InputError(
            "second derivatives of a crystal at rest take double precision",
            found=f"default_dtype: {str(potential.dtype).removeprefix('torch.')}",
            expected="float64",
        )
    expansion = _Expansion(potential, structure)
    like = torch.zeros((), dtype=potential.dtype, device=potential.graphs.device)
    u, strain = deformation or (like.expand(len(structure.positions), 3), like.expand(3, 3))
    if not create_graph:
        return expansion.values(u, strain)
    found: tuple[Tensor, ...] = _Streamed.apply(expansion, u, strain, *expansion.parameters)
    return Quadratic(*found)


@dataclass(frozen=True)
class _Expansion:
    """The second derivatives of one crystal, deformed by (u, ε), in one potential."""

    potential: Potential
    structure: Structure

    @property
    def parameters(self) -> list[Tensor]:
        """What they are differentiable in."""
        return list(self.potential.trainable_parameters().values())

    @property
    def copies(self) -> list[Structure]:
        """The crystal once for every direction: displacements, then strains."""
        return [self.structure] * (3 * len(self.structure.positions) + 6)

    def values(self, u: Tensor, strain: Tensor) -> Quadratic:
        """Without a graph. One forward pass serves several directions for each copy of the crystal."""
        count, work = len(self.copies), Work.HESSIAN
        # Copy c has the directions c, c + at_once, ...
        at_once = self.potential.chunks(self.copies, work)[0].stop

        def some(part: slice, graphs: Graphs) -> Quadratic:
            """Rows of the directions of some copies `[copies, blocks, n + 6]`, as the hessian."""
            with torch.no_grad():
                curvature = self.potential.curvature(_deformed(graphs, u, strain))
                firsts = range(part.start, part.start + count, at_once)
                rows = torch.stack([self._rows(curvature, first) for first in firsts], dim=1)
                return _detached(_with_rows(curvature, rows))

        parts = list(self.potential.in_chunks(work, self.copies[:at_once], some))
        rows = torch.cat([part.hessian for part in parts]).transpose(0, 1).reshape(-1, count)[:count]
        return replace(parts[0], hessian=_symmetric(rows))

    def gradients(self, u: Tensor, strain: Tensor, adjoint: Quadratic) -> Iterator[Gradients]:
        """Of adjoint · expansion in u, ε and the parameters: the part of every batch of directions."""
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
        """Rows `[copies, n + 6]` of the directions from one on, one for each copy; zero past the last."""
        cell = curvature.graphs.cell
        unit = torch.zeros(len(cell), len(self.copies), dtype=cell.dtype, device=cell.device)
        unit.diagonal(first).fill_(1.0)
        strains = torch.einsum("ra,aij->rij", unit[:, -6:], mandel_basis(unit))
        second = curvature.along(unit[:, :-6].reshape(-1, 3), strains, create_graph=create_graph)
        return _flat(second, len(cell))


class _Streamed(torch.autograd.Function):
    """The expansion as a function of u, ε and the parameters."""

    @staticmethod
    def forward(ctx: Any, expansion: _Expansion, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.expansion = expansion
        # The parameters too, so that a change before the backward pass is noticed.
        ctx.save_for_backward(*inputs)
        found = expansion.values(*inputs[:2])
        return found.energy, found.gradient, found.hessian, found.volume

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *adjoints: Tensor) -> tuple[Tensor | None, ...]:
        energy, gradient, hessian, volume = adjoints
        u, strain = (x.detach().requires_grad_() for x in ctx.saved_tensors[:2])
        adjoint = Quadratic(energy, gradient, _symmetric(hessian), volume)
        total = reduce(summed, ctx.expansion.gradients(u, strain, adjoint))
        return None, *total


def _deformed(graphs: Graphs, u: Tensor, strain: Tensor) -> Graphs:
    """Every copy of the crystal in a batch, deformed."""
    return deformed(graphs, u.repeat(graphs.n_graphs, 1), strain.expand(graphs.n_graphs, 3, 3))


def _with_rows(curvature: Curvature, rows: Tensor) -> Quadratic:
    """Energy, gradient and volume of the first of all copies, and some rows as the hessian."""
    gradient = _flat(curvature.gradient, curvature.graphs.n_graphs)[0]
    return Quadratic(curvature.energy[0], gradient, rows, curvature.graphs.volume[0])


def _detached(found: Quadratic) -> Quadratic:
    """Without hold on any graph: a view has that of its base even where none is made."""
    return Quadratic(*(x.detach() for x in (found.energy, found.gradient, found.hessian, found.volume)))


def _symmetric(rows: Tensor) -> Tensor:
    return (rows + rows.T) / 2


def _flat(second: Second, copies: int) -> Tensor:
    """Displacements and strain of each copy in one row `[copies, n + 6]`."""
    strain = torch.einsum("rij,aij->ra", second.strain, mandel_basis(second.strain))
    return torch.cat([second.positions.reshape(copies, -1), strain], dim=1)
