import pytest
from pydantic import ValidationError

from mlip_refine.config import Config, Phase, PotentialSection, ReplaySection, Sampling
from mlip_refine.config.yaml.diagnostics import keys_by_section


def minimal(**sections):
    return {"name": "run", "potential": {"model": "titanium-compact"}, **sections}


def test_defaults_need_only_a_name_and_a_model():
    config = Config.model_validate(minimal())
    assert config.sampling.timestep is None
    assert config.sampling.interval == 100.0
    assert config.sampling.friction is None
    assert config.sampling.barostat_time is None
    assert config.sampling.thermostat == "langevin"
    assert config.sampling.guards.restarts == 3
    assert config.free_energy.production == 20000.0
    assert config.training.tolerance == 0.3
    assert config.replay is None
    assert config.losses == ()


def test_a_config_is_built_from_sections_in_code():
    config = Config(
        name="run", potential=PotentialSection(model="m.model"), losses=[{"type": "replay", "weight": 2}]
    )
    assert config.losses[0].weight == 2.0
    assert config.losses[0].where("weight") == "losses[0].weight"
    assert config == Config.model_validate(
        {"name": "run", "potential": {"model": "m.model"}, "losses": [{"type": "replay", "weight": 2}]}
    )


def test_sections_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        Sampling().frames = 3


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("seed", -1),
        ("seed", True),
        ("seed", "1"),
        ("device", "gpu"),
        ("device", "cuda:x"),
        ("name", "../x"),
        ("name", ""),
        ("sampling", {"replicas": 0}),
        ("sampling", {"ensemble": "NVT"}),
        ("sampling", {"thermostat": "andersen"}),
        ("sampling", {"guards": {"restarts": -1}}),
        ("sampling", {"frames": 2.5}),
        ("sampling", {"n_eff_threshold": 1.5}),
        ("sampling", {"timestep": "10 fs", "interval": "5 fs"}),
        ("sampling", {"frames": 2, "replicas": 1}),
        ("sampling", {"guards": {"max_temperature_ratio": 1}}),
        ("free_energy", {"windows": 1}),
        ("free_energy", {"interval": "1 ns"}),
        ("free_energy", {"max_error": 0}),
        ("training", {"ema_decay": 1.0}),
        ("training", {"learning_rate": float("nan")}),
        ("training", {"clip_gradient": float("inf")}),
        ("training", {"steps": 0}),
        ("replay", {"train": "a.xyz"}),
        ("replay", {"train": [], "valid": "b.xyz"}),
        ("replay", {"train": [""], "valid": "b.xyz"}),
        ("potential", {"model": ""}),
        ("potential", {"model": "m", "default_dtype": "float16"}),
        ("output", {"folder": ""}),
        ("losses", [{"type": "a", "weight": 0}]),
        ("losses", [{"type": ""}]),
        ("losses", [{"weight": 1}]),
        ("losses", [{"type": "a"}, {"type": "a"}]),
        ("losses", {"type": "a"}),
        ("phases", {"a/b": {"file": "x"}}),
    ],
)
def test_wrong_values_are_refused(section, values):
    with pytest.raises(ValidationError):
        Config.model_validate(minimal(**{section: values}))


def test_one_replay_file_or_several():
    assert ReplaySection(train="a", valid=["b", "c"]).train == ("a",)
    assert ReplaySection(train="a", valid=["b", "c"]).valid == ("b", "c")


