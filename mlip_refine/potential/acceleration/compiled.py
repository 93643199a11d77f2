"""Energies and their derivatives as one compiled graph, for molecular dynamics of batches of one shape.

Dynamo does not get through e3nn. So the module is run once on the batch, and every operation of the forward
pass and of the derivative is written down (`make_fx`), TorchScript included; what is compiled is that list.
It holds for one number of atoms, systems and edges: the edges are padded, with room to spare, by dummies
beyond the cutoff that contribute exactly 0. Parameters are inputs, so that copies of a model which only
differ in them share what was compiled.

Measured on a CPU core alone (torch 2.15, float64): within 1e-10 of the plain model, written down for a small
MACE of scalars and vectors, and compiled by Inductor for one of scalars. Writing `titanium-compact` down took
6 to 10 s.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from mlip_refine.potential.graphs import Graphs

EnergyAndSlope = Callable[[Graphs, Tensor], tuple[Tensor, Tensor]]
"""A batch and its edge vectors `[n_edges, 3]`, Å -> energies `[n_graphs]`, eV, and their derivatives in the
vectors `[n_edges, 3]`, eV/Å."""

_ROOM, _BUCKET, _MOST_WASTE = 1.1, 64, 1.5
"""Edges that a graph is compiled for, over those of the batch; the multiple that they are rounded up to; and
the largest ratio to the edges of a later batch that is served by it."""

_MOST_GRAPHS = 8
"""Compiled graphs of a model and its copies: each takes a minute to make."""

_FAR = 2.0
"""Length of a dummy edge in cutoffs."""

_Shape = tuple[int, int, int, torch.dtype, torch.device]
_Compiled = Callable[..., tuple[Tensor, Tensor]]
_Compiler = Callable[[torch.fx.GraphModule, list[Any]], _Compiled]


def inductor(traced: torch.fx.GraphModule, inputs: list[Any]) -> _Compiled:
    """Compile a written-down graph for inputs of these shapes; Dynamo would only read it once more."""
    compiled: _Compiled = torch._inductor.compile(traced, inputs)
    return compiled


def capacity(n_edges: int) -> int:
    """Return the edges to compile for when there are `n_edges`: a multiple of 64 with a tenth to spare."""
    return max(1, math.ceil(_ROOM * n_edges / _BUCKET)) * _BUCKET


@dataclass
class CompiledGraphs:
    """Graphs that were compiled for a model, by shape and number of edges.

    Attributes:
        compiler: Compiler of a written-down graph.
        known: Compiled graphs of every shape, by their number of edges.
    """

    compiler: _Compiler = inductor
    known: dict[_Shape, dict[int, _Compiled]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of compiled graphs."""
        return sum(len(graphs) for graphs in self.known.values())

    def find(self, shape: _Shape, n_edges: int) -> int | None:
        """Return the smallest number of edges compiled for that fits and does not waste."""
        most = _MOST_WASTE * n_edges + _BUCKET
        return min((size for size in self.known.get(shape, {}) if n_edges <= size <= most), default=None)


class CompiledModule:
    """A MACE module behind compiled graphs, which are made when a batch needs them."""

    def __init__(self, module: torch.nn.Module, head: int, graphs: CompiledGraphs) -> None:
        """Keep a module of MACE without kernels, whose parameters need no gradients.

        Args:
            module: Module of MACE.
            head: Number of the head.
            graphs: Graphs compiled for it, or for a module that differs in its parameters alone.
        """
        self._module, self._head, self._compiled = module, head, graphs
        self._parameters = dict(module.named_parameters())
        some = next(module.parameters())
        self._far = some.new_tensor([[_FAR * float(module.r_max), 0.0, 0.0]])  # type: ignore[arg-type]

    def __call__(self, graphs: Graphs, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return energies and derivatives (see `EnergyAndSlope`), without a graph.

        Raises:
            RuntimeError: If the batches take more graphs than are worth compiling. Compiling itself may
                raise anything.
        """
        n_edges = len(vectors)
        shape = (len(graphs.batch), graphs.n_graphs, self._head, vectors.dtype, vectors.device)
        size = self._compiled.find(shape, n_edges)
        n_padded = size or capacity(n_edges)
        # Inputs of a compiled graph: parameters, vectors, edges, elements, systems and their first atoms.
        last = graphs.edge_index.new_full((2, n_padded - n_edges), len(graphs.batch) - 1)
        inputs: tuple[Any, ...] = (
            [p.detach() for p in self._parameters.values()],
            torch.cat([vectors.detach(), self._far.expand(n_padded - n_edges, 3)]),
            torch.cat([graphs.edge_index, last], dim=1),
            graphs.node_attrs,
            graphs.batch,
            graphs.ptr,
        )
        if size is None:
            if len(self._compiled) >= _MOST_GRAPHS:
                raise RuntimeError(f"batches have more than {_MOST_GRAPHS} shapes")
            parameters, padded, *rest = inputs
            # What TorchScript fuses after its first calls cannot be written down.
            with torch.enable_grad(), torch.jit.optimized_execution(should_optimize=False):  # type: ignore[attr-defined]
                # `make_fx` would count `self` of a method among the inputs.
                write_down = make_fx(partial(self._energy_and_slope))
                traced = write_down(parameters, padded.clone().requires_grad_(), *rest)
            with torch.no_grad():
                compiled = self._compiled.compiler(traced, list(inputs))
            self._compiled.known.setdefault(shape, {})[n_padded] = compiled
        with torch.no_grad():
            energy, slope = self._compiled.known[shape][n_padded](*inputs)
        return energy, slope[:n_edges]

    def _energy_and_slope(
        self,
        parameters: list[Tensor],
        vectors: Tensor,
        edge_index: Tensor,
        node_attrs: Tensor,
        batch: Tensor,
        ptr: Tensor,
    ) -> tuple[Tensor, Tensor]:
        positions = vectors.new_zeros(len(batch), 3)
        cell, shifts = vectors.new_zeros(len(ptr) - 1, 3, 3), torch.zeros_like(vectors)
        graphs = Graphs(positions, cell, node_attrs, batch, ptr, edge_index, shifts)
        # Plain zeros for positions: a subclass of tensors cannot be written down.
        inputs = graphs.mace_input(vectors, self._head) | {"positions": positions}
        named = dict(zip(self._parameters, parameters, strict=True))
        output = torch.func.functional_call(self._module, named, (inputs,), {"compute_force": False})
        (slope,) = torch.autograd.grad(output["energy"].sum(), vectors)
        return output["energy"].detach(), slope
