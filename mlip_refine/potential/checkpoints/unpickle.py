"""Loading MACE checkpoints without running code from them.

A `.model` file is a pickled module. Unpickling calls whatever the file names, and two things that every
MACE checkpoint holds are programs by themselves: `torch.fx` graphs (Python source) and TorchScript. So no
object of the file is made here. A restricted unpickler turns them into inert descriptions, admits only names
that MACE checkpoints need, and reads the tensors itself; then the model is built anew by MACE's own
constructor, filled with the tensors, and compared with the description (see `architecture.rebuild`).

Why not `torch.load(weights_only=True)`: it makes the objects that it admits and sets their state, and admits
neither modules of MACE nor the two kinds of programs.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from mace.modules import MACE
from torch import Tensor

from mlip_refine.errors import InputError
from mlip_refine.potential.checkpoints.architecture import rebuild
from mlip_refine.potential.checkpoints.archive import load_safetensors
from mlip_refine.potential.checkpoints.module_tree import Inert, node_of_inert

TRUST = (
    "if you trust the source, pass --trust-pickle (potential.trust_pickle: true; in Python trust_pickle=True)"
)

_ADMITTED: dict[str, str] = {
    "mace.modules.models": "MACE ScaleShiftMACE",
    "mace.modules.blocks": (
        "AtomicEnergiesBlock EquivariantProductBasisBlock LinearNodeEmbeddingBlock LinearReadoutBlock "
        "NonLinearReadoutBlock NonLinearBiasReadoutBlock RadialEmbeddingBlock ScaleShiftBlock "
        "RealAgnosticInteractionBlock RealAgnosticResidualInteractionBlock "
        "RealAgnosticAttResidualInteractionBlock RealAgnosticDensityInteractionBlock "
        "RealAgnosticDensityResidualInteractionBlock RealAgnosticResidualNonLinearInteractionBlock"
    ),
    "mace.modules.gate": "GatedEquivariantBlock",
    "mace.modules.irreps_tools": "reshape_irreps",
    "mace.modules.radial": (
        "AgnesiTransform BesselBasis ChebychevBasis GaussianBasis PolynomialCutoff RadialMLP SoftTransform "
        "ZBLBasis"
    ),
    "mace.modules.symmetric_contraction": "Contraction EmptyParam SymmetricContraction",
    "e3nn.math._normalize_activation": "normalize2mom",
    "e3nn.nn._activation": "Activation",
    "e3nn.nn._extract": "Extract",
    "e3nn.nn._fc": "FullyConnectedNet _Layer",
    "e3nn.nn._gate": "Gate _Sortcut",
    "e3nn.o3._irreps": "Irrep Irreps _MulIr",
    "e3nn.o3._linear": "Instruction Linear",
    "e3nn.o3._spherical_harmonics": "SphericalHarmonics",
    "e3nn.o3._tensor_product._instruction": "Instruction",
    "e3nn.o3._tensor_product._sub": (
        "ElementwiseTensorProduct FullTensorProduct FullyConnectedTensorProduct TensorSquare"
    ),
    "e3nn.o3._tensor_product._tensor_product": "TensorProduct",
    "torch": "Size device float16 bfloat16 float32 float64 int32 int64",
    "torch._C": "_VariableFunctions _VariableFunctionsClass",
    "torch.fx._symbolic_trace": "Tracer",
    "torch.fx.graph_module": "reduce_graph_module",
    "torch.nn.functional": "silu sigmoid tanh relu softplus",
    "torch.nn.modules.activation": "SiLU Sigmoid Tanh",
    "torch.nn.modules.container": "ModuleDict ModuleList ParameterDict ParameterList Sequential",
    "torch.nn.modules.linear": "Identity Linear",
    "torch.nn.modules.normalization": "LayerNorm",
    "numpy": "dtype ndarray",
    "numpy._core.multiarray": "_reconstruct",
    "numpy.core.multiarray": "_reconstruct",
    "builtins": "slice",
}
"""Names that a checkpoint may hold. Not one of them is called: each becomes an `Inert`."""

_STORAGES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

_CORRUPT = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, EOFError, TypeError, ValueError, AttributeError, KeyError),
    *(IndexError, RuntimeError, MemoryError, OverflowError, RecursionError, NotImplementedError, ImportError),
)
"""What a damaged or hand-made file raises somewhere between its first byte and its last tensor."""


def load_module(
    path: Path, trust_pickle: bool = False, device: str | torch.device = "cpu"
) -> torch.nn.Module:
    """Load a MACE checkpoint.

    Args:
        path: A `.model` file as MACE writes it, or a `.safetensors` file with its JSON.
        trust_pickle: Unpickle the file as it is, which lets it run any code.
        device: Where the model goes.

    Returns:
        The model in its own dtype and in evaluation mode. Parameters that arrive frozen stay frozen.

    Raises:
        InputError: The file is missing, damaged, not a MACE model, or names things that no MACE checkpoint
            needs.
    """
    if path.suffix == ".safetensors":
        return load_safetensors(path).to(device)
    where = str(path)
    if path.is_dir():
        raise InputError("a folder, not a model file", where=where)
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError("no such model file", where=where) from error
    except OSError as error:
        raise InputError(f"the model file cannot be read ({error.strerror})", where=where) from error
    with _open(content, where) as archive:
        if trust_pickle:
            try:
                module = torch.load(io.BytesIO(content), map_location="cpu", weights_only=False)
            except (*_CORRUPT, OSError) as error:
                raise InputError(f"the model file cannot be unpickled ({error})", where=where) from error
            if not isinstance(module, MACE):
                raise _not_a_model(module, where)
            return module.eval().to(device)
        try:
            contents = _InertUnpickler(archive, where).load()
            node = node_of_inert(contents) if isinstance(contents, Inert) else None
        except _CORRUPT as error:
            raise InputError(f"the model file is damaged ({error})", where=where) from error
    if node is None:
        raise _not_a_model(contents, where)
    return rebuild(node, where).to(device)


def _open(content: bytes, where: str) -> zipfile.ZipFile:
    """Open the zip archive that a checkpoint is, refusing what is not one."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
    except zipfile.BadZipFile as error:
        expected = "a checkpoint as MACE writes it (a complete zip archive)"
        found = "an empty file" if not content else f"{len(content)} bytes that are no such archive"
        raise InputError(
            "truncated, or not a model file", where=where, found=found, expected=expected
        ) from error
    names = {name.rpartition("/")[2] for name in archive.namelist()}
    if "constants.pkl" in names:
        raise InputError(
            "a compiled TorchScript model, which cannot be trained",
            where=where,
            fix="Give the .model file that it was compiled from.",
        )
    if "data.pkl" not in names:
        raise InputError("a zip archive, but not a checkpoint", where=where, expected="a file of torch.save")
    return archive


