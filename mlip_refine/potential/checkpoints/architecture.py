"""What a MACE model is made of, apart from its numbers: read off a model or a file, and built again.

Reading goes through `mlip_refine.potential.checkpoints.module_tree`, so that it works on live modules and on
files alike.
Building calls MACE's own constructor: nothing of the file runs.
"""

import json
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from e3nn.o3 import Irreps
from mace import modules
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor

from mlip_refine.errors import InputError
from mlip_refine.potential.checkpoints.module_tree import (
    Node,
    Plain,
    differences,
    node_of_module,
    replaced_prefixes,
)

_RADIAL = {"BesselBasis": "bessel", "GaussianBasis": "gaussian", "ChebychevBasis": "chebyshev"}
_TRANSFORM = {"AgnesiTransform": "Agnesi", "SoftTransform": "Soft"}
_CLASSES = {"MACE": modules.MACE, "ScaleShiftMACE": modules.ScaleShiftMACE}
_GATES = {"silu": torch.nn.functional.silu, "tanh": torch.tanh, "abs": torch.abs}
_READOUTS = {
    "NonLinearReadoutBlock": modules.blocks.NonLinearReadoutBlock,
    "NonLinearBiasReadoutBlock": modules.blocks.NonLinearBiasReadoutBlock,
}


