"""`phonons`: real runs of titanium, its own calculations as references, refusals, the printed tables."""

import json
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import phonopy
import pytest
from ase.build import bulk
from phonopy import Phonopy
from phonopy.structure.atoms import PhonopyAtoms
from rich.console import Console
from torch import Tensor

import mlip_refine
from mlip_refine import cli, testing
from mlip_refine.config import Config, Phonons, config_from_dict
from mlip_refine.config.sections.phonons import QuasiHarmonic
from mlip_refine.crystals.phonons.conductivity import INTERACTION
from mlip_refine.crystals.phonons.harmonic import HarmonicCrystal, forces
from mlip_refine.crystals.relaxation import Rest
from mlip_refine.data import kept_rows
from mlip_refine.errors import InputError, MlipRefineError
from mlip_refine.potential import Potential, Work, batching
from mlip_refine.workflows.phonons import run as workflow
from mlip_refine.workflows.phonons.point import expansion, find_point, gruneisen_parameters
from mlip_refine.workflows.phonons.records import PhononPoint, PhononResult, read_phonons_json
from mlip_refine.workflows.phonons.store import Store
from mlip_refine.workflows.phonons.tables import print_phonons
from mlip_refine.workflows.phonons.tasks import Task

HCP = {"prototype": "hcp", "element": "Ti", "n_atoms": 16, "a": 2.93, "c": 4.65}
BCC = {"prototype": "bcc", "element": "Ti", "n_atoms": 2, "a": 3.25}


def _config(folder: Path, name: str = "tiny", **phonons: Any) -> Config:
    return config_from_dict(
        {
            "name": name,
            "device": "cpu",
            "potential": {"model": "titanium-compact", "default_dtype": "float32"},
            "phases": {"hcp": HCP, "bcc": BCC},
            "phonons": {**({} if "data" in phonons else {"supercell": "5 Å"}), "mesh": [3, 3, 3], **phonons},
            "output": {"folder": str(folder / "runs")},
        }
    )


def _calculated(path: Path, potential: Potential, symbol: str = "Ti", **lattice: float) -> None:
    """A reference as phonopy would write it, its forces by a potential."""
    atoms = bulk("Ti", "hcp", **lattice)
    unit = PhonopyAtoms(
        symbols=[symbol] * 2, cell=atoms.cell.array, scaled_positions=atoms.get_scaled_positions()
    )
    phonon = Phonopy(unit, np.diag([2, 2, 2]), primitive_matrix=np.eye(3))
    phonon.generate_displacements(distance=0.01)
    cells = []
    for cell in phonon.supercells_with_displacements or []:
        moved = bulk("Ti", "hcp", **lattice).repeat((2, 2, 2))
        moved.set_positions(cell.positions)
        cells.append(moved)
    phonon.forces = forces(potential, cells)
    phonon.save(path)


@pytest.fixture(scope="module")
def titanium() -> Potential:
    return Potential.load("titanium-compact")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, titanium: Potential) -> Path:
    """Two references of hcp titanium, one in a cell that is far from rest."""
    folder = tmp_path_factory.mktemp("data")
    for name, a in (("small", 2.93), ("wide", 3.0)):
        (folder / name).mkdir()
        _calculated(folder / name / "phonopy_params.yaml", titanium, a=a, c=1.587 * a)
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, data: Path) -> PhononResult:
    return mlip_refine.phonons(
        _config(tmp_path_factory.mktemp("run"), data=str(data), cell=["reference", "relaxed"])
    )


def test_phases_come_to_rest_and_both_methods_agree(tmp_path: Path) -> None:
    result = mlip_refine.phonons(_config(tmp_path, method=["hessian", "displacements"]))
    hcp, bcc = result.points
    assert (hcp.name, hcp.n_primitive, bcc.n_primitive) == ("hcp", 2, 1)
    assert hcp.volume_A3_per_atom == pytest.approx(17.09, abs=0.05)
    assert all(p.method_difference is not None and p.method_difference < 1e-3 for p in result.points)
    assert hcp.properties["imaginary"] == 0
    assert bcc.properties["imaginary"] > 0.01
    assert hcp.reference is None
    assert result.cells == []


def test_a_model_reproduces_its_own_calculations(compared: PhononResult) -> None:
    own = compared.compared("reference")
    assert [p.name for p in own] == ["small", "wide"]
    for point in own:
        assert point.frequency_error_THz is not None
        assert point.frequency_error_THz < 1e-3
        assert point.volume_A3_per_atom == point.reference_volume_A3_per_atom
        assert abs(point.properties["entropy_J_K_mol"] - point.reference["entropy_J_K_mol"]) < 0.01


