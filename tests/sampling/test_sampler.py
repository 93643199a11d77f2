"""Sampling through the store: nothing is sampled twice, interrupted stages go on as if they had not been."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.io import read

from mlip_refine import testing
from mlip_refine.data.hdf5 import SEAL_BYTES, is_sealed
from mlip_refine.errors import InputError, MlipRefineError, SamplingError
from mlip_refine.interruption import Interrupted, ended_by_signals
from mlip_refine.potential import Potential
from mlip_refine.sampling import (
    FrameStore,
    Hamiltonian,
    Length,
    MDSettings,
    MolecularDynamics,
    StatePoint,
    Trajectory,
    UhlenbeckFord,
    last_frames,
    sample,
)
from mlip_refine.sampling import store as store_module

SERIES = ("positions", "cells", "model_energy", "bias_energy", "stress", "kinetic_energy")
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
def potential() -> Any:
    return testing.LennardJones([13], 0.25, 2.56, 4.4)


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


def test_another_model_or_provenance_is_sampled_anew(potential: Any, tmp_path: Path) -> None:
    _sample(potential, FrameStore(tmp_path, {"version": 1}))
    other = testing.LennardJones([13], 0.26, 2.56, 4.4)
    _sample(other, FrameStore(tmp_path, {"version": 1}))
    assert other.calls > 0
    calls = other.calls
    _sample(other, FrameStore(tmp_path, {"version": 2}))
    assert other.calls > calls


@pytest.mark.parametrize("ensemble", ["nvt", "npt", "nve", "nph"])
def test_frames_hold_the_kinetic_energy(potential: Any, ensemble: str) -> None:
    """Of the momenta that the frame ends with; and a state point knows how many of them are free."""
    single = Atoms("Al", cell=[4.6] * 3, pbc=True)
    thermostat = "nose_hoover" if ensemble == "nvt" else "langevin"
    points = [
        *(replace(p, thermostat=thermostat) for p in _points(ensemble)),
        StatePoint("single", single, 300.0, ensemble=ensemble, identity="none"),
        StatePoint("noisy", _points()[0].atoms, 300.0),
    ]
    dynamics = MolecularDynamics.prepare(potential, points, SETTINGS, 1)
    runs = dynamics.record(2)
    found = torch.cat([runs[p.name].kinetic_energy[:, -1] for p in points])
    assert torch.equal(found, dynamics.integrator.kinetic())
    dof = [p.degrees_of_freedom for p in dynamics.points for _ in range(p.replicas)]
    assert dof == dynamics.integrator.dof.tolist()


@pytest.mark.parametrize(("frames", "kept"), [(4, 2), (5, 2)])
def test_a_stage_goes_on_for_longer(potential: Any, tmp_path: Path, frames: int, kept: int) -> None:
    """Whole segments are kept, one that was cut short is sampled anew; the bits are those of one long run."""
    whole = _sample(potential, FrameStore(tmp_path / "whole", {}), length=Length(40.0, 8, 2))
    store = FrameStore(tmp_path / "grown", {})
    _sample(potential, store, length=Length(40.0, frames, 2))
    stamps = {path: path.stat().st_mtime_ns for path in sorted(store.folder.iterdir())}
    longer = _sample(potential, FrameStore(tmp_path / "grown", {}), length=Length(40.0, 8, 2))
    _require_equal(whole, longer)
    assert [path.stat().st_mtime_ns == before for path, before in stamps.items()].count(True) == kept


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize(("ensemble", "freedom"), [("nvt", "isotropic"), ("npt", "triclinic")])
def test_an_interrupted_stage_goes_on_bit_for_bit(
    potential: Any, tmp_path: Path, ensemble: str, freedom: str, after: int
) -> None:
    points = _points(ensemble, freedom)
    whole = _sample(potential, FrameStore(tmp_path / "whole", {}), points=points)
    with pytest.raises(KilledError):
        _sample(potential, StoppingStore(tmp_path / "cut", after), points=points)
    calls = potential.calls
    resumed = _sample(potential, FrameStore(tmp_path / "cut", {}), points=points)
    steps = (2 - after) * 2 * 5
    # The first forces, and those with which bulk moduli are found.
    assert potential.calls - calls == steps + 1 + (4 if ensemble == "npt" else 0)
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


EVERYTHING = [
    ("nve", "isotropic", "langevin"),
    ("nph", "isotropic", "langevin"),
    ("nph", "triclinic", "langevin"),
    ("nvt", "isotropic", "langevin"),
    ("nvt", "isotropic", "nose_hoover"),
    ("npt", "isotropic", "langevin"),
    ("npt", "hexagonal", "langevin"),
    ("npt", "anisotropic", "langevin"),
    ("npt", "triclinic", "langevin"),
    ("npt", "fixed", "langevin"),
]


def _everything() -> list[StatePoint]:
    """One system of every ensemble."""
    first = replace(_points()[0], replicas=1)
    return [
        replace(first, name="-".join(kind), ensemble=kind[0], cell_freedom=kind[1], thermostat=kind[2])
        for kind in EVERYTHING
    ]


def test_a_batch_of_all_ensembles_goes_on_bit_for_bit(potential: Any, tmp_path: Path) -> None:
    points = _everything()
    whole = _sample(potential, FrameStore(tmp_path / "whole", {}), points=points)
    with pytest.raises(KilledError):
        _sample(potential, StoppingStore(tmp_path / "cut", 1), points=points)
    resumed = _sample(potential, FrameStore(tmp_path / "cut", {}), points=points)
    _require_equal(whole, resumed)
    for point in points:
        moves = bool(resumed[point.name].cells.std(1).max() > 1e-12)
        assert moves == (point.ensemble in ("npt", "nph") and point.cell_freedom != "fixed")


def test_a_stage_of_one_ensemble_goes_on_bit_for_bit(potential: Any, tmp_path: Path) -> None:
    """As above, but with code paths that a batch of all ensembles does not take: no cell, no chain."""
    for point in (p for p in _everything() if p.freedom == "fixed"):
        folder = tmp_path / point.name
        whole = _sample(potential, None, points=[point])
        with pytest.raises(KilledError):
            _sample(potential, StoppingStore(folder, 0), points=[point])
        _require_equal(whole, _sample(potential, FrameStore(folder, {}), points=[point]))


def test_a_system_that_was_set_back_goes_on_bit_for_bit(potential: Any, tmp_path: Path) -> None:
    """A time step that is too long, and heals, and one that no halving saves, in the first segment."""
    calm, wild = _points()
    points = [
        calm,
        replace(wild, name="wild", timestep=64.0),
        replace(wild, name="doomed", timestep=2000.0),
    ]
    options: dict[str, Any] = {"points": points, "length": Length(0.0, 40, 20)}
    options["settings"] = replace(SETTINGS, guards=replace(SETTINGS.guards, restarts=4))
    doomed = r"no replica of doomed survived: doomed, replica 0, step \d+: set back .* after 4 restarts"
    with pytest.raises(SamplingError, match=doomed):
        _sample(potential, FrameStore(tmp_path / "whole", {}), **options)
    with pytest.raises(KilledError):
        _sample(potential, StoppingStore(tmp_path / "cut", 0), **options)
    with pytest.raises(SamplingError, match=doomed):
        _sample(potential, FrameStore(tmp_path / "cut", {}), **options)
    known = {p.name: p for p in points}
    verdicts = []
    for segment in (0, 1):
        (one, last), (two, other) = (
            FrameStore(tmp_path / run, {}).read("s", segment, known, None)  # type: ignore[misc]
            for run in ("whole", "cut")
        )
        _require_equal(one, two)
        assert all(torch.equal(last[name], other[name]) for name in last)
        assert not one["doomed"].kept.any()
        assert one["a"].kept.all()
        verdicts.append(one["wild"].verdicts)
    assert verdicts[0]
    assert one["wild"].kept.all()


class ImpatientStore(FrameStore):
    """A store whose owner is killed right after the state of a begun segment was written, at some step."""

    def __init__(self, folder: Path, after: int) -> None:
        super().__init__(folder, {})
        self.left = after

    def write_unfinished(self, *content: Any) -> None:
        super().write_unfinished(*content)
        self.left -= 1
        if self.left == 0:
            raise KilledError


@pytest.fixture
def always_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a stage has come to is written after every step."""
    monkeypatch.setattr("mlip_refine.sampling.sampler.KEEP_EVERY", -1.0)