def _not_a_model(contents: object, where: str) -> InputError:
    if isinstance(contents, dict):
        return InputError(
            "a dictionary of tensors, not a whole model",
            where=where,
            found=f"keys {[str(key) for key in list(contents)[:3]]}",
            expected="the .model file that mace_run_train writes beside its checkpoints",
        )
    return InputError("not a MACE model", where=where, found=type(contents).__name__)


class _Call:
    """A function of this module as a pickle sees it: it can be called and cannot be changed."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *args: object) -> object:
        return self._function(*args)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("state for a function")


class _InertUnpickler(pickle.Unpickler):
    """Turns the pickle of a torch archive into plain containers, tensors and `Inert` objects.

    Args:
        archive: Zip file with the pickle and the storages that it refers to.
        where: Name of the file in error messages.
        script: Whether the archive is TorchScript, whose own classes are admitted too.
    """

    def __init__(self, archive: zipfile.ZipFile, where: str, *, script: bool = False) -> None:
        pickled = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        self._archive, self._where, self._script = archive, where, script
        self._root = pickled.removesuffix("data.pkl")
        self._storages: dict[str, Tensor] = {}
        order = f"{self._root}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise InputError("written on a big-endian machine", where=where)
        super().__init__(io.BytesIO(archive.read(pickled)))
        self._functions: dict[str, Callable[..., object]] = {
            "builtins.set": set,
            "builtins.getattr": self._named_function,
            "collections.OrderedDict": OrderedDict,
            "_codecs.encode": self._encode,
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch._utils._rebuild_parameter": _parameter,
            "numpy.core.multiarray.scalar": _scalar,
            "numpy._core.multiarray.scalar": _scalar,
        }

    def find_class(self, module: str, name: str, /) -> object:
        module = "builtins" if module == "__builtin__" else module
        full = f"{module}.{name}"
        if full in self._functions:
            return _Call(self._functions[full])
        storage = module == "torch" and name in _STORAGES
        script = self._script and (module.split(".")[0] == "__torch__" or module == "torch.jit._pickle")
        if storage or script or name in _ADMITTED.get(module, "").split():
            return type("Inert", (Inert,), {"name": full})
        raise self._refused(full)

    def persistent_load(self, pid: object, /) -> Tensor:
        if not isinstance(pid, tuple) or len(pid) < 3 or pid[0] != "storage":
            raise pickle.UnpicklingError("unknown reference")
        key, dtype = str(pid[2]), _STORAGES[pid[1].name.rpartition(".")[2]]
        if key not in self._storages:
            info = self._archive.getinfo(f"{self._root}data/{key}")
            if info.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile("compressed tensor")
            raw = bytearray(self._archive.read(info))
            self._storages[key] = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return self._storages[key].view(dtype)

    def _refused(self, name: str) -> InputError:
        return InputError(
            "refused to load: the file wants to use something that no MACE checkpoint needs",
            where=self._where,
            found=name,
            fix=TRUST,
        )

    def _named_function(self, owner: object, name: object) -> object:
        """Stand for `getattr`, which is how `torch.tanh` and `torch.abs` are pickled and nothing else."""
        known = isinstance(owner, type) and issubclass(owner, Inert) and "_VariableFunctions" in owner.name
        if not known or name not in {"tanh", "abs"}:
            raise self._refused("builtins.getattr")
        return type("Inert", (Inert,), {"name": f"torch.{name}"})

    def _encode(self, text: object, codec: object) -> object:
        """Stand for `_codecs.encode`, by which bytes are written; TorchScript is read, never loaded."""
        if not isinstance(text, str) or codec != "latin1":
            raise self._refused("_codecs.encode")
        content = text.encode("latin1")
        if not content.startswith(b"PK"):
            return content
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return _InertUnpickler(archive, self._where, script=True).load()


def _tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> Tensor:
    if offset < 0 or any(n < 0 for n in (*size, *stride)):
        raise pickle.UnpicklingError("negative size")
    return torch.as_strided(storage, size, stride, offset).clone()


def _parameter(data: Tensor, requires_grad: object, *_: object) -> Tensor:
    return torch.nn.Parameter(data, requires_grad=bool(requires_grad) and data.is_floating_point())


def _scalar(kind: Inert, raw: bytes) -> object:
    dtype = np.dtype(str(kind.args[0]))
    if dtype.kind not in "biuf" or not isinstance(raw, bytes):
        raise pickle.UnpicklingError("not a number")
    return np.frombuffer(raw, dtype)[0].item()
