"""The command line: what it prints, and how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import pytest
import typer.testing

from mlip_refine import cli
from mlip_refine.config import Config
from mlip_refine.errors import InputError, StatisticsError
from mlip_refine.losses.registry import loss_types
from mlip_refine.workflows import verbs
from mlip_refine.workflows.base import Command, CommandResult
from mlip_refine.workflows.run_folder import logged


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process: exit code, standard output and standard error."""

    def call(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["mlip-refine", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capsys.readouterr()
        return end.value.code or 0, printed.out, printed.err

    return call


def test_schema_is_a_json_schema_of_everything(run):
    code, printed, _ = run("schema")
    schema = json.loads(printed)
    assert code == 0
    assert set(schema["properties"]) == set(Config.model_fields)
    assert "free_energy_difference" in printed
    assert "forces_weight" in printed


def test_schema_explains_sections_and_keys(run):
    _, printed, _ = run("schema", "md")
    assert printed.startswith("md: section | null, default null\n    What `mlip-refine md` runs.\n\nKeys\n")
    assert "\n  duration: number, fs, default 20000.0\n      Time after the equilibration, fs;" in printed
    assert "\n  dynamics: section | null, default null\n" in printed
    assert "\n      window: number, fs, default 1000.0\n          Longest time of" in printed
    _, printed, _ = run("schema", "md.dynamics")
    assert "\n  window: number, fs, default 1000.0\n" in printed
    assert run("schema", "md.temperature")[1].startswith(
        "md.temperature: number | list[number], K, required\n"
    )
    assert "\n  n_atoms: whole number | null, default null\n" in run("schema", "phases")[1]
    assert "angular_distribution, bulk_modulus" in run("schema", "losses")[1]
    assert run("schema", "losses.pressure") == run("losses", "pressure")
    assert (
        "\n  constants: mapping[number], GPa, required\n"
        in run("schema", "losses.elastic_constants.targets")[1]
    )
    assert json.loads(run("schema", "md.segment", "--json")[1])["x-unit"] == "fs"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("mdd", "a config has no section 'mdd'; expected one of name, seed, .*Did you mean md"),
        ("md.dynamic", r"no key 'dynamic' in md; expected one of .*Did you mean md\.dynamics"),
        ("losses.presure", r"no key 'presure' in losses; .*Did you mean losses\.pressure"),
        ("md.ensemble.nvt", r"no key 'nvt' in md\.ensemble; expected nothing after md\.ensemble"),
    ],
)
def test_a_key_that_the_schema_does_not_have_is_refused(run, asked, message):
    code, printed, error = run("schema", asked)
    assert (code, printed) == (2, "")
    assert re.search(message, error)


def test_every_key_of_the_config_is_explained(run):
    for name, field in Config.model_fields.items():
        _, printed, _ = run("schema", name)
        assert printed.startswith(f"{name}: ")
        assert field.description.split()[0] in printed
        assert "anything" not in printed


def test_losses_lists_every_loss_with_its_options(run):
    code, printed, _ = run("losses")
    assert code == 0
    text = " ".join(printed.split())
    assert "free_energy_difference: ((ΔG - target)/σ)², ΔG = G_II - G_I" in text
    assert "from: Phase I of the difference II - I. (required)" in text
    assert "uncertainty: " in text
    assert "meV/atom. (default 0.3)" in text
    assert "replay: Mean squared errors of energy, forces and stress" in text
    assert "forces_weight: Weight of the squared error of force components, Å²/eV²; null: likewise." in text


def test_losses_explains_one_loss(run):
    code, printed, _ = run("losses", "stress")
    assert code == 0
    assert printed.startswith("stress: Stress of a fixed cell (xx, yy, zz, yz, xz, xy; tensile positive)")
    lines = printed.splitlines()
    after = dict(pairwise(lines))
    assert after["  weight: number, default 1.0"] == "      Factor on the loss, no unit."
    assert after["  temperature: number, K, required"] == "      Temperature of the target, K."
    assert "  target: number | list[number] | mapping[number] | null, GPa, default null" in lines
    assert "  lattice: list[number], Å, default []" in lines
    assert lines.count("Columns of a table") == 1
    columns = " ".join(" ".join(lines[lines.index("Columns of a table") + 1 :]).split())
    assert columns.startswith("First temperature, K, or pressure, GPa. Then xx, yy, zz, yz, xz, xy,")
    assert columns.endswith("in one of GPa, MPa, kbar, bar, Pa. For other names: columns: {xx: NAME}.")