@pytest.mark.parametrize("after", [1, 9, 10, 11, 14, 15, 17, 30, 39])
def test_a_stage_that_was_cut_within_a_segment_goes_on_bit_for_bit(
    potential: Any, tmp_path: Path, always_kept: None, after: int
) -> None:
    """In the equilibration of 10 steps, within an interval of 5, at a frame, and one step before the end."""
    points = _everything()
    whole = _sample(potential, None, points=points)
    with pytest.raises(KilledError):
        _sample(potential, ImpatientStore(tmp_path, after), points=points)
    calls, taken = potential.calls, list[int]()
    resumed = _sample(potential, FrameStore(tmp_path, {}), points=points, taken=taken.append)
    _require_equal(whole, resumed)
    assert taken == [40 - after]
    # Those of the first forces and of bulk moduli come on top.
    assert potential.calls - calls < 40 - after + 30
    assert not list(tmp_path.glob("*unfinished*"))


def test_faults_of_a_segment_that_was_cut_are_known_afterwards(
    potential: Any, tmp_path: Path, always_kept: None
) -> None:
    calm, wild = _points()
    points = [calm, replace(wild, name="wild", timestep=64.0)]
    options: dict[str, Any] = {"points": points, "length": Length(0.0, 16)}
    options["settings"] = replace(SETTINGS, guards=replace(SETTINGS.guards, restarts=4))
    whole = _sample(potential, None, **options)
    assert len(whole["wild"].verdicts) > 0
    for after in (13, 68):
        folder = tmp_path / str(after)
        with pytest.raises(KilledError):
            _sample(potential, ImpatientStore(folder, after), **options)
        _require_equal(whole, _sample(potential, FrameStore(folder, {}), **options))


