"""`md.dynamics`: synthetic trajectories with known answers, their files, and a run of a harmonic crystal."""

import csv
import json
import math
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
import torch
from ase import Atoms, units
from rich.console import Console

import mlip_refine
from mlip_refine import testing
from mlip_refine.config import config_from_dict, dump_config, load_config
from mlip_refine.config.sections.md import Dynamics
from mlip_refine.errors import InputError, StatisticsError
from mlip_refine.files import write_json
from mlip_refine.quantities import KB
from mlip_refine.sampling import StatePoint, Trajectory
from mlip_refine.workflows.md import run as workflow
from mlip_refine.workflows.md.dynamics import Blocks, dynamics, write_dynamics
from mlip_refine.workflows.md.figures import write_dynamics_figures
from mlip_refine.workflows.md.records import DynamicsPoint, MDResult, read_dynamics
from mlip_refine.workflows.md.tables import print_dynamics
from mlip_refine.workflows.records import Estimate

INTERVAL, BOX, TEMPERATURE = 10.0, 12.0, 2000.0


@pytest.fixture
def brownian():
    """Random walks: four heavy atoms of D = 1e-3 Å²/fs and four light ones of four times as much."""

    def walk(frames: int = 405, replicas: int = 2, ensemble: str = "nvt") -> Trajectory:
        generator = torch.Generator().manual_seed(11)
        atoms = Atoms("Ti4O4", positions=np.zeros((8, 3)), cell=[BOX] * 3, pbc=True)
        point = StatePoint(
            "fluid", atoms, TEMPERATURE, ensemble=ensemble, thermostat="nose_hoover", replicas=replicas
        )
        steps = torch.randn(replicas, frames, 8, 3, generator=generator, dtype=torch.float64)
        sizes = (2 * 1e-3 * torch.tensor([1.0] * 4 + [4.0] * 4).double() * INTERVAL).sqrt()
        zeros = torch.zeros(replicas, frames, dtype=torch.float64)
        return Trajectory(
            point=point,
            positions=(steps * sizes[:, None]).cumsum(1),
            cells=torch.from_numpy(atoms.cell.array.copy()).expand(replicas, frames, 3, 3),
            model_energy=zeros,
            bias_energy=zeros,
            stress=zeros[..., None, None].expand(replicas, frames, 3, 3),
            kinetic_energy=zeros + 0.5 * KB * 1500.0 * 21,
            kept=torch.ones(replicas, frames, dtype=torch.bool),
        )

    return walk


def test_blocks_are_two_windows_at_least_and_use_every_replica(brownian) -> None:
    blocks = Blocks.cut(brownian(), skipped=5, interval=INTERVAL, window=250.0)
    assert blocks.lags == 25
    # 400 frames: seven blocks of 57, at least 51, of each replica.
    assert blocks.positions.shape == (14, 57, 8, 3)
    assert blocks.duration == 570.0


def test_a_replica_with_a_gap_does_not_count(brownian) -> None:
    run = brownian()
    run.kept[1, 100] = False
    run.positions[1] = torch.nan
    blocks = Blocks.cut(run, 5, INTERVAL, 250.0)
    assert len(blocks) == 7
    assert bool(blocks.positions.isfinite().all())
    run.kept[0, 3] = False
    assert len(Blocks.cut(run, 5, INTERVAL, 250.0)) == 7


def test_too_few_blocks_are_refused_with_the_length_that_would_do(brownian) -> None:
    with pytest.raises(
        StatisticsError, match=r"2 of 2 replicas .* 2 blocks .* 4, such as 6\.02 ps of 2 replicas"
    ):
        Blocks.cut(brownian(), 5, INTERVAL, 1500.0)