class Architecture(BaseModel):
    """Everything that MACE's constructor needs except the numbers in its tensors.

    Names are those of `mace.modules.MACE`; lengths are in Å.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: Literal["MACE", "ScaleShiftMACE"]
    r_max: float = Field(gt=0)
    num_bessel: int = Field(gt=0, le=1000)
    num_polynomial_cutoff: int = Field(gt=0)
    max_ell: int = Field(ge=0, le=11)
    interaction_first: str
    interaction: str
    num_interactions: int = Field(gt=0, le=20)
    hidden_irreps: str
    edge_irreps: str | None
    mlp_irreps: str
    gate: str | None
    readout: str
    correlation: list[int]
    avg_num_neighbors: float
    atomic_numbers: list[int]
    heads: list[str]
    radial_type: Literal["bessel", "gaussian", "chebyshev"]
    radial_mlp: list[int]
    distance_transform: Literal["None", "Agnesi", "Soft"]
    pair_repulsion: bool
    apply_cutoff: bool
    use_reduced_cg: bool
    use_so3: bool
    use_edge_irreps_first: bool
    use_agnostic_product: bool
    use_last_readout_only: bool
    keep_last_layer_irreps: bool
    energies_shape: list[int]
    scale_shape: list[int]
    shift_shape: list[int] | None = None  # where it is another one than that of the scale

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
        raise InputError(f"a MACE of an unsupported kind ({_first(error)})", where=where) from error
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, AssertionError) as error:
        raise InputError(f"a MACE whose parts cannot be read ({error!r})", where=where) from error


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _fields(node: Node) -> dict[str, object]:
    interactions, products = _layers(node, "interactions"), _layers(node, "products")
    last_readout = _layers(node, "readouts")[-1]
    heads = _strings(node.attributes.get("heads") or ["Default"])
    hidden = str(products[0].children["linear"].attributes["irreps_out"])
    edge = node.attributes.get("edge_irreps")
    return {
        "model": node.kind,
        "num_interactions": len(interactions),
        "interaction_first": interactions[0].kind,
        "interaction": interactions[-1].kind,
        "hidden_irreps": hidden,
        "edge_irreps": None if edge is None else str(edge),
        "mlp_irreps": _mlp_irreps(last_readout, len(heads)),
        "gate": _gate(last_readout),
        "readout": last_readout.kind if last_readout.kind in _READOUTS else "NonLinearReadoutBlock",
        "correlation": [_correlation(product) for product in products],
        "avg_num_neighbors": _number(interactions[0].attributes["avg_num_neighbors"]),
        "atomic_numbers": node.buffers["atomic_numbers"].tolist(),
        "heads": heads,
        "pair_repulsion": "pair_repulsion_fn" in node.children,
        "use_agnostic_product": _flag(products[0], "use_agnostic_product", default=False),
        "keep_last_layer_irreps": _keeps_irreps(products, hidden),
        "energies_shape": list(node.children["atomic_energies_fn"].buffers["atomic_energies"].shape),
        **_scale_shapes(node),
        "radial_mlp": _radial_mlp(interactions[0]),
        "max_ell": Irreps(node.children["spherical_harmonics"].attributes["irreps_out"]).lmax,
        "use_reduced_cg": _flag(node, "use_reduced_cg", default=False),
        "use_so3": _flag(node, "use_so3", default=False),
        "use_edge_irreps_first": _flag(node, "use_edge_irreps_first", default=False),
        "use_last_readout_only": _flag(node, "use_last_readout_only", default=False),
        **_radial_fields(node.children["radial_embedding"], float(node.buffers["r_max"])),
    }


def _radial_fields(radial: Node, r_max: float) -> dict[str, object]:
    transform = radial.children.get("distance_transform")
    return {
        "r_max": r_max,
        "num_bessel": radial.attributes["out_dim"],
        "num_polynomial_cutoff": int(radial.children["cutoff_fn"].buffers["p"]),
        "radial_type": _RADIAL.get(radial.children["bessel_fn"].kind, radial.children["bessel_fn"].kind),
        "distance_transform": "None" if transform is None else _TRANSFORM.get(transform.kind, transform.kind),
        "apply_cutoff": _flag(radial, "apply_cutoff", default=True),
    }


def _layers(node: Node, name: str) -> list[Node]:
    return list(node.children[name].children.values())


def _strings(value: Plain) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def _flag(node: Node, name: str, *, default: bool) -> bool:
    return bool(node.attributes.get(name, default))


def _number(value: Plain) -> float:
    if not isinstance(value, int | float):
        raise TypeError(f"not a number: {value}")
    return float(value)


def _mlp_irreps(readout: Node, n_heads: int) -> str:
    hidden = readout.attributes.get("hidden_irreps")
    scalars = Irreps(hidden).count("0e") if hidden is not None else 1
    return f"{max(1, scalars // n_heads)}x0e"


def _gate(readout: Node) -> str | None:
    activation = readout.at("non_linearity.acts.0")
    name = None if activation is None else activation.attributes.get("f")
    return None if name is None else str(name)


def _correlation(product: Node) -> int:
    contraction = product.at("symmetric_contractions.contractions.0")
    if contraction is None:
        raise KeyError("symmetric_contractions")
    return 1 + len(contraction.children["weights"].parameters)


def _keeps_irreps(products: list[Node], hidden: str) -> bool:
    last = str(products[-1].children["linear"].attributes["irreps_out"])
    return len(products) > 1 and last == hidden and Irreps(hidden).lmax > 0


def _scale_shapes(node: Node) -> dict[str, object]:
    """Shapes of scale and shift: by `mace_run_train --scaling rms_forces_scaling` they differ."""
    block = node.children.get("scale_shift")
    if block is None:
        return {"scale_shape": []}
    scale, shift = (list(block.buffers[name].shape) for name in ("scale", "shift"))
    return {"scale_shape": scale, "shift_shape": None if shift == scale else shift}


def _radial_mlp(interaction: Node) -> list[int]:
    declared = interaction.attributes.get("radial_MLP")
    if isinstance(declared, list):
        return [int(_number(size)) for size in declared]
    sizes = interaction.children["conv_tp_weights"].attributes["hs"]
    return [int(_number(size)) for size in sizes[1:-1]] if isinstance(sizes, list) else []


def build_module(architecture: Architecture, dtype: torch.dtype) -> torch.nn.Module:
    """Build a MACE model with arbitrary numbers in its tensors, on the CPU.

    The default dtype and the random state of the process are left as they were.
    """
    default = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        try:
            torch.set_default_dtype(dtype)
            module: torch.nn.Module = _CLASSES[architecture.model](**_arguments(architecture))
        finally:
            torch.set_default_dtype(default)
    return module


def _arguments(architecture: Architecture) -> dict[str, Any]:
    a = architecture
    same = a.model_dump(
        include={
            *("r_max", "num_bessel", "num_polynomial_cutoff", "max_ell", "num_interactions", "correlation"),
            *("avg_num_neighbors", "atomic_numbers", "heads", "radial_type", "distance_transform"),
            *("pair_repulsion", "apply_cutoff", "use_reduced_cg", "use_so3", "use_edge_irreps_first"),
            *("use_agnostic_product", "use_last_readout_only", "keep_last_layer_irreps"),
        }
    )
    scale = {}
    if a.model == "ScaleShiftMACE":
        shift_shape = a.scale_shape if a.shift_shape is None else a.shift_shape
        scale = {"atomic_inter_scale": np.ones(a.scale_shape), "atomic_inter_shift": np.zeros(shift_shape)}
    return (
        same
        | scale
        | {
            "interaction_cls_first": modules.interaction_classes[a.interaction_first],
            "interaction_cls": modules.interaction_classes[a.interaction],
            "num_elements": len(a.atomic_numbers),
            "hidden_irreps": Irreps(a.hidden_irreps),
            "edge_irreps": None if a.edge_irreps is None else Irreps(a.edge_irreps),
            "MLP_irreps": Irreps(a.mlp_irreps),
            "gate": None if a.gate is None else _GATES[a.gate],
            "readout_cls": _READOUTS[a.readout],
            "atomic_energies": np.zeros(a.energies_shape),
            "radial_MLP": a.radial_mlp,
        }
    )


def fill_tensors(module: torch.nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy numbers into a built model, in place and without loss.

    Flags that old MACE versions did not store (`..._zeroed`) may be absent.

    Raises:
        InputError: A tensor is missing, of another shape, or does not fit into the model's dtype.
    """
    own = module.state_dict(keep_vars=True)
    missing = [name for name in own if name not in tensors and not name.endswith("_zeroed")]
    unknown = [name for name in tensors if name not in own]
    if missing or unknown:
        found = f"{len(missing)} missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}"
        raise InputError("the tensors do not fit the model's architecture", where=where, found=found)
    for name in own.keys() & tensors.keys():
        _fill(own[name], tensors[name], f"{where}, tensor {name}")


