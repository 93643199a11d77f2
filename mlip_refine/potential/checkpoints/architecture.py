"""The architecture of a MACE model, apart from its numbers: read off a model or a file, and built again.

Reading goes through `mlip_refine.potential.checkpoints.module_tree`, so that it works on live modules and on
files alike. Building calls MACE's own constructor: nothing of the file runs.
"""

import inspect
import json
from collections.abc import Mapping
from importlib.metadata import version
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
import torch
from e3nn.o3 import Irreps
from mace import modules
from mace.modules.symmetric_contraction import EmptyParam
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor

from mlip_refine.errors import InputError
from mlip_refine.potential.checkpoints.module_tree import (
    Node,
    Plain,
    differences,
    node_of_module,
    without_unused_parts,
)

_RADIAL = {"BesselBasis": "bessel", "GaussianBasis": "gaussian", "ChebychevBasis": "chebyshev"}
_TRANSFORM = {"AgnesiTransform": "Agnesi", "SoftTransform": "Soft"}
_CLASSES = {"MACE": modules.MACE, "ScaleShiftMACE": modules.ScaleShiftMACE}
_GATES = {"silu": torch.nn.functional.silu, "tanh": torch.tanh, "abs": torch.abs}
_READOUTS = {
    "NonLinearReadoutBlock": modules.blocks.NonLinearReadoutBlock,
    "NonLinearBiasReadoutBlock": modules.blocks.NonLinearBiasReadoutBlock,
}

_GATE = ".equivariant_nonlin."
"""Part of the names of a gate's tensors: constants, which versions of MACE keep in different ways."""

_NOT_BUILT = (
    *(AssertionError, AttributeError, IndexError, KeyError, MemoryError, NotImplementedError, OverflowError),
    *(RecursionError, RuntimeError, TypeError, ValueError, ZeroDivisionError),
)
"""What MACE's constructor raises for an architecture that no model has."""


def largest_l(irreps: object) -> int:
    """Return the largest l of irreps, without counting through multiplicities as `Irreps.lmax` does."""
    return max((irrep.l for _, irrep in Irreps(irreps)), default=0)


