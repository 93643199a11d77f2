"""`md`: a tiny real run, an interrupted one, an ideal gas with its exact volume, and refusals."""

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

import mlip_refine
from mlip_refine import cli, testing
from mlip_refine.config import Config, config_from_dict
from mlip_refine.data import read_frames
from mlip_refine.errors import InputError, SamplingError, StorageError
from mlip_refine.quantities import GPA, KB
from mlip_refine.sampling import FrameStore
from mlip_refine.training.replay import LabelledFrame, held_out_errors
from mlip_refine.workflows import from_config as setup
from mlip_refine.workflows.from_config import load_potential
from mlip_refine.workflows.md import run as workflow
from mlip_refine.workflows.md.averages import UNITS
from mlip_refine.workflows.md.records import MDResult, read_md


def _config(folder: Path, **md: Any) -> Config:
    crystal = {"prototype": "bcc", "element": "Ti", "n_atoms": 16, "a": 3.25}
    return config_from_dict(
        {
            "name": "tiny",
            "seed": 2,
            "device": "cpu",
            "potential": {"model": "titanium-compact"},
            "phases": {
                "hcp": {"prototype": "hcp", "element": "Ti", "n_atoms": 16, "a": 2.93, "c": 4.65},
                "bcc": crystal,
                "kept": crystal | {"cell_freedom": "fixed"},
            },
            "md": {
                "temperature": "600 K",
                "pressure": ["0 GPa", "5 GPa"],
                "ensemble": "npt",
                "duration": "36 fs",
                "equilibration": "12 fs",
                "interval": "6 fs",
                "segment": "12 fs",
                **md,
            },
            "sampling": {
                "timestep": "3 fs",
                "friction": "10 /ps",
                "barostat_time": "200 fs",
                "min_effective_frames": 1.0,
            },
            "output": {"folder": str(folder), "figures": False},
        }
    )


class _Loaded:
    """A potential that is loaded and compiled once for all tests."""

    def __init__(self) -> None:
        self.frozen: Any = None

    def load(self, config: Config) -> Any:
        if self.frozen is None:
            self.frozen = load_potential(config).frozen_copy(config.sampling.dtype)
        return self

    def frozen_copy(self, dtype: str, accelerate: str) -> Any:
        assert (dtype, accelerate) == ("float32", "auto")
        return self.frozen


@pytest.fixture(scope="module", autouse=True)
def _loaded_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workflow, "load_potential", _Loaded().load)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, MDResult]:
    """A run of hcp and bcc at two pressures that was not interrupted."""
    config = _config(tmp_path_factory.mktemp("whole"), phases=["hcp", "bcc"], cell="hexagonal", export=True)
    return config, mlip_refine.md(config)


def test_every_phase_has_every_state(finished: tuple[Config, MDResult]) -> None:
    _, result = finished
    names = [f"{phase}-600K-{p}GPa" for phase in ("hcp", "bcc") for p in (0, 5)]
    assert [point.name for point in result.points] == names
    for point in result.points:
        assert (point.frames_kept, point.frames_discarded, point.steps) == (6, 0, 16)
        assert (point.timestep_fs, point.interval_fs, point.equilibration_ps) == (3.0, 6.0, 0.012)
        assert (point.friction_per_ps, point.barostat_time_fs) == (10.0, 200.0)
        assert list(point.averages) == list(UNITS)
    assert result.speed.steps == 16
    assert read_md(result.folder).points == result.points


def test_averages_are_those_of_the_frames(finished: tuple[Config, MDResult]) -> None:
    """Every mean, computed once more from the exported frames by other means."""
    _, result = finished
    for point in result.points:
        frames = ase.io.read(result.folder / "extxyz" / f"{point.name}.extxyz", ":")
        assert len(frames) == point.frames_kept
        mean = {name: average.value for name, average in point.averages.items() if average.measured}
        volumes = [atoms.get_volume() for atoms in frames]
        pressures = [
            -np.trace(a.info["REF_stress"]) / 3 / GPA + 16 * KB * 600 / GPA / v
            for a, v in zip(frames, volumes, strict=True)
        ]
        pv = point.pressure_GPa * GPA * np.mean(volumes)
        expected = {
            "energy": np.mean([a.info["REF_energy"] for a in frames]) / 16,
            "enthalpy": (np.mean([a.info["REF_energy"] for a in frames]) + pv) / 16,
            "volume": np.mean(volumes) / 16,
            "density": np.mean([16 * 47.867 / 0.602214076 / v for v in volumes]),
            "pressure": np.mean(pressures),
        }
        cells = np.mean([a.cell.cellpar() for a in frames], axis=0)
        expected |= dict(zip(("a", "b", "c", "alpha", "beta", "gamma"), cells, strict=True))
        with (result.folder / "series.csv").open(newline="") as stream:
            rows = [row for row in csv.DictReader(stream) if row["point"] == point.name]
        # Of the momenta, which are not exported; the equilibration is two frames.
        expected["temperature"] = np.mean([float(row["temperature (K)"]) for row in rows[2:]])
        assert mean.keys() <= expected.keys()
        assert len(mean) >= 3
        for name, value in mean.items():
            assert value == pytest.approx(expected[name], rel=1e-6, abs=1e-6), (point.name, name)


