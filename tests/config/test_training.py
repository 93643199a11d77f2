"""The section training: turns belong to schedules that have them."""

import pytest
import yaml

from mlip_refine.config import config_from_dict, dump_config, load_config
from mlip_refine.errors import InputError


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"schedule": "epochs"}, "training.epochs cannot be used; expected such as {replay: pass, "),
        ({"schedule": "sequential"}, "expected such as {replay: 100} with schedule: sequential"),
        ({"epochs": {"replay": 3}}, "expected none with schedule: joint"),
        ({"schedule": "alternate", "epochs": {"experiment": 3}}, "expected none with schedule: alternate"),
        ({"schedule": "epochs", "epochs": {"replay": 3}}, "such as {replay: pass, experiment: 10} with"),
        ({"schedule": "sequential", "epochs": {"experiment": 1}}, "such as {replay: 100} with schedule"),
        ({"schedule": "epochs", "epochs": {"replay": "pas"}}, "found 'pas', expected a number of at least 1"),
        ({"schedule": "epochs", "epochs": {"replay": 0}}, "found 0, expected a number of at least 1, or"),
        ({"schedule": "epochs", "epochs": {"replay": True}}, "found true, expected a number of at least 1"),
        ({"schedule": "alternat"}, "Did you mean 'alternate'?"),
        ({"energy_shift": "train"}, "expected 'none' or 'replay'"),
    ],
)
def test_turns_that_a_schedule_does_not_have_are_refused_once(training, message):
    with pytest.raises(InputError) as caught:
        config_from_dict({"name": "x", "potential": {"model": "m"}, "training": training})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"schedule": "alternate"},
        {"schedule": "epochs", "epochs": {"experiment": 2}},
        {"schedule": "sequential", "epochs": {"replay": 7}, "energy_shift": "replay"},
    ],
)
def test_schedules_survive_a_file(training, tmp_path):
    config = config_from_dict({"name": "x", "potential": {"model": "m"}, "training": training}, base=tmp_path)
    (tmp_path / "x.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "x.yaml") == config


@pytest.mark.parametrize("section", [{}, {"train": "a"}, {"valid": "a"}, {"from": "model", "train": "a"}])
def test_replay_has_files_to_train_on_and_to_hold_out(section):
    with pytest.raises(InputError, match=r"replay\.(train|valid).*expected a file or several"):
        config_from_dict({"name": "x", "potential": {"model": "m"}, "replay": section})
    config = config_from_dict({"name": "x", "potential": {"model": "m"}, "replay": {"from": "model"}})
    assert config.replay.train is None
    assert config_from_dict(yaml.safe_load(dump_config(config))).replay == config.replay