class Architecture(BaseModel):
    """Everything that MACE's constructor needs except the numbers in its tensors.

    Names are those of `mace.modules.MACE`; lengths are in Å.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    model: Literal["MACE", "ScaleShiftMACE"]
    r_max: float = Field(gt=0, le=1000)
    num_bessel: int = Field(gt=0, le=1000)
    num_polynomial_cutoff: int = Field(gt=0, le=1000)
    max_ell: int = Field(ge=0, le=11)
    interaction_first: str
    interaction: str
    num_interactions: int = Field(gt=0, le=20)
    hidden_irreps: str
    edge_irreps: str | None
    mlp_irreps: str
    gate: str | None
    readout: str
    correlation: list[Annotated[int, Field(gt=0, le=8)]] = Field(min_length=1, max_length=20)
    avg_num_neighbors: float
    atomic_numbers: list[Annotated[int, Field(gt=0, le=118)]] = Field(min_length=1, max_length=118)
    heads: list[str] = Field(min_length=1, max_length=1000)
    radial_type: Literal["bessel", "gaussian", "chebyshev"]
    radial_mlp: list[Annotated[int, Field(gt=0)]] = Field(max_length=20)
    distance_transform: Literal["None", "Agnesi", "Soft"]
    pair_repulsion: bool
    apply_cutoff: bool
    use_reduced_cg: bool
    use_so3: bool
    use_edge_irreps_first: bool
    use_agnostic_product: bool
    use_last_readout_only: bool
    keep_last_layer_irreps: bool
    energies_shape: list[int] = Field(max_length=3)
    scale_shape: list[int] = Field(max_length=3)
    shift_shape: list[int] | None = None  # where it is another one than that of the scale

    @field_validator("hidden_irreps", "edge_irreps", "mlp_irreps")
    @classmethod
    def _irreps(cls, text: str | None) -> str | None:
        if text is not None and (len(text) > 200 or largest_l(text) > 11 or not Irreps(text).count("0e")):
            raise ValueError("no irreps of a MACE: they hold scalars, and l up to 11")
        return text

    @field_validator("interaction_first", "interaction")
    @classmethod
    def _known_interaction(cls, name: str) -> str:
        return _known(name, modules.interaction_classes)

    @field_validator("readout")
    @classmethod
    def _known_readout(cls, name: str) -> str:
        return _known(name, _READOUTS)

    @field_validator("gate")
    @classmethod
    def _known_gate(cls, name: str | None) -> str | None:
        return None if name is None else _known(name, _GATES)

    def canonical(self) -> str:
        """Return the architecture as JSON with sorted keys: one text per architecture."""
        fields = self.model_dump()
        if self.shift_shape is None:  # as hashes of models were made before there was such a field
            del fields["shift_shape"]
        return json.dumps(fields, sort_keys=True)


def _known(name: str, table: Mapping[str, object]) -> str:
    if name not in table:
        raise ValueError(f"unknown: {name}; known: {', '.join(sorted(table))}")
    return name


def read_architecture(node: Node, where: str) -> Architecture:
    """Read the architecture of a model.

    Args:
        node: The model, live or from a file.
        where: Name of the model in error messages.

    Raises:
        InputError: The model is not a MACE, or one of a kind that cannot be rebuilt here.
    """
    if node.kind not in _CLASSES:
        raise InputError("not a MACE potential", where=where, found=node.kind, expected=" or ".join(_CLASSES))
    try:
        return Architecture.model_validate(_fields(node))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise InputError(f"a MACE of an unsupported kind ({problem})", where=where) from error
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, AssertionError) as error:
        raise InputError(f"a MACE whose parts cannot be read ({error!r})", where=where) from error


def _fields(node: Node) -> dict[str, object]:
    interactions, products, readouts = (
        list(node.children[name].children.values()) for name in ("interactions", "products", "readouts")
    )
    named = node.attributes.get("heads") or ["Default"]
    heads = [str(head) for head in named] if isinstance(named, list) else [str(named)]
    hidden, last = (str(p.children["linear"].attributes["irreps_out"]) for p in (products[0], products[-1]))
    edge = node.attributes.get("edge_irreps")
    # Files of MACE 0.3.14 and MH-1 have no such attribute: the first block tells what it was built with.
    scalars_first = None if edge is None else f"{Irreps(edge).count('0e')}x0e"
    first = interactions[0].attributes
    edge_first = scalars_first is not None and (
        scalars_first == str(first.get("edge_irreps")) != str(first.get("node_feats_irreps"))
    )
    contractions = [p.children["symmetric_contractions"].children["contractions"] for p in products]
    # By `mace_run_train --scaling rms_forces_scaling` the shapes of scale and shift differ.
    block = node.children.get("scale_shift")
    scale, shift = (list(block.buffers[name].shape) if block else [] for name in ("scale", "shift"))
    radial = node.children["radial_embedding"]
    basis, transform = radial.children["bessel_fn"].kind, radial.children.get("distance_transform")
    sizes = interactions[0].attributes.get("radial_MLP")
    if not isinstance(sizes, list):  # older versions of MACE keep the sizes in the network alone
        all_sizes = interactions[0].children["conv_tp_weights"].attributes["hs"]
        sizes = all_sizes[1:-1] if isinstance(all_sizes, list) else []
    readout = readouts[-1]
    hidden_readout = readout.attributes.get("hidden_irreps")
    scalars = Irreps(hidden_readout).count("0e") if hidden_readout is not None else 1
    activation = readout.at("non_linearity.acts.0")
    gate = None if activation is None else activation.attributes.get("f")
    fields: dict[str, object] = {
        "model": node.kind,
        "num_interactions": len(interactions),
        "interaction_first": interactions[0].kind,
        "interaction": interactions[-1].kind,
        "hidden_irreps": hidden,
        "edge_irreps": None if edge is None else str(edge),
        "correlation": [1 + len(c.children["0"].children["weights"].parameters) for c in contractions],
        "avg_num_neighbors": _number(interactions[0].attributes["avg_num_neighbors"]),
        "atomic_numbers": node.buffers["atomic_numbers"].tolist(),
        "heads": heads,
        "pair_repulsion": "pair_repulsion_fn" in node.children,
        "use_agnostic_product": _flag(products[0], "use_agnostic_product", default=False),
        "keep_last_layer_irreps": len(products) > 1 and last == hidden and largest_l(hidden) > 0,
        "energies_shape": list(node.children["atomic_energies_fn"].buffers["atomic_energies"].shape),
        "scale_shape": scale,
        "shift_shape": None if shift == scale else shift,
        "max_ell": largest_l(node.children["spherical_harmonics"].attributes["irreps_out"]),
        "r_max": float(node.buffers["r_max"]),
        "num_bessel": radial.attributes["out_dim"],
        "num_polynomial_cutoff": int(radial.children["cutoff_fn"].buffers["p"]),
        "radial_type": _RADIAL.get(basis, basis),
        "radial_mlp": [int(_number(size)) for size in sizes],
        "distance_transform": "None" if transform is None else _TRANSFORM.get(transform.kind, transform.kind),
        "apply_cutoff": _flag(radial, "apply_cutoff", default=True),
        "mlp_irreps": f"{max(1, scalars // len(heads))}x0e",
        "gate": None if gate is None else str(gate),
        "readout": readout.kind if readout.kind in _READOUTS else "NonLinearReadoutBlock",
    }
    # Attributes that were added with their options: a file without them was written before.
    inferred = {
        "use_reduced_cg": False,
        "use_so3": str(node.children["spherical_harmonics"].attributes["irreps_out"]).count("o") == 0
        and fields["max_ell"] != 0,
        "use_edge_irreps_first": edge_first,
        "use_last_readout_only": len(readouts) < len(interactions),
    }
    return fields | {name: _flag(node, name, default=value) for name, value in inferred.items()}


def _flag(node: Node, name: str, *, default: bool) -> bool:
    return bool(node.attributes.get(name, default))


def _number(value: Plain) -> float:
    if not isinstance(value, int | float):
        raise TypeError(f"not a number: {value}")
    return float(value)


def build_module(architecture: Architecture, dtype: torch.dtype, where: str = "the model") -> torch.nn.Module:
    """Build a MACE model with arbitrary numbers in its tensors, on the CPU.

    The default dtype and the random state of the process are left as they were.

    Raises:
        InputError: The installed MACE cannot build it.
    """
    a = architecture
    arguments: dict[str, Any] = a.model_dump(
        include={
            *("r_max", "num_bessel", "num_polynomial_cutoff", "max_ell", "num_interactions", "correlation"),
            *("avg_num_neighbors", "atomic_numbers", "heads", "radial_type", "distance_transform"),
            *("pair_repulsion", "apply_cutoff", "use_reduced_cg", "use_so3", "use_edge_irreps_first"),
            *("use_agnostic_product", "use_last_readout_only", "keep_last_layer_irreps"),
        }
    )
    arguments |= {
        "interaction_cls_first": modules.interaction_classes[a.interaction_first],
        "interaction_cls": modules.interaction_classes[a.interaction],
        "num_elements": len(a.atomic_numbers),
        "hidden_irreps": Irreps(a.hidden_irreps),
        "edge_irreps": None if a.edge_irreps is None else Irreps(a.edge_irreps),
        "MLP_irreps": Irreps(a.mlp_irreps),
        "gate": None if a.gate is None else _GATES[a.gate],
        "readout_cls": _READOUTS[a.readout],
        "radial_MLP": a.radial_mlp,
    }
    for name in arguments.keys() - inspect.signature(modules.MACE).parameters.keys():
        if arguments.pop(name):
            raise InputError(
                f"the installed mace-torch {version('mace-torch')} has no {name}, which this model needs",
                where=where,
                fix="Install mace-torch 0.3.16 or later.",
            )
    default = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        try:
            torch.set_default_dtype(dtype)
            if a.model == "ScaleShiftMACE":
                shift_shape = a.scale_shape if a.shift_shape is None else a.shift_shape
                arguments["atomic_inter_scale"] = np.ones(a.scale_shape)
                arguments["atomic_inter_shift"] = np.zeros(shift_shape)
            arguments["atomic_energies"] = np.zeros(a.energies_shape)
            module: torch.nn.Module = _CLASSES[a.model](**arguments)
        except _NOT_BUILT as error:
            message = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"MACE cannot build a model of this architecture ({message})", where=where
            ) from error
        finally:
            torch.set_default_dtype(default)
    return module


def require_sizes(architecture: Architecture, tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse an architecture that is larger than the tensors that belong to it, before it is built.

    Raises:
        InputError: Building the model would take more memory than its file justifies.
    """
    a, held = architecture, sum(tensor.numel() for tensor in tensors.values())
    scalars, gated = Irreps(a.hidden_irreps).count("0e"), Irreps(a.mlp_irreps).count("0e")
    edge = Irreps(a.edge_irreps).count("0e") if a.edge_irreps else 1
    needed = {
        "hidden_irreps": len(a.atomic_numbers) * Irreps(a.hidden_irreps).dim,
        "edge_irreps": scalars * edge,
        "correlation": (a.max_ell + 1) ** (2 * max(a.correlation)),
        "num_interactions": a.num_interactions * scalars,
        "mlp_irreps": gated * scalars,
        "heads": len(a.heads),
        "radial_mlp": max((m * n for m, n in pairwise(a.radial_mlp)), default=0),
        "energies_shape": int(np.prod([abs(n) for n in a.energies_shape], dtype=float)),
        "scale_shape": int(np.prod([abs(n) for n in a.scale_shape], dtype=float)),
    }
    for name, count in needed.items():
        if count > held:
            raise InputError(
                f"the tensors do not fit the model's architecture: its {name} alone needs {count} numbers",
                where=where,
                found=f"{held} in the file",
            )


