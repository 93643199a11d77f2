import sys
from textwrap import dedent

import pytest
from pydantic import Field

from mlip_refine.config import Config, Section, Temperature, config_from_dict, load_config, validate_node
from mlip_refine.errors import InputError

HEAD = "name: run\npotential:\n  model: titanium-compact\n"


def written(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(dedent(text), encoding="utf-8")
    return path


def refusal(tmp_path, text, overrides=()):
    path = written(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(str(path), "run.yaml")


def test_a_file_with_units(tmp_path):
    path = written(
        tmp_path, HEAD + "sampling:\n  timestep: 2 fs\n  interval: 0.2 ps\ntraining:\n  learning_rate: 1e-3\n"
    )
    config = load_config(path)
    assert (config.sampling.timestep, config.sampling.interval) == (2.0, 200.0)
    assert config.training.learning_rate == 1e-3
    assert config.base == tmp_path
    assert config.where("sampling", "interval") == f"{path}:6"
    assert config.where("potential", "head") == f"{path}:2"


def test_a_section_without_keys_is_one_of_defaults(tmp_path):
    config = load_config(written(tmp_path, HEAD + "sampling:\nreplay:\nlosses:\nphases:\n"))
    assert config == load_config(written(tmp_path, HEAD))


def test_an_unknown_key_names_line_section_and_nearest(tmp_path):
    message = refusal(tmp_path, HEAD + "sampling:\n  frames: 3\n  timestpe: 2 fs\n")
    assert message.startswith(
        "run.yaml:6: unknown key 'timestpe' in section 'sampling'; expected one of: ensemble,"
    )
    assert message.endswith("Did you mean 'timestep'?")


def test_a_key_of_another_section_is_sent_home(tmp_path):
    assert "'batch_size' belongs to section 'replay'." in refusal(
        tmp_path, HEAD + "training:\n  batch_size: 3\n"
    )
    message = refusal(tmp_path, HEAD + "training:\n  replicas: 3\n")
    assert "belongs to section 'sampling' and section 'md' and section 'transition'" in message
    assert "'device' belongs to the top level." in refusal(tmp_path, HEAD + "training:\n  device: cpu\n")


def test_a_misspelt_key_of_another_section_is_found_there(tmp_path):
    assert "Did you mean 'ema_decay' of section 'training'?" in refusal(
        tmp_path, HEAD + "output:\n  ema_deacy: 1\n"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "sampling:\n  replicas: 0\n",
            "run.yaml:5: sampling.replicas cannot be used; found 0, expected a number of at least 1",
        ),
        ("sampling:\n  ensemble: NPT\n", "found 'NPT', expected 'nvt' or 'npt'. Did you mean 'npt'?"),
        ("sampling:\n  friction: 5 /pss\n", "found '5 /pss', expected a rate in one of: /ps, /fs, /ns"),
        ("sampling:\n  timestep: 2 FS\n", "Did you mean 'fs'?"),
        (
            "sampling:\n  frames: many\n",
            "run.yaml:5: sampling.frames cannot be used; found 'many', expected a whole number",
        ),
        ("sampling:\n  timestep: -2 fs\n", "found '-2 fs', expected a time of at least 0.001 fs"),
        ("sampling: 3\n", "run.yaml:4: sampling cannot be used; found 3, expected a section"),
        ("sampling:\n  guards:\n    restarts: no\n", "run.yaml:6: sampling.guards.restarts"),
        (
            "sampling:\n  interval: 1 fs\n  timestep: 2 fs\n",
            "run.yaml:5: sampling.interval cannot be used; found '1 fs', expected at least",
        ),
        (
            "sampling:\n  lend: true\n  max_references: 1\n",
            "run.yaml:6: sampling.max_references cannot be used; found 1, expected at least 2 with lend",
        ),
        (
            "phases:\n  hcp:\n    prototype: hpc\n",
            "run.yaml:6: phases.hcp.prototype cannot be used; found 'hpc'",
        ),
        (
            "phases:\n  hcp:\n    prototype: hcp\n",
            "run.yaml:5: phases.hcp cannot be used; expected element and n_atoms",
        ),
        (
            "phases:\n  h p: {file: x}\n",
            "run.yaml:5: phases.h p cannot be used; found 'h p', expected a word",
        ),
        (
            "phases:\n  a:\n    file: x\n    supercell: [1, 2]\n",
            "run.yaml:7: phases.a.supercell cannot be used; found [1, 2]",
        ),
        ("phases:\n  a:\n    file: x\n    n_atoms: 3\n", "run.yaml:7: phases.a.n_atoms"),
        (
            "phases:\n  bcc: {file: x}\n  melt:\n    melt: {temperature: 3000 K, from: bbc}\n",
            "run.yaml:7: phases.melt.melt.from cannot be used; found 'bbc', expected a phase that is not "
            "molten itself: bcc. Did you mean 'bcc'?",
        ),
        (
            "phases:\n  melt:\n    melt: {temperature: 3000 K, from: melt}\n",
            "run.yaml:6: phases.melt.melt.from cannot be used; found 'melt', expected a phase that is not "
            "molten itself: (there is none)",
        ),
        ("replay:\n  train: x\n", "run.yaml:4: replay.valid cannot be used; expected a file or several"),
        (
            "losses:\n- tpye: x\n",
            "run.yaml:5: missing key 'type' in section 'losses[0]'. Is 'tpye' meant to be it?",
        ),
        ("losses:\n- type: x\n  weight: -1\n", "run.yaml:6: losses[0].weight cannot be used; found -1"),
        ("losses:\n- type: x\n- type: x\n", "Give each a key 'name'."),
        ("losses: {type: x}\n", "run.yaml:4: losses cannot be used"),
        ("losses: [x]\n", "run.yaml:4: losses[0] cannot be used; found 'x', expected a loss"),
        ("seed: 1\nseed: 2\n", "run.yaml:5: key 'seed' is given twice, first at run.yaml:4"),
        ("seed: !!python/object:os.system x\n", "run.yaml:4: the YAML tag"),
        ("seed: [1\n", "run.yaml:"),
        ("seed: *x\n", "run.yaml:4: no valid YAML: found undefined alias"),
        ("phases: &x\n  a: *x\n", "an anchor unfolds without end"),
        ("\tseed: 3\n", "run.yaml:4: no valid YAML"),
        ("---\nseed: 3\n", "no valid YAML"),
        ("seed: " + 2000 * "[", "too many levels"),
        ("sampling:\n  timestep: 1" + 400 * "0", "expected a time of at least 0.001 fs"),
        ("training:\n  learning_rate: 1" + 400 * "0", "training.learning_rate cannot be used"),
    ],
)
def test_wrong_values_name_line_found_and_allowed(tmp_path, text, message):
    assert message in refusal(tmp_path, HEAD + text)


