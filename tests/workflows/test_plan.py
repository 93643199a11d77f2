"""Dry runs: what they announce is what a run then does, and nothing is written."""

import json
import sys
from dataclasses import replace
from typing import Any

import pytest
import yaml

from mlip_refine import cli
from mlip_refine.config import config_from_dict
from mlip_refine.errors import InputError, MlipRefineError
from mlip_refine.sampling import MolecularDynamics
from mlip_refine.workflows import plan
from mlip_refine.workflows.elastic import elastic
from mlip_refine.workflows.free_energy import free_energy
from mlip_refine.workflows.md import md
from mlip_refine.workflows.transition import transition

MD = {"temperature": 300.0, "duration": 80.0, "equilibration": 20.0, "interval": 20.0, "replicas": 3}
LADDER = {
    "windows": 3,
    "replicas": 2,
    "reference": "einstein",
    "fit": 200.0,
    "equilibration": 40.0,
    "production": 160.0,
    "interval": 8.0,
    "max_error": None,
}
TRANSITION = {
    "from": "hcp",
    "to": "bcc",
    "temperature": [1000.0, 1100.0, 1200.0],
    "pressure": [0.0, 2.0],
    "anchor": [{"temperature": 1000.0}, {"temperature": 1200.0, "pressure": 2.0}],
    "duration": 4000.0,
    "equilibration": 400.0,
    "interval": 40.0,
    "replicas": 2,
    "extensions": 2,
}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(plan, "STEPS", 6)


@pytest.fixture
def taken(monkeypatch) -> list[int]:
    """Atoms of the batch, once for every step that is taken."""
    counted: list[int] = []
    step = MolecularDynamics._step

    def count(self: Any, *given: Any) -> Any:
        counted.append(len(self.state.positions))
        return step(self, *given)

    monkeypatch.setattr(MolecularDynamics, "_step", count)
    return counted


def announced(record: plan.PlanRecord) -> int:
    return sum(stage.atoms * stage.steps for stage in record.stages)


def test_md_takes_the_steps_that_were_announced(tiny, tmp_path, taken):
    config = tiny(md=MD | {"identity": "none"}, losses=[])
    before = {path.name for path in tmp_path.iterdir()}
    record = md.dry_run(config)
    assert {path.name for path in tmp_path.iterdir()} == before
    (stage,) = record.stages
    assert (stage.systems, stage.atoms, stage.steps, stage.frames) == (6, 6 * 16, 25, 5)
    assert {point.n_atoms for point in stage.points} == {16}
    assert len(taken) == plan.WARM_UP + 6
    assert record.hours == pytest.approx(96 * 25 / record.atom_steps_per_second / 3600)
    assert record.frames_memory_bytes > 0
    assert record.process_memory_bytes > 1e8
    taken.clear()
    md(config)
    assert sum(taken) == announced(record)
    written = sum(path.stat().st_size for path in (tmp_path / "runs" / "tiny" / "frames").iterdir())
    assert 0.5 * record.disk_bytes < written < 1.2 * record.disk_bytes


def test_free_energy_takes_the_steps_that_were_announced(tiny, tmp_path, taken):
    config = tiny(free_energy=LADDER)
    record = free_energy.dry_run(config)
    assert not (tmp_path / "runs").exists()
    names = [stage.name for stage in record.stages]
    assert names == ["cells", "free-energy, reference", "free-energy, windows"]
    # The cell of hcp is fixed.
    assert [stage.systems for stage in record.stages] == [2, 4, 12]
    assert record.hours == record.hours_at_most
    taken.clear()
    free_energy(config)
    assert sum(taken) == announced(record)


def test_transition_announces_ladders_extensions_and_anchors(tiny, tmp_path):
    phases = {"hcp": {"cell_freedom": "hexagonal"}}
    config = tiny(phases=phases, transition=TRANSITION, free_energy=LADDER)
    record = transition.dry_run(config)
    assert not (tmp_path / "runs").exists()
    ladder, extensions, reference, windows = record.stages
    assert (ladder.systems, ladder.steps, ladder.frames) == (2 * 3 * 2 * 2, 100 + 1000, 100)
    assert (extensions.systems, extensions.steps, extensions.if_needed) == (2 * 2 * 2, 2 * 1100, True)
    assert (reference.systems, reference.steps) == (2 * 2 * 2, 10 + 50)
    assert (windows.systems, windows.windows, windows.steps) == (3 * 2 * 2 * 2, 3, 10 + 40)
    speed = record.atom_steps_per_second * 3600
    hours = [16 * stage.systems * stage.steps / speed for stage in record.stages]
    assert [stage.hours for stage in record.stages] == pytest.approx(hours)
    assert record.hours_at_most - record.hours == pytest.approx(hours[1])
    assert ladder.points[0].temperature_K == 1000.0