def test_losses_explains_curves_sections_and_losses_without_tables(run):
    _, printed, _ = run("losses", "radial_distribution")
    assert "  pair: list[text | null], default [null, null]\n" in printed
    assert "First the axis, in Å; then the curve." in printed
    _, printed, _ = run("losses", "elastic_constants")
    assert "  method: static | fluctuation | deformation, default fluctuation\n" in printed
    assert "  targets: list[section], default []\n" in printed
    assert "\n      constants: mapping[number], GPa, required\n          Target constants by name" in printed
    assert "  thermal: true | false, default true\n" in printed
    assert "Columns of a table" not in printed
    _, printed, _ = run("losses", "free_energy_difference")
    assert "  from: text, required\n" in printed
    assert "  uncertainty: number, meV/atom, default 0.3\n" in printed


def test_an_unknown_loss_is_refused_with_the_nearest(run):
    code, printed, message = run("losses", "presure")
    assert (code, printed) == (2, "")
    assert message.startswith("mlip-refine: unknown loss 'presure'; expected one of angular_distribution, ")
    assert message.endswith("Did you mean 'pressure'?\n")


def test_every_option_of_every_loss_is_explained(run):
    for name, loss in loss_types().items():
        _, printed, _ = run("losses", name)
        for key, option in loss.options.model_json_schema()["properties"].items():
            assert f"\n  {key}: " in printed
            assert option["description"].split()[0] in printed
        assert "anything" not in printed


def test_help_names_the_commands(run):
    code, printed, _ = run("--help")
    assert code == 0
    for command in ("finetune", "free-energy", "schema", "losses"):
        assert command in printed


@pytest.mark.parametrize(
    "arguments", [("finetun", "x.yaml"), ("finetune",), ("finetune", "x.yaml", "--resum")]
)
def test_wrong_usage_ends_with_two(run, arguments):
    code, _, message = run(*arguments)
    assert code == 2
    assert message


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("wrong [thing]", where="a.yaml:3"), 2, "mlip-refine: a.yaml:3: wrong [thing]\n"),
        (StatisticsError("too few", needed="more"), 1, "mlip-refine: too few; needed: more\n"),
    ],
)
def test_an_error_on_purpose_is_one_line(run, monkeypatch, error, code, message):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "load_config", fail)
    assert run("finetune", "a.yaml") == (code, "", message)


def test_a_long_message_is_not_wrapped(run, monkeypatch):
    def fail(*_: object) -> None:
        raise InputError("word " * 100)

    monkeypatch.setattr(cli, "load_config", fail)
    _, _, message = run("finetune", "a.yaml")
    assert message.count("\n") == 1


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_ends_with_one_line_and_its_exit_code(run, monkeypatch, tmp_path, name, request):
    """128 and the number of the signal; how to go on only where there is a run to go on with."""
    number = signal.Signals[name]
    # Who starts the tests in the background may ignore some.
    before = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    given = signal.signal(number, before)
    request.addfinalizer(lambda: signal.signal(number, given))
    monkeypatch.setattr(cli, "load_config", lambda *_: os.kill(os.getpid(), number))
    code, out, message = run("finetune", "a.yaml")
    what = "Ctrl-C" if name == "SIGINT" else name
    assert (code, out, message) == (128 + number, "", f"mlip-refine: ended by {what}\n")

    def load(*_: object) -> None:
        with logged(tmp_path, "a run"):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(cli, "load_config", load)
    code, _, message = run("finetune", "a.yaml")
    line = f"ended by {what}; go on with the same command and --resume (kept in {tmp_path})\n"
    assert (code, message) == (128 + number, f"mlip-refine: {line}")
    assert (tmp_path / "log.txt").read_text().endswith(f" UTC  {line}")
    assert signal.getsignal(number) == before