def test_a_folded_cell_has_the_entropy_of_its_primitive_cell(
    tmp_path: Path, phonons_of: Callable[..., Any], springs: Callable[..., Any]
) -> None:
    """Data whose primitive cell holds four of the crystal: their own entropies count likewise."""
    unit, shells = bulk("Ar", "fcc", a=4.0, cubic=True), {3.0: 2.5}
    potential = springs(unit, {3.0: (2.5, 4.0 / 2**0.5)})
    folded, smallest = (
        phonons_of(unit, (2, 2, 2), lambda atoms: testing.bond_springs(atoms, shells), primitive=primitive)
        for primitive in (np.eye(3), "auto")
    )
    store = Store(tmp_path, "", Phonons(mesh=(5, 5, 5)))
    (tmp_path / "crystals").mkdir()
    points = [
        find_point(potential, Task("Ar", "reference", HarmonicCrystal.of_reference(one), None, one), store)
        for one in (folded, smallest)
    ]
    assert [point.n_primitive for point in points] == [1, 1]
    for key in ("entropy_J_K_mol", "free_energy_kJ_mol", "heat_capacity_J_K_mol"):
        # The folded mesh is finer.
        assert points[0].properties[key] == pytest.approx(points[1].properties[key], rel=0.05)
        assert points[0].properties[key] == pytest.approx(points[0].reference[key], rel=1e-6)


def test_relaxed_cells_have_phonons_of_one_crystal(compared: PhononResult) -> None:
    small, wide = compared.compared("relaxed")
    assert small.volume_A3_per_atom == pytest.approx(wide.volume_A3_per_atom, rel=1e-6)
    assert small.properties["max_THz"] == pytest.approx(wide.properties["max_THz"], abs=1e-3)
    assert wide.frequency_error_THz > 0.1
    assert wide.properties["max_THz"] > wide.reference["max_THz"]


@pytest.mark.slow
def test_expansion_conduction_and_files_for_others(tmp_path: Path) -> None:
    """What hcp carries and unstable bcc does not; phonopy and phono3py read what is exported."""
    result = mlip_refine.phonons(
        _config(
            tmp_path,
            gruneisen=True,
            quasi_harmonic={"temperature": 300, "volumes": [0.98, 0.99, 1.0, 1.01, 1.02]},
            conductivity={"mesh": [3, 3, 3]},
            export=True,
        )
    )
    hcp, bcc = result.points
    assert hcp.refused == {}
    modes = json.loads((result.folder / "crystals" / "hcp-relaxed.json").read_text())["gruneisen_modes"]
    assert len(modes["weights"]) == len(modes["parameters"])
    assert "modes" not in hcp.gruneisen
    assert 0.8 < hcp.gruneisen["mean"][0] < 1.4
    assert hcp.quasi_harmonic["temperatures_K"] == [300.0]
    assert 17.0 < hcp.quasi_harmonic["volume_A3_per_atom"][0] < 17.5
    assert 1 < hcp.conductivity["mean_W_m_K"][0] < 100
    assert "unstable" in bcc.refused["quasi_harmonic"]
    assert "conductivity" in bcc.refused
    loaded = phonopy.load(result.folder / "crystals" / "hcp-relaxed.phonopy.yaml", log_level=0)
    loaded.run_mesh([3, 3, 3], is_gamma_center=True)
    assert loaded.mesh.frequencies.max() == pytest.approx(hcp.properties["max_THz"], abs=1e-4)
    with h5py.File(result.folder / "crystals" / "hcp-relaxed.fc3.hdf5") as file:
        n = hcp.n_atoms
        assert file["fc3"].shape == (2, n, n, 3, 3, 3)
        assert len(file["p2s_map"]) == 2
    files = {name: result.folder / "crystals" / f"hcp-relaxed.{name}.hdf5" for name in ("fc2", "fc3")}
    phono3py = pytest.importorskip("phono3py")
    theirs = phono3py.load(
        result.folder / "crystals" / "hcp-relaxed.phonopy.yaml",
        fc2_filename=files["fc2"],
        fc3_filename=files["fc3"],
        produce_fc=False,
        log_level=0,
    )
    theirs.mesh_numbers = [3, 3, 3]
    theirs.init_phph_interaction(**INTERACTION)
    theirs.run_thermal_conductivity(temperatures=[hcp.conductivity["temperatures_K"][0]], is_isotope=False)
    kappa = theirs.thermal_conductivity.kappa[0, 0, :3].mean()
    assert kappa == pytest.approx(hcp.conductivity["mean_W_m_K"][0], rel=1e-4)
    console = Console(file=StringIO(), width=200)
    print_phonons(console, result)
    for words in ("Grüneisen", "expansion", "W/(m K)", "note, bcc (relaxed): no quasi-harmonic"):
        assert words in console.file.getvalue()
    assert (result.folder / "hcp-relaxed-expansion.png").stat().st_size > 10_000


