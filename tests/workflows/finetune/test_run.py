"""The whole way from config to refined checkpoint, on sixteen atoms."""

import io
import json
import math
import sys

import numpy as np
import pytest
import torch
from ase.build import bulk
from mace.calculators import MACECalculator
from rich.console import Console

from mlip_refine import cli
from mlip_refine.config import dump_config, load_config
from mlip_refine.errors import InputError
from mlip_refine.potential import Potential
from mlip_refine.sampling.md.engine import MolecularDynamics
from mlip_refine.training.gauss_newton import GaussNewton
from mlip_refine.workflows.base import Run
from mlip_refine.workflows.finetune import finetune
from mlip_refine.workflows.finetune import run as workflow
from mlip_refine.workflows.finetune.records import read_summary
from mlip_refine.workflows.finetune.run import FinetuneResult, anchored, make_trainer, prepare
from mlip_refine.workflows.free_energy import free_energies

TRANSITION_KEYS = (
    *("name", "from", "to", "n_atoms", "temperature_K", "pressure_GPa"),
    *("delta_g_before", "delta_g_after"),
    *("transition_temperature_before", "transition_temperature_after"),
)
REPLAY_KEYS = ("energy_mae", "forces_mae", "stress_mae")


@pytest.fixture(autouse=True)
def _default_dtype():
    default = torch.get_default_dtype()
    yield
    torch.set_default_dtype(default)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_in) -> FinetuneResult:
    return finetune(tiny_in(tmp_path_factory.mktemp("finished")))


def _log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_run_folder_is_complete(finished):
    names = {p.name for p in finished.folder.iterdir()}
    assert names == {
        *("config.yaml", "log.jsonl", "checkpoints", "frames", "summary.json"),
        *("tiny.model", "tiny.safetensors", "tiny.json", "provenance.json", "log.txt"),
    }
    assert finished.model == finished.folder / "tiny.model"
    assert finished.safetensors == finished.folder / "tiny.safetensors"


def test_summary_says_all_that_was_promised(finished):
    summary = json.loads((finished.folder / "summary.json").read_text())
    assert summary == finished.summary.as_json()
    assert read_summary(finished.folder) == finished.summary
    assert summary["model_hash"] == finished.potential.hash != summary["initial_model_hash"]
    assert (summary["seed"], summary["steps"]) == (3, 4)
    assert summary["wall_time_s"] > 0
    assert [t["name"] for t in summary["transitions"]] == ["low"]
    for transition in summary["transitions"]:
        assert set(TRANSITION_KEYS) <= set(transition)
        for key in TRANSITION_KEYS[6:8]:
            assert math.isfinite(transition[key]["value"])
            assert math.isfinite(transition[key]["se"])
            assert transition[key]["unit"] == "meV/atom"
        for when in ("before", "after"):
            found = transition[f"transition_temperature_{when}"]
            assert found is None or found["value"] > 0
            noted = any(note.startswith(f"{when}: no transition") for note in transition["notes"])
            assert (found is None) == noted
    low = summary["transitions"][0]
    assert (low["from"], low["to"], low["n_atoms"]) == ("hcp", "bcc", 16)
    assert (low["temperature_K"], low["pressure_GPa"]) == (1150.0, 0.0)
    assert (low["delta_g_before"]["value"], low["delta_g_before"]["se"]) == (-1.5, 0.2)
    assert low["delta_g_after"]["se"] > 0.2
    for when in ("before", "after"):
        for key in REPLAY_KEYS:
            assert summary["replay"][when][key]["value"] > 0


def test_log_has_a_line_per_update(finished):
    lines = _log(finished.folder)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert {"low", "replay.energy", "replay.forces", "replay.stress"} < set(lines[0]["losses"])
    assert lines[0]["diagnostics"]["low"]["delta_g"]["value"] == pytest.approx(-1.5)
    assert all(line["gradient_norm"] > 0 for line in lines)
    assert any(line["resampled"] for line in lines)