def test_a_signal_that_is_ignored_stays_so(run, monkeypatch):
    """As `nohup` does with the one of a closed terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def load(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        raise InputError("came this far")

    monkeypatch.setattr(cli, "load_config", load)
    try:
        assert run("finetune", "a.yaml")[0] == 2
    finally:
        signal.signal(signal.SIGHUP, before)


def test_overrides_and_trust_reach_the_config(run, monkeypatch):
    seen = {}

    def load(path, overrides):
        seen.update(path=str(path), overrides=overrides)
        raise InputError("stop")

    monkeypatch.setattr(cli, "load_config", load)
    run("finetune", "a.yaml", "training.steps=5", "--trust-pickle", "seed=4")
    assert seen == {
        "path": "a.yaml",
        "overrides": ["training.steps=5", "seed=4", "potential.trust_pickle=true"],
    }
    run("free-energy", "b.yaml")
    assert seen == {"path": "b.yaml", "overrides": []}


def test_the_installed_command(tmp_path):
    """In a process of its own: refused with exit code 2, nothing on standard output."""
    path = tmp_path / "run.yaml"
    path.write_text("name: x\npotential: {model: titanium-compact}\nsampling: {replicas: 0}\n")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "mlip_refine", "finetune", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"mlip-refine: {path}:3: " in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_but_the_schema_is_printed():
    command = [sys.executable, "-W", "ignore", "-m", "mlip_refine", "schema"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["properties"]


def test_the_guide_shows_pages_and_knows_their_names(run):
    code, printed, _ = run("guide")
    assert code == 0
    assert "[reweighting](reweighting.md)" in printed
    code, printed, _ = run("guide", "reweighting")
    assert code == 0
    assert printed.startswith("# Reweighting\n")
    code, printed, message = run("guide", "reweigting")
    assert (code, printed) == (2, "")
    assert "Did you mean 'reweighting'?" in message


def _quick(folder: Path) -> Path:
    """A config of molecular dynamics that takes a second."""
    path = folder / "quick.yaml"
    config = {
        "name": "quick",
        "device": "cpu",
        "potential": {"model": "titanium-compact"},
        "phases": {"bcc": {"prototype": "bcc", "element": "Ti", "n_atoms": 2, "a": 3.25}},
        "md": {"temperature": 300, "duration": 12, "equilibration": 0, "interval": 6, "identity": "none"},
        "sampling": {"timestep": 3, "friction": 10, "min_effective_frames": 1, "accelerate": "none"},
        "output": {"folder": str(folder), "figures": False},
    }
    path.write_text(json.dumps(config))
    return path


def test_json_on_standard_output_and_nothing_of_libraries_on_standard_error(tmp_path):
    """In a process of its own, as the user calls it: no warnings of torch, e3nn, mace, warp or ase."""
    command = [sys.executable, "-m", "mlip_refine", "md", str(_quick(tmp_path)), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["md.json"]["points"][0]["name"] == "bcc-300K-0GPa"
    assert "md.json           averages with errors" in done.stderr
    assert "speed" in done.stderr
    for word in ("Warning", "warning:", "deprecat", "CUDA"):
        assert word not in done.stderr
    assert done.stderr.splitlines()[0] == str(tmp_path / "quick")
    assert done.stderr.splitlines()[-1].startswith("results ")


def test_quiet_prints_nothing_and_verbose_shows_where_an_error_came_from(run, tmp_path):
    path = str(_quick(tmp_path))
    assert run("md", path, "--quiet") == (0, "", "")
    code, printed, message = run("md", path, "-v")
    assert (code, printed) == (2, "")
    assert "Traceback" in message
    assert "mlip-refine: " in message
    assert "the run folder exists" in message
    assert "Traceback" not in run("md", path)[2]


def _add(*, first: int = 1, second: Annotated[int, typer.Option(help="A number.")] = 1) -> CommandResult:
    if second < 0:
        raise InputError("a number below zero")
    return CommandResult({"sum": first + second}, lambda console: console.print(f"it is {first + second}"))


def test_a_new_command_has_the_options_of_every_verb():
    """A function that only returns its result: `--json`, `--quiet` and `--verbose` are there."""
    command = Command(name="add", help="Add.", example="mlip-refine add", function=_add)
    application, runner = cli.application([command, *verbs()]), typer.testing.CliRunner()

    def call(*arguments: str) -> str:
        done = runner.invoke(application, ["add", "--second", "4", *arguments])
        assert done.exit_code == 0
        return done.stdout

    assert call("--first", "2") == "it is 6\n"
    assert json.loads(call("--json")) == {"sum": 5}
    assert call("-q") == ""
    assert all(word in call("--help") for word in ("--first", "--second", "--json", "--quiet", "--verbose"))


@pytest.mark.parametrize("verb", verbs(), ids=lambda verb: verb.name)
def test_every_verb_has_the_options_of_every_verb(run, verb):
    code, printed, _ = run(verb.name, "--help")
    assert code == 0
    assert all(word in printed for word in ("--json", "--quiet", "-q", "--verbose", "-v"))


def test_commands_print_json_or_nothing_and_show_where_an_error_came_from(run):
    _, printed, _ = run("losses", "replay", "--json")
    assert set(json.loads(printed)) == {"replay"}
    _, printed, _ = run("losses", "--json")
    assert set(json.loads(printed)) == set(loss_types())
    assert json.loads(run("guide", "losses", "--json")[1])["text"].startswith("# Losses\n")
    assert run("schema", "--json") == run("schema")
    assert run("losses", "-q") == (0, "", "")
    assert "Traceback" in run("guide", "reweigting", "-v")[2]
    assert "Traceback" not in run("guide", "reweigting")[2]


def test_version_and_examples(run):
    assert run("--version") == (0, f"mlip-refine {version('mlip-refine')}\n", "")
    code, printed, _ = run("md", "--help")
    assert code == 0
    assert "Example: mlip-refine md configs/md.yaml" in " ".join(printed.split())


def test_shell_completion_is_there(run):
    code, printed, _ = run("--help")
    assert code == 0
    assert "--install-completion" in printed
