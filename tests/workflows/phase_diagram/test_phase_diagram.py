"""`phase-diagram` on made-up transitions whose boundaries are known."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from mlip_refine import cli
from mlip_refine.config import config_from_dict
from mlip_refine.errors import InputError
from mlip_refine.quantities import Measured
from mlip_refine.workflows.phase_diagram import phase_diagram
from mlip_refine.workflows.phase_diagram.records import PhaseDiagramFile, read_phase_diagram
from mlip_refine.workflows.records import Estimate, write_record
from mlip_refine.workflows.transition.records import BoundaryRecord, TransitionFile

PRESSURES = (0.0, 2.5, 5.0)
# T at 0 GPa and slope: hcp-bcc and bcc-liquid as in titanium, and the boundaries that meet hcp-bcc at 4 GPa.
LINES = {("hcp", "bcc"): (1155.0, -30.0), ("bcc", "liquid"): (1940.0, 30.0)}


def finished(folder: Path, one: str, two: str, line: tuple[float, float], **changes: Any) -> Path:
    """The folder of a run whose boundary is a line; `two` is the phase of higher temperatures."""
    start, slope = line
    points = tuple(
        BoundaryRecord(
            pressure_GPa=p,
            temperature=Estimate(value=start + slope * p, se=5.0, unit="K"),
            se_common_K=3.0,
            slope=Measured(slope, 0.0, "K/GPa"),
            delta_s=Measured(0.04, 0.001, "meV/atom/K"),
        )
        for p in PRESSURES
    )
    file = TransitionFile(
        name=folder.name,
        model_hash="abc",
        head="default",
        from_=one,
        to=two,
        convention="thermodynamic limit",
        timestep_fs=3.0,
        seed=1,
        settings={},
        boundary=points,
        anchors=(),
        closures=(),
        differences=(),
        states=(),
    )
    folder.mkdir(exist_ok=True)
    write_record(folder / "transition.json", file.model_copy(update=changes))
    return folder


def titanium(folder: Path, **changes: Any) -> list[str]:
    return [
        str(finished(folder / f"{one}-{two}", one, two, line, **changes))
        for (one, two), line in LINES.items()
    ]


def diagram(folder: Path, transitions: list[str], **section: Any) -> PhaseDiagramFile:
    config = config_from_dict(
        {
            "name": "diagram",
            "base": str(folder),
            "potential": {"model": "titanium-compact"},
            "phase_diagram": {"transitions": transitions, **section},
            "output": {"folder": str(folder / "runs")},
        }
    )
    return phase_diagram(config, resume=True).file


def test_titanium_beside_experiment(tmp_path):
    pressure = {"from": "0 GPa", "to": "6 GPa", "points": 7}
    experiment = "titanium-phase-boundaries"
    file = diagram(tmp_path, titanium(tmp_path), pressure=pressure, experiment=experiment)
    folder = tmp_path / "runs" / "diagram"
    assert read_phase_diagram(folder).as_json() == file.as_json()
    assert {path.name for path in folder.iterdir()} >= {"phase_diagram.png", "phase_diagram.csv"}
    for curve in file.boundaries:
        start, slope = LINES[curve.from_, curve.to]
        # Nothing at 6 GPa, beyond the runs.
        assert [point.pressure_GPa for point in curve.interpolated] == [0, 1, 2, 3, 4, 5]
        for point in curve.interpolated:
            assert point.temperature.value == pytest.approx(start + slope * point.pressure_GPa)
            assert point.temperature.se == pytest.approx(5.0)
            assert point.se_common_K == pytest.approx(3.0)
            assert point.more_stable is None
    rows = (folder / "phase_diagram.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 6
    assert rows[2].split(",")[:4] == ["hcp", "bcc", "1.0", "1125.0"]
    hcp, melting = file.experiment
    assert (hcp.column, melting.column) == ("T_hcp_bcc", "T_melt")
    first = hcp.points[1].deviation
    assert first is not None
    assert (first.value, first.se) == (pytest.approx(1125.0 - 1124.5), pytest.approx(5.0))
    off = [1940 + 30 * p.pressure_GPa - p.temperature.value for p in melting.points]
    assert melting.rms_K == pytest.approx(math.sqrt(sum(x**2 for x in off) / 6))
    assert file.triple_points == ()
    assert any("do not meet" in note for note in file.notes)


def test_three_boundaries_meet_and_their_far_sides_are_metastable(tmp_path):
    # a below b below c; b is squeezed out at 3 GPa, from where on a turns into c.
    lines = {("a", "b"): (1000.0, 20.0), ("b", "c"): (1120.0, -20.0), ("a", "c"): (1060.0, 0.0)}
    runs = [str(finished(tmp_path / "".join(pair), *pair, line)) for pair, line in lines.items()]
    file = diagram(tmp_path, runs)
    (point,) = file.triple_points
    assert point.phases == ("a", "b", "c")
    assert point.boundaries == 3
    assert point.pressure.value == pytest.approx(3.0)
    assert point.temperature.value == pytest.approx(1060.0)
    assert point.mismatch_sigma == pytest.approx(0.0, abs=1e-6)
    third = {curve.title: curve.interpolated for curve in file.boundaries}
    for title, phase, low in (("a to b", "c", False), ("b to c", "a", False), ("a to c", "b", True)):
        for at in third[title]:
            if abs(at.pressure_GPa - 3.0) > 1e-9:
                beyond = at.pressure_GPa < 3.0 if low else at.pressure_GPa > 3.0
                assert at.more_stable == (phase if beyond else None), (title, at.pressure_GPa)
    two = diagram(tmp_path, runs, boundaries=[["b", "a"], ["b", "c"]])
    assert [curve.title for curve in two.boundaries] == ["a to b", "b to c"]
    (point,) = two.triple_points
    assert (point.boundaries, point.mismatch_sigma) == (2, None)
    assert two.boundaries[0].interpolated[-1].more_stable == "c"


def test_before_and_after(tmp_path):
    runs = titanium(tmp_path)
    (tmp_path / "old").mkdir()
    old = titanium(tmp_path / "old", model_hash="old")
    file = diagram(tmp_path, runs, phases=["hcp", "bcc"], compare=[old[0], str(tmp_path / old[1])])
    assert [curve.title for curve in file.boundaries] == ["hcp to bcc"]
    assert [(other.name, other.model_hash) for other in file.others] == [
        ("hcp-bcc", "old"),
        ("bcc-liquid", "old"),
    ]
    again = diagram(tmp_path, runs, compare=str(tmp_path / "runs" / "diagram"))
    assert [curve.title for curve in again.others[0].boundaries] == ["hcp to bcc"]


def test_refused_pressures_are_left_out(tmp_path):
    folder = finished(tmp_path / "run", "hcp", "bcc", (1155.0, -30.0))
    data = json.loads((folder / "transition.json").read_text())
    data["boundary"][1]["temperature"] = {"value": None, "se": None, "unit": "K", "refused": "too noisy"}
    (folder / "transition.json").write_text(json.dumps(data))
    file = diagram(tmp_path, ["run"])
    assert [point.pressure_GPa for point in file.boundaries[0].sampled] == [0.0, 5.0]
    assert file.notes == ("hcp to bcc, 2.5 GPa: too noisy",)
    for point in data["boundary"]:
        point["temperature"] = {"value": None, "se": None, "unit": "K", "refused": "too noisy"}
    (folder / "transition.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"no boundary of hcp and bcc; found .*too noisy"):
        diagram(tmp_path, ["run"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_hash": "xyz"}, "the model differs; found xyz, expected abc"),
        ({"head": "other"}, "the head differs"),
        ({"convention": "cells of 54 atoms"}, "convention of free energies differs; found cells of 54"),
        ({"from_": "bcc", "to": "hcp"}, "two runs have the boundary of bcc and hcp"),
        ({"to": "bcc", "from_": "bcc"}, "is no function of the pressure"),
    ],
)
def test_runs_that_do_not_belong_together(tmp_path, changes, message):
    runs = titanium(tmp_path)
    runs.append(str(finished(tmp_path / "third", "hcp", "liquid", (1500.0, 0.0), **changes)))
    with pytest.raises(InputError, match=message):
        diagram(tmp_path, runs)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"transitions": ["nowhere"]}, r"no finished run of transition; found .*nowhere"),
        ({"phases": ["hpc", "bcc"]}, "no transition has the phase 'hpc'.*Did you mean 'hcp'"),
        ({"phases": ["hcp", "liquid"]}, "no boundary lies between the phases"),
        ({"boundaries": [["hcp", "liquid"]]}, "no transition has the boundary of hcp and liquid"),
        ({"experiment": "titanium-hcp-lattice"}, "first column of the table is not the pressure"),
        ({"experiment": {"table": "titanium-phase-boundaries", "columns": {"bcc-hpc": "T_melt"}}}, "bcc-hcp"),
        (
            {"experiment": {"table": "titanium-phase-boundaries", "columns": {"bcc-hcp": "T_met"}}},
            "no such column",
        ),
        (
            {"experiment": {"table": "titanium-phase-boundaries", "columns": {"bcc-hcp": "P_Stutzmann"}}},
            "P_Stutzmann has no unit of temperature; found unit GPa",
        ),
        ({"compare": "nowhere"}, "no finished run of transition"),
    ],
)
def test_bad_sections(tmp_path, section, message):
    with pytest.raises(InputError, match=message):
        diagram(tmp_path, **({"transitions": titanium(tmp_path)} | section))


def test_other_conventions_are_not_laid_over_it(tmp_path):
    old = finished(tmp_path / "old", "hcp", "bcc", (1155.0, -30.0), convention="cells of 54 atoms")
    with pytest.raises(InputError, match="run old has another convention"):
        diagram(tmp_path, titanium(tmp_path), compare=[str(old)])


def test_a_table_without_the_boundary(tmp_path):
    runs = [str(finished(tmp_path / "run", "fcc", "hcp", (500.0, 10.0)))]
    with pytest.raises(InputError, match="no column of a boundary of the diagram"):
        diagram(tmp_path, runs, experiment="titanium-phase-boundaries")


@pytest.mark.parametrize("bad", [{"value": math.nan, "se": 1.0}, {"value": 5.0, "se": None}])
def test_numbers_that_are_none(tmp_path, bad):
    folder = finished(tmp_path / "run", "hcp", "bcc", (1155.0, -30.0))
    data = json.loads((folder / "transition.json").read_text())
    data["boundary"][0]["temperature"] |= bad
    (folder / "transition.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="is not usable"):
        diagram(tmp_path, ["run"])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "transitions"),
        ({"pressure": {"from": 1.0, "to": 1.0}}, "a pressure above from"),
        ({"boundaries": [["hcp"]]}, "boundaries"),
        ({"experiment": {"columns": None}}, "table"),
    ],
)
def test_wrong_sections_are_refused(section, message):
    node = ({"transitions": ["a"]} if section else {}) | section
    with pytest.raises(InputError, match=message):
        config_from_dict({"name": "x", "potential": {"model": "m"}, "phase_diagram": node})


def test_command_line(tmp_path, monkeypatch, capsys):
    titanium(tmp_path)
    (tmp_path / "x.yaml").write_text(
        "name: x\npotential: {model: titanium-compact}\n"
        "phase_diagram: {transitions: [hcp-bcc, bcc-liquid], experiment: titanium-phase-boundaries}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mlip-refine", "phase-diagram", "x.yaml", "--json"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    out = capsys.readouterr()
    printed = json.loads(out.out)
    assert [curve["to"] for curve in printed["boundaries"]] == ["bcc", "liquid"]
    assert "less experiment" in out.err
    assert "T_melt" in out.err
