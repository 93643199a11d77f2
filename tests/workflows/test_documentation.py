"""Every code block of the README and of the guide runs, on configs that take seconds."""

import re
import shlex
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import mlip_refine
from mlip_refine import cli
from mlip_refine.config import load_config
from mlip_refine.data.frame_formats import FORMATS
from mlip_refine.data.phonons.formats import READERS
from mlip_refine.losses import ObservableLoss, Setting, loss_specs
from mlip_refine.observables import average, sample_of

PROJECT = Path(__file__).parents[2]
GUIDE = Path(mlip_refine.__file__).parent / "guide"
PAGES = [PROJECT / "README.md", *sorted(GUIDE.glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LADDER = {
    "windows": 2,
    "replicas": 1,
    "fit": 800.0,
    "equilibration": 80.0,
    "production": 240.0,
    "interval": 8.0,
    "max_error": None,
}
# What the README's and the guide's commands read, made so small that a command takes seconds.
SHORT: dict[str, dict[str, Any]] = {
    "md": {
        "phases": None,
        "md": {"pressure": "0 GPa", "duration": "0.2 ps", "equilibration": "0.04 ps", "interval": "0.04 ps"},
    },
    "elastic": {"elastic": {"phases": ["bcc"], "pressure": "0 GPa"}},
    "phonons": {"phonons": {"gruneisen": False, "quasi_harmonic": None, "mesh": [2, 2, 2]}},
}


def blocks(*languages: str) -> list[Any]:
    """The blocks of some languages, named by page and number."""
    found = []
    for page in PAGES:
        for number, (language, text) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8"))):
            if language in languages:
                # A minute together; finetune itself is run by the README's block.
                again = page.stem in {"bench", "config", "finetune", "free-energy"}
                slow = [pytest.mark.slow] if again and language == "sh" else []
                found.append(pytest.param(text, id=f"{page.stem}-{number}", marks=slow))
    return found


def merged(data: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    joined = dict(data)
    for key, value in changes.items():
        joined[key] = merged(joined[key], value) if isinstance(value, dict) and joined.get(key) else value
    return {key: value for key, value in joined.items() if value is not None}


@pytest.fixture
def home(
    tmp_path: Path, tiny_in: Callable[..., Any], tiny_data: Callable[..., Any], monkeypatch: Any
) -> Path:
    """A folder in which the commands of the documentation work, in seconds."""
    configs = tmp_path / "configs"
    configs.mkdir()
    tiny_in(configs)
    data = tiny_data(tmp_path, name="quickstart", base=str(configs), free_energy=LADDER)
    (configs / "quickstart.yaml").write_text(yaml.safe_dump(data))
    for name, changes in SHORT.items():
        original = yaml.safe_load((PROJECT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
        phases = {n: p | {"n_atoms": min(p["n_atoms"], 16)} for n, p in original["phases"].items()}
        changed = merged(original | {"phases": phases}, {k: v for k, v in changes.items() if k != "phases"})
        (configs / f"{name}.yaml").write_text(yaml.safe_dump(changed))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(arguments: list[str], monkeypatch: Any) -> object:
    """Exit code of the command line."""
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code or 0


@pytest.mark.parametrize("text", blocks("sh", "bash"))
def test_commands(text: str, home: Path, monkeypatch: Any, capsys: Any) -> None:
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["mlip-refine"]:
            words += ["training.steps=2"] * (words[1] == "finetune")
            assert run(words, monkeypatch) == 0, capsys.readouterr().err
        elif words[:1] == ["make"]:
            assert re.search(
                rf"^{words[1]}:", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
            )
        else:
            assert not words or words[0] in {"git", "pip", "python"}, line


@pytest.mark.parametrize("text", blocks("yaml"))
def test_configs(text: str, tmp_path: Path) -> None:
    given = yaml.safe_load(text)
    phases = {name: {"prototype": name, "element": "Ti", "n_atoms": 54} for name in ("hcp", "bcc")}
    base = {"name": "page", "potential": {"model": "titanium-compact"}, "phases": phases}
    path = tmp_path / "page.yaml"
    given["phases"] = phases | given.get("phases", {})
    path.write_text(yaml.safe_dump(base | given, allow_unicode=True))
    loss_specs(load_config(path).losses)


@pytest.mark.parametrize("text", blocks("toml"))
def test_toml(text: str) -> None:
    assert tomllib.loads(text)


def python_of(page: Path) -> list[str]:
    return [
        text for language, text in BLOCK.findall(page.read_text(encoding="utf-8")) if language == "python"
    ]


@pytest.mark.parametrize("page", list(filter(python_of, PAGES)), ids=lambda page: page.stem)
def test_python(page: Path, request: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Nothing but the package is there before; the README has the configs of the repository beside it."""
    monkeypatch.chdir(tmp_path)
    if page.stem == "README":
        request.getfixturevalue("home")
    names: dict[str, Any] = {"__name__": "documentation"}
    for text in python_of(page):
        exec(compile(text, str(page), "exec"), names)
    if page.stem == "python":
        assert names["found"].energy.shape == (3,)
        assert [len(trajectory) for trajectory in names["result"].trajectories.values()] == [10]
        assert names["rest"].points[0].stable
    if page.stem == "observables":
        crystal, sampled = names["atoms"], sample_of(names["trajectory"])
        given = {"phase": "bcc", "temperature": 1200.0, "target": 8, "uncertainty": 0.1, "distance": 3.0}
        setting = Setting(crystal=lambda _: crystal, cell_moves=lambda _: False, resolve=Path)
        loss = ObservableLoss.bind("neighbours", 1.0, names["CoordinationOptions"](**given), setting)
        assert loss.targets["coordination"].value == 8.0
        # Eight nearest neighbours of bcc, and six more at the distance of the lattice constant.
        at_rest = torch.from_numpy(crystal.positions).expand_as(sampled.positions)
        ideal = replace(
            sampled, positions=at_rest, cells=torch.from_numpy(crystal.cell.array).expand_as(sampled.cells)
        )
        assert average(loss.observable, ideal).tolist() == pytest.approx([8.0])
        assert average(names["Coordination"](3.5), ideal).tolist() == pytest.approx([14.0])
    if page.stem == "extending":
        # The page's readers are for its own tables alone.
        assert FORMATS.pop(".json")[1] is names["read_json"]
        assert READERS.pop().read is names["read_arrays"]
        options = names["HuberForcesOptions"](delta=0.2)
        assert names["HuberForces"]("huber", 1.0, options).probes == {"forces"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http", "#", "mailto")):
            assert (page.parent / target.split("#")[0]).exists(), target
    assert not [line for line in text.splitlines() if len(line) > 160 and not line.startswith("|")]


def test_the_index_names_every_page() -> None:
    named = set(re.findall(r"\]\((\w[\w-]*)\.md\)", (GUIDE / "index.md").read_text(encoding="utf-8")))
    assert named == {page.stem for page in GUIDE.glob("*.md")} - {"index"}