def test_bands_and_figures_are_beside_the_reference(compared: PhononResult) -> None:
    kept = json.loads((compared.folder / "crystals" / "wide-reference.json").read_text())
    assert list(kept["structures"]["bands"]) == ["reference", "model"]
    assert kept["structures"]["errors"]["mean_THz"] == compared.compared("reference")[1].band_error_THz
    assert compared.compared("reference")[1].band_error_THz < 1e-3
    assert compared.compared("relaxed")[1].band_error_THz > 0.1
    assert kept["structures"]["overlap"] > 0.99
    for name in ("small-reference-bands.png", "wide-relaxed-bands.png", "parity-relaxed.png"):
        assert (compared.folder / name).stat().st_size > 10_000


def test_the_result_file_holds_all_of_it(compared: PhononResult) -> None:
    read = read_phonons_json(compared.folder)
    assert read == compared
    data = json.loads((compared.folder / "phonons.json").read_text())
    errors = data["mean_absolute_errors"]["relaxed"]
    assert errors["materials"] == 2
    expected = np.mean(
        [abs(p.properties["max_THz"] - p.reference["max_THz"]) for p in compared.compared("relaxed")]
    )
    assert errors["max_THz"]["value"] == pytest.approx(expected)


def test_tables_show_values_errors_and_what_they_are_about(compared: PhononResult) -> None:
    console = Console(file=StringIO(), width=160)
    print_phonons(console, compared)
    text = console.file.getvalue()
    for words in ("wide Ti", "relaxed", "mean absolute errors, reference cells, 2 materials", "ω_max", "THz"):
        assert words in text
    assert "smaller by" not in text


def test_a_baseline_is_compared_and_may_be_given_later(
    tmp_path: Path, compared: PhononResult, data: Path
) -> None:
    one = {"data": str(data), "materials": "small", "bands": False}
    alone = mlip_refine.phonons(_config(tmp_path, **one))
    assert alone.baseline is None
    one["baseline"] = str(compared.folder)
    result = mlip_refine.phonons(_config(tmp_path, **one), resume=True)
    assert result.points == alone.points
    assert result.baseline["name"] == "tiny"
    assert result.baseline["cells"]["reference"]["materials"] == 1
    assert "at least 5 cases" in result.baseline["cells"]["reference"]["refused"]
    assert read_phonons_json(result.folder) == result
    with pytest.raises(InputError, match="another mesh or temperature"):
        mlip_refine.phonons(_config(tmp_path, "other", **one | {"mesh": [4, 4, 4]}))
    assert not (tmp_path / "runs" / "other").exists()