def test_diffusion_of_every_element(brownian) -> None:
    """Relative to the centre of mass the walks lose a part that their weights in it give exactly."""
    run = brownian(frames=4000)
    point, curves, spectrum = dynamics(Blocks.cut(run, 0, INTERVAL, 250.0), Dynamics(window=250.0))
    shares = run.point.atoms.get_masses() / run.point.atoms.get_masses().sum()
    D = np.array([1e-3] * 4 + [4e-3] * 4)
    drift = (shares**2 * D).sum()
    for symbol, i in (("Ti", 0), ("O", 4)):
        exact = (D[i] - 2 * shares[i] * D[i] + drift) * 1e-5
        found = point.values[f"diffusion_{symbol}"]
        assert found.se < 0.06 * exact
        assert abs(found.value - exact) < 4 * found.se
    assert curves["time (ps)"][-1] == pytest.approx(0.25)
    # White noise has no correlations, and frames that do not follow it do not show its spectrum.
    assert float(curves["vacf"][1:].abs().max()) < 0.1
    assert spectrum["frequency (THz)"][-1] == pytest.approx(1e3 / 20)


def test_the_size_of_the_box_is_corrected(brownian) -> None:
    options = Dynamics(window=250.0, finite_size_correction=True, viscosity=2.0)
    for ensemble, temperature in (("nvt", TEMPERATURE), ("nve", 1500.0)):
        values = dynamics(Blocks.cut(brownian(ensemble=ensemble), 5, INTERVAL, 250.0), options)[0].values
        exact = 2.837297 * KB * 1.602176634e-19 * temperature / (6 * math.pi * 2e-3 * BOX * 1e-10)
        correction = values["finite_size_correction"]
        assert correction.value == pytest.approx(exact)
        assert correction.se == 0.0
        bulk, box = values["diffusion_O_bulk"], values["diffusion_O"]
        assert (bulk.value, bulk.se) == (pytest.approx(box.value + exact), pytest.approx(box.se))


def test_a_correction_that_is_not_known_is_refused(brownian) -> None:
    """No viscosity from frames that do not follow the motion, no formula for a box that is no cube."""
    run = brownian()
    computed = Dynamics(window=250.0, finite_size_correction=True)
    values = dynamics(Blocks.cut(run, 5, INTERVAL, 250.0), computed)[0].values
    assert "needs frames that follow every vibration" in values["viscosity"].refused
    assert "diffusion_O_bulk" not in values
    given = Dynamics(window=250.0, finite_size_correction=True, viscosity=2.0)
    flat = replace(run, cells=run.cells * torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64))
    values = dynamics(Blocks.cut(flat, 5, INTERVAL, 250.0), given)[0].values
    assert values["viscosity"].value == 2.0
    assert "cubic box" in values["finite_size_correction"].refused


def test_files_are_written_read_printed_and_drawn(brownian, tmp_path) -> None:
    short = replace(brownian(60), point=replace(brownian(60).point, name="short"))
    options = Dynamics(window=250.0, finite_size_correction=True, viscosity=2.0)
    runs = {"fluid": brownian(), "short": short}
    points = write_dynamics(tmp_path / "dynamics", runs, 5, INTERVAL, options)
    write_json(
        tmp_path / "dynamics.json",
        MDResult(tmp_path, "run", "abc", (), None, points).files()["dynamics.json"],
    )
    assert read_dynamics(tmp_path) == points
    rows = list(csv.DictReader((tmp_path / "dynamics" / "fluid-times.csv").open()))
    assert len(rows) == 26
    assert float(rows[1]["msd Ti (Å²)"]) == pytest.approx(6 * 1e-3 * INTERVAL, rel=0.2)
    assert float(rows[0]["vacf"]) == 1.0
    figures = write_dynamics_figures(tmp_path)
    assert [f.name for f in figures] == ["fluid.png"]
    stream = StringIO()
    print_dynamics(Console(file=stream, width=160), points)
    text = stream.getvalue()
    assert "diffusion Ti bulk" in text
    assert "10⁻⁹ m²/s" in text
    assert "note, short: no diffusion: 2 of 2 replicas ran without a gap" in text


