"""The energy of a crystal to second order in the displacements of its atoms and its strain.

The strain is symmetric, acts on Cartesian vectors, and counts in the orthonormal basis of symmetric tensors
(`mandel_basis`): so the matrix of second derivatives is symmetric, whatever the box and the frame.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mlip_refine.errors import InputError
from mlip_refine.observables.tensors import mandel_basis
from mlip_refine.potential import Graphs, Potential, Second, Structure, Work, deformed


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
    """Find the energy of a crystal to second order, all directions in batches.

    Args:
        potential: In float64.
        structure: The crystal.
        deformation: Strain it first by ε `[3, 3]`, then displace its atoms by u `[N, 3]`, Å: (u, ε).
        create_graph: Keep everything differentiable in the parameters and in the deformation.

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
    count = 3 * len(structure.positions) + 6
    work = Work.BORN_GRADIENT if create_graph else Work.BORN
    # Copies of the crystal in one batch: copy c has the directions c, c + copies, ... for one forward pass.
    copies = potential.chunks([structure] * count, work)[0].stop

    def some(part: slice, graphs: Graphs) -> Quadratic:
        """Rows of the directions of some copies `[copies, blocks, n + 6]`, as the hessian."""
        if deformation is not None:
            u, strain = deformation
            graphs = deformed(graphs, u.repeat(graphs.n_graphs, 1), strain.expand(graphs.n_graphs, 3, 3))
        curvature = potential.curvature(graphs)
        with torch.set_grad_enabled(create_graph):
            blocks = [
                _flat(curvature.along(*directions, create_graph=create_graph), graphs.n_graphs)
                for directions in _directions(part, copies, count, graphs.cell)
            ]
            gradient = _flat(curvature.gradient, graphs.n_graphs)[0]
            return Quadratic(curvature.energy[0], gradient, torch.stack(blocks, dim=1), graphs.volume[0])

    parts = list(potential.in_chunks(work, [structure] * copies, some))
    rows = torch.cat([part.hessian for part in parts]).transpose(0, 1).reshape(-1, count)[:count]
    first = parts[0] if create_graph else _detached(parts[0])
    return Quadratic(first.energy, first.gradient, (rows + rows.T) / 2, first.volume)


def _directions(part: slice, copies: int, count: int, like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of unit displacements `[n_part * N, 3]` and strains `[n_part, 3, 3]`; zero past the last."""
    for start in range(0, count, copies):
        unit = torch.zeros(part.stop - part.start, count, dtype=like.dtype, device=like.device)
        unit.diagonal(start + part.start).fill_(1.0)
        strains = torch.einsum("ra,aij->rij", unit[:, count - 6 :], mandel_basis(like))
        yield unit[:, : count - 6].reshape(-1, 3), strains


def _flat(second: Second, copies: int) -> Tensor:
    """Displacements and strain of each copy in one row `[copies, n + 6]`."""
    strain = torch.einsum("rij,aij->ra", second.strain, mandel_basis(second.strain))
    return torch.cat([second.positions.reshape(copies, -1), strain], dim=1)


def _detached(first: Quadratic) -> Quadratic:
    return Quadratic(*(x.detach() for x in (first.energy, first.gradient, first.hessian, first.volume)))