def test_missing_keys_at_the_top(tmp_path):
    message = refusal(tmp_path, "seed: 1\n")
    assert "run.yaml has 2 problems" in message
    assert "run.yaml:1: missing key 'name' at the top level; expected name of the run" in message
    assert "run.yaml:1: missing key 'potential' at the top level" in message


def test_all_problems_come_at_once_in_the_order_of_the_file(tmp_path):
    text = (
        "name: a b\npotential:\n  modle: x\nsampling:\n  replicas: 0\n  replicas: 1\nlosses:\n- weight: 1\n"
    )
    lines = refusal(tmp_path, text, ["training.stpes=3"]).splitlines()
    assert lines[0] == "run.yaml has 7 problems:"
    places = [line.split(": ")[0].strip() for line in lines[1:]]
    assert places == [*(f"run.yaml:{line}" for line in (1, 2, 3, 5, 6, 8)), "override 'training.stpes=3'"]


@pytest.mark.parametrize(
    ("text", "message"), [("", "is empty"), ("# only\n", "is empty"), ("- a\n", "is no section")]
)
def test_a_file_without_keys(tmp_path, text, message):
    assert message in refusal(tmp_path, text)


def test_files_that_cannot_be_read(tmp_path):
    written(tmp_path, HEAD)
    with pytest.raises(InputError, match=r"does not exist\. The folder has run\.yaml"):
        load_config(tmp_path / "rum.yaml")
    with pytest.raises(InputError, match="does not exist"):
        load_config(tmp_path / "no" / "rum.yaml")
    with pytest.raises(InputError, match="a folder is no config"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00x")
    with pytest.raises(InputError, match="cannot be read"):
        load_config(tmp_path / "binary.yaml")


def test_anchors_and_merged_sections(tmp_path):
    text = HEAD + "sampling: &s\n  equilibration: 3 ps\n  frames: 7\nevaluation:\n  <<: *s\n  frames: 9\n"
    config = load_config(written(tmp_path, text))
    assert (config.evaluation.equilibration, config.evaluation.frames) == (3000.0, 9)


def test_a_dict_in_code_meets_the_same_messages():
    data = {"name": "run", "potential": {"model": "m"}, "sampling": {"timestpe": 2}}
    with pytest.raises(
        InputError, match=r"^unknown key 'timestpe' in section 'sampling'.*Did you mean 'timestep'\?$"
    ):
        config_from_dict(data)
    del data["sampling"]
    assert config_from_dict(data, base="/x") == Config.model_validate({**data, "base": "/x"})


class Options(Section):
    """Options of a loss, as the registry declares them."""

    from_: str = Field(alias="from", description="Name of a phase.")
    temperature: Temperature = Field(description="Where, K.")
    weight: float = 1.0


def test_options_of_a_loss(tmp_path):
    text = HEAD + "losses:\n- type: x\n  name: y\n  weight: 2\n  from: hcp\n  temperature: 900 K\n"
    path = written(tmp_path, text)
    node = load_config(path).losses[0]
    options = validate_node(Options, node)
    assert (options.from_, options.temperature, options.weight) == ("hcp", 900.0, 2.0)
    assert node.where("temperature") == f"{path}:9"
    assert node.where() == f"{path}:5"
    assert node.where("absent") == f"{path}:5"


def test_wrong_options_of_a_loss_name_their_lines(tmp_path):
    text = HEAD + "losses:\n- type: x\n- type: y\n  form: hcp\n  temperature: -3 K\n  frames: 3\n"
    path = written(tmp_path, text)
    with pytest.raises(InputError) as caught:
        validate_node(Options, load_config(path).losses[1])
    message = str(caught.value).replace(str(path), "run.yaml")
    assert (
        "missing key 'from' in section 'losses[1]'; expected name of a phase. Is 'form' meant to be it?"
        in message
    )
    assert "run.yaml:7: unknown key 'form' in section 'losses[1]'; expected one of: from, temp" in message
    assert "weight, type, name." in message
    assert "run.yaml:8: losses[1].temperature cannot be used; found '-3 K'" in message
    assert "'frames' belongs to section 'sampling'" in message


def test_wrong_options_in_code_name_the_loss():
    config = Config.model_validate(
        {"name": "r", "potential": {"model": "m"}, "losses": [{"type": "x", "from": 3}]}
    )
    with pytest.raises(InputError, match=r"losses\[0\]\.from cannot be used; found 3, expected a text"):
        validate_node(Options, config.losses[0])


def test_levels_are_limited_whatever_pythons_limit_is(tmp_path):
    """Libraries raise the limit of recursion when they are imported."""
    nested = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{y: *a{i - 1}}}\n" for i in range(1, 200))
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(100_000)
        for text in ("seed: " + 2000 * "[", nested):
            path = tmp_path / "run.yaml"
            path.write_text(text)
            with pytest.raises(InputError, match="too many levels"):
                load_config(path)
    finally:
        sys.setrecursionlimit(limit)
