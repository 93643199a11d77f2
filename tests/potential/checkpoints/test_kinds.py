"""Checkpoints of every family of MACE models load, or are refused with the kind and the way out."""

import pickle
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path

import mace  # noqa: F401 - before e3nn
import pytest
import torch
from mace import modules
from mace.modules.radial import PolynomialCutoff

from mlip_refine.errors import InputError
from mlip_refine.potential import Potential
from mlip_refine.potential.checkpoints.kinds import UnsupportedModelError, require_supported
from mlip_refine.potential.checkpoints.unpickle import load_module

SAVED = "mh-1 needs mace 0.3.15"


def _saved(contents: object, path: Path) -> Path:
    torch.save(contents, path)
    return path


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(value, second[key], rtol=0, atol=1e-12) for key, value in first.items())


def _with_old_repulsion(module: torch.nn.Module) -> torch.nn.Module:
    """As mace 0.3.5 to 0.3.9 made it: MACE-MP-0b, 0b2 and MPA-0 are such files."""
    module.pair_repulsion_fn.register_buffer("r_max", torch.tensor(4.0))
    module.pair_repulsion_fn.cutoff = PolynomialCutoff(4.0, 5)
    return module


def _as_released(module: torch.nn.Module) -> torch.nn.Module:
    """As MH-1 was released: without the attribute that its first block was built with."""
    del module.use_edge_irreps_first
    return module


OLD = {
    "repulsion": ("density", _with_old_repulsion),
    "mh-1": ("mh-1", _as_released),
    "pseudoscalars": ("pseudoscalars", lambda module: module),
}


@pytest.mark.parametrize("name", OLD)
def test_released_models_load_and_are_saved_so_that_they_open_again(name, build, evaluate, tmp_path):
    kind, change = OLD[name]
    if name == "mh-1" and not hasattr(build("nonlinear"), "use_edge_irreps_first"):
        pytest.skip("needs mace 0.3.15")
    module = build(kind)
    heads = range(len(module.heads))
    expected = [evaluate(module, head) for head in heads]
    path = _saved(change(module), tmp_path / "old.model")
    potential = Potential.load(str(path), trust_pickle=True)
    for saved in potential.save(tmp_path, "new"):
        again = load_module(saved)
        assert [str(h) for h in again.heads] == list(module.heads)
        assert all(_same(expected[head], evaluate(again, head)) for head in heads)


def test_the_first_block_tells_that_it_was_built_with_irreps_of_edges(build, tmp_path):
    if not hasattr(build("nonlinear"), "use_edge_irreps_first"):
        pytest.skip("needs mace 0.3.15")
    for kind, expected in (("mh-1", True), ("nonlinear", False)):
        loaded = load_module(_saved(_as_released(build(kind)), tmp_path / "a.model"))
        assert loaded.use_edge_irreps_first is expected


def _program(name: str, path: Path) -> Path:
    """Write a checkpoint that asks for an object of a class, which need not be installed."""
    module, _, cls = name.rpartition(".")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", f"\x80\x02c{module}\n{cls}\n)\x81.".encode("latin1"))
        archive.writestr("a/byteorder", "little")
    return path


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mace.modules.extensions.PolarMACE", "Polar MACE.*Start from"),
        ("graph_longrange.energy.GTOElectrostaticEnergy", "Polar MACE"),
        ("mace.modules.extensions.MACELES", "LES.*Start from"),
        ("les.les.Les", "LES"),
        ("mace.modules.models.AtomicDipolesMACE", "dipole model.*no energies"),
        ("mace.modules.models.AtomicDielectricMACE", "polarisabilities.*no energies"),
        ("mace.modules.models.EnergyDipolesMACE", "energies and dipoles"),
        ("mace.modules.models.MagneticScaleShiftMACE", "magnetic"),
        ("mace.modules.embeddings.GenericJointEmbedding", "charge and the spin.*embedding_specs.*mh-1"),
        ("mace.modules.lora.LoRAO3Linear", "not merged.*merge_lora_weights"),
        ("cuequivariance_torch.operations.linear.Linear", "cuEquivariance.*mace_cueq_to_e3nn"),
        ("openequivariance.TensorProduct", "OpenEquivariance.*convert_oeq_e3nn"),
        ("torch._dynamo.eval_frame.OptimizedModule", "torch.compile"),
    ],
)
def test_other_kinds_are_refused_with_the_way_out_whether_trusted_or_not(name, words, trust, tmp_path):
    path = _program(name, tmp_path / "other.model")
    with pytest.raises(UnsupportedModelError, match=rf"other\.model: this is .*{words}"):
        load_module(path, trust_pickle=trust)


@pytest.fixture(scope="module")
def conditioned(build) -> torch.nn.Module:
    """A model that reads charge and spin, as OMOL."""
    module = build("scalars")
    specs = {
        "total_charge": {"type": "categorical", "per": "graph", "in_dim": 1, "emb_dim": 4, "num_classes": 9}
    }
    module.embedding_specs = specs
    module.joint_embedding = modules.embeddings.GenericJointEmbedding(base_dim=16, embedding_specs=specs)
    return module


def _with_lora(build) -> torch.nn.Module:
    lora = pytest.importorskip("mace.modules.lora")
    module = build("residual")
    lora.inject_LoRAs(module, rank=2)
    return module


def test_live_models_and_their_files_are_refused_by_kind(conditioned, build, tmp_path):
    for module, words in ((conditioned, "charge and the spin"), (_with_lora(build), "LoRA")):
        with pytest.raises(UnsupportedModelError, match=words):
            Potential.from_module(module)
        path = _saved(module, tmp_path / "a.model")
        for trust in (False, True):
            with pytest.raises(UnsupportedModelError, match=words):
                Potential.load(str(path), trust_pickle=trust)


