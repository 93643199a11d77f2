"""Exact replacements of parts of MACE: faster convolutions, radial functions that see one edge at a time.

The first layer of every MACE convolves scalar features with spherical harmonics,

    m[i, c, lm] = sum over neighbours j of w[ij, l, c] x[j, c] Y[ij, lm],

which e3nn evaluates as an outer product per edge, followed by a scatter. With the neighbours of every atom
laid out in padded rows it is one small matrix product per atom and l. MACE's interaction blocks can be given
it: with an attribute `conv_fusion` they call `conv_tp(node_feats, edge_attrs, weights, edge_index)`.

MACE's radial functions call `torch.pow` with a tensor exponent, which takes another algorithm for the
elements that do not fill a vector register than for those that do. Which edges these are depends on the
number of edges before them, so the energy of one system would depend, in its last bits, on its neighbours in
the batch. Here integer powers are products, real powers are exponentials, and powers of the elements are
computed once per element.
"""

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from e3nn.o3 import TensorProduct
from mace.modules.radial import AgnesiTransform, PolynomialCutoff, ZBLBasis
from mace.modules.symmetric_contraction import EmptyParam
from torch import Tensor

_MAX_PADDING = 4.0
"""Largest ratio of padded rows to edges; beyond it (a few crowded atoms) the edge-wise product is used."""

_WIDTHS, _SMALLEST_WIDTH, _FEWEST_CHANNELS = 4, 28, 16
"""Multiple and minimum of the width of rows, and minimum of their channels. The width depends on all systems
of the batch, and the order of summation on the CPU must not depend on that: MKL takes another one for the
rest of a matrix, and torch does products of fewer than 400 multiplications without MKL."""


class Replacement(torch.nn.Module):
    """A module that computes what `original` computes; what is saved and hashed is the original.

    Attributes:
        original: The part of MACE that this stands for, with its tensors.
    """

    def __init__(self, original: torch.nn.Module) -> None:
        """Keep the part that this stands for."""
        super().__init__()
        self.original = original


@dataclass(frozen=True)
class _Path:
    """One output of the convolution: which irrep of Y it takes, which output it is, and its factor."""

    irrep: int
    output: int
    factor: float


