"""Second derivatives of the energy in positions and strain, many directions for one forward pass.

Every derivative is taken in the edge vectors. In the linear convention a displacement u of the atoms and a
symmetric strain ε act on them as vec' = (1 + ε) vec + u_j - u_i, which is affine in (u, ε): the second
derivatives in (u, ε) are those in the vectors, projected, with nothing added.

In units of one evaluation of energy and forces, the slope that all directions share costs 1.6 and every
direction 1.2; so the six of `Curvature.born` cost 9, and 30 with their gradient in the parameters (432
atoms in float32 on one core).
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mlip_refine.potential.graphs import Graphs
from mlip_refine.quantities import VOIGT


class GeometryDerivatives(NamedTuple):
    """Derivatives of the energy, or of its slope along a direction (u, ε), in positions and strain.

    Attributes:
        positions: ∂U/∂x in eV/Å, or ∂²U/∂x∂(x, ε)·(u, ε) in eV/Å per unit of the direction, `[n_atoms, 3]`.
        strain: ∂U/∂ε, or ∂²U/∂ε∂(x, ε)·(u, ε), in eV, symmetric `[n_graphs, 3, 3]`.
    """

    positions: Tensor
    strain: Tensor


def deformed(graphs: Graphs, displacements: Tensor, strains: Tensor) -> Graphs:
    """Return the same graphs strained by ε `[n_graphs, 3, 3]`, then displaced by u `[n_atoms, 3]`, Å.

    Differentiable in both: the `Curvature` of the result is, too.
    """
    change = _change(graphs, graphs.vectors, displacements, strains)
    moved = (strains.index_select(0, graphs.batch) @ graphs.positions.unsqueeze(2)).squeeze(2)
    return replace(
        graphs,
        positions=graphs.positions + moved + displacements,
        cell=graphs.cell + graphs.cell @ strains.mT,
        vectors=graphs.vectors + change,
    )


@dataclass(frozen=True)
class Curvature:
    """The energy of a batch and its slope, ready for second derivatives along any number of directions.

    Attributes:
        graphs: Batch of graphs.
        vectors: Edge vectors of the batch `[n_edges, 3]`, Å: a leaf, or with a graph of their own
            (`deformed`).
        energy: Energies `[n_graphs]`, eV.
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
    ) -> GeometryDerivatives:
        """Multiply the second derivatives with one direction per graph.

        Args:
            displacements: Displacements of the atoms `[n_atoms, 3]`, Å.
            strains: Symmetric strains that act on Cartesian vectors `[n_graphs, 3, 3]`.
            create_graph: Whether the products are differentiable in the parameters.
        """
        direction = _change(self.graphs, self._arms, displacements, strains)
        product = self._product(direction, create_graph=create_graph)
        return GeometryDerivatives(-self.graphs.forces(product), self._virial(product))

    def born(self, *, create_graph: bool = False) -> Tensor:
        """Return (1/V) ∂²U/∂ε∂ε `[n_graphs, 6, 6]`, eV/Å³, in the linear symmetric strain.

        Rows and columns are xx, yy, zz, yz, xz, xy; entries are components of the tensor, without factors 2.
        """
        rows = []
        for i, j in VOIGT:
            unit = torch.zeros_like(self.graphs.cell)
            unit[:, i, j] += 0.5
            unit[:, j, i] += 0.5
            direction = _change(self.graphs, self._arms, None, unit)
            row = self._virial(self._product(direction, create_graph=create_graph))
            rows.append(torch.stack([row[:, a, b] for a, b in VOIGT], dim=1) / self.graphs.volume[:, None])
        return torch.stack(rows, dim=1)

    @property
    def gradient(self) -> GeometryDerivatives:
        """∂U/∂x `[n_atoms, 3]`, eV/Å, and ∂U/∂ε `[n_graphs, 3, 3]`, eV: minus the forces, and V σ."""
        return GeometryDerivatives(-self.graphs.forces(self.slope), self._virial(self.slope))

    @property
    def _arms(self) -> Tensor:
        """The vectors that strain acts on: constants, unless they have a graph of their own."""
        return self.vectors.detach() if self.vectors.is_leaf else self.vectors

    def _product(self, direction: Tensor, *, create_graph: bool) -> Tensor:
        """Return the second derivative in the vectors times a direction `[n_edges, 3]`; 0 without any."""
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
        virial = self._arms.unsqueeze(2) * slope.unsqueeze(1)
        system = self.graphs.batch.index_select(0, self.graphs.edge_index[0])
        total = torch.zeros_like(self.graphs.cell).index_add(0, system, virial)
        return (total + total.mT) / 2


def _change(graphs: Graphs, vectors: Tensor, displacements: Tensor | None, strains: Tensor | None) -> Tensor:
    """Return the change of edge vectors `[n_edges, 3]`, Å: ε vec + u_j - u_i."""
    sender, receiver = graphs.edge_index
    change = torch.zeros_like(vectors)
    if strains is not None:
        per_edge = strains.to(vectors).index_select(0, graphs.batch.index_select(0, sender))
        change = change + (per_edge @ vectors.unsqueeze(2)).squeeze(2)
    if displacements is not None:
        moved = displacements.to(vectors)
        change = change + moved.index_select(0, receiver) - moved.index_select(0, sender)
    return change
