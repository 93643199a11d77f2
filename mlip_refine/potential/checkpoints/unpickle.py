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
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from mace.modules import MACE, ScaleShiftMACE
from torch import Tensor

from mlip_refine.errors import InputError
from mlip_refine.potential.checkpoints.architecture import rebuild
from mlip_refine.potential.checkpoints.archive import load_safetensors
from mlip_refine.potential.checkpoints.kinds import UnsupportedModelError, require_supported, unsupported
from mlip_refine.potential.checkpoints.module_tree import Inert, Node, node_of_inert, node_of_module

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
    "mace.modules.wrapper_ops": "CuEquivarianceConfig OEQConfig",
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

_LONGEST = 200
"""Characters of a file's text that a message shows."""

_LARGEST_TUPLE = 100_000
"""Values in a tuple, those of tuples within it included."""

_SHARING, _SPARE_BYTES = 4, 2**24
"""Tensors of a file may hold so many times its bytes, and so many more."""


def load_module(
    path: Path, trust_pickle: bool = False, device: str | torch.device = "cpu"
) -> torch.nn.Module:
    """Load a MACE checkpoint.

    Args:
        path: A `.model` file as MACE writes it, or a `.safetensors` file with its JSON.
        trust_pickle: Unpickle a file that cannot be read safely, which lets it run any code.
        device: Where the model goes.

    Returns:
        The model in its own dtype and in evaluation mode. Parameters that arrive frozen stay frozen.

    Raises:
        InputError: The file is missing, damaged, not a MACE model, of a kind that is not refined here, or
            names things that no MACE checkpoint needs; or the model could not be saved and opened again.
    """
    if path.suffix == ".safetensors":
        return load_safetensors(path).to(device)
    where = str(path)
    if path.exists() and not path.is_file():
        problem = "a folder, not a model file" if path.is_dir() else "a device or a pipe, not a model file"
        raise InputError(problem, where=where)
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError("no such model file", where=where) from error
    except OSError as error:
        raise InputError(f"the model file cannot be read ({error.strerror})", where=where) from error
    with _open(content, where) as archive:
        try:
            node = _described(archive, where)
        except UnsupportedModelError:
            raise
        except InputError:
            if not trust_pickle:
                raise
            node = _unpickled(content, where)
    module = rebuild(node, where)
    require_supported(module, where)
    return module.to(device)


def _described(archive: zipfile.ZipFile, where: str) -> Node:
    """Read a checkpoint without making any of its objects."""
    try:
        contents = _InertUnpickler(archive, where).load()
        if not isinstance(contents, Inert):
            raise _not_a_model(contents, where)
        return node_of_inert(contents)
    except _CORRUPT as error:
        raise InputError(f"the model file is damaged ({_one_line(error)})", where=where) from error


def _unpickled(content: bytes, where: str) -> Node:
    """Read a checkpoint as Python does, which runs whatever it asks for."""
    try:
        module = torch.load(io.BytesIO(content), map_location="cpu", weights_only=False)
    except Exception as error:  # code of the file may raise anything
        raise InputError(f"the model file cannot be unpickled ({_one_line(error)})", where=where) from error
    if not isinstance(module, torch.nn.Module):
        raise _not_a_model(module, where)
    require_supported(module, where)
    if isinstance(module, MACE) and type(module) not in (MACE, ScaleShiftMACE):
        raise InputError(
            "a class of its own derived from MACE, which cannot be saved so that MACE opens it",
            where=where,
            found=f"{type(module).__module__}.{type(module).__qualname__}",
            expected="mace.modules.MACE or mace.modules.ScaleShiftMACE",
        )
    return node_of_module(module)


def _one_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:_LONGEST] if str(error) else type(error).__name__


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
            found=f"keys {[str(key)[:_LONGEST] for key in list(contents)[:3]]}",
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


