"""The protocol of verbs: run folder, lock, log, provenance, result files, figures and frames."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from mlip_refine import progress
from mlip_refine.config import Config, config_from_dict
from mlip_refine.errors import InputError
from mlip_refine.workflows import verbs
from mlip_refine.workflows.base import Command, Run, Workflow
from mlip_refine.workflows.run_folder import locked_run_folder


@dataclass
class Answer:
    """Result of a toy."""

    value: float

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value}

    def files(self) -> dict[str, Any]:
        return {"toy.json": self.to_json()}


def _run(prepared: SimpleNamespace, run: Run) -> Answer:
    (run.folder / "frames").mkdir(exist_ok=True)
    (run.folder / "frames" / "one.h5").touch()
    run.report("half")
    progress.console.print("a notice")
    warnings.warn("a warning", UserWarning, stacklevel=1)
    if prepared.fails:
        raise InputError("it went wrong")
    return Answer(42.0)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Workflow[Any, Answer]:
    """A workflow that answers 42 at once; `seed: 13` makes it fail."""
    module = ModuleType("toy_verb")
    potential = SimpleNamespace(device="cpu", hash="abc", head="pbe")
    functions = {
        "prepare": lambda config: SimpleNamespace(potential=potential, fails=config.seed == 13),
        "run": _run,
        "show": lambda console, result: console.print(f"answer {result.value:g}"),
        "figures": lambda folder: (folder / "toy.png").touch(),
        "reporter": lambda console: lambda report: console.print(f"step {report}"),
    }
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, "toy_verb", module)
    return Workflow(
        name="toy",
        help="Answer.",
        example="mlip-refine toy a.yaml",
        layout="{folder}\n└── toy.json  the answer of {name}",
        **{name: f"toy_verb:{name}" for name in functions},
    )


def _config(folder: Path, **changes: Any) -> Config:
    data = {"name": "run", "seed": 5, "potential": {"model": "m"}}
    return config_from_dict(data | {"output": {"folder": str(folder)}} | changes, base=folder)


def test_a_run_leaves_results_provenance_log_figures_and_frames(toy, tmp_path) -> None:
    opened, reports, stream = [], [], StringIO()
    console = Console(file=stream, width=80)
    with pytest.warns(UserWarning, match="a warning"):
        result = toy(_config(tmp_path), opened=opened.append, report=reports.append, console=console)
    folder = tmp_path / "run"
    assert (result.value, opened, reports) == (42.0, [folder], ["half"])
    names = {"config.yaml", "frames", "log.txt", "provenance.json", "toy.json", "toy.png"}
    assert {path.name for path in folder.iterdir()} == names
    assert json.loads((folder / "toy.json").read_text()) == {"value": 42.0}
    printed = stream.getvalue()
    log = (folder / "log.txt").read_text()
    for text in ("toy.json  the answer of run", "step half", "answer 42"):
        assert text in printed
        assert text in log
    for text in ("toy of run, mlip-refine ", f"process {os.getpid()}", "a notice", "a warning", "finished"):
        assert text in log
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["workflow"] == "toy"
    assert (provenance["seed"], provenance["device"], provenance["model_hash"]) == (5, "cpu", "abc")
    assert provenance["head"] == "pbe"
    assert set(provenance["packages"]) >= {"mlip-refine", "torch", "mace-torch"}


@pytest.mark.filterwarnings("ignore:a warning")
def test_the_provenance_is_that_of_the_numbers(toy, tmp_path) -> None:
    """The hash of the config does not depend on where a run writes, but on everything that it computes."""
    hashes = []
    for name, changes in {"a": {}, "b": {}, "c": {"seed": 6}}.items():
        toy(_config(tmp_path / name, **changes))
        hashes.append(json.loads((tmp_path / name / "run" / "provenance.json").read_text())["config_hash"])
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.filterwarnings("ignore:a warning")
def test_figures_and_frames_are_left_out_where_they_are_not_wanted(toy, tmp_path) -> None:
    toy(_config(tmp_path, output={"folder": str(tmp_path), "figures": False, "keep_frames": False}))
    assert not (tmp_path / "run" / "toy.png").exists()
    assert not (tmp_path / "run" / "frames").exists()


@pytest.mark.filterwarnings("ignore:a warning")
def test_an_error_is_logged_with_its_traceback_and_the_lock_is_released(toy, tmp_path) -> None:
    config = _config(tmp_path, seed=13)
    shown, listeners = warnings.showwarning, list(progress.listeners)
    for resume in (False, True):
        with pytest.raises(InputError, match="it went wrong"):
            toy(config, resume=resume)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("ended by InputError") == log.count("Traceback") == 2
    assert not (tmp_path / "run" / "toy.json").exists()
    assert not (tmp_path / "run" / ".lock").exists()
    assert (warnings.showwarning, progress.listeners) == (shown, listeners)


HOLDER = """
import sys
from mlip_refine.config import load_config
from mlip_refine.workflows.run_folder import locked_run_folder
with locked_run_folder(load_config(sys.argv[1]), resume=True):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_do_not_work_in_one_folder(tmp_path) -> None:
    """The second is refused with the process and host of the first; a killed process holds nothing."""
    config = _config(tmp_path)
    with locked_run_folder(config, resume=False) as folder:
        pass
    path = folder / "config.yaml"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        found = f"found process {holder.pid} on {os.uname().nodename}"
        with pytest.raises(InputError, match=found), locked_run_folder(config, resume=True):
            pass
        holder.kill()
    assert (folder / ".lock").exists()
    with locked_run_folder(config, resume=True) as again:
        assert str(os.getpid()) in (again / ".lock").read_text()
    assert {p.name for p in folder.iterdir()} == {"config.yaml"}


@pytest.mark.parametrize("verb", verbs(), ids=lambda verb: verb.name)
def test_every_verb_can_be_imported_and_explains_itself(verb) -> None:
    assert verb.help.endswith(".")
    assert verb.example.startswith(f"mlip-refine {verb.name}")
    if not isinstance(verb, Command):
        verb.load()


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("verb", [v for v in verbs() if isinstance(v, Workflow)], ids=lambda verb: verb.name)
def test_every_verb_leaves_out_figures_and_frames(verb, wanted, tmp_path, monkeypatch) -> None:
    """What a verb computes and draws is replaced; what becomes of it is decided by `output`."""
    drawn = []

    def run(prepared: object, run: Run) -> Answer:
        run.store.folder.mkdir()
        return Answer(1.0)

    replaced = {
        verb.prepare: lambda config: SimpleNamespace(
            potential=SimpleNamespace(device="cpu", hash="abc", head="pbe")
        ),
        verb.run: run,
        verb.show: lambda console, result: None,
        verb.figures: drawn.append,
        verb.check: lambda config: None,
    }
    for name, function in replaced.items():
        if name is not None:
            monkeypatch.setattr(name.replace(":", "."), function)
    output = {"folder": str(tmp_path), "figures": wanted, "keep_frames": wanted}
    verb(_config(tmp_path, output=output))
    assert (tmp_path / "run" / "frames").exists() == wanted
    assert drawn == ([tmp_path / "run"] if wanted and verb.figures else [])
