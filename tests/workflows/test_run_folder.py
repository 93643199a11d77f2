"""The run folder is made, refused, or resumed; nothing in it is overwritten."""

import pytest

from mlip_refine.config import Config, config_from_dict, load_config
from mlip_refine.errors import InputError
from mlip_refine.workflows.finetune import LAYOUT
from mlip_refine.workflows.run_folder import open_run_folder


def _config(folder, **changes: object) -> Config:
    data = {"name": "run", "potential": {"model": "m"}, "output": {"folder": str(folder)}}
    data["losses"] = [{"type": "replay", "weight": 2.0}]
    data["sampling"] = {"interval": 120.0, "timestep": 4.0}
    return config_from_dict(data | changes, base=folder)


def _contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_new_folder_holds_the_resolved_config(tmp_path):
    config = _config(tmp_path / "deep" / "runs")
    folder = open_run_folder(config, resume=False)
    assert folder == tmp_path / "deep" / "runs" / "run"
    assert list(_contents(folder)) == ["config.yaml"]
    assert load_config(folder / "config.yaml") == config
    assert "min_effective_frames" in (folder / "config.yaml").read_text()


def test_an_empty_folder_may_be_used(tmp_path):
    (tmp_path / "run").mkdir()
    assert open_run_folder(_config(tmp_path), resume=False) == tmp_path / "run"


def test_an_existing_run_is_refused(tmp_path):
    folder = open_run_folder(_config(tmp_path), resume=False)
    before = _contents(tmp_path)
    with pytest.raises(InputError, match="the run folder exists") as caught:
        open_run_folder(_config(tmp_path), resume=False)
    assert str(caught.value).startswith(str(folder))
    assert "--resume" in str(caught.value)
    assert _contents(tmp_path) == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_something_else_is_refused(tmp_path, resume):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="exists and is not a run"):
        open_run_folder(_config(tmp_path), resume=resume)
    assert _contents(tmp_path) == {"run/thesis.tex": b"years of work"}


def test_a_file_in_its_place_is_refused(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(InputError, match="exists and is not a run"):
        open_run_folder(_config(tmp_path), resume=False)
    assert (tmp_path / "run").read_text() == "a file"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match="the run folder cannot be written") as caught:
        open_run_folder(_config(tmp_path / "file" / "runs"), resume=False)
    assert "Set output.folder" in str(caught.value)
    assert _contents(tmp_path) == {"file": b"not a folder"}


def test_resuming_without_a_run_starts_one(tmp_path):
    assert (open_run_folder(_config(tmp_path), resume=True) / "config.yaml").exists()


def test_resuming_the_same_config_changes_nothing(tmp_path):
    folder = open_run_folder(_config(tmp_path), resume=False)
    (folder / "log.jsonl").write_text("{}\n")
    before = _contents(tmp_path)
    assert open_run_folder(_config(tmp_path), resume=True) == folder
    assert _contents(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "section"),
    [
        ({"seed": 4}, "seed"),
        ({"sampling": {"interval": 120.0, "timestep": 2.0}}, "sampling.timestep"),
        ({"losses": [{"type": "replay", "weight": 3.0}]}, "losses"),
        (
            {"potential": {"model": "m", "default_dtype": "float32"}, "seed": 1},
            "potential.default_dtype, seed",
        ),
    ],
)
def test_resuming_another_config_names_the_difference(tmp_path, changes, section):
    folder = open_run_folder(_config(tmp_path), resume=False)
    with pytest.raises(InputError, match="belongs to another config") as caught:
        open_run_folder(_config(tmp_path, **changes), resume=True)
    assert str(caught.value).startswith(str(folder / "config.yaml"))
    assert f"differences in {section}." in str(caught.value)


def test_a_run_may_go_on_for_longer(tmp_path):
    folder = open_run_folder(_config(tmp_path), resume=False)
    longer = _config(tmp_path, training={"steps": 99, "tolerance": 0.1})
    assert open_run_folder(longer, resume=True) == folder
    assert load_config(folder / "config.yaml").training.steps == 99


def test_only_a_run_whose_frames_may_grow_gets_more_of_them(tmp_path):
    sampling = {"interval": 120.0, "timestep": 4.0, "frames": 30}
    folder = open_run_folder(_config(tmp_path), resume=False)
    with pytest.raises(InputError, match=r"differences in sampling\.frames"):
        open_run_folder(_config(tmp_path, sampling=sampling), resume=True)
    grown = _config(tmp_path, sampling=sampling)
    open_run_folder(grown, resume=True, growing=("sampling.frames",))
    assert load_config(folder / "config.yaml").sampling.frames == 30
    with pytest.raises(InputError, match=r"cannot be made shorter(.|\n)*sampling\.frames 20"):
        open_run_folder(_config(tmp_path), resume=True, growing=("sampling.frames",))


def test_a_learning_rate_that_ends_somewhere_knows_how_many_updates_there_are(tmp_path):
    training = {"steps": 50, "final_learning_rate": 1e-5}
    open_run_folder(_config(tmp_path, training=training), resume=False)
    open_run_folder(_config(tmp_path, training={**training, "tolerance": 0.1}), resume=True)
    with pytest.raises(InputError, match=r"differences in training\.steps"):
        open_run_folder(_config(tmp_path, training={**training, "steps": 99}), resume=True)


def test_figures_may_be_switched_when_resuming(tmp_path):
    open_run_folder(_config(tmp_path), resume=False)
    open_run_folder(_config(tmp_path, output={"folder": str(tmp_path), "figures": False}), resume=True)


def test_the_layout_names_what_a_run_writes():
    text = LAYOUT.format(folder="runs/x", name="x")
    for word in (
        "config.yaml",
        "log.jsonl",
        "checkpoints/",
        "frames/",
        "x.model",
        "x.safetensors",
        "summary.json",
    ):
        assert word in text