def fill_tensors(module: torch.nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy numbers into a built model, in place and without loss.

    Flags that old MACE versions did not store (`..._zeroed`) may be absent, and constants of gates differ.
    Weights of products that vanish by symmetry stay zero, as MACE makes them, whatever the file holds:
    nothing depends on them, and copies and files of the model would not keep other numbers.

    Raises:
        InputError: A tensor is missing, of another shape, not finite, or does not fit into the model's dtype.
    """
    own = {name: t for name, t in module.state_dict(keep_vars=True).items() if _GATE not in name}
    tensors = {name: tensor for name, tensor in tensors.items() if _GATE not in name}
    parameters = dict(module.named_parameters())
    missing = [name for name in own if name not in tensors and not name.endswith("_zeroed")]
    unknown = [name for name in tensors if name not in own]
    if missing or unknown:
        found = f"{len(missing)} missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}"
        raise InputError("the tensors do not fit the model's architecture", where=where, found=found)
    for name in own.keys() & tensors.keys():
        mine, given, place = own[name], tensors[name], f"{where}, tensor {name}"
        if mine.shape != given.shape:
            given_shape, own_shape = list(given.shape), str(list(mine.shape))
            raise InputError("wrong shape", where=place, found=given_shape, expected=own_shape)
        if name in parameters and not bool(given.isfinite().all()):
            raise InputError("a weight is not a finite number", where=place)
        if type(mine) is EmptyParam:
            continue
        with torch.no_grad():
            mine.copy_(given)
        if not torch.equal(mine.detach().to(given.dtype), given.detach()) and not bool(given.isnan().any()):
            raise InputError(
                "does not fit the model's dtype", where=place, found=given.dtype, expected=str(mine.dtype)
            )


def rebuild(node: Node, where: str) -> torch.nn.Module:
    """Build the model that a file describes and prove that it is that model.

    Args:
        node: Contents of the file.
        where: Name of the file in error messages.

    Raises:
        InputError: The rebuilt model would not be the same as the one in the file.
    """
    node = without_unused_parts(node)
    tensors = node.tensors()
    sizes: dict[torch.dtype, int] = {}
    for _, child in node.walk():
        for parameter in child.parameters.values():
            if parameter.is_floating_point():
                sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    dtype = max(sizes, key=sizes.__getitem__, default=torch.get_default_dtype())
    architecture = read_architecture(node, where)
    require_sizes(architecture, tensors, where)
    module = build_module(architecture, dtype, where)
    fill_tensors(module, tensors, where)
    unlike = list(differences(node, node_of_module(module)))
    if unlike:
        raise InputError(
            f"cannot be rebuilt exactly: {'; '.join(unlike[:3])}",
            where=where,
            fix="Refined models are saved as MACE's constructor makes them, and this one is another: it "
            "would not open again as what was trained.",
        )
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(tensors[name].requires_grad)
    return module.train(mode=False)
