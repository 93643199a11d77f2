import pytest

from mlip_refine.config import load_config, parse_overrides
from mlip_refine.errors import InputError

TEXT = """\
name: run
potential:
  model: titanium-compact
losses:
- {type: a, name: first, temperature: 1000 K}
- {type: b}
training:
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(TEXT)
    return file


def test_addresses_and_values():
    first, second, third = parse_overrides(["training.steps=5", "losses[0].weight = 2.5", "name=a=b"])
    assert (first.address, first.value) == (("training", "steps"), 5)
    assert (second.address, second.value) == (("losses", 0, "weight"), 2.5)
    assert (third.address, third.value) == (("name",), "a=b")


@pytest.mark.parametrize(
    "item", ["training.steps", "=5", ".steps=5", "training..steps=3", "losses[x].a=3", "a b[0"]
)
def test_what_is_no_override(item):
    with pytest.raises(InputError, match=r"expected key\.key=value"):
        parse_overrides([item])


def test_a_value_that_is_no_yaml():
    with pytest.raises(InputError, match=r"override 'name=\[1'"):
        parse_overrides(["name=[1"])


@pytest.mark.parametrize("address", ["losses.0", "losses[0]", "losses.first"])
def test_losses_by_number_or_name(path, address):
    config = load_config(path, [f"{address}.temperature=900 K"])
    assert config.losses[0]["temperature"] == "900 K"
    assert config.losses[0].where("temperature") == f"override '{address}.temperature=900 K'"
    assert config.losses[0].where("type") == f"{path}:5"


def test_sections_that_the_file_lacks_or_leaves_empty(path):
    config = load_config(
        path, ["training.steps=5", "sampling.guards.restarts=0", "replay={train: a, valid: b}"]
    )
    assert config.training.steps == 5
    assert config.sampling.guards.restarts == 0
    assert config.replay is not None
    assert config.replay.train == ("a",)


def test_the_last_one_wins_and_null_takes_away(path):
    config = load_config(path, ["training.steps=5", "training.steps=6", "training.clip_gradient=null"])
    assert (config.training.steps, config.training.clip_gradient) == (6, None)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("training.stpes=5", "override 'training.stpes=5': unknown key 'stpes' in section 'training'"),
        ("trainin.steps=5", "override 'trainin.steps=5': unknown key 'trainin' at the top level"),
        ("training.steps=0", "override 'training.steps=0': training.steps cannot be used; found 0"),
        ("sampling.timestep=2 GPa", "override 'sampling.timestep=2 GPa': sampling.timestep cannot be used"),
        ("losses.7.weight=2", "the list has 2 entries"),
        ("losses.third.weight=2", "no single entry is named 'third'; expected one of: first, b"),
        ("name.x=3", "nothing below a plain value"),
    ],
)
def test_wrong_overrides_are_named(path, item, message):
    with pytest.raises(InputError) as caught:
        load_config(path, [item])
    assert message in str(caught.value)


def test_overrides_alone_fill_an_empty_file(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(tmp_path / "empty.yaml", ["name=x", "potential.model=m"]).potential.model == "m"