def test_total_is_the_weighted_sum(finished):
    for line in _log(finished.folder):
        parts = line["losses"]
        replay = sum(value for name, value in parts.items() if name.startswith("replay."))
        assert parts["total"] == pytest.approx(parts["low"] + 0.1 * replay)


def test_saved_model_is_the_one_in_memory(finished):
    """Energies and forces through plain MACE, to 1e-10 in float64."""
    calculator = MACECalculator(model_paths=str(finished.model), device="cpu", default_dtype="float64")
    again = Potential.load(str(finished.safetensors), default_dtype="float64")
    for crystal in (
        bulk("Ti", "hcp", a=2.95, c=4.7).repeat(2),
        bulk("Ti", "bcc", a=3.3, cubic=True).repeat(2),
    ):
        crystal.rattle(0.1, seed=1)
        ours = {}
        for name, potential in (("memory", finished.potential), ("safetensors", again)):
            graphs = potential.graphs.collate([potential.graphs.from_atoms(crystal)])
            out = potential.evaluate(graphs, ("energy", "forces"))
            ours[name] = out["energy"].item(), out["forces"].detach().numpy()
        crystal.calc = calculator
        # What TorchScript makes of functions that all models share would change the last bits of later tests.
        with torch.jit.optimized_execution(False):
            whole, each = crystal.get_potential_energy(), crystal.get_forces()
        for energy, forces in ours.values():
            assert abs(whole - energy) < 1e-10
            assert np.abs(each - forces).max() < 1e-10


def test_every_tensor_was_trained(finished):
    start = Potential.load("titanium-compact", default_dtype="float64").parameters()
    end = finished.potential.parameters()
    unchanged = [name for name, value in start.items() if value.any() and torch.equal(value, end[name])]
    assert unchanged == []


def _stop_after(monkeypatch, steps: int) -> None:
    """Interrupt molecular dynamics after some steps, as Ctrl-C would."""
    step, left = MolecularDynamics._step, iter(range(steps))

    def limited(dynamics: MolecularDynamics) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        step(dynamics)

    monkeypatch.setattr(MolecularDynamics, "_step", limited)


def _interrupted(config, monkeypatch, *, md_steps: int | None = None, step: int | None = None) -> None:
    def report(seen) -> None:
        if seen.step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if md_steps is not None:
            _stop_after(patch, md_steps)
        with pytest.raises(KeyboardInterrupt):
            finetune(config, resume=True, report=report)