def test_transition_announces_liquids_and_boxes(tiny, tmp_path):
    melt = {"melt": {"from": "bcc", "temperature": 3000.0, "duration": 600.0}, "identity": "liquid"}
    boxes = {"n_atoms": 1200, "starts": [1500.0, 1700.0], "pressure": [0.0, 2.0], "duration": 1000.0}
    section = TRANSITION | {"from": "bcc", "to": "liquid", "replicas": 1, "extensions": 0}
    config = tiny(
        phases={"bcc": {"n_atoms": 54}, "liquid": melt},
        transition=section | {"coexistence": boxes},
        free_energy=LADDER | {"finite_size": "limit"},
        sampling={"timestep": 2.0},
    )
    record = transition.dry_run(config)
    assert not (tmp_path / "runs").exists()
    stages = {stage.name: stage for stage in record.stages}
    molten = stages["melt, 600 fs hot and as long cool"]
    # Six states of the liquid, each once, hot and cool: a third without frames, and frames every 10 fs.
    assert (molten.systems, molten.steps) == (6, 2 * (100 + 40 * 5))
    assert stages["ladder"].systems == 12
    assert stages["anchors, windows"].systems == 3 * 2 * 2
    free = stages["coexistence"]
    assert (free.systems, free.steps) == (2, 2 * 1000 / 2)
    assert free.atoms == pytest.approx(2 * 1200, rel=0.2)
    paths = stages["anchors, windows of liquids"]
    assert (paths.systems, paths.windows, paths.steps) == (9 * 2 * 2, 9, 20 + 20 * 4)
    assert "9 are assumed" in record.notes[1]


def test_a_part_of_a_large_batch_is_timed(tiny, monkeypatch):
    monkeypatch.setitem(plan.MOST_ATOMS, "cpu", 40)
    record = md.dry_run(tiny(md=MD | {"identity": "none"}, losses=[]))
    assert record.timed_atoms == 32
    assert record.stages[0].atoms == 96


def test_a_busy_machine_is_named():
    timing = plan._Timing(2.0, 100, 50, 0.1, 0.95)
    cpu, gpu = (plan.torch.device(kind) for kind in ("cpu", "cuda"))
    assert plan._busy(cpu, timing) == ()
    busy = replace(timing, cores=0.25)
    assert "this process had 25% of a processor" in plan._busy(cpu, busy)[0]
    assert plan._busy(gpu, busy) == ()


def test_bad_input_is_refused_as_in_a_run(tiny):
    with pytest.raises(InputError, match="no section md"):
        md.dry_run(tiny())
    with pytest.raises(MlipRefineError, match="elastic has no dry run"):
        elastic.dry_run(config_from_dict({"name": "x", "potential": {"model": "m"}}))


def run(words: list[str], monkeypatch: Any) -> object:
    monkeypatch.setattr(sys, "argv", ["mlip-refine", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code or 0


def test_command_line(tiny, tiny_data, tmp_path, monkeypatch, capsys):
    tiny()
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(tiny_data(tmp_path, md=MD | {"identity": "none"}, losses=[])))
    before = {each.name for each in tmp_path.iterdir()}
    assert run(["md", str(path), "--dry-run"], monkeypatch) == 0
    text = capsys.readouterr().out
    assert "what md would sample" in text
    assert "nothing was written" in text
    assert "atom·steps/s" in text
    assert run(["md", str(path), "--dry-run", "--json"], monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["stages"][0]["steps"] == 25
    assert {each.name for each in tmp_path.iterdir()} == before
    assert run(["elastic", str(path), "--dry-run"], monkeypatch) == 2
    assert "No such option" in capsys.readouterr().err
