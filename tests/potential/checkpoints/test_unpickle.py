"""Checkpoints load without running anything that they hold."""

import builtins
import functools
import importlib
import io
import os
import pickle
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from e3nn.nn import Gate
from e3nn.o3 import Linear
from mace.modules import ScaleShiftMACE
from mace.modules.symmetric_contraction import EmptyParam
from torch.fx.graph_module import reduce_graph_module

from mlip_refine.errors import InputError
from mlip_refine.potential.acceleration.kernels import copy_module
from mlip_refine.potential.checkpoints.archive import module_hash
from mlip_refine.potential.checkpoints.unpickle import load_module

ASSET = Path(str(importlib.resources.files("mlip_refine").joinpath("assets", "titanium-compact.model")))
KINDS = ["residual", "all-residual", "density", "nonlinear", "three-layers", "scalars"]


class Payload:
    """An object that asks its unpickler to call something."""

    def __init__(self, function: object, *args: object) -> None:
        self._call = (function, args)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self._call


def _saved(contents: object, path: Path) -> Path:
    torch.save(contents, path)
    return path


def _raw(program: bytes, path: Path) -> Path:
    """Write a checkpoint with a pickle program of our own."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
    return path


def _assert_same(
    first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], tolerance: float = 1e-12
) -> None:
    for key, value in first.items():
        assert torch.allclose(value, second[key], rtol=0, atol=tolerance), key


def test_embedded_checkpoint_equals_its_plain_unpickling(evaluate):
    restricted, plain = load_module(ASSET), load_module(ASSET, trust_pickle=True)
    assert restricted.state_dict().keys() == plain.state_dict().keys()
    _assert_same(restricted.state_dict(), plain.state_dict())
    _assert_same(evaluate(restricted.double()), evaluate(plain.double()))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_mace_loads_as_it_was_saved(kind, build, evaluate, tmp_path):
    module = build(kind)
    loaded = load_module(_saved(module, tmp_path / "a.model"))
    for head in range(len(module.heads)):
        _assert_same(evaluate(module, head), evaluate(loaded, head))
    assert [str(h) for h in loaded.heads] == list(module.heads)


def test_loading_leaves_the_random_state_and_the_default_dtype_alone(build, tmp_path):
    path = _saved(build("residual", torch.float32), tmp_path / "a.model")
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    loaded = load_module(path)
    assert torch.get_default_dtype() == torch.float64
    assert next(loaded.parameters()).dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), state)


def test_frozen_parameters_stay_frozen(build, tmp_path):
    module = build("residual")
    module.node_embedding.requires_grad_(requires_grad=False)
    loaded = load_module(_saved(module, tmp_path / "a.model"))
    expected = {name: p.requires_grad for name, p in module.named_parameters()}
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == expected


def test_constants_rounded_to_single_precision_are_kept(build, evaluate, tmp_path):
    module = build("residual", torch.float32).double()
    loaded = load_module(_saved(module, tmp_path / "a.model"))
    _assert_same(evaluate(module), evaluate(loaded))


def test_checkpoint_of_an_old_mace_loads(build, evaluate, tmp_path):
    module = build("residual")
    expected = evaluate(module)
    for name in ("apply_cutoff", "use_so3", "use_agnostic_product", "use_last_readout_only", "heads"):
        delattr(module, name)
    for product in module.products:
        for contraction in product.symmetric_contractions.contractions:
            del contraction.weights_0_zeroed, contraction.weights_max_zeroed
    linear = module.interactions[1].linear
    joined = Linear(linear.irreps_in.simplify(), linear.irreps_out).double()
    joined.load_state_dict(linear.state_dict())
    module.interactions[1].linear = joined
    assert len(linear.irreps_in) > len(joined.irreps_in)
    _assert_same(expected, evaluate(load_module(_saved(module, tmp_path / "a.model"))))


def test_weights_that_nothing_depends_on_stay_zero(build, evaluate, tmp_path):
    """Old versions of MACE drew them at random where products vanish by symmetry."""
    module = build("pseudoscalars")
    expected = evaluate(module)
    dead = [p for p in module.parameters() if type(p) is EmptyParam]
    assert dead
    with torch.no_grad():
        for parameter in dead:
            parameter.normal_()
    loaded = load_module(_saved(module, tmp_path / "a.model"))
    _assert_same(expected, evaluate(loaded))
    again = load_module(_saved(copy_module(loaded), tmp_path / "b.model"))
    assert module_hash(loaded) == module_hash(again) == module_hash(build("pseudoscalars"))


def test_gate_of_e3nn_loads_as_the_gate_of_mace(build, evaluate, tmp_path):
    module = build("nonlinear")
    silu, sigmoid = torch.nn.functional.silu, torch.nn.functional.sigmoid
    for block in module.interactions:
        gated = [(mul, ir) for mul, ir in block.irreps_out if ir.l > 0]
        scalars = [(mul, ir) for mul, ir in block.irreps_out if ir.l == 0]
        gates = [(mul, "0e") for mul, _ in gated]
        block.equivariant_nonlin = Gate(scalars, [silu], gates, [sigmoid] * len(gates), gated).double()
    loaded = load_module(_saved(module, tmp_path / "a.model"))
    _assert_same(evaluate(module), evaluate(loaded))


def test_model_that_would_not_be_rebuilt_exactly_is_refused(build, tmp_path):
    module = build("residual")
    module.interactions[1].avg_num_neighbors = 11.0
    path = _saved(module, tmp_path / "a.model")
    for trust in (False, True):
        with pytest.raises(InputError, match=r"1\.avg_num_neighbors is 11.0 in the file and 8.0"):
            load_module(path, trust_pickle=trust)


class Derived(ScaleShiftMACE):
    """A model of a user's own."""


