"""A module tree as plain data: what a live MACE module and the inert contents of a file have in common.

A file is read without making any of its objects (see `mlip_refine.potential.checkpoints.unpickle`): every
object is an `Inert` that keeps its class name, its arguments and its state. Both that and a live module turn
into a `Node`, so that one code reads architectures and compares a rebuilt model with its file.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self, cast

import numpy as np
import torch
from e3nn.o3 import Irrep, Irreps
from torch import Tensor

from mlip_refine.potential.acceleration.kernels import Replacement

Plain = None | bool | int | float | str | list["Plain"]
"""Attribute values that can be compared: numbers, text, lists of them."""

GRAPH_CODE = "compiled code"
"""Kind of the nodes that hold generated code: `torch.fx` graphs and TorchScript."""

_RELATIVE = 1e-6
_HIDDEN = frozenset({"training", "cueq_config", "oeq_config", "conv_fusion", "embedding_specs"})


class Inert:
    """An object of a pickle that is described instead of made.

    Attributes:
        name: Full name of the class or function that the pickle asked for.
        args: Arguments that it would have been called with.
        state: State that it would have been given.
    """

    name: ClassVar[str] = ""
    args: tuple[object, ...]
    state: object

    def __new__(cls, *args: object, **_: object) -> Self:
        """Keep the arguments and run nothing."""
        instance = super().__new__(cls)
        instance.args = args
        instance.state = None
        return instance

    def __setstate__(self, state: object) -> None:
        """Keep the state and run nothing."""
        self.state = state


@dataclass(frozen=True)
class Node:
    """One module of a tree.

    Attributes:
        kind: Class name without its Python module.
        attributes: Public plain attributes by name.
        parameters: Own parameters by name.
        buffers: Own buffers by name.
        children: Submodules by name.
    """

    kind: str
    attributes: Mapping[str, Plain]
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    children: Mapping[str, "Node"]

    def at(self, path: str) -> "Node | None":
        """Return the node at a dotted path, or None."""
        node: Node | None = self
        for name in path.split("."):
            node = node.children.get(name) if node else None
        return node

    def walk(self, prefix: str = "") -> Iterator[tuple[str, "Node"]]:
        """Yield dotted path (with a trailing dot, empty for the root) and node, parents first."""
        yield prefix, self
        for name, child in self.children.items():
            yield from child.walk(f"{prefix}{name}.")

    def tensors(self) -> dict[str, Tensor]:
        """Return all parameters and buffers by dotted name."""
        return {
            f"{prefix}{name}": tensor
            for prefix, node in self.walk()
            for name, tensor in (*node.parameters.items(), *node.buffers.items())
        }


class Budget:
    """Number of values that may still be read from one file.

    A file of a few bytes can refer to the same object again and again, so that walking it never ends. The
    largest models of MACE hold some thousands of values.
    """

    def __init__(self, left: int = 300_000) -> None:
        """Allow so many values."""
        self.left = left

    def spend(self, values: int = 1) -> None:
        """Count values.

        Raises:
            ValueError: The file holds too many.
        """
        self.left -= values
        if self.left < 0:
            raise ValueError("it holds more values than any model does")


def node_of_module(module: torch.nn.Module) -> Node:
    """Describe a live module; installed kernels are seen through."""
    if isinstance(module, Replacement):
        return node_of_module(module.original)
    if isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
        return Node(GRAPH_CODE, {}, {}, dict(module.named_buffers()), {})
    return Node(
        kind=type(module).__name__,
        attributes=_public(vars(module), Budget()),
        parameters={k: p for k, p in module._parameters.items() if p is not None},
        buffers={k: b for k, b in module._buffers.items() if b is not None},
        children={k: node_of_module(m) for k, m in module._modules.items() if m is not None},
    )


def node_of_inert(inert: object, budget: Budget | None = None) -> Node:
    """Describe a module that a file holds.

    Args:
        inert: The module.
        budget: What the whole file may still hold.

    Raises:
        TypeError: The object is not the state of a module.
        ValueError: The file holds too much.
    """
    budget = budget or Budget()
    budget.spend(20)  # a module is dearer than a number
    if isinstance(inert, Inert) and inert.name.endswith("reduce_graph_module"):
        return Node(GRAPH_CODE, {}, {}, {}, {})
    if not isinstance(inert, Inert) or not isinstance(inert.state, dict):
        raise TypeError(f"not a module: {type(inert).__name__}")
    state = inert.state
    children = {k: node_of_inert(m, budget) for k, m in _members(state, "_modules").items()}
    for name, code in _members(state, "__codegen__").items():
        held = code.state if isinstance(code, Inert) and isinstance(code.state, dict) else {}
        children[name] = Node(GRAPH_CODE, {}, {}, _tensors(held), {})
    return Node(
        kind=inert.name.rpartition(".")[2],
        attributes=_public(state, budget),
        parameters=_tensors(_members(state, "_parameters")),
        buffers=_tensors(_members(state, "_buffers")),
        children=children,
    )


def without_unused_parts(node: Node) -> Node:
    """Return a model without the parts that old versions of MACE kept in it and never used.

    Until MACE 0.3.9 the ZBL repulsion held a cutoff radius and a cutoff function beside the one that it
    evaluates, which reaches to the sum of the covalent radii. Files of MACE-MP-0b, 0b2 and MPA-0 have them.
    """
    repulsion = node.children.get("pair_repulsion_fn")
    if repulsion is None:
        return node
    kept = replace(
        repulsion,
        buffers={name: tensor for name, tensor in repulsion.buffers.items() if name != "r_max"},
        children={name: child for name, child in repulsion.children.items() if name != "cutoff"},
    )
    return replace(node, children={**node.children, "pair_repulsion_fn": kept})


def differences(file: Node, live: Node, prefix: str = "") -> Iterator[str]:
    """Yield, in words, where a rebuilt module does not do what the file describes.

    Attributes that only one side has depend on the version of MACE and are passed over; tensors are compared
    where they are copied (`architecture.fill_tensors`).
    """
    if _replaced(file, live):
        return
    if file.kind != live.kind:
        yield f"{prefix or 'model'} is a {file.kind} in the file and a {live.kind} when rebuilt"
        return
    described, rebuilt = _comparable(file), _comparable(live)
    for name in sorted(described.keys() & rebuilt.keys()):
        theirs, ours = described[name], rebuilt[name]
        if not _equal(name, theirs, ours):
            yield f"{prefix}{name} is {theirs} in the file and {ours} when rebuilt"
    for name in sorted(file.children.keys() ^ live.children.keys()):
        yield f"{prefix}{name} exists only {'in the file' if name in file.children else 'when rebuilt'}"
    for name in sorted(file.children.keys() & live.children.keys()):
        yield from differences(file.children[name], live.children[name], f"{prefix}{name}.")


def _replaced(file: Node, live: Node) -> bool:
    """Return whether one node is the gate of e3nn and the other MACE's own, which replaced it in MACE 0.3.16.

    Both have the same numbers. A file of a newer MACE is rebuilt with the gate of the one that is installed.
    """
    return {file.kind, live.kind} == {"Gate", "GatedEquivariantBlock"}


def _comparable(node: Node) -> dict[str, Plain]:
    """Return a node's attributes, those of a linear layer independently of how its input is split up.

    Old MACE versions joined equal irreps before the layer (`128x0e`), new ones do not (`64x0e+64x0e`): the
    same weights in the same order, and the same numbers.
    """
    attributes = dict(node.attributes)
    instructions = attributes.get("instructions")
    if node.kind != "Linear" or not isinstance(instructions, list):
        return attributes
    inputs, outputs = Irreps(attributes["irreps_in"]), Irreps(attributes["irreps_out"])
    attributes["irreps_in"] = str(inputs.simplify())
    joined: list[list[float]] = []
    for i_in, i_out, _, weight in cast(list[tuple[int, int, object, float]], instructions):
        taken = inputs.slices()[i_in] if i_in >= 0 else slice(-1, -1)
        output = outputs.slices()[i_out].start
        # Paths that take neighbouring inputs to one output with the same weight are one path.
        follows = bool(joined) and joined[-1][1:3] == [taken.start, output]
        if follows and math.isclose(joined[-1][3], float(weight), rel_tol=_RELATIVE):
            joined[-1][1] = taken.stop
        else:
            joined.append([taken.start, taken.stop, output, float(weight)])
    attributes["instructions"] = cast(list[Plain], joined)
    return attributes


def _members(state: Mapping[object, object], key: str) -> dict[str, object]:
    members = state.get(key)
    if not isinstance(members, Mapping):
        return {}
    return {str(k): v for k, v in members.items() if v is not None}


def _tensors(members: Mapping[str, object]) -> dict[str, Tensor]:
    return {name: value for name, value in members.items() if isinstance(value, Tensor)}


def _public(attributes: Mapping[str, object], budget: Budget) -> dict[str, Plain]:
    plain = {
        str(name): _plain(value, budget)
        for name, value in attributes.items()
        if not str(name).startswith("_") and str(name) not in _HIDDEN
    }
    return {name: cast(Plain, value) for name, value in plain.items() if value is not _NOT_PLAIN}


_NOT_PLAIN = object()
"""Result of `_plain` for a value that cannot be compared; None is a value of its own."""


def _plain(value: object, budget: Budget) -> object:
    """Turn a value into `Plain`, functions such as `silu` into their names, live or inert."""
    budget.spend()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic | np.ndarray | Tensor):
        return value.tolist()
    if isinstance(value, Irreps | Irrep):
        return str(value)
    if isinstance(value, list | tuple):
        items = [_plain(item, budget) for item in value]
        return _NOT_PLAIN if any(item is _NOT_PLAIN for item in items) else items
    if isinstance(value, Inert):
        return _plain_inert(value, budget)
    name: object
    if isinstance(value, type) and issubclass(value, Inert):
        name = value.name.rpartition(".")[2]
    else:
        name = getattr(value, "__name__", None) if callable(value) else None
    return name if isinstance(name, str) else _NOT_PLAIN


def _plain_inert(value: Inert, budget: Budget) -> object:
    """Write irreps and instructions of a file as e3nn writes those of a live module."""
    kind = value.name.rpartition(".")[2]
    if kind == "Instruction":
        return _plain(value.args, budget)
    if kind in {"Irreps", "Irrep", "_MulIr"} and isinstance(value.args[0], tuple):
        parts = value.args[0]
        if kind == "Irreps":
            return "+".join(str(_plain(part, budget)) for part in parts)
        if kind == "_MulIr":
            return f"{int(parts[0])}x{_plain(parts[1], budget)}"
        return f"{int(parts[0])}{'e' if parts[1] == 1 else 'o'}"
    return _NOT_PLAIN


def _equal(name: str, theirs: Plain, ours: Plain) -> bool:
    if isinstance(theirs, list) and isinstance(ours, list):
        return len(theirs) == len(ours) and all(_equal(name, a, b) for a, b in zip(theirs, ours, strict=True))
    if isinstance(theirs, int | float) and isinstance(ours, int | float):
        return math.isclose(theirs, ours, rel_tol=_RELATIVE, abs_tol=1e-12)
    if "irreps" in name and isinstance(theirs, str) and isinstance(ours, str):
        return bool(Irreps(theirs) == Irreps(ours))
    return theirs == ours