def test_angles_that_no_strain_changes_are_exact(finished: tuple[Config, MDResult]) -> None:
    _, result = finished
    averages = result["hcp-600K-0GPa"].averages
    assert [averages[name].value for name in ("alpha", "beta", "gamma")] == pytest.approx([90, 90, 120])
    assert all(averages[name].se == 0 for name in ("alpha", "beta", "gamma"))
    assert not averages["volume"].measured or averages["volume"].se > 0


def test_trajectories_are_the_frames_that_count(finished: tuple[Config, MDResult]) -> None:
    _, result = finished
    assert list(result.trajectories) == [point.name for point in result.points]
    for point in result.points:
        trajectory = result.trajectories[point.name]
        assert trajectory.held is None
        frames = list(trajectory)
        exported = ase.io.read(result.folder / "extxyz" / f"{point.name}.extxyz", ":")
        assert len(trajectory) == len(frames) == len(exported) == point.frames_kept
        energies = [atoms.get_potential_energy() for atoms in frames]
        assert np.mean(energies) / 16 == pytest.approx(point.averages["energy"].value, abs=1e-9)
        for atoms, other in zip(frames, exported, strict=True):
            assert atoms.positions == pytest.approx(other.positions, abs=1e-7)
            assert atoms.get_stress(voigt=False) == pytest.approx(other.info["REF_stress"], abs=1e-8)
            assert {key: other.info[key] for key in atoms.info} == pytest.approx(atoms.info)
        assert trajectory.load().positions.shape[:2] == (1, 8)


def test_trajectories_are_held_where_frames_are_not_kept(tmp_path: Path) -> None:
    config = _config(tmp_path, phases="hcp", pressure=0)
    config = config.model_copy(update={"output": config.output.model_copy(update={"keep_frames": False})})
    result = mlip_refine.md(config)
    assert not (result.folder / "frames").exists()
    (trajectory,) = result.trajectories.values()
    assert len(list(trajectory)) == len(trajectory) == result.points[0].frames_kept
    with pytest.raises(InputError, match="frames of the run are gone"):
        list(replace(trajectory, held=None))


def test_exports_are_read_as_labelled_frames(finished: tuple[Config, MDResult]) -> None:
    _, result = finished
    path = result.folder / "extxyz" / "bcc-600K-5GPa.extxyz"
    frames = read_frames([path], elements={22})
    assert len(frames) == 6
    # Of the potential itself, within the single precision of MD and the eight digits of positions in a file.
    potential = load_potential(finished[0])
    errors = held_out_errors(potential, [LabelledFrame.from_frame(potential, f) for f in frames])
    assert errors.energy_mae_mev_per_atom < 0.1
    assert errors.forces_mae_mev_per_A < 0.1
    assert errors.stress_mae_gpa < 1e-3
    assert frames[0].info["time_ps"] == pytest.approx(0.018)
    assert not list(path.parent.glob(".*"))


