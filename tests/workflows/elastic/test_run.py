"""`elastic`: a real run, any frame and box of a crystal, refusals, the printed tables."""

import json
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase.build import bulk
from rich.console import Console

import mlip_refine
from mlip_refine import cli
from mlip_refine.config import Config, config_from_dict
from mlip_refine.errors import InputError
from mlip_refine.workflows.elastic.records import ElasticResult, read_elastic
from mlip_refine.workflows.elastic.tables import print_elastic


def _data(folder: Path, **elastic: Any) -> dict[str, Any]:
    hcp = {"prototype": "hcp", "element": "Ti", "n_atoms": 2, "a": 2.93, "c": 4.65}
    return {
        "name": "tiny",
        "device": "cpu",
        "potential": {"model": "titanium-compact", "default_dtype": "float32"},
        "phases": {
            "hcp": hcp,
            "held": hcp | {"cell_freedom": "fixed"},
            "turned": {"file": str(folder / "turned.vasp"), "supercell": [1, 2, 1]},
            "bcc": {"prototype": "bcc", "element": "Ti", "n_atoms": 16, "a": 2.8},
            "sheared": {"file": str(folder / "sheared.vasp")},
        },
        "elastic": elastic,
        "output": {"folder": str(folder / "runs")},
    }


def _config(folder: Path, **elastic: Any) -> Config:
    return config_from_dict(_data(folder, **elastic))


def _write_turned(path: Path) -> None:
    """Hcp in another frame and a skew box."""
    turn = np.linalg.qr(np.random.default_rng(4).normal(size=(3, 3)))[0]
    atoms = bulk("Ti", "hcp", a=2.93, c=4.65)
    atoms.set_cell(np.array(atoms.cell) @ (turn * np.linalg.det(turn)).T, scale_atoms=True)
    atoms.set_cell(np.array([[1, 0, 0], [2, 1, 0], [-1, 1, 1]]) @ np.array(atoms.cell), scale_atoms=False)
    ase.io.write(path, atoms, format="vasp")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> ElasticResult:
    folder = tmp_path_factory.mktemp("elastic")
    _write_turned(folder / "turned.vasp")
    sheared = bulk("Ti", "fcc", a=4.1)
    shear = np.eye(3) + 0.03 * (np.ones((3, 3)) - np.eye(3))
    sheared.set_cell(sheared.cell.array @ shear, scale_atoms=True)
    ase.io.write(folder / "sheared.vasp", sheared, format="vasp")
    return mlip_refine.elastic(_config(folder, pressure=["0 GPa", "5 GPa"]))


def test_every_phase_at_every_pressure_and_a_fixed_cell_as_it_is(found: ElasticResult) -> None:
    names = ["hcp-0GPa", "hcp-5GPa", "held", "turned-0GPa", "turned-5GPa", "bcc-0GPa", "bcc-5GPa"]
    names += ["sheared-0GPa", "sheared-5GPa"]
    assert [point.name for point in found.points] == names
    np.testing.assert_allclose(found["hcp-5GPa"].stress_GPa, -5.0 * np.eye(3), atol=1e-8)
    held = found["held"]
    assert held.pressure_GPa is None
    assert held.relaxed == "atoms"
    assert held.volume_A3_per_atom == pytest.approx(bulk("Ti", "hcp", a=2.93, c=4.65).cell.volume / 2)
    assert abs(held.stress_GPa[0][0]) > 0.1
    assert found["hcp-5GPa"].volume_A3_per_atom < found["hcp-0GPa"].volume_A3_per_atom


@pytest.mark.parametrize("pressure", [0, 5])
def test_a_crystal_in_another_frame_and_box_has_the_same_tables(found: ElasticResult, pressure: int) -> None:
    one, other = found[f"hcp-{pressure}GPa"], found[f"turned-{pressure}GPa"]
    assert other.n_atoms_given == 4
    assert other.n_atoms == one.n_atoms == 2
    assert other.space_group == one.space_group == "P6_3/mmc"
    for name in ("constants_GPa", "clamped_GPa", "stress_strain_GPa", "stress_GPa"):
        np.testing.assert_allclose(getattr(other, name), getattr(one, name), rtol=0, atol=1e-6)
    assert other.energy_eV_per_atom == pytest.approx(one.energy_eV_per_atom, abs=1e-10)


def test_constants_moduli_and_stability_belong_together(found: ElasticResult) -> None:
    hcp, bcc = found["hcp-5GPa"], found["bcc-0GPa"]
    assert set(hcp.independent_GPa) == {"C11", "C12", "C13", "C33", "C44"}
    c, b = np.array(hcp.constants_GPa), np.array(hcp.stress_strain_GPa)
    assert hcp.independent_GPa["C13"] == pytest.approx(c[0, 2])
    assert c[5, 5] == pytest.approx((c[0, 0] - c[0, 1]) / 2)
    np.testing.assert_allclose(np.diag(b - c), -5.0, atol=1e-6)
    assert hcp.clamped_GPa[0][0] - c[0, 0] > 1.0
    voigt, reuss, hill = (hcp.moduli[name] for name in ("voigt", "reuss", "hill"))
    assert voigt.bulk_GPa == pytest.approx(b[:3, :3].sum() / 9)
    assert reuss.shear_GPa < hill.shear_GPa < voigt.shear_GPa
    assert hcp.stable
    assert not bcc.stable
    c11, c12 = bcc.independent_GPa["C11"], bcc.independent_GPa["C12"]
    assert bcc.stability_GPa[0] == pytest.approx(c11 - c12)
    assert list(bcc.moduli) == ["voigt"]


