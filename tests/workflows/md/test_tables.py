"""The tables and figures of `md`, from its files."""

import json
from dataclasses import replace

import pytest
from rich.console import Console

from mlip_refine.errors import InputError
from mlip_refine.quantities import Measured
from mlip_refine.workflows.md.figures import write_md_figures
from mlip_refine.workflows.md.records import Average, MDPoint, MDResult, Speed, read_md
from mlip_refine.workflows.md.tables import print_md

QUANTITIES = {"energy": "eV/atom", "enthalpy": "eV/atom", "volume": "Å³/atom", "density": "g/cm³"}
QUANTITIES |= {"pressure": "GPa", "a": "Å", "b": "Å", "c": "Å", "alpha": "°", "beta": "°", "gamma": "°"}


def average(value, se, unit, independent):
    return Average.of(Measured(value, se, unit), independent_frames=independent)


def averages():
    found = {name: average(4.5, 0.012, unit, 41.5) for name, unit in QUANTITIES.items()}
    found |= {name: average(90.0, 0.0, "°", None) for name in ("alpha", "beta", "gamma")}
    few = "the average of {} rests on {} independent samples"
    found["volume"] = Average.refuse("Å³/atom", few.format("volume", 7), independent_frames=7.0)
    found["pressure"] = Average.refuse("GPa", few.format("pressure", 3), independent_frames=3.0)
    return found


def point(name):
    return MDPoint(
        name=name,
        phase="hcp",
        n_atoms=54,
        temperature_K=300.0,
        pressure_GPa=0.0,
        ensemble="npt",
        thermostat="langevin",
        cell_freedom="anisotropic",
        identity="structure",
        timestep_fs=4.0,
        interval_fs=100.0,
        friction_per_ps=5.0,
        barostat_time_fs=480.0,
        replicas=2,
        steps=100,
        equilibration_ps=0.1,
        frames_kept=5,
        frames_discarded=1,
        averages=averages(),
        verdicts=(f"{name}, replica 1, step 100: set back to step 75 (restart 1 of 3), it overheated",),
    )


@pytest.fixture
def result(tmp_path):
    speed = Speed(steps=100, seconds=20.0, atom_steps_per_s=1080.0, device="cpu")
    return MDResult(tmp_path, "run", "abc", (point("hcp-300K-0GPa"), point("hcp-600K-0GPa")), speed)


def write(result):
    (result.folder / "md.json").write_text(json.dumps(result.files()["md.json"]))
    head = ["point", "replica", "time_ps", "kept", *(f"{n} ({u})" for n, u in QUANTITIES.items())]
    lines = [",".join(head)]
    for p in result.points:
        for replica in range(2):
            for frame in range(4):
                kept = int((replica, frame) != (1, 3))
                values = ["" if name == "pressure" else f"{frame + 0.5}" for name in QUANTITIES]
                lines.append(",".join([p.name, str(replica), f"{0.1 * (frame + 1)}", str(kept), *values]))
    (result.folder / "series.csv").write_text("\n".join(lines) + "\n")


def test_results_read_back_equal(result):
    write(result)
    again = read_md(result.folder)
    assert again.points == result.points
    assert again["hcp-600K-0GPa"].averages["energy"].measured == Measured(4.5, 0.012, "eV/atom")
    with pytest.raises(KeyError):
        again["hcp-700K-0GPa"]


def test_tables_name_units_errors_refusals_and_verdicts(result):
    console = Console(width=80)
    with console.capture() as captured:
        print_md(console, result)
    text = captured.get()
    rows = [line.split() for line in text.splitlines()]
    assert ["hcp-300K-0GPa", "npt", "5/6", "4.500(12)", "4.500(12)", "-"] in rows
    assert ["hcp-300K-0GPa", "-", *["4.500(12)"] * 4] in rows
    assert "angles" not in text
    for unit in set(QUANTITIES.values()) - {"°"}:
        assert unit in text
    least = "no volume, pressure: the average of pressure rests on 3 independent samples"
    assert f"note, hcp-300K-0GPa: {least}\n" in text
    assert "note, hcp-600K-0GPa, replica 1, step 100: set back to step 75 (restart 1 of 3), it overh" in text
    assert "1.08e+03 atom·steps/s on cpu, 100 steps in 20 s" in text


def test_angles_are_told_where_they_move(result):
    moving = averages() | {"gamma": average(119.9, 0.2, "°", 20.0)}
    points = (result.points[0].model_copy(update={"averages": moving}), result.points[1])
    console = Console(width=80)
    with console.capture() as captured:
        print_md(console, replace(result, points=points))
    rows = [line.split() for line in captured.get().splitlines()]
    assert ["hcp-300K-0GPa", "90", "90", "119.90(20)"] in rows
    assert ["hcp-600K-0GPa", "90", "90", "90"] not in rows


def test_a_figure_for_every_point(result):
    write(result)
    files = write_md_figures(result.folder)
    assert [file.name for file in files] == ["hcp-300K-0GPa.png", "hcp-600K-0GPa.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("md.json", None, "the result file is missing"),
        ("md.json", "{}", "this is no result of md"),
        ("md.json", "[", "this is no result of md"),
        ("series.csv", None, "the series cannot be read"),
        ("series.csv", "a,b\n1,2\n", "the series cannot be read"),
    ],
)
def test_broken_files_are_named(result, name, content, message):
    write(result)
    (result.folder / name).unlink()
    if content is not None:
        (result.folder / name).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        write_md_figures(result.folder)
    assert name in str(error.value)