@dataclass(frozen=True)
class _Slots:
    """Row of every edge in the padded table of `n_nodes * width` rows, for one `edge_index`."""

    edge_index: Tensor
    version: int
    n_nodes: int
    width: int
    row: Tensor

    @classmethod
    def find(cls, edge_index: Tensor, n_nodes: int, version: int) -> "_Slots":
        """Number the edges of every receiver, in the order of the list."""
        receiver = edge_index[1]
        count = torch.bincount(receiver, minlength=n_nodes)
        first = torch.cumsum(count, 0) - count
        number = torch.arange(len(receiver), device=receiver.device)
        if bool((receiver.diff() >= 0).all()):
            place = number - first.index_select(0, receiver)
        else:
            order = torch.argsort(receiver, stable=True)
            place = torch.empty_like(receiver)
            place[order] = number - first[receiver[order]]
        width = max(-(-int(count.max()) // _WIDTHS) * _WIDTHS, _SMALLEST_WIDTH) if len(receiver) else 0
        return cls(edge_index, version, n_nodes, width, receiver * width + place)

    def serves(self, edge_index: Tensor, n_nodes: int) -> bool:
        """Tell whether these slots were made for this very tensor, unchanged since."""
        return (
            self.edge_index is edge_index and self.n_nodes == n_nodes and self.version == edge_index._version
        )

    def lay_out(self, values: Tensor) -> Tensor:
        """Sort edge values `[n_edges, d]` by receiver: `[n_nodes, width, d]`, zeros where no edge is."""
        table = values.new_zeros(self.n_nodes * self.width, values.shape[1])
        return table.index_copy(0, self.row, values).view(self.n_nodes, self.width, -1)


class SlotCache:
    """Slots of the last edge list, shared by all convolutions of a model.

    It keeps a reference to the tensor that they were made for, so an identity cannot be reused, and it
    starts empty in every copy.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._slots: _Slots | None = None

    def __reduce__(self) -> tuple[type["SlotCache"], tuple[()]]:
        """Copy and pickle as an empty cache."""
        return SlotCache, ()

    def find(self, edge_index: Tensor, n_nodes: int) -> _Slots:
        """Return the slots of an edge list `[2, n_edges]`, computing them at most once per tensor."""
        if edge_index.is_inference():
            return _Slots.find(edge_index, n_nodes, version=0)
        if self._slots is None or not self._slots.serves(edge_index, n_nodes):
            self._slots = _Slots.find(edge_index, n_nodes, edge_index._version)
        return self._slots


class DenseConvolution(Replacement):
    """The convolution of scalar features as matrix products, equal to `original` and its scatter.

    Attributes:
        weight_numel: Number of weights per edge, as on the original.
    """

    def __init__(self, original: TensorProduct, cache: SlotCache) -> None:
        """Read the paths of a tensor product that `is_scalar_convolution` accepts.

        The 3j symbol of 0 x l -> l is a unit matrix over sqrt(2l + 1).
        """
        super().__init__(original)
        self.weight_numel: int = original.weight_numel
        self._channels: int = original.irreps_in1[0].mul
        self._paths = tuple(
            _Path(i.i_in2, i.i_out, i.path_weight / math.sqrt(original.irreps_in2[i.i_in2].ir.dim))
            for i in original.instructions
        )
        self._dims: list[int] = [ir.dim for _, ir in original.irreps_in2]
        self._cache = cache

    def forward(self, node_feats: Tensor, edge_attrs: Tensor, weights: Tensor, edge_index: Tensor) -> Tensor:
        """Sum the messages of every atom's neighbours.

        Args:
            node_feats: Scalars of every atom `[n_nodes, channels]`.
            edge_attrs: Spherical harmonics of every edge `[n_edges, sum of 2l + 1]`.
            weights: Radial weights `[n_edges, weight_numel]`.
            edge_index: Senders and receivers `[2, n_edges]`, in any order.

        Returns:
            Messages `[n_nodes, channels * sum of 2l + 1]` in e3nn's layout; atoms without neighbours get 0.
        """
        n_nodes, n_edges = node_feats.shape[0], weights.shape[0]
        slots = self._cache.find(edge_index, n_nodes)
        if n_edges == 0 or n_nodes * slots.width > _MAX_PADDING * n_edges + n_nodes:
            return _edgewise(self.original, node_feats, edge_attrs, weights, edge_index)
        sent = node_feats.index_select(0, edge_index[0])
        weighted = (weights.view(n_edges, -1, self._channels) * sent.unsqueeze(1)).view(n_edges, -1)
        radial = slots.lay_out(weighted).split(self._channels, dim=2)
        angular = slots.lay_out(edge_attrs).split(self._dims, dim=2)
        messages: dict[int, Tensor] = {}
        for r, path in zip(radial, self._paths, strict=True):
            harmonics = angular[path.irrep]
            scaled = harmonics if path.factor == 1.0 else harmonics * path.factor
            messages[path.output] = _RowSum.apply(r, scaled)
        return torch.cat([messages[i].reshape(n_nodes, -1) for i in sorted(messages)], dim=1)


class EdgewiseConvolution(Replacement):
    """A convolution of any features, edge by edge as in MACE, whose sums have a fixed order.

    The derivative of indexing with a tensor adds up with several threads in the order of their arrival;
    that of `index_select` does not.

    Attributes:
        weight_numel: Number of weights per edge, as on the original.
    """

    def __init__(self, original: TensorProduct) -> None:
        """Keep a tensor product."""
        super().__init__(original)
        self.weight_numel: int = original.weight_numel

    def forward(self, node_feats: Tensor, edge_attrs: Tensor, weights: Tensor, edge_index: Tensor) -> Tensor:
        """Sum the messages of every atom's neighbours (see `DenseConvolution.forward`)."""
        return _edgewise(self.original, node_feats, edge_attrs, weights, edge_index)


def _edgewise(
    product: torch.nn.Module, node_feats: Tensor, edge_attrs: Tensor, weights: Tensor, edge_index: Tensor
) -> Tensor:
    messages: Tensor = product(node_feats.index_select(0, edge_index[0]), edge_attrs, weights)
    return messages.new_zeros(node_feats.shape[0], messages.shape[1]).index_add(0, edge_index[1], messages)


class _RowSum(torch.autograd.Function):
    """r[n, w, c], a[n, w, m] -> sum over w of r a, `[n, c, m]`.

    Autograd's own derivative of the matrix product would have the width as its fastest dimension: slower,
    and in another order of summation for the last few edges of a row.
    """

    @staticmethod
    def forward(r: Tensor, a: Tensor) -> Tensor:
        return torch.bmm(r.transpose(1, 2), a)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        r, a = ctx.saved_tensors
        to_r, to_a = ctx.needs_input_grad
        return torch.bmm(a, grad.transpose(1, 2)) if to_r else None, torch.bmm(r, grad) if to_a else None


def is_scalar_convolution(module: torch.nn.Module) -> bool:
    """Tell whether `DenseConvolution` can stand for a module.

    It must be a tensor product of e3nn of `N x 0e`, N at least 16, with one irrep of each kind, weighted
    from outside, path type "uvu", and with one path for every output.
    """
    if type(module) is not TensorProduct:
        return False
    product = cast(Any, module)
    scalars, harmonics, outputs = product.irreps_in1, product.irreps_in2, product.irreps_out
    paths = product.instructions
    return (
        not (product.internal_weights or product.shared_weights)
        and len(scalars) == 1
        and scalars[0].ir.is_scalar()
        and scalars[0].mul >= _FEWEST_CHANNELS
        and all(mul == 1 for mul, _ in harmonics)
        and all(path.connection_mode == "uvu" and path.has_weight for path in paths)
        and sorted(path.i_out for path in paths) == list(range(len(outputs))) != []
        and all(outputs[path.i_out].ir.l == harmonics[path.i_in2].ir.l for path in paths)
    )


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


RADIAL: dict[type[torch.nn.Module], type[Replacement]] = {
    PolynomialCutoff: ProductCutoff,
    AgnesiTransform: ElementwiseAgnesi,
    ZBLBasis: ElementwiseRepulsion,
}
"""Replacement of every radial function that has one."""


def install_kernels(module: torch.nn.Module) -> int:
    """Replace, in place, every part of a MACE module that has an exact replacement.

    Returns:
        How many were replaced.
    """
    radial = [
        (parent, name, RADIAL[type(child)](child))
        for parent in list(module.modules())
        if not isinstance(parent, Replacement)
        for name, child in list(parent.named_children())
        if type(child) in RADIAL
    ]
    for parent, name, replacement in radial:
        setattr(parent, name, replacement)
    cache, count = SlotCache(), len(radial)
    for block in getattr(module, "interactions", []):
        product: Any = getattr(block, "conv_tp", None)
        if type(product) is TensorProduct and not hasattr(block, "conv_fusion"):
            dense = is_scalar_convolution(product)
            block.conv_tp = DenseConvolution(product, cache) if dense else EdgewiseConvolution(product)
            block.conv_fusion = True
            count += 1
    return count


def remove_kernels(module: torch.nn.Module) -> None:
    """Restore, in place, what `install_kernels` replaced."""
    for parent, name, child in _replacements(module):
        setattr(parent, name, child.original)
        if isinstance(child, DenseConvolution | EdgewiseConvolution):
            del parent.conv_fusion


def has_kernels(module: torch.nn.Module) -> bool:
    """Tell whether any part of a module is replaced."""
    return next(_replacements(module), None) is not None


def copy_module(module: torch.nn.Module) -> torch.nn.Module:
    """Return a deep copy of a module, also of one with pseudoscalars.

    Where no product leads to an irrep such as `0o`, MACE holds a parameter that `deepcopy` alone cannot copy.
    """
    empty: Any = EmptyParam  # untyped
    return deepcopy(module, {id(p): empty(p.detach()) for p in module.parameters() if type(p) is EmptyParam})


def without_kernels(module: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of a module as MACE made it."""
    stock = copy_module(module)
    remove_kernels(stock)
    return stock


def _replacements(module: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, Replacement]]:
    """Yield the parent, the name in it and the replacement itself, of each one in a module."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Replacement):
                yield parent, name, child
