"""Exact replacements inside MACE: a faster convolution for scalar layers, radial functions for edges alone.

The first layer of every MACE convolves scalar features with spherical harmonics,

    m[i, c, lm] = sum over neighbours j of w[ij, l, c] x[j, c] Y[ij, lm],

which e3nn evaluates as an outer product per edge, followed by a scatter. With the neighbours of every atom
laid out in padded rows it is one small matrix product per atom and l. MACE's interaction blocks offer the
door for it: with an attribute `conv_fusion` they call `conv_tp(node_feats, edge_attrs, weights, edge_index)`.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import mace  # noqa: F401 - before e3nn, which fails to load on torch >= 2.6 otherwise
import torch
from e3nn.o3 import TensorProduct
from torch import Tensor

from mlip_refine.potential.acceleration.radial import STAND_INS
from mlip_refine.potential.acceleration.replacement import Replacement, replacements

_MAX_PADDING = 4.0
"""Largest ratio of padded rows to edges; beyond it (a few crowded atoms) the edge-wise product is used."""

_WIDTHS, _SMALLEST_WIDTH, _FEWEST_CHANNELS = 4, 28, 16
"""Rows are as wide as a multiple of this, no narrower, and of no fewer channels. How wide they are depends on
all systems of the batch, and the order of summation on the CPU must not depend on that: MKL takes another one
for the rest of a matrix, and torch does products of fewer than 400 multiplications without MKL."""


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

    def serves(self, edge_index: Tensor, n_nodes: int) -> bool:
        """Tell whether these slots were made for this very tensor, unchanged since."""
        return (
            self.edge_index is edge_index and self.n_nodes == n_nodes and self.version == edge_index._version
        )


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
            return _find_slots(edge_index, n_nodes, version=0)
        if self._slots is None or not self._slots.serves(edge_index, n_nodes):
            self._slots = _find_slots(edge_index, n_nodes, edge_index._version)
        return self._slots


def _find_slots(edge_index: Tensor, n_nodes: int, version: int) -> _Slots:
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
    return _Slots(edge_index, version, n_nodes, width, receiver * width + place)


class DenseConvolution(Replacement):
    """The convolution of scalar features as matrix products, equal to `original` and its scatter.

    Attributes:
        weight_numel: Number of weights per edge, as on the original.
    """

    def __init__(self, original: TensorProduct, cache: SlotCache) -> None:
        """Take over a tensor product that `is_scalar_convolution` accepts."""
        super().__init__(original)
        self.weight_numel: int = original.weight_numel
        self._channels: int = original.irreps_in1[0].mul
        self._paths = _paths(original)
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
        radial = _scatter_rows(weighted, slots).split(self._channels, dim=2)
        angular = _scatter_rows(edge_attrs, slots).split(self._dims, dim=2)
        messages = {
            path.output: _sum_over_rows(r, _scaled(angular[path.irrep], path.factor))
            for r, path in zip(radial, self._paths, strict=True)
        }
        return torch.cat([messages[i].reshape(n_nodes, -1) for i in sorted(messages)], dim=1)


class EdgewiseConvolution(Replacement):
    """A convolution of any features, edge by edge as in MACE, whose sums have a fixed order.

    The derivative of indexing with a tensor adds up with several threads in the order of their arrival;
    that of `index_select` does not.

    Attributes:
        weight_numel: Number of weights per edge, as on the original.
    """

    def __init__(self, original: TensorProduct) -> None:
        """Take over a tensor product."""
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


def _sum_over_rows(r: Tensor, a: Tensor) -> Tensor:
    result: Tensor = _RowSum.apply(r, a)
    return result


def _scatter_rows(values: Tensor, slots: _Slots) -> Tensor:
    """Lay edge values `[n_edges, d]` out by receiver: `[n_nodes, width, d]`, zeros where no edge is."""
    table = values.new_zeros(slots.n_nodes * slots.width, values.shape[1])
    return table.index_copy(0, slots.row, values).view(slots.n_nodes, slots.width, -1)


def _scaled(values: Tensor, factor: float) -> Tensor:
    return values if factor == 1.0 else values * factor


def _paths(product: TensorProduct) -> tuple[_Path, ...]:
    """Read the paths off the instructions; the 3j symbol of 0 x l -> l is a unit matrix over sqrt(2l + 1)."""
    return tuple(
        _Path(i.i_in2, i.i_out, i.path_weight / math.sqrt(product.irreps_in2[i.i_in2].ir.dim))
        for i in product.instructions
    )


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


def install_kernels(module: torch.nn.Module) -> int:
    """Replace, in place, every part of a MACE module that has an exact form of its own here.

    Returns:
        How many were replaced.
    """
    radial = [
        (parent, name, STAND_INS[type(child)](child))
        for parent in list(module.modules())
        if not isinstance(parent, Replacement)
        for name, child in list(parent.named_children())
        if type(child) in STAND_INS
    ]
    for parent, name, stand_in in radial:
        setattr(parent, name, stand_in)
    return len(radial) + _install_convolutions(module)


def _install_convolutions(module: torch.nn.Module) -> int:
    cache, count = SlotCache(), 0
    for block in _blocks(module):
        product = block.conv_tp
        if not hasattr(block, "conv_fusion") and type(product) is TensorProduct:
            dense = is_scalar_convolution(product)
            block.conv_tp = DenseConvolution(product, cache) if dense else EdgewiseConvolution(product)
            block.conv_fusion = True
            count += 1
    return count


def remove_kernels(module: torch.nn.Module) -> None:
    """Restore, in place, what `install_kernels` replaced."""
    for parent, name, child in replacements(module):
        setattr(parent, name, child.original)
        if isinstance(child, DenseConvolution | EdgewiseConvolution):
            del parent.conv_fusion


def has_kernels(module: torch.nn.Module) -> bool:
    """Tell whether any part of a module is replaced."""
    return next(replacements(module), None) is not None


class _Block(torch.nn.Module):
    """What is read of an interaction block of MACE."""

    conv_tp: torch.nn.Module
    conv_fusion: bool


def _blocks(module: torch.nn.Module) -> list[_Block]:
    blocks = getattr(module, "interactions", [])
    return [cast(_Block, b) for b in blocks if isinstance(getattr(b, "conv_tp", None), torch.nn.Module)]