def test_a_run_killed_again_and_again_ends_in_the_same_place(finished, tiny, tmp_path, monkeypatch):
    """Killed in the first sampling, after an update, sampling anew, and in the verdict: the same bits."""
    config = tiny()
    _interrupted(config, monkeypatch, md_steps=17)
    _interrupted(config, monkeypatch, step=0)
    assert [line["step"] for line in _log(config.run_folder)] == [0]
    redrawn = next(line["step"] for line in _log(finished.folder) if line["resampled"])
    _interrupted(config, monkeypatch, md_steps=12)
    assert len(_log(config.run_folder)) == redrawn
    _interrupted(config, monkeypatch, step=2)
    assert [line["step"] for line in _log(config.run_folder)] == [0, 1, 2]
    first = (config.run_folder / "log.jsonl").read_text().splitlines()[:2]
    with (config.run_folder / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "los')
    _interrupted(config, monkeypatch, md_steps=100)
    assert (config.run_folder / "log.jsonl").read_text().splitlines()[:2] == first
    result = finetune(config, resume=True)
    assert (result.folder / "log.jsonl").read_text() == (finished.folder / "log.jsonl").read_text()
    wanted = finished.potential.parameters()
    for name, value in result.potential.parameters().items():
        assert torch.equal(value, wanted[name]), name
    again, first = (r.summary.model_copy(update={"wall_time_s": 0.0}) for r in (result, finished))
    assert again == first


def test_gauss_newton_meets_its_target_in_two_updates_and_resumes(tiny, monkeypatch):
    """ΔG comes within 5 % of its first distance; killed after one update, the run ends in the same bits."""
    training = {"optimiser": "gauss_newton", "ema_decay": 0.9, "steps": 3}
    changes = {
        "training": training,
        "replay": {"batch_size": 5},
        "sampling": {"n_eff_threshold": 0.3},
        "evaluation": {"cell_iterations": 4},
    }
    seen, step = [], GaussNewton.step

    def noted(optimiser, trial) -> float:
        seen.append((trial.objective(), optimiser._value))
        return step(optimiser, trial)

    with monkeypatch.context() as patch:
        patch.setattr(GaussNewton, "step", noted)
        whole = finetune(tiny(name="whole", **changes))
    assert len(seen) == 3
    for objective, added in seen:
        assert objective == pytest.approx(added, rel=1e-10)
    lines = _log(whole.folder)
    distances = [line["losses"]["low"] for line in lines]
    assert distances[2] < 0.05**2 * distances[0]
    assert lines[2]["losses"]["total"] < lines[0]["losses"]["total"]
    config = tiny(name="killed", **changes)
    _interrupted(config, monkeypatch, step=0)
    again = finetune(config, resume=True)
    for name, value in again.potential.parameters().items():
        assert torch.equal(value, whole.potential.parameters()[name]), name


def test_gauss_newton_takes_losses_on_targets_alone(tiny):
    losses = [{"type": "phonon_hvp", "data": "nowhere.csv"}]
    config = tiny(losses=losses, training={"optimiser": "gauss_newton", "ema_decay": 0.9})
    with pytest.raises(InputError, match="'phonon_hvp' is no mean of squared deviations"):
        finetune(config)
    assert not config.run_folder.exists()


def test_resuming_a_finished_run_changes_nothing(finished, monkeypatch):
    """Through the command line, which prints the table and draws the figures this time."""
    before = (
        (finished.folder / "log.jsonl").read_text(),
        json.loads((finished.folder / "summary.json").read_text()),
    )
    printed = io.StringIO()
    console = Console(file=printed, width=120, highlight=False)
    monkeypatch.setattr(cli, "terminal", lambda **_: console)
    config = str(finished.folder / "config.yaml")
    monkeypatch.setattr(sys, "argv", ["mlip-refine", "finetune", config, "output.figures=true", "--resume"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code in (0, None)
    after = json.loads((finished.folder / "summary.json").read_text())
    assert (finished.folder / "log.jsonl").read_text() == before[0]
    for summary in (after, before[1]):
        summary.pop("wall_time_s")
    assert after == before[1]
    assert "summary.json" in printed.getvalue()
    assert "-1.50(20)" in printed.getvalue()
    assert sorted(p.name for p in finished.folder.glob("*.png"))


def test_frames_are_not_kept_where_not_wanted(tiny):
    losses = [{"type": "replay", "energy_weight": 1.0, "forces_weight": 10.0, "stress_weight": 10.0}]
    result = finetune(tiny(losses=losses, output={"keep_frames": False}, training={"steps": 2}))
    assert not (result.folder / "frames").exists()
    assert result.summary.transitions == ()
    assert result.summary.replay.after.n_frames == 5


def test_replay_alone_lowers_its_error(tiny):
    losses = [{"type": "replay", "energy_weight": 100.0, "forces_weight": 1.0, "stress_weight": 10.0}]
    result = finetune(tiny(losses=losses, training={"steps": 25, "learning_rate": 5e-3}))
    before, after = result.summary.replay.before, result.summary.replay.after
    assert after.energy.value < 0.8 * before.energy.value


def test_replay_frames_are_needed_for_a_replay_loss(tiny):
    with pytest.raises(InputError, match="the config has no section replay"):
        prepare(tiny(replay=None))


def test_no_losses_is_nothing_to_do(tiny):
    config = tiny(losses=[])
    with pytest.raises(InputError, match="there is nothing to do"):
        finetune(config)
    assert not config.run_folder.exists()


def test_free_energies_keep_the_lines_of_the_config(tiny, tmp_path):
    path = tmp_path / "run.yaml"
    text = dump_config(tiny()).replace("from: hcp", "from: hpc", 1)
    path.write_text(text)

    with pytest.raises(InputError, match="names the phase 'hpc'") as caught:
        free_energies(load_config(path))
    assert str(caught.value).startswith(f"{path}:")
    assert "Did you mean 'hcp'?" in str(caught.value)


def test_the_evaluation_samples_what_has_a_free_energy(tiny, monkeypatch):
    """A loss on the stress at another state has no part in it."""
    (transition,) = (dict(loss) for loss in tiny().losses if loss.type == "free_energy_difference")
    stress = {
        "type": "pressure",
        "phase": "hcp",
        "temperature": 300.0,
        "uncertainty": 1.0,
        "lattice": [2.95, 4.68],
    }
    run = prepare(tiny(name="verdict", losses=[transition, stress]))
    assert len(run.points) == 3
    asked = []
    monkeypatch.setattr(workflow, "phase_changes", lambda *arguments: asked.append(arguments[2]) or {})
    workflow.evaluate(run, run.potential, None)
    assert [sorted(s.phase for s in points) for points in asked] == [["bcc", "hcp"]]
    assert all(s.temperature == transition["temperature"] for s in asked[0])


def test_single_precision_is_refused_before_a_run_is_made(tiny):
    target = {"temperature": 300.0, "lattice": [2.95, 4.68], "constants": {"C11": 160.0}}
    loss = {"type": "elastic_constants", "phase": "hcp", "method": "static", "targets": [target]}
    config = tiny(name="single", losses=[loss], potential={"default_dtype": "float32"})
    with pytest.raises(InputError, match="double precision"):
        finetune(config)
    assert not config.run_folder.exists()


def test_training_stops_where_the_targets_are_met(tiny):
    """Twice in a row inside the tolerance: one update, and a checkpoint that knows that it is done."""
    (transition,) = (loss for loss in tiny().losses if loss.type == "free_energy_difference")
    losses = [dict(transition) | {"target": -1.5}]
    config = tiny(losses=losses, training={"patience": 2, "learning_rate": 1e-9, "steps": 9})
    for _ in range(2):
        config.run_folder.mkdir(parents=True, exist_ok=True)
        run = Run(config.run_folder, config.seed)
        trainer = make_trainer(anchored(prepare(config), run), run)
        trainer.resume()
        trainer.run()
        assert (trainer.step, trainer.converged) == (2, True)
    lines = _log(config.run_folder)
    assert lines[0]["gradient_norm"] is not None
    assert lines[1]["gradient_norm"] is None


@pytest.mark.slow
def test_frames_of_the_run_itself_are_replayed(tiny):
    """Those that the training starts from, labelled by the initial model; one of five is held out."""
    replay = {"from": "model", "train": None, "valid": None, "trust_labels": False}
    result = finetune(tiny(replay=replay, training={"steps": 2}))
    before, after = result.summary.replay.before, result.summary.replay.after
    # Two phases with six frames of each of two replicas.
    assert before.n_frames == 4
    assert before.energy.value < 1e-9
    assert 0 < after.energy.value < 100
    assert all("replay.energy" in json.loads(line)["losses"] for line in (result.folder / "log.jsonl").open())


def test_frames_of_a_run_that_samples_nothing_are_refused(tiny):
    replay = {"from": "model", "train": None, "valid": None}
    with pytest.raises(InputError, match="come from losses on averages"):
        prepare(tiny(replay=replay, losses=[{"type": "replay"}]))
