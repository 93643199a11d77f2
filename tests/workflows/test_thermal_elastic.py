"""Elastic constants at temperatures, as a command and as a loss with a thermal part: small."""

import io
import json

import pytest
from rich.console import Console

from mlip_refine.config import config_from_dict
from mlip_refine.errors import StatisticsError
from mlip_refine.report import print_thermal_elastic, read_thermal_elastic
from mlip_refine.training.loop import Trainer
from mlip_refine.workflows.elastic import elastic
from mlip_refine.workflows.finetune import finetune

HCP = {"hcp": {"prototype": "hcp", "element": "Ti", "n_atoms": 16}}
SAMPLING = {"timestep": 4.0, "replicas": 3, "equilibration": 80.0, "interval": 40.0, "frames": 12}
CONSTANTS = {"C11", "C12", "C13", "C33", "C44"}


def _config(folder, **changes):
    return config_from_dict(
        {
            "name": "small",
            "seed": 2,
            "device": "cpu",
            "potential": {"model": "titanium-compact", "default_dtype": "float64"},
            "phases": HCP,
            "sampling": SAMPLING | {"min_effective_frames": 2, "dtype": "float64"},
            "output": {"folder": str(folder / "runs"), "figures": False},
            **changes,
        },
        base=folder,
    )


@pytest.fixture(scope="module")
def hot(tmp_path_factory):
    section = {
        "temperature": [300, 900],
        "table": "titanium-hcp-elastic",
        "method": ["fluctuation", "deformation"],
        "kind": "isothermal",
    }
    return _config(tmp_path_factory.mktemp("hot"), elastic=section | {"born_every": 4})


@pytest.fixture(scope="module")
def found(hot):
    return elastic(hot)


def test_every_cell_has_its_constants_and_what_was_measured(hot, found):
    points = read_thermal_elastic(found.folder)
    assert points == found.thermal
    assert [(p.temperature_K, p.method) for p in points] == [
        (t, m) for t in (300.0, 900.0) for m in ("fluctuation", "deformation")
    ]
    for point in points:
        assert set(point.constants) == set(point.targets) == CONSTANTS
        assert point.n_atoms == 16
        assert all(m.se > 0 for m in point.constants.values())
        # 3 replicas of 12 frames every 10 steps, for one cell or for the six strained ones.
        cells = 1 if point.method == "fluctuation" else 6
        assert point.frames == 36 * cells
        assert point.atom_steps == 36 * 10 * 16 * cells
    assert points[0].targets["C44"].value == pytest.approx(46.66, abs=0.05)
    assert points[0].lattice_A == pytest.approx((2.9506, 4.6788), abs=1e-3)


def test_both_methods_agree_as_far_as_they_know(found):
    """Within 4σ: five constants at two temperatures."""
    for one, other in (found.thermal[:2], found.thermal[2:]):
        for name in CONSTANTS:
            difference = one.isothermal[name] - other.isothermal[name]
            assert abs(difference.value) < 4 * difference.se, (name, one.isothermal, other.isothermal)


def test_the_lattice_at_rest_is_smaller_under_tension(found):
    """The model's own cell is smaller than the measured one: its pressure there is below zero."""
    point = found.thermal[0]
    assert point.pressure.value < -3 * point.pressure.se
    for axis, length in zip("ac", point.lattice_A, strict=True):
        rest = point.rest_lattice[axis]
        assert rest.value < length
        assert rest.value == pytest.approx(length, rel=0.03)


def test_a_finished_run_is_read_again(hot, found):
    again = elastic(hot, resume=True)
    assert again.thermal == found.thermal


def test_tables_name_method_and_kind(found):
    console = Console(file=io.StringIO(), width=140)
    print_thermal_elastic(console, found.thermal)
    text = console.file.getvalue()
    assert "isothermal constants, GPa, by fluctuation" in text
    assert "by deformation" in text
    assert text.count("measured") == 4


def test_too_few_independent_frames_are_refused(tmp_path):
    sampling = SAMPLING | {"min_effective_frames": 36}
    config = _config(tmp_path, elastic={"temperature": 300}, sampling=sampling)
    with pytest.raises(StatisticsError, match="frames"):
        elastic(config)


def _static(folder, steps):
    loss = {
        "type": "elastic_constants",
        "phase": "hcp",
        "method": "static",
        "table": "titanium-hcp-elastic",
        "temperatures": [300, 600, 900],
        "pressure": 0,
        "every": 2,
        "born_every": 4,
    }
    training = {"steps": steps, "learning_rate": 1e-3}
    return _config(folder, losses=[loss], training=training)


@pytest.mark.slow
def test_a_static_loss_learns_what_temperature_adds_and_resumes_bit_for_bit(tmp_path):
    """Five updates at once, and three, then two more: the draws at 0, 2 and 4 are shared by neither."""
    whole = finetune(_static(tmp_path / "whole", 5))
    first = finetune(_static(tmp_path / "parts", 3))
    parts = finetune(_static(tmp_path / "parts", 5), resume=True)
    assert first.folder == parts.folder
    logs = [(run.folder / "log.jsonl").read_text() for run in (whole, parts)]
    assert logs[0] == logs[1]
    assert whole.potential.hash == parts.potential.hash
    lines = [json.loads(line) for line in logs[0].splitlines()]
    values = [line["losses"]["elastic_constants"] for line in lines]
    assert values[-1] < values[0]
    steps = [line["md_steps"] for line in lines]
    assert steps[0] == steps[1] > 0
    assert steps[2] == steps[3] == 2 * steps[0]


@pytest.mark.slow
def test_a_draw_that_was_interrupted_is_finished(tmp_path, monkeypatch):
    whole = finetune(_static(tmp_path / "whole", 3))
    update = Trainer._log

    def interrupted(self, *arguments, **named):
        update(self, *arguments, **named)
        if self.step == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune(_static(tmp_path / "parts", 3))
    monkeypatch.undo()
    parts = finetune(_static(tmp_path / "parts", 3), resume=True)
    assert (whole.folder / "log.jsonl").read_text() == (parts.folder / "log.jsonl").read_text()
