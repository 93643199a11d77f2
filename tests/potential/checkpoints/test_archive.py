"""What is saved is what was in memory: through plain MACE, and without pickle."""

import copy
import json
import zipfile

import pytest
import torch
from mace.calculators import MACECalculator

from mlip_refine.errors import InputError
from mlip_refine.potential.acceleration.kernels import install_kernels
from mlip_refine.potential.checkpoints.archive import (
    architecture_json,
    load_safetensors,
    module_hash,
    save_model,
    save_safetensors,
    tensor_hash,
)
from mlip_refine.potential.checkpoints.unpickle import load_module
from mlip_refine.potential.model_files import resolve_model

KINDS = ["titanium", "all-residual", "density", "nonlinear", "three-layers"]


@pytest.fixture(scope="module")
def model(build, tmp_path_factory):
    """Models by kind in double precision, with disturbed weights; made once."""
    made: dict[str, torch.nn.Module] = {}

    def get(kind: str) -> torch.nn.Module:
        if kind not in made:
            base = tmp_path_factory.mktemp("base")
            titanium = kind == "titanium"
            module = (
                load_module(resolve_model("titanium-compact", base)).double() if titanium else build(kind)
            )
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.mul_(1 + 0.01 * torch.rand_like(parameter))
            made[kind] = module
        return made[kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_both_formats_keep_energies_and_forces(kind, model, frames, batch, tmp_path):
    module = model(kind)
    save_model(module, tmp_path / "a.model")
    tensors = save_safetensors(module, tmp_path / "a.v2", {"head": "x"})
    assert tensors == tmp_path / "a.v2.safetensors"
    rebuilt = load_safetensors(tensors)
    head = len(module.heads) - 1
    options = {"device": "cpu", "default_dtype": "float64", "head": module.heads[head]}
    calculators = [
        MACECalculator(model_paths=str(tmp_path / "a.model"), **options),
        MACECalculator(models=[rebuilt], **options),
    ]
    for atoms in (frame.copy() for frame in frames):
        if kind == "titanium":
            atoms.numbers[:] = 22
        expected = module(batch(module, [atoms], head))
        for atoms.calc in calculators:
            assert atoms.get_potential_energy() == pytest.approx(expected["energy"].item(), abs=1e-10)
            forces = torch.tensor(atoms.get_forces())
            assert torch.allclose(forces, expected["forces"].detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["titanium", "density"])
def test_hash_is_that_of_the_numbers(kind, model, tmp_path):
    module = model(kind)
    expected = module_hash(module)
    save_model(module, tmp_path / "a.model")
    assert module_hash(load_module(tmp_path / "a.model")) == expected
    assert module_hash(load_module(tmp_path / "a.model", trust_pickle=True)) == expected
    assert module_hash(load_safetensors(save_safetensors(module, tmp_path / "a"))) == expected
    changed = load_module(tmp_path / "a.model")
    with torch.no_grad():
        next(iter(changed.parameters())).view(-1)[0] += 1e-9
    assert module_hash(changed) != expected


def test_scale_and_shift_of_different_shapes(model, evaluate, tmp_path):
    """As `mace_run_train --scaling rms_forces_scaling` writes them: a scale of one head, a shift of none."""
    module = copy.deepcopy(model("titanium"))
    module.scale_shift.shift = torch.tensor(0.25, dtype=torch.float64)
    expected = evaluate(module)
    save_model(module, tmp_path / "a.model")
    save_safetensors(module, tmp_path / "a")
    for path in (tmp_path / "a.model", tmp_path / "a.safetensors"):
        loaded = load_module(path)
        assert loaded.scale_shift.shift.shape == ()
        assert module_hash(loaded) == module_hash(module)
        for name, value in evaluate(loaded).items():
            assert torch.allclose(value, expected[name], rtol=0, atol=1e-12)
    assert "shift_shape" not in json.loads(architecture_json(model("titanium")))


def test_kernels_and_freezing_do_not_enter_the_hash_nor_the_files(model, evaluate, tmp_path):
    save_model(model("titanium"), tmp_path / "plain.model")
    module = load_module(tmp_path / "plain.model")
    expected = module_hash(module)
    assert install_kernels(module) == 3
    module.node_embedding.requires_grad_(requires_grad=False)
    assert module_hash(module) == expected
    save_model(module, tmp_path / "a.model")
    save_safetensors(module, tmp_path / "a")
    for path in (tmp_path / "a.model", tmp_path / "a.safetensors"):
        loaded = load_module(path)
        assert module_hash(loaded) == expected
        assert not any("original" in name for name in loaded.state_dict())
        frozen = [name for name, p in loaded.named_parameters() if not p.requires_grad]
        assert {name.split(".")[0] for name in frozen} == {"node_embedding"}
    assert not [p.name for p in tmp_path.iterdir() if p.name.endswith(".part")]


def test_saved_model_needs_nothing_of_ours(model, tmp_path):
    module = copy.deepcopy(model("titanium"))
    install_kernels(module)
    save_model(module, tmp_path / "a.model")
    with zipfile.ZipFile(tmp_path / "a.model") as archive:
        assert not [name for name in archive.namelist() if b"mlip_refine" in archive.read(name)]


def test_architecture_is_one_text(model):
    text = architecture_json(model("density"))
    architecture = json.loads(text)
    assert architecture["pair_repulsion"] is True
    assert architecture["distance_transform"] == "Agnesi"
    assert architecture["heads"] == ["default", "r2scan"]
    assert text == json.dumps(architecture, sort_keys=True)


def test_metadata_travels_in_the_json(model, tmp_path):
    save_safetensors(model("scalars"), tmp_path / "a", {"head": "Default", "steps": 5})
    document = json.loads((tmp_path / "a.json").read_text())
    assert document["metadata"] == {"head": "Default", "steps": 5}
    assert document["dtype"] == "float64"


def test_unwritable_folder_is_named_and_nothing_is_left(model, tmp_path):
    with pytest.raises(InputError, match=r"a\.model: the model cannot be written"):
        save_model(model("scalars"), tmp_path / "gone" / "a.model")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        save_safetensors(model("scalars"), tmp_path / "file" / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d | {"format": "other"}, "not the description of a model"),
        (lambda d: d | {"format_version": 99}, "unknown format version; found 99, expected 1"),
        (lambda d: d | {"dtype": "int8"}, "damaged"),
        (lambda d: d | {"architecture": d["architecture"] | {"interaction": "os.system"}}, "damaged"),
        (lambda d: d | {"architecture": d["architecture"] | {"radial_mlp": [4, 8]}}, "wrong shape"),
        *(
            (lambda d, change=change: d | {"architecture": d["architecture"] | change}, message)
            for change, message in (
                ({"r_max": 1e30}, "damaged"),
                ({"r_max": float("nan")}, "damaged"),
                ({"atomic_numbers": [-5]}, "damaged"),
                ({"heads": []}, "damaged"),
                ({"hidden_irreps": "many"}, "damaged"),
                ({"hidden_irreps": "1x99e"}, "damaged"),
                ({"hidden_irreps": "1000000000x0e"}, "hidden_irreps alone needs"),
                ({"mlp_irreps": "1000000000x0e"}, "mlp_irreps alone needs"),
                ({"max_ell": 11, "correlation": [8, 8]}, "correlation alone needs"),
                ({"radial_mlp": [10**6, 10**6]}, "radial_mlp alone needs"),
                ({"energies_shape": [10**6, 10**6]}, "energies_shape alone needs"),
                ({"num_interactions": 3}, "MACE cannot build|missing"),
                ({"correlation": [2]}, "MACE cannot build|missing"),
                ({"scale_shape": [-1]}, "MACE cannot build"),
            )
        ),
        (lambda d: d | {"architecture": d["architecture"] | {"pair_repulsion": True}}, "missing"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(change, message, model, tmp_path):
    path = save_safetensors(model("scalars"), tmp_path / "a")
    description = tmp_path / "a.json"
    description.write_text(json.dumps(change(json.loads(description.read_text()))))
    with pytest.raises(InputError, match=message):
        load_safetensors(path)


def test_missing_and_damaged_files(model, tmp_path):
    path = save_safetensors(model("scalars"), tmp_path / "a")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="the model file is damaged"):
        load_safetensors(path)
    path.unlink()
    with pytest.raises(InputError, match="no such model file"):
        load_module(path)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InputError, match="description of the model is damaged"):
        load_safetensors(path)
    (tmp_path / "a.json").unlink()
    with pytest.raises(InputError, match="description of the model is missing"):
        load_safetensors(path)


def test_hash_depends_on_numbers_names_shapes_and_architecture_only():
    one = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
    reordered = {
        "b": torch.ones(2, dtype=torch.float64),
        "a": torch.arange(6.0, requires_grad=True).reshape(2, 3),
    }
    reference = tensor_hash(one, "x")
    assert len(reference) == 64
    assert tensor_hash(reordered, "x") == reference
    assert tensor_hash(one, "y") != reference
    assert tensor_hash({**one, "b": torch.tensor([1.0, 1.0 + 1e-7], dtype=torch.float64)}, "x") != reference
    assert tensor_hash({**one, "a": one["a"].reshape(3, 2)}, "x") != reference
    assert tensor_hash({"a": one["a"], "c": one["b"]}, "x") != reference


def test_hash_of_a_transposed_view_reads_the_numbers_in_order():
    matrix = torch.arange(6.0).reshape(2, 3)
    assert tensor_hash({"a": matrix.T}, "") == tensor_hash({"a": matrix.T.clone()}, "")