def test_a_file_that_is_missing_or_foreign_is_an_input_error(tmp_path) -> None:
    with pytest.raises(InputError, match=r"missing.*md\.dynamics"):
        read_dynamics(tmp_path)
    (tmp_path / "dynamics.json").write_text("{}")
    with pytest.raises(InputError, match=r"no result of md\.dynamics"):
        read_dynamics(tmp_path)
    values = {"viscosity": Estimate.refuse("mPa s", "short")}
    point = DynamicsPoint(name="p", interval_fs=1.0, window_ps=1.0, blocks=4, block_ps=2.0, values=values)
    result = MDResult(tmp_path, "r", "h", (), None, (point,))
    (tmp_path / "dynamics.json").write_text(json.dumps(result.files()["dynamics.json"]))
    assert read_dynamics(tmp_path) == (point,)


def config(folder, **md):
    state = {"temperature": 300, "ensemble": "nve", "interval": 10, "dynamics": {"window": "0.1 ps"}}
    return config_from_dict(
        {
            "name": "x",
            "device": "cpu",
            "potential": {"model": "titanium-compact"},
            "phases": {"fcc": {"prototype": "fcc", "element": "Al", "n_atoms": 32, "a": 4.05}},
            "md": state | md,
            "sampling": {"timestep": "5 fs"},
            "output": {"folder": str(folder), "figures": False},
        }
    )


def test_options_read_back_equal(tmp_path) -> None:
    whole = config(
        tmp_path, dynamics={"finite_size_correction": True, "viscosity": "0.005 Pa s", "window": 100}
    )
    assert whole.md.dynamics.viscosity == pytest.approx(5.0)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(whole))
    assert load_config(path) == whole


@pytest.mark.parametrize(
    ("md", "message"),
    [
        ({"ensemble": "nvt"}, "expected nve, or nvt with thermostat: nose_hoover"),
        ({"ensemble": "npt"}, "expected nve, or nvt with thermostat: nose_hoover"),
        ({"dynamics": {"window": 50}}, r"at least ten intervals \(100 fs\)"),
        ({"dynamics": {"window": 100, "viscosity": 2}}, "expected finite_size_correction: true"),
        ({"dynamics": {"windw": 100}}, "Did you mean 'window'"),
    ],
)
def test_options_without_an_effect_are_refused(tmp_path, md, message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(tmp_path, **md)


@pytest.mark.statistical
def test_spectrum_of_a_harmonic_crystal(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First and second moments of the spectrum are those of the 3N - 3 modes, in a run from the door on."""
    _, reference = testing.harmonic_crystal("fcc")
    potential = testing.HarmonicCrystals([reference], [13])
    monkeypatch.setattr(workflow, "load_potential", lambda _: potential)
    options = {"duration": "3 ps", "equilibration": "0.3 ps", "replicas": 4, "identity": "none"}
    mlip_refine.md(config(tmp_path, **options, dynamics={"window": "0.5 ps"}))
    (point,) = read_dynamics(tmp_path / "x")
    assert point.blocks == 8
    root = reference.masses.sqrt().repeat_interleave(3)
    squares = torch.linalg.eigvalsh(reference.projected / root / root[:, None])[3:]
    # √(eV/Å²/amu) in 1/ps.
    exact = squares.sqrt() * (1e3 * units.fs / (2 * math.pi))
    rows = list(csv.DictReader((tmp_path / "x" / "dynamics" / "fcc-300K-0GPa-spectrum.csv").open()))
    frequency, density = (
        np.array([float(r[k]) for r in rows]) for k in ("frequency (THz)", "density (1/THz)")
    )
    mean = np.trapezoid(frequency * density, frequency)
    square = np.trapezoid(frequency**2 * density, frequency)
    assert mean == pytest.approx(float(exact.mean()), rel=0.05)
    assert square == pytest.approx(float(exact.square().mean()), rel=0.1)