def test_a_trusted_class_of_ones_own_is_refused(build, tmp_path):
    module = build("scalars")
    module.__class__ = Derived
    path = _saved(module, tmp_path / "a.model")
    with pytest.raises(InputError, match=r"refused to load.*Derived.*--trust-pickle"):
        load_module(path)
    with pytest.raises(InputError, match=r"a class of its own.*Derived"):
        load_module(path, trust_pickle=True)


def test_trust_reads_what_cannot_be_read_safely(build, evaluate, tmp_path):
    module = build("scalars")
    module.note = Path("written by a user")
    path = _saved(module, tmp_path / "a.model")
    with pytest.raises(InputError, match=r"pathlib.*--trust-pickle"):
        load_module(path)
    _assert_same(evaluate(module), evaluate(load_module(path, trust_pickle=True)))


ATTACKS = {
    "system": (os.system, "touch {}"),
    "popen": (subprocess.Popen, ["touch", "{}"]),
    "eval": (builtins.eval, "open('{}', 'w')"),
    "exec": (builtins.exec, "open('{}', 'w')"),
    "open": (builtins.open, "{}", "w"),
    "getattr": (builtins.getattr, torch.nn.Linear, "forward"),
    "import": (importlib.import_module, "antigravity"),
    "torch.load": (torch.load, "{}"),
    "torch.hub": (torch.hub.load, "{}", "model"),
    "load_from_bytes": (torch.storage._load_from_bytes, b"{}"),
    "jit": (torch.jit.load, "{}"),
    "from_file": (torch.from_file, "{}", True, 8),
    "partial": (functools.partial, os.system, "touch {}"),
    "rot13": (__import__("_codecs").encode, "{}", "rot13"),
}


def _attack(name: str, marker: Path) -> Payload:
    function, *args = ATTACKS[name]
    filled = [a.format(marker) if isinstance(a, str) else a for a in args]
    filled = [[part.format(marker) for part in a] if isinstance(a, list) else a for a in filled]
    return Payload(function, *filled)


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("place", ["whole", "attribute", "state"])
def test_malicious_pickles_are_refused_without_effect(name, place, tmp_path):
    marker = tmp_path / "marker"
    payload = _attack(name, marker)
    contents: object = payload
    if place != "whole":
        contents = torch.nn.ModuleList([torch.nn.Linear(1, 1)])
        target = contents if place == "attribute" else contents[0]
        target.__dict__["extra" if place == "attribute" else "_buffers"] = {"x": payload}
    with pytest.raises(InputError, match=r"refused to load.*--trust-pickle"):
        load_module(_saved(contents, tmp_path / "bad.model"))
    assert not marker.exists()


