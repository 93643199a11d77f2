"""Sampling through the store: nothing is sampled twice, interrupted stages go on as if they had not been."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from ase.build import bulk

from mlip_refine.errors import InputError, SamplingError
from mlip_refine.potential import Potential
from mlip_refine.sampling import (
    FrameStore,
    Hamiltonian,
    Length,
    MDSettings,
    StatePoint,
    Trajectory,
    last_frames,
    sample,
)

SERIES = ("positions", "cells", "model_energy", "bias_energy", "stress")
LENGTH = Length(40.0, 6, 2)
SETTINGS = MDSettings(timestep=4.0, interval=20.0, barostat_time=800.0)


class KilledError(Exception):
    pass


class StoppingStore(FrameStore):
    """A store whose owner is killed right after some segment was written."""

    def __init__(self, folder: Path, after: int) -> None:
        super().__init__(folder, {})
        self.after = after

    def write(self, stage: str, segment: int, *rest: Any) -> None:
        super().write(stage, segment, *rest)
        if segment == self.after:
            raise KilledError


@pytest.fixture
def potential(analytic: SimpleNamespace) -> Any:
    return analytic.LennardJones([13], 0.25, 2.56, 4.4)


def _points(ensemble: str = "nvt", freedom: str = "isotropic") -> list[StatePoint]:
    al = bulk("Al", "fcc", a=4.0, cubic=True) * (2, 2, 2)
    return [
        StatePoint("a", al, 300.0, 0.0, ensemble, freedom, replicas=2),
        StatePoint("b", al, 600.0, 1.0, ensemble, freedom, replicas=1),
    ]


def _sample(potential: Any, store: FrameStore | None, **changes: Any) -> dict[str, Trajectory]:
    options = {"points": _points(), "settings": SETTINGS, "length": LENGTH, "seed": 5, "stage": "s"} | changes
    points, settings, length = (options.pop(name) for name in ("points", "settings", "length"))
    return sample(potential, points, settings, length, store=store, **options)


def _require_equal(one: dict[str, Trajectory], two: dict[str, Trajectory]) -> None:
    assert list(one) == list(two)
    for name, trajectory in one.items():
        for series in (*SERIES, "kept"):
            assert torch.equal(getattr(trajectory, series), getattr(two[name], series)), (name, series)
        assert trajectory.verdicts == two[name].verdicts


def test_shapes_and_order(potential: Any) -> None:
    runs = _sample(potential, None)
    assert list(runs) == ["a", "b"]
    assert runs["a"].positions.shape == (2, 6, 32, 3)
    assert runs["b"].stress.shape == (1, 6, 3, 3)
    assert runs["a"].positions.dtype == torch.float64
    energy = potential.energies(
        potential.graphs.frames(runs["a"].positions[1], runs["a"].cells[1], runs["a"].point.atoms.numbers)
    )
    torch.testing.assert_close(energy, runs["a"].model_energy[1], rtol=1e-12, atol=1e-9)


def test_frames_come_back_from_the_store_as_they_were(potential: Any, tmp_path: Path) -> None:
    first = _sample(potential, FrameStore(tmp_path, {"seed": 1}))
    calls = potential.calls
    again = _sample(potential, FrameStore(tmp_path, {"seed": 1}))
    assert potential.calls == calls
    _require_equal(first, again)
    assert len(list(tmp_path.glob("*.h5"))) == 3
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 6},
        {"settings": replace(SETTINGS, friction=6.0)},
        {"length": Length(44.0, 6, 2)},
        {"points": [replace(p, temperature=p.temperature + 1) for p in _points()]},
        {"points": [p.with_cell(np.array(p.atoms.cell) * 1.001) for p in _points()]},
    ],
    ids=["seed", "friction", "length", "temperature", "cell"],
)
def test_other_settings_are_sampled_anew(potential: Any, tmp_path: Path, change: dict[str, Any]) -> None:
    _sample(potential, FrameStore(tmp_path, {}))
    calls = potential.calls
    _sample(potential, FrameStore(tmp_path, {}), **change)
    assert potential.calls > calls


def test_another_model_or_provenance_is_sampled_anew(
    potential: Any, analytic: SimpleNamespace, tmp_path: Path
) -> None:
    _sample(potential, FrameStore(tmp_path, {"version": 1}))
    other = analytic.LennardJones([13], 0.26, 2.56, 4.4)
    _sample(other, FrameStore(tmp_path, {"version": 1}))
    assert other.calls > 0
    calls = other.calls
    _sample(other, FrameStore(tmp_path, {"version": 2}))
    assert other.calls > calls


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize(
    ("ensemble", "freedom"), [("nvt", "isotropic"), ("npt", "isotropic"), ("npt", "anisotropic")]
)
def test_an_interrupted_stage_goes_on_bit_for_bit(
    potential: Any, tmp_path: Path, ensemble: str, freedom: str, after: int
) -> None:
    points = _points(ensemble, freedom)
    whole = _sample(potential, FrameStore(tmp_path / "whole", {}), points=points)
    with pytest.raises(KilledError):
        _sample(potential, StoppingStore(tmp_path / "cut", after), points=points)
    calls = potential.calls
    resumed = _sample(potential, FrameStore(tmp_path / "cut", {}), points=points)
    steps = (2 - after) * 2 * SETTINGS.steps(SETTINGS.interval)
    assert potential.calls - calls == steps + 1
    _require_equal(whole, resumed)
    _require_equal(whole, _sample(potential, None, points=points))


def test_an_interrupted_stage_of_titanium_goes_on_bit_for_bit(tmp_path: Path) -> None:
    titanium = Potential.load("titanium-compact").frozen_copy("float64")
    atoms = bulk("Ti", "hcp", a=2.93, c=4.65) * (2, 2, 2)
    options = {
        "points": [StatePoint("hcp", atoms, 1500.0, replicas=2)],
        "settings": MDSettings(timestep=4.0, interval=60.0),
        "length": Length(80.0, 3, 2),
    }
    whole = _sample(titanium, FrameStore(tmp_path / "whole", {}), **options)
    with pytest.raises(KilledError):
        _sample(titanium, StoppingStore(tmp_path / "cut", 0), **options)
    _require_equal(whole, _sample(titanium, FrameStore(tmp_path / "cut", {}), **options))


def test_a_stopped_replica_stays_stopped_after_a_restart(potential: Any, tmp_path: Path) -> None:
    hot = replace(SETTINGS, guards=replace(SETTINGS.guards, max_temperature_ratio=1.05, check_interval=1))
    points = [replace(_points()[0], replicas=4)]
    with pytest.raises(KilledError):
        _sample(potential, StoppingStore(tmp_path, 0), points=points, settings=hot)
    part, _ = FrameStore(tmp_path, {}).read("s", 0, {"a": points[0]}, None)  # type: ignore[misc]
    lost = ~part["a"].kept
    assert lost.any()
    resumed = _sample(potential, FrameStore(tmp_path, {}), points=points, settings=hot)["a"]
    assert not resumed.kept[lost].any()
    assert all("step" in verdict for verdict in part["a"].verdicts)
    assert set(part["a"].verdicts) <= set(resumed.verdicts)
    assert len(resumed.verdicts) == int((~resumed.kept).sum())


def test_mixed_ensembles_become_batches_of_their_own(potential: Any, tmp_path: Path) -> None:
    nvt, npt = _points()[0], replace(_points("npt")[1], name="free")
    runs = _sample(potential, FrameStore(tmp_path, {}), points=[nvt, npt])
    assert list(runs) == ["a", "free"]
    assert runs["a"].cells.std(1).max() < 1e-15 < runs["free"].cells.std(1).max()
    assert {p.name.split(".")[0] for p in tmp_path.glob("*.h5")} == {"s-npt-isotropic", "s-nvt-"}


def test_sampling_starts_where_it_is_told(potential: Any) -> None:
    runs = _sample(potential, None)
    start = last_frames(runs)
    again = _sample(
        potential, None, start=start, length=Length(0.0, 1), settings=replace(SETTINGS, interval=4.0)
    )
    moved = again["a"].positions[:, 0] - runs["a"].positions[:, -1]
    assert 0 < moved.abs().max() < 0.1


@pytest.fixture
def written(potential: Any, tmp_path: Path) -> tuple[FrameStore, dict[str, StatePoint]]:
    store = FrameStore(tmp_path, {})
    _sample(potential, store)
    return store, {p.name: p for p in _points()}


def test_a_missing_segment_and_another_key_give_nothing(written: Any) -> None:
    store, points = written
    assert store.read("s", 3, points, None) is None
    assert store.read("other", 0, points, None) is None
    assert store.read("s", 0, points, "another key") is None
    assert store.read("s", 0, points, None) is not None


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.95])
def test_a_truncated_file_is_refused_by_name(written: Any, keep: float) -> None:
    store, points = written
    path = store.path("s", 1)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else int(keep)])
    with pytest.raises(InputError, match="delete it") as caught:
        store.read("s", 1, points, None)
    assert str(path) in str(caught.value)


def test_foreign_files_are_refused_by_name(written: Any) -> None:
    store, points = written
    path = store.path("s", 0)
    path.write_text("frames, honestly")
    with pytest.raises(InputError, match=r"s\.0000\.h5"):
        store.read("s", 0, points, None)
    with h5py.File(path, "w") as file:
        file["data"] = [1, 2, 3]
    with pytest.raises(InputError, match="not a file of frames"):
        store.read("s", 0, points, None)


def test_a_file_without_the_wanted_point_is_refused(written: Any) -> None:
    store, points = written
    with pytest.raises(InputError, match="cannot be read"):
        store.read("s", 0, {"c": points["a"]}, None)


def test_a_file_without_its_key_is_refused(written: Any) -> None:
    store, points = written
    with h5py.File(store.path("s", 0), "a") as file:
        del file.attrs["key"]
    with pytest.raises(InputError, match="cannot be read"):
        store.read("s", 0, points, "key")


def test_batches_of_one_kind_only(potential: Any) -> None:
    from mlip_refine.sampling import MolecularDynamics

    with pytest.raises(SamplingError, match="one kind of ensemble"):
        MolecularDynamics(potential, [_points()[0], _points("npt")[1]], SETTINGS, seed=1)


@pytest.mark.parametrize(("frames", "segment", "wanted"), [(6, None, [6]), (6, 4, [4, 2]), (6, 3, [3, 3])])
def test_segments(frames: int, segment: int | None, wanted: list[int]) -> None:
    assert Length(0.0, frames, segment).segments() == wanted


def _cells(point: StatePoint, stretches: list[list[float]]) -> Trajectory:
    home = torch.from_numpy(point.atoms.cell.array.copy())
    cells = torch.stack([home * torch.tensor(s, dtype=torch.float64) for s in stretches])[None]
    n, zero = len(stretches), torch.zeros(1, len(stretches), dtype=torch.float64)
    positions = torch.from_numpy(point.atoms.positions.copy()).expand(1, n, -1, 3)
    return Trajectory(point, positions, cells, zero, zero, torch.zeros_like(cells), torch.tensor([True]))


def test_total_stress_of_a_gas_is_minus_its_pressure() -> None:
    from mlip_refine.quantities import KB

    atoms = bulk("Al", "fcc", a=4.0, cubic=True)
    run = _cells(StatePoint("p", atoms, 700.0), [[1.0, 1.0, 1.0]])
    wanted = -4 * KB * 700.0 / 64.0 * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(run.total_stress(), wanted)


def test_bias_and_scale_belong_to_the_key(potential: Any, analytic: SimpleNamespace, tmp_path: Path) -> None:
    atoms = _points()[0].atoms
    soft, stiff = (analytic.harmonic(atoms, {3.0: k}) for k in (1.0, 1.1))
    for hamiltonian in (
        Hamiltonian(0.5, 0.5, soft),
        Hamiltonian(0.5, 0.5, stiff),
        Hamiltonian(0.4, 0.6, stiff),
    ):
        calls = potential.calls
        _sample(potential, FrameStore(tmp_path, {}), points=[replace(_points()[0], hamiltonian=hamiltonian)])
        assert potential.calls > calls