def test_merged_lora_loads(build, evaluate, tmp_path):
    module = _with_lora(build)
    merged = __import__("mace.modules.lora", fromlist=["x"]).merge_lora_weights(module)
    assert _same(evaluate(merged), evaluate(load_module(_saved(merged, tmp_path / "a.model"))))


@pytest.mark.skipif(find_spec("cuequivariance_torch") is None, reason="needs cuequivariance_torch")
def test_a_converted_model_is_refused(build, tmp_path):
    from mace.cli.convert_e3nn_cueq import run

    path = _saved(run(build("scalars"), device="cpu", return_model=True), tmp_path / "a.model")
    with pytest.raises(UnsupportedModelError, match="mace_cueq_to_e3nn"):
        load_module(path)


def _lone_pair_energies(module: torch.nn.Module) -> tuple[float, float]:
    """Return the energy of two atoms without an edge, and with one that is longer than the cutoff."""
    inputs = {
        "positions": torch.zeros(2, 3).double(),
        "cell": torch.eye(3).double() * 50,
        "node_attrs": torch.eye(2).double(),
        "batch": torch.zeros(2, dtype=torch.long),
        "ptr": torch.tensor([0, 2]),
        "head": torch.zeros(1, dtype=torch.long),
    }
    far = torch.tensor([[4.5, 0.1, 0.2]]).double()
    edges = [(torch.zeros(2, 0, dtype=torch.long), far[:0]), (torch.tensor([[0], [1]]), far)]
    found = [module(inputs | {"edge_index": i, "shifts": s}, compute_force=False)["energy"] for i, s in edges]
    return float(found[0].detach()), float(found[1].detach())


def test_models_whose_energy_jumps_at_the_cutoff_are_refused(build, tmp_path):
    block = modules.interaction_classes["RealAgnosticAttResidualInteractionBlock"]
    for kind, attention in (("all-residual", True), ("nonlinear", False)):
        for smooth in (False, True):
            module = build(kind)
            module.radial_embedding.apply_cutoff = not smooth
            if attention:
                old = module.interactions[1]
                torch.set_default_dtype(torch.float64)
                names = ("node_attrs_irreps", "node_feats_irreps", "edge_attrs_irreps", "edge_feats_irreps")
                module.interactions[1] = block(
                    **{name: getattr(old, name) for name in names},
                    target_irreps=old.target_irreps,
                    hidden_irreps=old.hidden_irreps,
                    avg_num_neighbors=8.0,
                    radial_MLP=[8, 8],
                )
            without, beyond = _lone_pair_energies(module)
            assert (without == pytest.approx(beyond, rel=1e-14)) is smooth
            if smooth:
                require_supported(module)
            else:
                with pytest.raises(UnsupportedModelError, match=r"jumps .* cutoff.*--apply_cutoff False"):
                    require_supported(module)


def _zip(data: bytes, path: Path, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a/data.pkl", data)
        archive.writestr("a/byteorder", "little", zipfile.ZIP_STORED)
        archive.writestr("a/data/0", bytes(8), zipfile.ZIP_STORED)
    return path


_MODULE = b"\x80\x02cmace.modules.models\nMACE\n)\x81}("
_DOUBLED = b"".join(b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(60))
_SHARED = (
    _MODULE
    + b"X\x08\x00\x00\x00_modulescmace.modules.blocks\nScaleShiftBlock\n)\x81}bq\x00"
    + b"".join(
        b"cmace.modules.blocks\nScaleShiftBlock\n)\x81}X\x08\x00\x00\x00_modules}(X\x01\x00\x00\x00ah"
        + bytes([n])
        + b"X\x01\x00\x00\x00bh"
        + bytes([n])
        + b"usbq"
        + bytes([n + 1])
        for n in range(60)
    )
)
_STRIDE = (
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nDoubleStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQK\x00J\x00\x00\x00\x40\x85K\x00\x85\x89)tR."
)
HOSTILE = {
    "tuples that double": _MODULE + b"X\x01\x00\x00\x00aK\x01q\x00" + _DOUBLED + b"ub.",
    "a doubled key": b"\x80\x02}K\x01q\x00" + _DOUBLED + b"K\x01s.",
    "shared submodules": b"\x80\x02"
    + _SHARED[2:].replace(b"X\x08\x00\x00\x00_modulescmace", b"cmace", 1)
    + b".",
    "a stride of zero": _STRIDE,
    "a memo of two billion places": b"\x80\x02K\x01r\xff\xff\xff\x7f.",
    "irreps without end": _MODULE + b"X\x05\x00\x00\x00heads]ub.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_small_files_that_take_everything_are_refused(name, tmp_path):
    path = _zip(HOSTILE[name], tmp_path / "bomb.model")
    started = time.process_time()
    with pytest.raises(InputError, match=r"bomb\.model"):
        load_module(path)
    assert time.process_time() - started < 20


def test_compressed_members_and_devices_are_refused(tmp_path):
    path = _zip(pickle.dumps(list(range(10**5)), protocol=2), tmp_path / "a.model", zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match=r"damaged.*compressed"):
        load_module(path)
    for device in (Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(InputError, match="a device or a pipe"):
            load_module(device)


def test_names_in_a_file_cannot_steer_the_terminal(tmp_path):
    path = _zip(b"\x80\x02c\x1b[2Jos\nsystem\n.", tmp_path / "a.model")
    with pytest.raises(InputError) as caught:
        load_module(path)
    assert "\x1b" not in str(caught.value)
