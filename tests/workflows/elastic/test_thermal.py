"""Elastic constants at temperatures, as a command and as a loss with a thermal part: small."""

import io
import json
import re

import pytest
from rich.console import Console

from mlip_refine.config import config_from_dict
from mlip_refine.data import kept_rows
from mlip_refine.errors import InputError
from mlip_refine.files import write_json
from mlip_refine.potential import Potential, Work, batching
from mlip_refine.testing import sigma_bound
from mlip_refine.training.streaming import further_probes
from mlip_refine.training.trainer import Trainer
from mlip_refine.workflows.elastic import elastic
from mlip_refine.workflows.elastic.records import read_thermal_elastic
from mlip_refine.workflows.elastic.tables import print_thermal_elastic
from mlip_refine.workflows.finetune import finetune

HCP = {"hcp": {"prototype": "hcp", "element": "Ti", "n_atoms": 16}}
SAMPLING = {"timestep": 4.0, "replicas": 3, "equilibration": 80.0, "interval": 40.0, "frames": 12}
QUICK = SAMPLING | {"interval": 24.0, "min_effective_frames": 2, "dtype": "float32"}
SHORT = QUICK | {"replicas": 2, "frames": 4}
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
    return _config(tmp_path_factory.mktemp("hot"), elastic=section | {"born_every": 4}, sampling=QUICK)


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
        # 3 replicas of 12 frames every 6 steps, for one cell, or with the six strained ones.
        cells = 1 if point.method == "fluctuation" else 7
        assert point.frames == 36 * cells
        # Twenty steps of equilibration before them.
        assert point.atom_steps == 3 * (20 + 12 * 6) * 16 * cells
    assert points[0].targets["C44"].value == pytest.approx(46.66, abs=0.05)
    assert points[0].lattice_A == pytest.approx((2.9506, 4.6788), abs=1e-3)


@pytest.mark.statistical
def test_both_methods_agree_as_far_as_they_know(found):
    """Five constants at two temperatures."""
    for one, other in (found.thermal[:2], found.thermal[2:]):
        for name in CONSTANTS:
            difference = one.isothermal[name] - other.isothermal[name]
            assert abs(difference.value) < sigma_bound(10) * difference.se, (
                name,
                one.isothermal,
                other.isothermal,
            )


@pytest.mark.statistical
def test_the_lattice_at_rest_is_smaller_under_tension(found):
    """The model's own cell is smaller than the measured one: its pressure there is below zero."""
    point = found.thermal[0]
    assert point.pressure.value < -sigma_bound() * point.pressure.se
    for axis, length in zip("ac", point.lattice_A, strict=True):
        rest = point.rest_lattice[axis]
        assert rest.value < length
        assert rest.value == pytest.approx(length, rel=0.03)


@pytest.mark.statistical
def test_under_tension_the_coefficients_are_not_the_constants(found):
    """B11 = C11 + σ_xx, and B44 = C44 + ½(σ_yy + σ_zz): both have the sign of the tension."""
    for point in found.thermal[:2]:
        tension = -point.pressure.value
        for name in ("C11", "C44"):
            more = point.stress_strain[name].value - point.constants[name].value
            assert more == pytest.approx(tension, rel=0.4), (name, point)


def test_moduli_are_those_of_the_coefficients(found):
    """Voigt's bulk modulus is (2 (B11 + B12) + 4 B13 + B33)/9."""
    for point in found.thermal[:2]:
        b = {name: m.value for name, m in point.stress_strain.items()}
        bulk = (2 * (b["C11"] + b["C12"]) + 4 * b["C13"] + b["C33"]) / 9
        assert point.moduli["K"].value == pytest.approx(bulk)
        assert set(point.moduli) == {"K", "G", "E", "nu"}
        assert all(m.se > 0 for m in point.moduli.values())


def test_the_pressure_is_that_of_the_cell_whatever_the_method(found):
    """Not the mean over strained cells, which is another one in the second order of the strain."""
    for own, strained in (found.thermal[:2], found.thermal[2:]):
        assert strained.pressure.value == pytest.approx(own.pressure.value, rel=1e-10)
        assert strained.pressure.se == pytest.approx(own.pressure.se, rel=1e-6)


def test_a_finished_run_is_read_again(hot, found, monkeypatch):
    """No dynamics; and neighbours are listed for the frames only that have a Born term: one in four."""
    lengths = []

    def counted(potential, structures, wanted):
        lengths.append(len(structures))
        return further_probes(potential, structures, wanted)

    monkeypatch.setattr("mlip_refine.workflows.elastic.thermal.further_probes", counted)
    again = elastic(hot, resume=True)
    assert again.thermal == found.thermal
    assert lengths == [9, 9]


def test_tables_name_method_and_kind(found):
    console = Console(file=io.StringIO(), width=140)
    print_thermal_elastic(console, found.thermal)
    text = console.file.getvalue()
    assert "hcp: isothermal constants, GPa, by fluctuation" in text
    assert "by deformation" in text
    assert text.count("measured") == 4


def test_a_state_with_too_few_independent_frames_says_so_and_others_go_on(tmp_path, monkeypatch):
    """The file is there after the first state already."""
    sampling = SHORT | {"min_effective_frames": 8}
    written = []

    def noted(path, document):
        write_json(path, document)
        if path.name == "thermal_elastic.json":
            written.append(len(document["points"]))

    monkeypatch.setattr("mlip_refine.workflows.elastic.run.write_json", noted)
    config = _config(tmp_path, elastic={"temperature": [300, 600]}, sampling=sampling)
    found = elastic(config)
    assert written == [1, 2]
    assert read_thermal_elastic(found.folder) == found.thermal
    for point in found.thermal:
        assert re.search("rests on .* independent samples.* frames", point.refused)
        assert not point.constants
        assert point.pressure is None
    document = json.loads((found.folder / "thermal_elastic.json").read_text())
    assert document["points"][0]["constants"] is None