def test_titanium_that_was_cut_goes_on_bit_for_bit(tmp_path: Path, always_kept: None) -> None:
    """In single precision, with cells that move."""
    titanium = Potential.load("titanium-compact").frozen_copy("float32")
    atoms = bulk("Ti", "hcp", a=2.93, c=4.65) * (2, 2, 2)
    options = {
        "points": [StatePoint("hcp", atoms, 1500.0, 0.0, "npt", "triclinic", replicas=2)],
        "settings": MDSettings(timestep=4.0, interval=20.0),
        "length": Length(20.0, 6),
    }
    whole = _sample(titanium, None, **options)
    with pytest.raises(KilledError):
        _sample(titanium, ImpatientStore(tmp_path, 22), **options)
    _require_equal(whole, _sample(titanium, FrameStore(tmp_path, {}), **options))


def test_a_signal_keeps_what_a_stage_has_come_to(potential: Any, tmp_path: Path) -> None:
    whole = _sample(potential, None)
    evaluate, calls = potential.evaluate, potential.calls

    def ended(*arguments: Any, **options: Any) -> Any:
        if potential.calls == calls + 24:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments, **options)

    potential.evaluate = ended
    with pytest.raises(Interrupted, match="SIGTERM"), ended_by_signals():
        _sample(potential, FrameStore(tmp_path, {}))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["s.0000.h5", "s.0001.unfinished.h5"]
    calls = potential.calls
    with ended_by_signals():
        _require_equal(whole, _sample(potential, FrameStore(tmp_path, {})))
    assert potential.calls == calls + 41 - 24


