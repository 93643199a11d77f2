"""Files of MACE models: a `.model` that plain MACE opens, and tensors with JSON that need no pickle."""

import hashlib
import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mlip_refine.errors import InputError
from mlip_refine.files import written
from mlip_refine.potential.acceleration.kernels import has_kernels, without_kernels
from mlip_refine.potential.checkpoints.architecture import (
    Architecture,
    build_module,
    fill_tensors,
    read_architecture,
    require_sizes,
)
from mlip_refine.potential.checkpoints.module_tree import GRAPH_CODE, node_of_module

FORMAT = "mlip-refine MACE"
FORMAT_VERSION = 1

_DTYPES = {
    str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
_DERIVED = ("output_mask", "_zeroed")


def save_model(module: torch.nn.Module, path: Path) -> None:
    """Write a model as MACE does, so that `mace.calculators.MACECalculator` opens it.

    The file appears complete or not at all.

    Raises:
        InputError: The folder cannot be written to.
    """
    plain = without_kernels(module) if has_kernels(module) else module
    _write_atomically(path, lambda partial: torch.save(plain, partial))


def save_safetensors(
    module: torch.nn.Module, path_stem: Path, metadata: Mapping[str, object] | None = None
) -> Path:
    """Write `NAME.safetensors` (all tensors) and `NAME.json` (what is needed to rebuild the model).

    Args:
        module: A MACE model.
        path_stem: Folder and NAME.
        metadata: Anything that JSON can hold, kept under `metadata`.

    Returns:
        Path of the `.safetensors` file.

    Raises:
        InputError: The folder cannot be written to, or the model is of a kind that cannot be rebuilt.
    """
    plain = without_kernels(module) if has_kernels(module) else module
    path, description = (path_stem.with_name(path_stem.name + end) for end in (".safetensors", ".json"))
    parameters = dict(plain.named_parameters())
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "mace_version": version("mace-torch"),
        "dtype": str(next(iter(parameters.values())).dtype).removeprefix("torch."),
        "frozen": [name for name, parameter in parameters.items() if not parameter.requires_grad],
        "architecture": read_architecture(node_of_module(plain), "the model").model_dump(),
        "metadata": dict(metadata or {}),
    }
    text = json.dumps(document, indent=2) + "\n"
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in plain.state_dict().items()}
    _write_atomically(path, lambda partial: save_file(tensors, partial, metadata={"format": "pt"}))
    _write_atomically(description, lambda partial: partial.write_text(text, encoding="utf-8"))
    return path


def load_safetensors(path: Path) -> torch.nn.Module:
    """Rebuild a model from `NAME.safetensors` and the `NAME.json` beside it; no pickle is involved.

    Returns:
        The model on the CPU, in the dtype that it was saved in and in evaluation mode.

    Raises:
        InputError: A file is missing or damaged, or the two do not fit together.
    """
    description = path.with_suffix(".json")
    where = str(description)
    for file in (path, description):
        if file.exists() and not file.is_file():
            raise InputError("a folder, a device or a pipe, not a model file", where=str(file))
    try:
        document = json.loads(description.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError("the description of the model is missing", where=where) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"the description of the model is damaged ({error})", where=where) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise InputError("not the description of a model", where=where, expected=f'"format": "{FORMAT}"')
    if document.get("format_version") != FORMAT_VERSION:
        found, expected = document.get("format_version"), str(FORMAT_VERSION)
        raise InputError("unknown format version", where=where, found=found, expected=expected)
    try:
        architecture = Architecture.model_validate(document["architecture"])
        dtype, frozen = _DTYPES[document["dtype"]], frozenset(map(str, document["frozen"]))
    except (ValidationError, KeyError, TypeError) as error:
        raise InputError(f"the description of the model is damaged ({error})", where=where) from error

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError as error:
        raise InputError("no such model file", where=str(path)) from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"the model file is damaged ({error})", where=str(path)) from error
    require_sizes(architecture, tensors, str(path))
    module = build_module(architecture, dtype, str(path))
    fill_tensors(module, tensors, str(path))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return module.eval()


def architecture_json(module: torch.nn.Module) -> str:
    """Describe a model apart from its numbers, as JSON with sorted keys: one text per architecture."""
    return read_architecture(node_of_module(module), "the model").canonical()


def module_hash(module: torch.nn.Module) -> str:
    """Identify a model: SHA-256 of its architecture and of the tensors that its energies depend on.

    Device, dtype (where the numbers are the same), file format, frozen parameters and installed kernels do
    not change it. What follows from the architecture (masks, 3j symbols) does not enter.
    """
    node = node_of_module(module)
    tensors: dict[str, Tensor] = {}
    for prefix, child in node.walk():
        for name, tensor in (*child.parameters.items(), *child.buffers.items()):
            if child.kind != GRAPH_CODE and tensor.numel() and not name.endswith(_DERIVED):
                tensors[f"{prefix}{name}"] = tensor
    return tensor_hash(tensors, read_architecture(node, "the model").canonical())


def tensor_hash(tensors: Mapping[str, Tensor], architecture: str) -> str:
    """Identify a model by its numbers and its architecture.

    Args:
        tensors: Every tensor that the output depends on, by name; order does not matter.
        architecture: Text that settles everything the tensors do not (layers, cutoff, heads).

    Returns:
        Hexadecimal SHA-256 over the architecture and, by sorted name, the name, shape and
        little-endian float64 bytes of every tensor. Precision and device do not enter.
    """
    digest = hashlib.sha256(architecture.encode())
    for name in sorted(tensors):
        numbers = tensors[name].detach().to(device="cpu", dtype=torch.float64).contiguous().numpy()
        digest.update(f"\0{name}\0{numbers.shape}\0".encode())
        digest.update(numbers.astype("<f8", copy=False).tobytes())
    return digest.hexdigest()


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    try:
        with written(path, shared=True) as partial:
            write(partial)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"the model cannot be written ({error})", where=str(path), expected="an existing, writable folder"
        ) from error
