"""Radial functions of MACE whose result for an edge does not depend on the other edges of the batch.

`torch.pow` with a tensor exponent takes another algorithm for the elements that do not fill a vector
register than for those that do. Which edges these are depends on the number of edges before them, so the
energy of one system would depend, in its last bits, on its neighbours in the batch. Here integer powers are
products, real powers are exponentials, and powers of the elements are computed once per element.
"""

from typing import Any, cast

import torch
from mace.modules.radial import AgnesiTransform, PolynomialCutoff, ZBLBasis
from torch import Tensor

from mlip_refine.potential.acceleration.replacement import Replacement


def integer_power(x: Tensor, exponent: int) -> Tensor:
    """Raise to a positive integer power by repeated squaring; each product is rounded once."""
    if exponent == 1:
        return x
    half = integer_power(x, exponent // 2)
    square = half * half
    return square * x if exponent % 2 else square


def envelope(x: Tensor, r_max: Tensor, p: int) -> Tensor:
    """Polynomial cutoff (Gasteiger et al. 2020, arXiv:2003.03123, eq. 8), exactly 0 from `r_max` on.

    Args:
        x: Distances, Å.
        r_max: Where it ends: a scalar, or of the shape of `x`, Å.
        p: Order of the leading power.

    Returns:
        1 - (p+1)(p+2)/2 u^p + p(p+2) u^(p+1) - p(p+1)/2 u^(p+2) with u = x / r_max, of the shape of `x`.
    """
    u = x / r_max
    bracket = (p + 1) * (p + 2) / 2 - u * (p * (p + 2) - u * (p * (p + 1) / 2))
    return (1.0 - integer_power(u, p) * bracket) * (x < r_max)


class ProductCutoff(Replacement):
    """MACE's polynomial cutoff with powers as products."""

    def __init__(self, original: PolynomialCutoff) -> None:
        """Read the order once: as a tensor it would cost a wait for the device in every call."""
        super().__init__(original)
        self._p = int(original.p)

    def forward(self, x: Tensor) -> Tensor:
        """Cutoff of distances `[n_edges, 1]`, Å."""
        return envelope(x, cast(Tensor, self.original.r_max), self._p)


class ElementwiseAgnesi(Replacement):
    """MACE's Agnesi transform of distances with real powers as exponentials."""

    def forward(self, x: Tensor, node_attrs: Tensor, edge_index: Tensor, atomic_numbers: Tensor) -> Tensor:
        """Transform distances `[n_edges, 1]`, Å; the arguments are those of `AgnesiTransform.forward`."""
        own = cast(Any, self.original)
        radii = own.covalent_radii[atomic_numbers]
        sender, receiver = _per_edge(radii, node_attrs, edge_index)
        log_ratio = (x / (0.5 * (sender + receiver))).log()
        rise, fall = (own.q * log_ratio).exp(), ((own.q - own.p) * log_ratio).exp()
        transformed: Tensor = (1 + own.a * rise / (1 + fall)).reciprocal()
        return transformed


class ElementwiseRepulsion(Replacement):
    """MACE's Ziegler-Biersack-Littmark repulsion with powers per element and products."""

    def __init__(self, original: ZBLBasis) -> None:
        """Read the order of the cutoff once."""
        super().__init__(original)
        self._p = int(original.p)

    def forward(self, x: Tensor, node_attrs: Tensor, edge_index: Tensor, atomic_numbers: Tensor) -> Tensor:
        """Energies of atoms `[n_atoms]`, eV, from distances `[n_edges, 1]`, Å, as `ZBLBasis.forward`."""
        own = cast(Any, self.original)
        screening = torch.pow(atomic_numbers, own.a_exp)
        sender, receiver = _per_edge(screening, node_attrs, edge_index)
        reduced = x * (sender + receiver) / (own.a_prefactor * 0.529)
        exponents = (-3.2, -0.9423, -0.4028, -0.2016)
        screened = sum(c * torch.exp(k * reduced) for c, k in zip(own.c, exponents, strict=True))
        z_sender, z_receiver = _per_edge(atomic_numbers, node_attrs, edge_index)
        r_sender, r_receiver = _per_edge(own.covalent_radii[atomic_numbers], node_attrs, edge_index)
        repulsion = 14.3996 * (z_sender * z_receiver) / x * screened
        pairs: Tensor = 0.5 * repulsion * envelope(x, r_sender + r_receiver, self._p)
        return pairs.new_zeros(node_attrs.shape[0]).index_add(0, edge_index[1], pairs.squeeze(-1))


def _per_edge(table: Tensor, node_attrs: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor]:
    """Values of the elements `[n_elements]` at the senders and receivers of edges, each `[n_edges, 1]`."""
    values = table[node_attrs.argmax(dim=1)].unsqueeze(-1)
    return values[edge_index[0]], values[edge_index[1]]


STAND_INS: dict[type[torch.nn.Module], type[Replacement]] = {
    PolynomialCutoff: ProductCutoff,
    AgnesiTransform: ElementwiseAgnesi,
    ZBLBasis: ElementwiseRepulsion,
}
"""What stands for which part of MACE."""