def test_damaged_segments_are_sampled_anew(potential: Any, tmp_path: Path, always_kept: None) -> None:
    whole = _sample(potential, FrameStore(tmp_path, {}))
    store = FrameStore(tmp_path, {})
    content = store.path("s", 1).read_bytes()
    for damage in (content[: len(content) // 2], b"", content.replace(b"checksum", b"checksux")):
        store.path("s", 1).write_bytes(damage)
        _require_equal(whole, _sample(potential, store))
        assert store.path("s", 1).read_bytes() == content


def test_changed_bits_of_frames_are_noticed(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single bit: what is read is what was written; HDF5 does not even see what is not."""
    store, points = written
    path = store.path("s", 1)
    content, random, seen = path.read_bytes(), np.random.default_rng(0), []
    monkeypatch.setattr(store_module, "sealed_hdf5", seen.append)
    for position in random.integers(SEAL_BYTES, len(content), size=40):
        changed = bytearray(content)
        changed[position] ^= 1 << int(random.integers(8))
        path.write_bytes(bytes(changed))
        with pytest.raises(InputError, match="damaged"):
            store.read("s", 1, points, None)
    assert seen == []


def test_segments_without_their_seal_are_refused(written: Any) -> None:
    """A changed seal makes a file look like one of others; its format says that it must have one."""
    store, points = written
    path = store.path("s", 1)
    path.write_bytes(b"M" + path.read_bytes()[1:])
    with pytest.raises(InputError, match="its checksum is missing"):
        store.read("s", 1, points, None)


def _as_before(path: Path, version: int) -> None:
    """Rewrite a segment as an earlier version wrote it: without a seal, the fourth without checksums."""
    with h5py.File(path) as new, h5py.File(path.with_suffix(".old"), "w") as old:
        old.attrs.update(dict(new.attrs) | {"format": f"mlip_refine frames {version}"})
        for name in new:
            new.copy(name, old)
        for group in (old["snapshot"], *old["points"].values()) if version < 5 else ():
            del group.attrs["checksum"]
    path.with_suffix(".old").replace(path)


@pytest.mark.parametrize("version", [4, 5])
def test_segments_of_earlier_versions_are_read(written: Any, version: int) -> None:
    """To the same bits, with the checksums that they have, and for a run that goes on."""
    store, points = written
    whole, snapshot = store.read("s", 1, points, None)
    checksum = store.checksum("s", 1, "a")
    assert checksum is not None
    path = store.path("s", 1)
    _as_before(path, version)
    found, again = store.read("s", 1, points, None)
    _require_equal(whole, found)
    assert all(torch.equal(value, again[name]) for name, value in snapshot.items())
    assert store.checksum("s", 1, "a") == (checksum if version > 4 else None)
    assert store.read("s", 1, points, "another key") is None
    with h5py.File(path, "a") as file:
        file["points/a/positions"][0, 0, 0, 0] += 1e-9
    if version > 4:
        with pytest.raises(InputError, match="the checksum of points/a is another one"):
            store.read("s", 1, points, None)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="file of frames is damaged"):
        store.read("s", 1, points, None)


def test_a_seal_is_compared_once_for_the_same_file(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store, points = written
    compared: list[Path] = []
    monkeypatch.setattr(store_module, "is_sealed", lambda path: compared.append(path) or is_sealed(path))
    for _ in range(3):
        store.read("s", 0, points, None)
        store.checksum("s", 0, "a")
    assert compared == [store.path("s", 0)]
    store.path("s", 1).replace(store.path("s", 0))
    store.read("s", 0, points, None)
    assert len(compared) == 2


def test_failures_are_dumped_beside_the_frames(potential: Any, tmp_path: Path) -> None:
    """What is written can be read by other programs, NaN and all, and says why."""
    calm, wild = _points()
    store = FrameStore(tmp_path / "frames", {})
    runs = _sample(potential, store, points=[calm, replace(wild, timestep=64.0)], length=Length(0.0, 40))
    dumps = sorted((tmp_path / "frames" / "failed").glob("*.extxyz"))
    assert len(dumps) == len(runs["b"].verdicts) > 0
    first = runs["b"].verdicts[0]
    step, reason = first.split("step ")[1].split(":")[0], first.split(", ")[-1]
    frames = read(tmp_path / "frames" / "failed" / f"s-b-0-step-{step}.extxyz", ":")
    assert all(frame.info["failure"] == reason for frame in frames)
    assert all(len(frame) == len(wild.atoms) for frame in frames)


def test_one_batch_mixes_everything(potential: Any, tmp_path: Path) -> None:
    nvt, npt = _points()[0], replace(_points("npt")[1], name="free")
    runs = _sample(potential, FrameStore(tmp_path, {}), points=[nvt, npt])
    assert list(runs) == ["a", "free"]
    assert runs["a"].cells.std(1).max() < 1e-15 < runs["free"].cells.std(1).max()
    assert {p.name for p in tmp_path.glob("*.h5")} == {"s.0000.h5", "s.0001.h5", "s.0002.h5"}
    _require_equal({"a": runs["a"]}, _sample(potential, None, points=[nvt]))


def test_nose_hoover_goes_with_nvt_only(potential: Any) -> None:
    for ensemble in ("npt", "nve", "nph"):
        point = replace(_points(ensemble)[0], thermostat="nose_hoover")
        with pytest.raises(SamplingError, match=f"a: a Nosé-Hoover chain goes with nvt, not with {ensemble}"):
            _sample(potential, None, points=[point])


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
    with pytest.raises(InputError, match="file of frames is damaged") as caught:
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
    with pytest.raises(InputError, match="is damaged"):
        store.read("s", 0, {"c": points["a"]}, None)


def test_a_file_without_its_key_is_refused(written: Any) -> None:
    store, points = written
    _as_before(store.path("s", 0), 5)
    with h5py.File(store.path("s", 0), "a") as file:
        del file.attrs["key"]
    with pytest.raises(InputError, match=r"is damaged.*key"):
        store.read("s", 0, points, "key")


@pytest.mark.parametrize(("frames", "segment", "wanted"), [(6, None, [6]), (6, 4, [4, 2]), (6, 3, [3, 3])])
def test_segments(frames: int, segment: int | None, wanted: list[int]) -> None:
    assert Length(0.0, frames, segment).segments() == wanted


def _cells(point: StatePoint, stretches: list[list[float]]) -> Trajectory:
    home = torch.from_numpy(point.atoms.cell.array.copy())
    cells = torch.stack([home * torch.tensor(s, dtype=torch.float64) for s in stretches])[None]
    n, zero = len(stretches), torch.zeros(1, len(stretches), dtype=torch.float64)
    positions = torch.from_numpy(point.atoms.positions.copy()).expand(1, n, -1, 3)
    stress, kept = torch.zeros_like(cells), torch.ones(1, n).bool()
    return Trajectory(point, positions, cells, zero, zero, stress, zero, kept)


def test_total_stress_of_a_gas_is_minus_its_pressure() -> None:
    from mlip_refine.quantities import KB

    atoms = bulk("Al", "fcc", a=4.0, cubic=True)
    run = _cells(StatePoint("p", atoms, 700.0), [[1.0, 1.0, 1.0]])
    wanted = -4 * KB * 700.0 / 64.0 * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(run.total_stress(), wanted)


def test_bias_and_scale_belong_to_the_key(potential: Any, tmp_path: Path) -> None:
    atoms = _points()[0].atoms
    n = len(atoms)
    soft, stiff = (testing.harmonic_reference(atoms, {3.0: k}) for k in (1.0, 1.1))
    for hamiltonian in (
        Hamiltonian(0.5, 0.5, soft),
        Hamiltonian(0.5, 0.5, stiff),
        Hamiltonian(0.4, 0.6, stiff),
        *(Hamiltonian(0.4, 0.6, UhlenbeckFord.of_one_length(n, sigma, 0.05)) for sigma in (1.0, 1.01)),
    ):
        calls = potential.calls
        _sample(potential, FrameStore(tmp_path, {}), points=[replace(_points()[0], hamiltonian=hamiltonian)])
        assert potential.calls > calls


def test_points_of_one_name_are_refused(potential):
    """The second would take the place of the first."""
    first, second = _points()[0], replace(_points()[1], name="a")
    with pytest.raises(MlipRefineError, match="state points must have different names: a, a"):
        sample(potential, [first, second], SETTINGS, LENGTH, seed=1, stage="same")