@pytest.mark.parametrize(
    ("values", "freedom"),
    [
        ({"prototype": "hcp", "element": "Ti", "n_atoms": 54}, "anisotropic"),
        ({"prototype": "bcc", "element": "Ti", "n_atoms": 54}, "isotropic"),
        ({"file": "x.vasp"}, "isotropic"),
        ({"file": "x.vasp", "cell_freedom": "fixed"}, "fixed"),
    ],
)
def test_freedom_of_the_cell_follows_the_crystal(values, freedom):
    assert Phase.model_validate(values).cell_freedom == freedom


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"prototype": "bcc", "element": "Ti", "n_atoms": 54, "file": "x"},
        {"prototype": "bcc", "element": "Ti"},
        {"prototype": "bcc", "n_atoms": 54},
        {"prototype": "bcc", "element": "ti", "n_atoms": 54},
        {"prototype": "bcc", "element": "X", "n_atoms": 54},
        {"prototype": "bcc", "element": "Ti", "n_atoms": 54, "c": 4.0},
        {"prototype": "bcc", "element": "Ti", "n_atoms": 54, "supercell": [2, 2, 2]},
        {"prototype": "bcc", "element": "H", "n_atoms": 54},
        {"file": "x", "n_atoms": 54},
        {"file": "x", "melt": {"from": "bcc", "temperature": 3000}},
        {"melt": {"from": "bcc"}},
        {"melt": {"temperature": 3000}},
        {"melt": {"from": "bcc", "temperature": 3000}, "element": "Ti"},
        {"melt": {"from": "bcc", "temperature": 3000}, "identity": "structure"},
        {"melt": {"from": "bcc", "temperature": 3000}, "cell_freedom": "anisotropic"},
        {"file": "x", "supercell": [2, 2]},
        {"file": "x", "supercell": [2, 2, 0]},
        {"file": "x", "supercell": [2, 2, 1.5]},
    ],
)
def test_a_phase_has_one_origin(values):
    with pytest.raises(ValidationError):
        Phase.model_validate(values)


def test_a_molten_phase_is_liquid():
    melt = {"from": "bcc", "temperature": "3000 K", "duration": "5 ps"}
    assert Phase.model_validate({"melt": melt}).identity == "liquid"
    assert Phase.model_validate({"melt": melt, "identity": "none"}).identity == "none"
    found = Phase.model_validate({"melt": melt}).melt
    assert (found.from_, found.temperature, found.duration) == ("bcc", 3000.0, 5000.0)
    assert Phase.model_validate({"file": "x"}).identity == "structure"


def test_open_lattice_constants_keep_the_volume_of_the_reference_state():
    hcp = Phase(prototype="hcp", element="Ti", n_atoms=54)
    a, c = hcp.lattice
    assert (a, c) == pytest.approx((2.95, 2.95 * 1.59), rel=5e-3)
    bcc, none = Phase(prototype="bcc", element="Ti", n_atoms=54).lattice
    assert none is None
    assert bcc**3 / 2 == pytest.approx(3**0.5 / 4 * a**2 * c)
    assert Phase(prototype="hcp", element="Ti", n_atoms=54, a=3.0, c=4.7).lattice == (3.0, 4.7)
    assert Phase(prototype="fcc", element="Cu", n_atoms=32).lattice[0] == pytest.approx(3.61, abs=0.01)


def test_losses_answer_by_name_and_type():
    config = Config.model_validate(minimal(losses=[{"type": "a", "name": "one", "x": [1]}, {"type": "a"}]))
    one, other = config.losses
    assert (one.type, one.name, one.weight, one["x"]) == ("a", "one", 1.0, [1])
    assert (other.name, dict(other)) == ("a", {"type": "a"})


def test_input_paths_start_from_the_base(tmp_path):
    config = Config.model_validate(minimal(base=str(tmp_path)))
    assert config.resolve("x/y.json") == tmp_path / "x" / "y.json"
    assert config.resolve("/x.json").as_posix() == "/x.json"


def test_the_run_folder_starts_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config.model_validate(minimal(base="/elsewhere"))
    assert config.run_folder == tmp_path / "runs" / "run"


def test_every_key_knows_its_sections():
    index = keys_by_section(Config)
    assert index["batch_size"] == ["replay"]
    assert index["replicas"] == ["sampling", "md", "transition", "free_energy", "evaluation"]
    assert index["restarts"] == ["sampling.guards"]