def test_what_is_done_is_not_done_again(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Materials may have any names, those of files do not."""
    index = tmp_path / "index.csv"
    index.write_text(f"file,name\n{data / 'small'},../small\n{data / 'wide'},mp-1/PBE\n")
    config = _config(tmp_path, data=str(index))
    found, calls = workflow.find_point, []

    def stops(*args: Any) -> Any:
        if calls:
            raise KeyboardInterrupt
        calls.append(args)
        return found(*args)

    monkeypatch.setattr(workflow, "find_point", stops)
    with pytest.raises(KeyboardInterrupt):
        mlip_refine.phonons(config)
    monkeypatch.setattr(workflow, "find_point", lambda *args: calls.append(args) or found(*args))
    with pytest.raises(InputError, match="run folder exists"):
        mlip_refine.phonons(config)
    result = mlip_refine.phonons(config, resume=True)
    assert [p.name for p in result.points] == ["../small", "mp-1/PBE"]
    assert len(calls) == 2
    names = sorted(file.name for file in (result.folder / "crystals").iterdir())
    assert names == ["..%2Fsmall-reference.json", "mp-1%2FPBE-reference.json"]
    assert (result.folder / "mp-1%2FPBE-reference-bands.png").exists()


def test_an_interrupted_crystal_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of second and third derivatives, also of other volumes, are computed once, to the same bits."""
    pytest.importorskip("phono3py")
    monkeypatch.setitem(batching.CHUNK_ATOMS, "cpu", 50)
    monkeypatch.setattr(kept_rows, "_WORTH", 0.0)
    in_chunks, done, stops = Potential.in_chunks, [], []

    def counted(self: Potential, work: Work, structures: Any, evaluate: Any) -> Any:
        for chunk in in_chunks(self, work, structures, evaluate):
            # Relaxation of the primitive cell has second derivatives of its own.
            if evaluate.__qualname__.startswith("evaluate_rows"):
                if len(done) in stops:
                    stops.clear()
                    raise KeyboardInterrupt
                done.append(work)
            yield chunk

    monkeypatch.setattr(Potential, "in_chunks", counted)
    further = {"gruneisen": True, "conductivity": {"mesh": [2, 2, 2], "temperature": [300.0]}}
    settings = {"phases": "hcp", "bands": False, **further}
    whole = mlip_refine.phonons(_config(tmp_path / "whole", **settings))
    n, second = len(done), done.index(Work.HESSIAN_GRADIENT)
    assert not (whole.folder / "unfinished").exists()
    done.clear()
    config = _config(tmp_path / "parts", **settings)
    # In the first Hessian, in that of another volume, and in the third derivatives.
    for stop in (2, second - 1, n - 2):
        stops.append(stop)
        with pytest.raises(KeyboardInterrupt):
            mlip_refine.phonons(config, resume=True)
        assert len(done) == stop
        assert (tmp_path / "parts" / "runs" / "tiny" / "unfinished").is_dir()
    found = mlip_refine.phonons(config, resume=True)
    assert len(done) == n
    assert found.points == whole.points
    assert not (found.folder / "unfinished").exists()


def test_figures_are_left_out_where_the_config_wants_none(tmp_path: Path) -> None:
    config = _config(tmp_path, phases="hcp")
    quiet = config.model_copy(update={"output": config.output.model_copy(update={"figures": False})})
    result = mlip_refine.phonons(quiet)
    assert list(result.folder.glob("*.png")) == []
    mlip_refine.phonons(config, resume=True)
    assert [file.name for file in result.folder.glob("*.png")] == ["hcp-relaxed-bands.png"]


def test_materials_that_cannot_be_done_are_told_or_refused(tmp_path: Path, titanium: Potential) -> None:
    for name, symbol in (("ti", "Ti"), ("zr", "Zr")):
        (tmp_path / "data" / name).mkdir(parents=True)
        _calculated(tmp_path / "data" / name / "phonopy_params.yaml", titanium, symbol, a=2.93, c=4.65)
    with pytest.raises(InputError, match="does not know every element of 1 crystals; found zr: Zr"):
        mlip_refine.phonons(_config(tmp_path, data=str(tmp_path / "data")))
    assert not (tmp_path / "runs").exists()
    lenient = {"skip_refused": True, "bands": False}
    result = mlip_refine.phonons(_config(tmp_path, "lenient", data=str(tmp_path / "data"), **lenient))
    assert [p.name for p in result.points] == ["ti"]
    assert "does not know" in result.left_out["zr (reference)"]


@pytest.mark.parametrize(
    ("phonons", "message"),
    [
        ({"phases": "hpc"}, "Did you mean 'hcp'"),
        ({"materials": "small"}, "data: what it is about"),
        ({"cell": ["relaxed", "relaxed"]}, "values that differ"),
        ({"cell": "relaxed"}, "data: what it is about"),
        ({"skip_refused": True}, "data: what it is about"),
        ({"data": "x", "supercell": 9.0}, "phases: materials have"),
        ({"mesh": [0, 1, 1]}, "mesh"),
        ({"data": "x", "gruneisen": True}, "cell: relaxed"),
        ({"quasi_harmonic": {"volumes": [1.0, 1.01]}}, "volumes"),
        ({"quasi_harmonic": {"volumes": [1.0, 1.01, 1.02, 1.03, 1.04]}}, "some below and some above 1"),
        ({"quasi_harmonic": {"volumes": [97, 98, 99, 101, 102]}}, "all from 0.7 to 1.5"),
        ({"quasi_harmonic": {"volumes": [0.98, 0.99, 0.99, 1.01, 1.02]}}, "values that differ"),
        ({"method": "hesian"}, "hessian"),
    ],
)
def test_bad_input_is_refused(tmp_path: Path, phonons: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        mlip_refine.phonons(_config(tmp_path, **phonons))
    assert not (tmp_path / "runs").exists()


def test_unknown_materials_and_baselines_are_refused(tmp_path: Path, data: Path) -> None:
    with pytest.raises(InputError, match="Did you mean 'small'"):
        mlip_refine.phonons(_config(tmp_path, data=str(data), materials="smal"))
    with pytest.raises(InputError, match="the result file is missing"):
        mlip_refine.phonons(_config(tmp_path, data=str(data), baseline=str(tmp_path / "none.json")))
    assert not (tmp_path / "runs").exists()


def test_a_wrong_model_is_refused(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose second derivatives are too large by a thousandth."""
    right = Potential.curvature

    def wrong(self: Potential, graphs: Any) -> Any:
        curvature = right(self, graphs)
        along = curvature.along

        def changed(direction: Tensor) -> Any:
            found = along(direction)
            return found._replace(positions=1.001 * found.positions)

        object.__setattr__(curvature, "along", changed)
        return curvature

    monkeypatch.setattr(Potential, "curvature", wrong)
    with pytest.raises(
        MlipRefineError, match=r"small \(reference\): second derivatives .* contradict differences"
    ):
        mlip_refine.phonons(_config(tmp_path, data=str(data)))


def test_errors_of_libraries_name_the_material(
    tmp_path: Path, data: Path, titanium: Potential, compared: PhononResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = compared.compared("reference")[1]

    def fails(_: Potential, task: Task, store: Store) -> PhononPoint:
        if task.name == "small":
            raise np.linalg.LinAlgError("singular matrix")
        store.write(task, known, structures=None)
        return known

    monkeypatch.setattr(workflow, "find_point", fails)
    monkeypatch.setattr(workflow, "load_potential", lambda _: titanium)
    with pytest.raises(MlipRefineError, match=r"small \(reference\): LinAlgError: singular matrix"):
        mlip_refine.phonons(_config(tmp_path, data=str(data)))
    one = {"data": str(data), "materials": "small", "skip_refused": True}
    with pytest.raises(MlipRefineError, match=r"no crystal is left: small \(reference\): LinAlgError"):
        mlip_refine.phonons(_config(tmp_path, "one", **one))
    result = mlip_refine.phonons(_config(tmp_path, "both", **one | {"materials": ["small", "wide"]}))
    assert [p.name for p in result.points] == ["wide"]
    assert result.left_out == {"small (reference)": "LinAlgError: singular matrix"}
    assert read_phonons_json(result.folder) == result


@pytest.mark.slow
def test_volumes_have_the_method_of_the_crystal(titanium: Potential, monkeypatch: pytest.MonkeyPatch) -> None:
    """Force constants at other volumes, too, are differences of the step that is asked for."""
    calls = []
    right = HarmonicCrystal.force_constants

    def told(self: HarmonicCrystal, potential: Potential, *how: Any) -> Any:
        calls.append(how)
        return right(self, potential, *how)

    monkeypatch.setattr(HarmonicCrystal, "force_constants", told)
    section = Phonons(method="displacements", displacement=0.02, mesh=(1, 1, 1))
    crystal = HarmonicCrystal.of_cell(bulk("Ti", "hcp", a=2.93, c=4.65), np.eye(3, dtype=int))
    rested = crystal.at_rest(titanium, Rest("cell"))
    phonon = rested.phonopy(rested.force_constants(titanium, "displacements", 0.02))
    gruneisen_parameters(titanium, rested, phonon, section)
    settings = QuasiHarmonic(temperature=300.0, volumes=(0.98, 0.99, 1.0, 1.01, 1.02))
    expansion(titanium, rested, section, settings)
    assert calls == [("displacements", 0.02)] * (1 + 2 + 5)


def test_the_command_line_prints_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "name: cli\ndevice: cpu\npotential: {model: titanium-compact}\n"
        "phases:\n  hcp: {prototype: hcp, element: Ti, n_atoms: 2, a: 2.93 Å, c: 4.65 Å}\n"
        f"phonons: {{supercell: 5 Å, mesh: [2, 2, 2]}}\noutput: {{folder: {tmp_path / 'runs'}}}\n"
    )
    monkeypatch.setattr(sys, "argv", ["mlip-refine", "phonons", str(path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "phonons.json" in printed
    assert "hcp Ti" in printed