def test_an_interrupted_run_ends_the_same(
    finished: tuple[Config, MDResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the first segment: the same bits in every file, and only the rest is sampled."""
    whole, result = finished
    folder = whole.output.model_copy(update={"folder": str(tmp_path)})
    config, write = whole.model_copy(update={"output": folder}), FrameStore.write

    def interrupted(self: FrameStore, stage: str, segment: int, *rest: Any) -> None:
        write(self, stage, segment, *rest)
        if segment == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FrameStore, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mlip_refine.md(config)
    assert not (config.run_folder / "md.json").exists()
    again = mlip_refine.md(config, resume=True)
    assert again.speed.steps == 8
    for name in ("md.json", "series.csv", "extxyz/hcp-600K-5GPa.extxyz"):
        assert (config.run_folder / name).read_bytes() == (result.folder / name).read_bytes(), name
    finally_ = mlip_refine.md(config, resume=True)
    assert finally_.speed is None
    assert json.loads((config.run_folder / "speed.json").read_text())["steps"] == 8


def _with_duration(config: Config, duration: float) -> Config:
    return config.model_copy(update={"md": config.md.model_copy(update={"duration": duration})})


def test_a_full_disk_ends_a_run_that_goes_on(tmp_path: Path, file_size_limit: Any) -> None:
    """Ended with the file that lacked room; what was written before is whole, and nothing else is left."""
    whole = mlip_refine.md(_config(tmp_path / "whole", phases=["hcp"], export=True))
    config = _config(tmp_path / "full", phases=["hcp"], export=True)
    with (
        file_size_limit(20_000),
        pytest.raises(StorageError, match=r"md\.0000\.h5: cannot be written .* needs"),
    ):
        mlip_refine.md(config)
    assert list((config.run_folder / "frames").iterdir()) == []
    result = mlip_refine.md(config, resume=True)
    assert result.points == whole.points
    export = Path("extxyz", "hcp-600K-5GPa.extxyz")
    assert (result.folder / export).read_bytes() == (whole.folder / export).read_bytes()


def test_a_finished_run_goes_on_for_longer(finished: tuple[Config, MDResult], tmp_path: Path) -> None:
    """The same bits as a run of that length from the start; frames that are there are not sampled again."""
    whole, result = finished
    folder = whole.output.model_copy(update={"folder": str(tmp_path)})
    config = whole.model_copy(update={"output": folder})
    assert mlip_refine.md(_with_duration(config, 18.0)).speed.steps == 10
    # Of the two segments after the equilibration the second held one frame, and is sampled anew.
    assert mlip_refine.md(config, resume=True).speed.steps == 8
    for name in ("md.json", "series.csv", "extxyz/hcp-600K-5GPa.extxyz"):
        assert (config.run_folder / name).read_bytes() == (result.folder / name).read_bytes(), name
    with pytest.raises(InputError, match=r"a run cannot be made shorter.*18.*at least 36"):
        mlip_refine.md(_with_duration(config, 18.0), resume=True)
    assert "duration: 36" in (config.run_folder / "config.yaml").read_text()


def test_the_command_line_prints_files_and_averages(
    finished: tuple[Config, MDResult], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With all frames there, nothing is sampled, so no speed is told; a finished run keeps its results."""
    config, result = finished
    before = (result.folder / "md.json").read_bytes()
    arguments = ["md", str(config.run_folder / "config.yaml"), "--resume"]
    monkeypatch.setattr(sys, "argv", ["mlip-refine", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capsys.readouterr().out
    assert not end.value.code
    assert "md.json           averages with errors" in printed
    rows = [line.split()[:3] for line in printed.splitlines()]
    for point in result.points:
        assert [point.name, "npt", "6/6"] in rows
    assert "atom·steps/s" not in printed
    assert (result.folder / "md.json").read_bytes() == before


def test_a_run_folder_is_not_overwritten(finished: tuple[Config, MDResult]) -> None:
    with pytest.raises(InputError, match="the run folder exists"):
        mlip_refine.md(finished[0])


def test_steps_friction_and_barostat_follow_the_fastest_vibration(tmp_path: Path) -> None:
    config = _config(tmp_path, phases="bcc", pressure=0)
    automatic = config.sampling.model_copy(update=dict.fromkeys(("timestep", "friction", "barostat_time")))
    (point,) = mlip_refine.md(config.model_copy(update={"sampling": automatic})).points
    period = 0.1 * 2e3 * np.pi / point.friction_per_ps
    assert 100 < period < 200
    assert point.barostat_time_fs == pytest.approx(4 * period, rel=0.03)
    assert point.timestep_fs == pytest.approx(min(period / 30, 5.0), rel=0.03)
    assert point.interval_fs % point.timestep_fs == pytest.approx(0, abs=1e-9)


def test_a_fixed_cell_is_exact_and_a_free_temperature_is_that_of_the_momenta(tmp_path: Path) -> None:
    """In nve the kinetic energy makes up for the potential energy, and is part of the pressure."""
    result = mlip_refine.md(_config(tmp_path, phases="kept", pressure=0, ensemble="nph", export=True))
    (point,) = result.points
    assert (point.ensemble, point.cell_freedom, point.barostat_time_fs) == ("nve", "fixed", None)
    assert point.averages["volume"].value == pytest.approx(3.25**3 / 2)
    assert point.averages["volume"].se == 0
    assert point.averages["energy"].value == pytest.approx(-7.7, abs=0.1)
    with (result.folder / "series.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["kept"] for row in rows] == ["1"] * 8
    temperature = np.array([float(row["temperature (K)"]) for row in rows])
    energy = 16 * np.array([float(row["energy (eV/atom)"]) for row in rows])
    kinetic = 0.5 * 45 * KB * temperature
    assert np.ptp(kinetic) > 0.1
    assert np.ptp(energy + kinetic) < 0.02 * np.ptp(kinetic)
    frames = ase.io.read(result.folder / "extxyz" / f"{point.name}.extxyz", ":")
    for row, atoms, t in zip(rows[2:], frames, temperature[2:], strict=True):
        pressure = -np.trace(atoms.info["REF_stress"]) / 3 + 16 * KB * t / atoms.get_volume()
        assert float(row["pressure (GPa)"]) == pytest.approx(pressure / GPA, rel=1e-6)
        enthalpy = (atoms.info["REF_energy"] + pressure * atoms.get_volume()) / 16
        assert float(row["enthalpy (eV/atom)"]) == pytest.approx(enthalpy, rel=1e-6)
    assert point.averages["temperature"].value == pytest.approx(temperature[2:].mean())


def test_too_few_frames_are_refused_with_the_length_that_would_do(tmp_path: Path) -> None:
    config = _config(tmp_path, phases="bcc", pressure=0)
    strict = config.sampling.model_copy(update={"min_effective_frames": 40.0})
    result = mlip_refine.md(config.model_copy(update={"sampling": strict}))
    volume = result["bcc-600K-0GPa"].averages["volume"]
    assert volume.measured is None
    assert "fewer than 40; needed: about" in volume.refused
    data = json.loads((result.folder / "md.json").read_text())["points"][0]["averages"]["volume"]
    assert (data["value"], data["se"], data["refused"]) == (None, None, volume.refused)


def test_a_lost_point_does_not_take_the_others_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two atoms nearly in one place fly apart, however often the system is started."""
    crystal = bulk("Ti", "fcc", a=4.0, cubic=True) * (2, 2, 2)
    ase.io.write(tmp_path / "good.extxyz", crystal)
    crystal.positions[0] = crystal.positions[1] + [0.45, 0.0, 0.0]
    ase.io.write(tmp_path / "lost.extxyz", crystal)
    phases = {name: {"file": f"{name}.extxyz"} for name in ("good", "lost")}
    config = _gas_config(tmp_path, phases, {"duration": "0.4 ps", "equilibration": 0, "temperature": 100})
    monkeypatch.setattr(workflow, "load_potential", lambda _: testing.LennardJones([22], 0.25, 2.56, 5.0))
    result = mlip_refine.md(config)
    lost, good = result["lost-100K-0GPa"], result["good-100K-0GPa"]
    assert (lost.frames_kept, lost.frames_discarded, good.frames_kept) == (0, 10, 10)
    assert lost.averages["energy"].refused == "no frame after the equilibration counts"
    assert any("stopped after 3 restarts" in verdict for verdict in lost.verdicts)
    assert len(read_md(result.folder).points) == 2
    alone = config.model_copy(update={"name": "alone", "phases": {"lost": config.phases["lost"]}})
    with pytest.raises(SamplingError, match="no replica of any state point survived: lost-100K-0GPa"):
        mlip_refine.md(alone)


def _gas_config(folder: Path, phases: dict[str, Any], md: dict[str, Any]) -> Config:
    return config_from_dict(
        {
            "name": "gas",
            "device": "cpu",
            "potential": {"model": "titanium-compact"},
            "phases": phases,
            "md": {"identity": "none", "interval": "40 fs", **md},
            "sampling": {"timestep": "10 fs", "friction": 10.0, "barostat_time": "200 fs"},
            "output": {"folder": str(folder), "figures": False},
        },
        base=folder,
    )


@pytest.mark.statistical
def test_an_ideal_gas_has_its_exact_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """⟨V⟩ = (N + 1) kT/P, the density V^N exp(-PV/kT); N = 4 tells it from N by 25 %."""
    n, temperature, pressure = 4, 900.0, 2.0
    unit = KB * temperature / (pressure * GPA)
    sites = np.random.default_rng(1).random((n, 3))
    box = [((n + 1) * unit) ** (1 / 3)] * 3
    ase.io.write(tmp_path / "gas.extxyz", Atoms(f"Ti{n}", scaled_positions=sites, cell=box, pbc=True))
    md = {"temperature": temperature, "pressure": pressure, "ensemble": "npt", "replicas": 48}
    md |= {"duration": "1.6 ps", "equilibration": "0.4 ps"}
    monkeypatch.setattr(workflow, "load_potential", lambda _: testing.IdealGas([22], 0.1))
    (point,) = mlip_refine.md(_gas_config(tmp_path, {"gas": {"file": "gas.extxyz"}}, md)).points
    volume, held = point.averages["volume"].measured, point.averages["pressure"].measured
    kinetic, bound = point.averages["temperature"].measured, testing.sigma_bound(3)
    assert abs(kinetic.value - temperature) < bound * kinetic.se
    assert kinetic.se < 0.05 * temperature
    exact = (n + 1) * unit / n
    assert 1.2 * bound * volume.se < exact / (n + 1)
    assert abs(volume.value - exact) < bound * volume.se
    # ⟨N kT/V⟩ = P in the same density.
    assert abs(held.value - pressure) < bound * held.se


def test_a_crystal_is_molten_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its point starts from the melt, whose frames are in the store."""
    ase.io.write(tmp_path / "fcc.extxyz", bulk("Ar", "fcc", a=4.1, cubic=True) * (2, 2, 2))
    melt = {"from": "fcc", "temperature": 2500.0, "duration": "4.5 ps"}
    md = {"temperature": 1300.0, "pressure": 5.0, "ensemble": "npt", "replicas": 2, "phases": ["liquid"]}
    md |= {"duration": "0.4 ps", "equilibration": "40 fs"}
    monkeypatch.setattr(workflow, "load_potential", lambda _: testing.LennardJones([18], 0.1, 2.6, 5.2))
    phases = {"fcc": {"file": "fcc.extxyz"}, "liquid": {"melt": melt}}
    config = _gas_config(tmp_path, phases, md)
    result = mlip_refine.md(config)
    (point,), (frames,) = result.points, result.trajectories.values()
    assert (point.phase, point.identity) == ("liquid", "molten")
    atoms = list(frames)[-1]
    assert 1.05 < atoms.cell.volume / (32 * 4.1**3 / 4) < 1.4
    assert {path.name.split(".")[0] for path in (config.run_folder / "frames").glob("melt*")} == {
        "melt-4500fs-hot",
        "melt-4500fs-cool",
    }


def test_every_phase_has_its_own_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What md says counts for all; a liquid needs something that can judge it, before anything is written."""
    base = _config(tmp_path)
    liquid = base.phases["bcc"].model_copy(update={"identity": "liquid"})
    config = base.model_copy(update={"phases": base.phases | {"bcc": liquid}})
    monkeypatch.setitem(sys.modules, "ovito.modifiers", None)
    assert setup.identity(config, "hcp") == "structure"
    assert setup.identity(config, "bcc", "sites") == "sites"
    with pytest.raises(InputError, match="a liquid cannot be told from a crystal without OVITO"):
        mlip_refine.md(config)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    if find_spec("ovito"):
        assert setup.identity(config, "bcc") == "liquid"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phases": ["hcp", "bbc"]}, "md names the phase 'bbc'"),
        ({"interval": "2 fs"}, "frames cannot be closer than steps"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        mlip_refine.md(_config(tmp_path, **changes))
    assert "Did you mean 'bcc'?" in str(error.value) or "one time step (3 fs)" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_config_needs_the_section_and_phases(tmp_path: Path) -> None:
    whole = _config(tmp_path)
    for missing in ({"md": None}, {"phases": {}}):
        with pytest.raises(InputError, match="there is nothing to run"):
            mlip_refine.md(whole.model_copy(update=missing))
    assert not list(tmp_path.iterdir())