def _fill(own: Tensor, given: Tensor, where: str) -> None:
    if own.shape != given.shape:
        raise InputError("wrong shape", where=where, found=list(given.shape), expected=str(list(own.shape)))
    with torch.no_grad():
        own.copy_(given)
    if not torch.equal(own.detach().to(given.dtype), given.detach()) and not bool(given.isnan().any()):
        raise InputError(
            "does not fit the model's dtype", where=where, found=given.dtype, expected=str(own.dtype)
        )


def rebuild(node: Node, where: str) -> torch.nn.Module:
    """Build the model that a file describes and prove that it is that model.

    Args:
        node: Contents of the file.
        where: Name of the file in error messages.

    Raises:
        InputError: The rebuilt model would not be the same as the one in the file.
    """
    tensors = node.tensors()
    module = build_module(read_architecture(node, where), _dtype(node))
    live = node_of_module(module)
    skipped = replaced_prefixes(node, live)
    kept = {name: t for name, t in tensors.items() if not name.startswith(skipped)} if skipped else tensors
    fill_tensors(module, kept, where)
    unlike = list(differences(node, live))
    if unlike:
        raise InputError(
            f"cannot be rebuilt exactly: {'; '.join(unlike[:3])}",
            where=where,
            fix="if you trust the source, pass --trust-pickle (potential.trust_pickle: true)",
        )
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(kept[name].requires_grad)
    return module.train(mode=False)


def _dtype(node: Node) -> torch.dtype:
    sizes: dict[torch.dtype, int] = {}
    for prefix, child in node.walk():
        for name, tensor in child.parameters.items():
            if tensor.is_floating_point() and f"{prefix}{name}":
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=sizes.__getitem__, default=torch.get_default_dtype())