def _weighed(load: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return the reading of a tuple that also weighs it."""

    def loaded(unpickler: Any) -> None:
        load(unpickler)
        unpickler._weigh()

    return loaded


class _InertUnpickler(pickle._Unpickler):
    """Turns the pickle of a torch archive into plain containers, tensors and `Inert` objects.

    It is the unpickler that Python has in Python: the one in C allocates what a few bytes of a file ask for
    before this class sees them.

    Args:
        archive: Zip file with the pickle and the storages that it refers to.
        where: Name of the file in error messages.
        script: Whether the archive is TorchScript, whose own classes are admitted too.
    """

    stack: list[Any]

    def __init__(self, archive: zipfile.ZipFile, where: str, *, script: bool = False) -> None:
        pickled = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        self._archive, self._where, self._script = archive, where, script
        self._root = pickled.removesuffix("data.pkl")
        self._storages: dict[str, Tensor] = {}
        self._classes: dict[str, type[Inert]] = {}
        self._weights: dict[int, tuple[object, int]] = {}
        # Tensors may share a storage, but all together are hardly larger than their file.
        self._bytes_left = _SPARE_BYTES + _SHARING * sum(info.file_size for info in archive.infolist())
        order = f"{self._root}byteorder"
        if order in archive.namelist() and self._member(order) != b"little":
            raise InputError("written on a big-endian machine", where=where)
        super().__init__(io.BytesIO(self._member(pickled)))
        self._functions: dict[str, Callable[..., object]] = {
            "builtins.set": set,
            "builtins.getattr": self._named_function,
            "collections.OrderedDict": OrderedDict,
            "_codecs.encode": self._encode,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": _parameter,
            "numpy.core.multiarray.scalar": _scalar,
            "numpy._core.multiarray.scalar": _scalar,
        }

    def _weigh(self) -> None:
        """Refuse a tuple whose hash would take for ever: each may hold the one before it twice."""
        parts = self.stack[-1]
        weight = 1 + sum(self._weights.get(id(part), (None, 1))[1] for part in parts)
        if weight > _LARGEST_TUPLE:
            raise pickle.UnpicklingError("it holds larger tuples than any model does")
        self._weights[id(parts)] = parts, weight  # kept, so that no other object gets its number

    def _member(self, name: str) -> bytes:
        """Read a member of the archive; torch compresses none, and a compressed one grows without limit."""
        info = self._archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise zipfile.BadZipFile("a compressed member")
        return self._archive.read(info)

    def find_class(self, module: str, name: str, /) -> object:
        module = "builtins" if module == "__builtin__" else module
        full = f"{module}.{name}"
        if full in self._functions:
            return _Call(self._functions[full])
        storage = module == "torch" and name in _STORAGES
        script = self._script and (module.split(".")[0] == "__torch__" or module == "torch.jit._pickle")
        if storage or script or name in _ADMITTED.get(module, "").split():
            return self._classes.setdefault(full, type("Inert", (Inert,), {"name": full}))
        raise unsupported(full, self._where) or self._refused(full)

    def persistent_load(self, pid: object, /) -> Tensor:
        if not isinstance(pid, tuple) or len(pid) < 3 or pid[0] != "storage" or not isinstance(pid[2], str):
            raise pickle.UnpicklingError("unknown reference")
        key, dtype = pid[2], _STORAGES[pid[1].name.rpartition(".")[2]]
        if key not in self._storages:
            raw = bytearray(self._member(f"{self._root}data/{key}"))
            self._storages[key] = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return self._storages[key].view(dtype)

    def _refused(self, name: str) -> InputError:
        return InputError(
            "refused to load: the file wants to use something that no MACE checkpoint needs",
            where=self._where,
            found=name[:_LONGEST],
            fix=TRUST,
        )

    def _named_function(self, owner: object, name: object) -> object:
        """Stand for `getattr`, which is how `torch.tanh` and `torch.abs` are pickled and nothing else."""
        known = isinstance(owner, type) and issubclass(owner, Inert) and "_VariableFunctions" in owner.name
        if not known or not isinstance(name, str) or name not in {"tanh", "abs"}:
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
        self, storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
    ) -> Tensor:
        if offset < 0 or any(n < 0 for n in (*size, *stride)):
            raise pickle.UnpicklingError("negative size")
        self._bytes_left -= math.prod(size) * storage.element_size()
        if self._bytes_left < 0:
            raise pickle.UnpicklingError("its tensors are larger than the file")
        return torch.as_strided(storage, size, stride, offset).clone()

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = pickle._Unpickler.dispatch | {
        code[0]: _weighed(pickle._Unpickler.dispatch[code[0]])
        for code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
    }


def _parameter(data: Tensor, requires_grad: object, *_: object) -> Tensor:
    return torch.nn.Parameter(data, requires_grad=bool(requires_grad) and data.is_floating_point())


def _scalar(kind: Inert, raw: bytes) -> object:
    code = kind.args[0]
    if not isinstance(code, str):
        raise pickle.UnpicklingError("not a number")
    dtype = np.dtype(code)
    if dtype.kind not in "biuf" or not isinstance(raw, bytes):
        raise pickle.UnpicklingError("not a number")
    return np.frombuffer(raw, dtype)[0].item()