def test_refusal_names_what_the_file_wanted(tmp_path):
    path = _saved(Payload(os.system, "true"), tmp_path / "bad.model")
    with pytest.raises(InputError, match=r"found posix\.system") as refusal:
        load_module(path)
    assert refusal.value.exit_code == 2


def test_source_code_of_a_graph_module_is_never_run(build, tmp_path):
    marker = tmp_path / "marker"
    source = f"open({str(marker)!r}, 'w').close()\n"
    payload = Payload(reduce_graph_module, {"_code": "def forward(self):\n    return 1\n"}, source)
    module = build("scalars")
    module.extra = payload
    load_module(_saved(module, tmp_path / "a.model"))
    assert not marker.exists()
    with pytest.raises(InputError, match="not a MACE"):
        load_module(_saved(payload, tmp_path / "b.model"))
    assert not marker.exists()


def test_admitted_classes_are_never_made(tmp_path):
    path = _saved(Payload(torch.nn.Linear, 10**12, 10**12), tmp_path / "a.model")
    with pytest.raises(InputError, match=r"not a MACE potential|damaged"):
        load_module(path)


@pytest.mark.parametrize("name", [b"torch._utils\n_rebuild_tensor_v2", b"mace.modules.models\nMACE"])
def test_state_for_a_function_or_a_class_is_refused(name, tmp_path):
    program = b"\x80\x02c" + name + b"\n}X\x01\x00\x00\x00aK\x01sb."
    with pytest.raises(InputError, match="damaged"):
        load_module(_raw(program, tmp_path / "a.model"))


def test_sizes_beyond_the_storage_are_refused(tmp_path):
    stream = io.BytesIO()
    torch.save(torch.nn.ParameterList([torch.zeros(2)]), stream)
    with zipfile.ZipFile(stream) as archive:
        names = {n: archive.read(n) for n in archive.namelist()}
    path = tmp_path / "a.model"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in names.items():
            short = content[:4] if name.endswith("data/0") else content
            archive.writestr(name, short)
    with pytest.raises(InputError, match="damaged"):
        load_module(path)


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("trust", [False, True])
def test_truncated_files_are_refused(fraction, trust, tmp_path):
    content = ASSET.read_bytes()
    path = tmp_path / "short.model"
    path.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(InputError, match=r"short\.model: truncated"):
        load_module(path, trust_pickle=trust)


def test_flipped_bits_are_found(tmp_path):
    content = bytearray(ASSET.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path = tmp_path / "flipped.model"
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        load_module(path)


def _script() -> bytes:
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), stream)
    return stream.getvalue()


def _zip_without_pickle() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return stream.getvalue()


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"weight": torch.zeros(2)}, "a dictionary of tensors"),
        (torch.nn.Linear(1, 1).state_dict(), "a dictionary of tensors"),
        (torch.nn.Linear(1, 1), "not a MACE"),
        ([1, 2], "not a MACE"),
        (_script(), "TorchScript"),
        (_zip_without_pickle(), "not a checkpoint"),
        (b"some text", "truncated, or not a model file"),
        (pickle.dumps({"a": 1}), "truncated, or not a model file"),
    ],
)
def test_other_files_are_refused_in_words(contents, message, trust, tmp_path):
    path = tmp_path / "other.model"
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    else:
        torch.save(contents, path)
    with pytest.raises(InputError, match=message):
        load_module(path, trust_pickle=trust)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match=r"gone\.model: no such model file"):
        load_module(tmp_path / "gone.model")
    with pytest.raises(InputError, match="a folder, not a model file"):
        load_module(tmp_path)
