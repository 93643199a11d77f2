"""Elastic constants at temperatures: one table for every phase and method, and the file."""

import io
import json

import pytest
from rich.console import Console

from mlip_refine.errors import InputError
from mlip_refine.quantities import Measured
from mlip_refine.workflows.elastic.records import ElasticResult, ThermalElasticPoint, read_thermal_elastic
from mlip_refine.workflows.elastic.tables import print_thermal_elastic


def _gpa(**values: float) -> dict[str, Measured]:
    return {name: Measured(value, 1.0, "GPa") for name, value in values.items()}


HCP = ThermalElasticPoint(
    name="hcp-300K-0GPa",
    phase="hcp",
    method="fluctuation",
    kind="adiabatic",
    temperature_K=300.0,
    lattice_A=(2.95, 4.68),
    n_atoms=16,
    frames=36,
    atom_steps=6720,
    targets=_gpa(C11=162, C12=92, C13=69, C33=181, C44=47),
    verdicts=(),
    constants=_gpa(C11=161, C12=91, C13=68, C33=182, C44=48),
    isothermal=_gpa(C11=160, C12=90, C13=67, C33=181, C44=48),
    stress_strain=_gpa(C11=163, C12=93, C13=66, C33=184, C44=49),
    moduli=_gpa(K=110, G=44) | {"nu": Measured(0.32, 0.01, "")},
    pressure=Measured(-2.0, 0.1, "GPa"),
    rest_strain={axis: Measured(-0.01, 0.002, "") for axis in ("xx", "yy", "zz")},
)
CUBIC = {name: _gpa(C11=140, C12=100, C44=40) for name in ("constants", "isothermal", "stress_strain")}
BCC = HCP.model_copy(update={"name": "bcc-300K-0GPa", "phase": "bcc", "lattice_A": (), "targets": {}} | CUBIC)
STRAINED = HCP.model_copy(
    update={"method": "deformation", "kind": "isothermal", "moduli": {}, "rest_strain": {}}
)
REFUSED = ThermalElasticPoint(
    **{name: getattr(HCP, name) for name in ("name", "phase", "method", "kind", "lattice_A", "n_atoms")},
    **{name: getattr(HCP, name) for name in ("frames", "atom_steps", "targets", "verdicts")},
    temperature_K=900.0,
    refused="the stress rests on 3 samples",
)
POINTS = (HCP, REFUSED, STRAINED, BCC)


def _printed(points: tuple[ThermalElasticPoint, ...]) -> list[list[str]]:
    console = Console(file=io.StringIO(), width=140)
    print_thermal_elastic(console, points)
    return [line.split() for line in console.file.getvalue().splitlines()]


def test_every_phase_and_method_has_a_table_of_its_own_constants():
    """A cubic crystal after a hexagonal one has fewer columns."""
    lines = _printed(POINTS)
    assert ["hcp:", "adiabatic", "constants,", "GPa,", "by", "fluctuation"] in lines
    assert ["hcp:", "isothermal", "constants,", "GPa,", "by", "deformation"] in lines
    assert ["bcc:", "adiabatic", "constants,", "GPa,", "by", "fluctuation"] in lines
    assert ["T,", "K", "C11", "C12", "C44", "K", "G", "nu", "P"] in lines
    assert ["300", "C", "140.0(1.0)", "100.0(1.0)", "40.0(1.0)", "-2.00(10)"] in lines


def test_measured_values_stand_below_the_coefficients_that_they_are():
    lines = _printed((HCP,))
    row = next(i for i, line in enumerate(lines) if line[:1] == ["B"])
    assert lines[row][1:4] == ["163.0(1.0)", "93.0(1.0)", "66.0(1.0)"]
    assert lines[row + 1] == ["measured", "162", "92", "69", "181", "47"]


def test_what_is_refused_says_why():
    lines = _printed(POINTS)
    assert ["900", "refused"] in lines
    assert ["hcp-300K-0GPa,", "fluctuation:", "the", "stress", "rests", "on", "3", "samples"] in lines


def test_points_come_back_from_the_file(tmp_path):
    document = ElasticResult(tmp_path, "run", "abc", (), POINTS).files()["thermal_elastic.json"]
    (tmp_path / "thermal_elastic.json").write_text(json.dumps(document))
    assert read_thermal_elastic(tmp_path) == POINTS
    first, refused, *_ = document["points"]
    assert first["rest_lattice"]["a"]["value"] == pytest.approx(2.95 * 0.99)
    assert refused["constants"] is refused["pressure"] is refused["rest_lattice"] is None
    assert refused["refused"] == "the stress rests on 3 samples"


def test_another_file_is_refused(tmp_path):
    (tmp_path / "thermal_elastic.json").write_text('{"points": [{"name": "x"}]}')
    with pytest.raises(InputError, match="no result of elastic constants"):
        read_thermal_elastic(tmp_path)


def test_no_digit_is_lost_in_a_narrow_terminal():
    console = Console(file=io.StringIO(), width=60)
    print_thermal_elastic(console, (HCP,))
    assert "…" not in console.file.getvalue()