def test_too_few_frames_with_a_born_term_are_refused(tmp_path):
    """One in eight is one: its spread would be none."""
    config = _config(tmp_path, elastic={"temperature": 300, "born_every": 8}, sampling=SHORT)
    (point,) = elastic(config).thermal
    assert "the Born term of hcp-300K-0GPa-fixed, of one frame in 8, rests on 1 independent" in point.refused
    assert "about 16 frames in place of 8" in point.refused


def test_frames_are_removed_where_the_config_does_not_keep_them(tmp_path):
    output = {"folder": str(tmp_path / "runs"), "figures": False, "keep_frames": False}
    config = _config(tmp_path, elastic={"temperature": 300}, sampling=SHORT, output=output)
    found = elastic(config)
    assert read_thermal_elastic(found.folder) == found.thermal
    assert not (found.folder / "frames").exists()


def test_born_terms_of_an_interrupted_run_are_not_computed_again(tmp_path, monkeypatch):
    """Neither those of the temperature that was done, nor those of the one that was under way."""
    monkeypatch.setitem(batching.CHUNK_ATOMS, "cpu", 1)
    monkeypatch.setattr(kept_rows, "_WORTH", 0.0)
    in_chunks, done, stops = Potential.in_chunks, [], [6]

    def counted(self, work, structures, evaluate):
        for chunk in in_chunks(self, work, structures, evaluate):
            if work is Work.BORN:
                if len(done) in stops:
                    stops.clear()
                    raise KeyboardInterrupt
                done.append(work)
            yield chunk

    monkeypatch.setattr(Potential, "in_chunks", counted)
    settings = {"elastic": {"temperature": [300, 600], "born_every": 2}, "sampling": SHORT}
    config = _config(tmp_path / "parts", **settings)
    with pytest.raises(KeyboardInterrupt):
        elastic(config)
    assert (config.run_folder / "unfinished").is_dir()
    found = elastic(config, resume=True)
    n = len(done)
    assert not (config.run_folder / "unfinished").exists()
    done.clear()
    assert elastic(_config(tmp_path / "whole", **settings)).thermal == found.thermal
    assert len(done) == n > 6


def test_a_finished_run_goes_on_to_more_frames(tmp_path, monkeypatch):
    """Two segments of two frames are left as they are, also by other packages, and a third follows them."""
    monkeypatch.setattr("mlip_refine.workflows.elastic.thermal.SEGMENT", 48.0)
    longer = {"elastic": {"temperature": 300, "born_every": 1}, "sampling": SHORT | {"frames": 6}}
    short = _config(tmp_path, **longer | {"sampling": SHORT})
    (first,) = elastic(short).thermal
    frames = short.run_folder / "frames"
    written = {path.name: path.stat().st_mtime_ns for path in frames.iterdir()}
    monkeypatch.setattr("mlip_refine.workflows.base.packages", lambda: {"torch": "another version"})
    (grown,) = elastic(_config(tmp_path, **longer), resume=True).thermal
    assert (first.frames, grown.frames) == (8, 12)
    assert len(written) == 2
    assert len(list(frames.iterdir())) == 3
    assert {name: (frames / name).stat().st_mtime_ns for name in written} == written
    with pytest.raises(InputError, match=r"cannot be made shorter(.|\n)*sampling\.frames 4"):
        elastic(short, resume=True)


def test_a_table_for_several_phases_is_refused(tmp_path):
    phases = HCP | {"bcc": {"prototype": "bcc", "element": "Ti", "n_atoms": 16}}
    section = {"temperature": 300, "table": "titanium-hcp-elastic"}
    config = _config(tmp_path, phases=phases, elastic=section)
    with pytest.raises(InputError, match=r"belongs to one phase(.|\n)*for hcp, bcc"):
        elastic(config)
    assert not (tmp_path / "runs").exists()


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
    update = Trainer.update

    def interrupted(self):
        report = update(self)
        if report.step == 1:
            raise KeyboardInterrupt
        return report

    monkeypatch.setattr(Trainer, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune(_static(tmp_path / "parts", 3))
    monkeypatch.undo()
    parts = finetune(_static(tmp_path / "parts", 3), resume=True)
    assert (whole.folder / "log.jsonl").read_text() == (parts.folder / "log.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.statistical
def test_static_constants_after_training_are_those_of_a_fresh_run(tmp_path):
    """B44 in the cell of the phase, under tension: as trained, its thermal part is of an earlier model."""
    sampling = SAMPLING | {"replicas": 4, "equilibration": 400.0, "frames": 60, "dtype": "float32"}
    loss = {
        "type": "elastic_constants",
        "phase": "hcp",
        "method": "static",
        "targets": [{"temperature": 500.0, "constants": {"C44": 45.0}, "uncertainty": 1.0}],
    }
    run = finetune(_config(tmp_path, losses=[loss], sampling=sampling, training={"steps": 15}))
    course = run.summary.measured["elastic_constants"]["C44 500 K"]
    again = {"potential": {"model": str(run.model), "default_dtype": "float64"}, "sampling": sampling}
    (fresh,) = elastic(_config(tmp_path, name="fresh", seed=9, elastic={"temperature": 500}, **again)).thermal
    difference = course.after - fresh.stress_strain["C44"]
    assert course.after.value > course.first.value + 5.0
    assert 0 < difference.se < 3.0
    assert abs(difference.value) < sigma_bound(dof=20) * difference.se
