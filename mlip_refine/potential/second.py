"""Second derivatives of the energy in positions and strain, many directions for one forward pass.

Every derivative is taken in the edge vectors. In the linear convention a displacement u of the atoms and a
symmetric strain ε act on them as vec' = (1 + ε) vec + u_j - u_i, which is affine in (u, ε): the second
derivatives in (u, ε) are those in the vectors, projected, with nothing added.

In units of one evaluation of energy and forces, the slope that all directions share costs 1.6 and every
direction 1.2; so the six of `Curvature.born` cost 9, and 30 with their gradient in the parameters (432
atoms in float32 on one core).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mlip_refine.potential.graphs import Graphs
from mlip_refine.quantities import VOIGT


class Second(NamedTuple):
    """Products of the second derivatives of the energy with a direction (v, ε).

    Attributes:
        positions: ∂²U/∂x∂(x, ε)·(v, ε) `[n_atoms, 3]`, eV/Å.
        strain: ∂²U/∂ε∂(x, ε)·(v, ε) `[n_graphs, 3, 3]`, eV, symmetric.
    """

    positions: Tensor
    strain: Tensor


@dataclass(frozen=True)
class Curvature:
    """The energy of a batch and its slope, ready for second derivatives along any number of directions.

    Attributes:
        graphs: The batch.
        vectors: Its edge vectors as a leaf of the graph `[n_edges, 3]`, Å.
        energy: `[n_graphs]`, eV.
        slope: ∂U/∂vec `[n_edges, 3]`, eV/Å, differentiable in the vectors.
    """

    graphs: Graphs
    vectors: Tensor
    energy: Tensor
    slope: Tensor

    def along(
        self,
        displacements: Tensor | None = None,
        strains: Tensor | None = None,
        *,
        create_graph: bool = False,
    ) -> Second:
        """Multiply the second derivatives with one direction per graph.

        Args:
            displacements: Of the atoms `[n_atoms, 3]`, Å.
            strains: Symmetric, acting on Cartesian vectors `[n_graphs, 3, 3]`.
            create_graph: Keep the products differentiable in the parameters.
        """
        product = self._product(self._direction(displacements, strains), create_graph=create_graph)
        return Second(-self.graphs.forces(product), self._virial(product))

    def born(self, *, create_graph: bool = False) -> Tensor:
        """Return (1/V) ∂²U/∂ε∂ε `[n_graphs, 6, 6]`, eV/Å³, in the linear symmetric strain.

        Rows and columns are xx, yy, zz, yz, xz, xy; entries are components of the tensor, without factors 2.
        """
        rows = [self._born_row(i, j, create_graph=create_graph) for i, j in VOIGT]
        return torch.stack(rows, dim=1)

    def _born_row(self, i: int, j: int, *, create_graph: bool) -> Tensor:
        direction = torch.zeros_like(self.vectors)
        direction[:, i] += 0.5 * self.vectors.detach()[:, j]
        direction[:, j] += 0.5 * self.vectors.detach()[:, i]
        row = self.graphs.stress(self.vectors, self._product(direction, create_graph=create_graph))
        return torch.stack([row[:, a, b] for a, b in VOIGT], dim=1)

    def _direction(self, displacements: Tensor | None, strains: Tensor | None) -> Tensor:
        """Change of the edge vectors `[n_edges, 3]`, Å."""
        sender, receiver = self.graphs.edge_index
        direction = torch.zeros_like(self.vectors)
        if strains is not None:
            system = self.graphs.batch.index_select(0, sender)
            bent = strains.to(direction).index_select(0, system) @ self.vectors.detach().unsqueeze(2)
            direction = direction + bent.squeeze(2)
        if displacements is not None:
            moved = displacements.to(direction)
            direction = direction + moved.index_select(0, receiver) - moved.index_select(0, sender)
        return direction

    def _product(self, direction: Tensor, *, create_graph: bool) -> Tensor:
        """Second derivative in the vectors times a direction `[n_edges, 3]`; 0 without any."""
        if not self.slope.requires_grad:
            return torch.zeros_like(self.vectors)
        (product,) = torch.autograd.grad(
            self.slope,
            self.vectors,
            direction,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
        return product

    def _virial(self, slope: Tensor) -> Tensor:
        return self.graphs.stress(self.vectors, slope) * self.graphs.volume[:, None, None]