def test_the_result_file_holds_all_of_it(found: ElasticResult) -> None:
    assert read_elastic(found.folder) == found
    data = json.loads((found.folder / "elastic.json").read_text())
    assert [point["stable"] for point in data["points"]] == [point.stable for point in found.points]
    crystals = ase.io.read(found.folder / "crystals.extxyz", index=":")
    assert [atoms.info["name"] for atoms in crystals] == [point.name for point in found.points]
    for atoms, point in zip(crystals, found.points, strict=True):
        np.testing.assert_allclose(np.array(atoms.cell), point.cell_A, atol=1e-7)
    # In the standard axes c is along z.
    assert abs(np.array(crystals[3].cell)[2, 2]) == pytest.approx(found["turned-0GPa"].cell_A[2][2])
    (found.folder / "elastic.json").write_text("{}")
    try:
        with pytest.raises(InputError, match="no result of elastic"):
            read_elastic(found.folder)
    finally:
        (found.folder / "elastic.json").write_text(json.dumps(data))


def test_the_tables_show_the_tensor_the_moduli_and_what_is_wrong(found: ElasticResult) -> None:
    text = StringIO()
    print_elastic(Console(file=text, width=80), found)
    shown = text.getvalue()
    c44, bulk_modulus = found["hcp-0GPa"].constants_GPa[3][3], found["hcp-0GPa"].moduli["hill"].bulk_GPa
    lines = [line.split() for line in shown.splitlines()]
    assert ["yz", "0.0", "0.0", "0.0", f"{c44:.1f}", "0.0", "0.0"] in lines
    assert any(line[:2] == ["hill", f"{bulk_modulus:.1f}"] for line in lines)
    assert "-0.0" not in shown
    assert "bcc-0GPa: Im-3m, 1 atom (of 16 given)" in shown
    assert "note, bcc-0GPa: unstable, a strain has the stiffness" in shown
    assert "note, hcp" not in shown
    note = "note, sheared-0GPa: relaxation changed the space group from R-3m to Fm-3m"
    assert note in " ".join(shown.split())
    given, rest = found["sheared-0GPa"].given, found["sheared-0GPa"].lattice
    assert (given.space_group, rest.space_group) == ("R-3m", "Fm-3m")
    a = rest.conventional_A_deg[0]
    volume = 4 * found["sheared-0GPa"].volume_A3_per_atom
    assert a**3 == pytest.approx(volume)
    assert rest.primitive_A_deg == pytest.approx([a / 2**0.5] * 3 + [60.0] * 3)
    words = f"conventional cell a {a:.4f} Å; primitive cell a {a / 2**0.5:.4f} Å, α 60°"
    assert words in " ".join(shown.split())
    hcp = found["hcp-0GPa"].lattice.primitive_A_deg
    words = f"conventional and primitive cell a {hcp[0]:.4f}, c {hcp[2]:.4f} Å, γ 120°"
    assert words in " ".join(shown.split())
    assert "…" not in shown


def test_raw_tensors_differ_from_projected_ones_by_rounding(tmp_path: Path, found: ElasticResult) -> None:
    raw = mlip_refine.elastic(_config(tmp_path, phases=["hcp"], symmetrise=False))
    np.testing.assert_allclose(
        raw["hcp-0GPa"].constants_GPa, found["hcp-0GPa"].constants_GPa, rtol=0, atol=1e-6
    )
    assert 0 < raw["hcp-0GPa"].asymmetry_GPa < 1e-6


@pytest.mark.parametrize(
    ("elastic", "message"),
    [
        ({"phases": ["hpc"]}, "Did you mean 'hcp'"),
        ({"phases": ["bcc", "bcc"]}, "values that differ"),
        ({"relax": "atoms", "pressure": [5.0]}, "relax: atoms keeps the cell"),
    ],
)
def test_bad_input_is_refused(tmp_path: Path, elastic: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        mlip_refine.elastic(_config(tmp_path, **elastic))
    assert not (tmp_path / "runs").exists()


def test_liquids_and_empty_configs_are_refused(tmp_path: Path) -> None:
    data = _data(tmp_path)
    data["phases"] = {"melt": data["phases"]["bcc"] | {"identity": "liquid"}}
    with pytest.raises(InputError, match="is a liquid"):
        mlip_refine.elastic(config_from_dict(data))
    with pytest.raises(InputError, match="has no phases"):
        mlip_refine.elastic(config_from_dict(data | {"phases": {}}))


def test_the_command_line_prints_tables_and_overwrites_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "name: run\npotential: {model: titanium-compact}\n"
        "phases: {hcp: {prototype: hcp, element: Ti, n_atoms: 2, a: 2.93 Å, c: 4.65 Å}}\n"
        f"output: {{folder: {tmp_path / 'runs'}}}\n"
    )
    (tmp_path / "config.yaml").write_text(text)
    monkeypatch.setattr(sys, "argv", ["mlip-refine", "elastic", str(tmp_path / "config.yaml")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    shown = capsys.readouterr().out
    assert "hcp-0GPa: P6_3/mmc, 2 atoms" in shown
    assert "crystals.extxyz" in shown
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "the run folder exists" in capsys.readouterr().err
