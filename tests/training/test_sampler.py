"""State points are sampled anew as their policy says, and come back from a checkpoint bit for bit."""

import shutil
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from mlip_refine.errors import InputError
from mlip_refine.losses import EnsembleSource
from mlip_refine.sampling import FrameStore, Length, MDSettings, StatePoint, Trajectory
from mlip_refine.training import tracker as resampling
from mlip_refine.training.ensemble import may_lend
from mlip_refine.training.tracker import (
    EnsembleSampler,
    Policy,
    restored_ensembles,
    saved_ensembles,
    stage_seed,
)
from mlip_refine.training.trainer import read_latest, write_checkpoint

HCP, BCC = EnsembleSource("hcp", 1000.0, 2.0), EnsembleSource("bcc", 1000.0, 2.0)


def _trajectory(point: StatePoint, seed: int, n_frames: int) -> Trajectory:
    noise = np.random.default_rng(seed).normal(0, 0.08, (2, n_frames, len(point.atoms), 3))
    series = torch.zeros(2, n_frames, dtype=torch.float64)
    return Trajectory(
        point=point,
        positions=torch.from_numpy(point.atoms.positions + noise),
        cells=torch.from_numpy(np.array(point.atoms.cell)).expand(2, n_frames, 3, 3).contiguous(),
        model_energy=series,
        bias_energy=series,
        stress=series[..., None, None].expand(2, n_frames, 3, 3).contiguous(),
        kinetic_energy=series,
        kept=torch.ones(2, n_frames, dtype=torch.bool),
    )


class Sampled:
    """Stands for `sample`: rattled crystals in place of dynamics, noted and stored."""

    calls: ClassVar[list] = []

    def __call__(self, potential, points, settings, length, *, seed, stage, store, start):
        self.calls.append((stage, [p.name for p in points], length, start))
        frames = {p.name: _trajectory(p, seed + i, length.frames) for i, p in enumerate(points)}
        store.write(stage, 0, frames, {"step": torch.tensor(3)}, "key")
        return frames


@pytest.fixture
def sampled(monkeypatch):
    monkeypatch.setattr(resampling, "sample", Sampled())
    Sampled.calls.clear()
    return Sampled.calls


@pytest.fixture
def sampler(tmp_path, hcp, bcc, sampled):
    def make(kind: str = "nvt", **policy) -> EnsembleSampler:
        freedom = {"hcp": "anisotropic", "bcc": "isotropic"}
        points = {
            s: StatePoint(s.name, atoms, s.temperature, s.pressure, kind, freedom[s.phase], replicas=2)
            for s, atoms in ((HCP, hcp), (BCC, bcc))
        }
        store = FrameStore(tmp_path / "frames", {"seed": 1})
        length = Length(200.0, 4)
        return EnsembleSampler(points, MDSettings(), length, store, 1, "float64", 0.1, Policy(**policy))

    return make


def _moved(potential, factor: float) -> None:
    with torch.no_grad():
        for parameter in potential.trainable_parameters().values():
            parameter.mul_(factor)


def _redrawn(sampler, potential, ensembles, stage):
    energies = {s: potential.energies(e.structures) for s, e in ensembles.items()}
    fresh, known = sampler.redraw(potential, ensembles, energies, list(ensembles), stage)
    return ensembles | fresh, known


def test_old_frames_stay_and_the_model_is_known_on_all(titanium, sampler, sampled):
    drawer = sampler(refresh=0.5)
    ensembles = drawer.initial(titanium, [HCP, BCC])
    _moved(titanium, 1.0002)
    ensembles, known = _redrawn(drawer, titanium, ensembles, "step-0001")
    for source, ensemble in ensembles.items():
        assert [r.stage for r in ensemble.references] == ["initial", "step-0001"]
        assert ensemble.sizes == [8, 4]
        wanted = titanium.energies(ensemble.structures)
        assert torch.allclose(known[source], wanted, rtol=1e-12)
        assert torch.allclose(ensemble.energies[1], wanted, rtol=1e-12)
        with titanium.holding(ensemble.references[0].parameters):
            assert torch.allclose(ensemble.energies[0], titanium.energies(ensemble.structures), rtol=1e-12)
        assert ensemble.n_eff(known[source]) > 1.2
    stage, names, length, start = sampled[-1]
    assert (stage, names, length) == ("step-0001", [HCP.name, BCC.name], Length(100.0, 2))
    assert torch.equal(
        start[HCP.name][0][0], _trajectory(drawer.points[HCP], stage_seed(1, "initial"), 4).positions[0, -1]
    )


def test_the_newest_reference_alone(titanium, sampler, sampled):
    """A whole draw in place of the old one; the way back to the initial model is in the shift."""
    drawer = sampler(max_references=1)
    first = drawer.initial(titanium, [HCP])
    _moved(titanium, 1.0002)
    ensembles, known = _redrawn(drawer, titanium, first, "step-0001")
    assert sampled[-1][2] == Length(200.0, 4)
    assert [r.stage for r in ensembles[HCP].references] == ["step-0001"]
    assert torch.equal(known[HCP], ensembles[HCP].energies[0])
    change = float(known[HCP].mean() - first[HCP].energies.mean())
    assert ensembles[HCP].shift.value == pytest.approx(change, abs=0.5)
    assert ensembles[HCP].shift.se > 0


@pytest.mark.parametrize(
    ("n_eff", "references", "share"),
    [(0.9, 6, 0.5), (0.2, 6, 0.8), (0.0, 6, 1.0), (1.4, 6, 0.5), (0.9, 1, 1.0)],
)
def test_a_draw_makes_up_for_what_is_missing(n_eff, references, share):
    assert Policy(max_references=references, refresh=0.5).share(n_eff) == pytest.approx(share)


def test_steps_are_counted(titanium, sampler):
    """(equilibration + frames · interval)/timestep · replicas · atoms, half of it for half a draw."""
    drawer = sampler()
    ensembles = drawer.initial(titanium, [HCP, BCC])
    atoms = sum(len(p.atoms) * p.replicas for p in drawer.points.values())
    assert drawer.md_steps == (200 + 4 * 100) // 2 * atoms
    _redrawn(drawer, titanium, {HCP: ensembles[HCP]}, "step-0003")
    assert drawer.md_steps == 300 * atoms + 150 * 2 * len(drawer.points[HCP].atoms)


@pytest.mark.parametrize("kind", ["nvt", "npt"])
@pytest.mark.parametrize("most", [1, 6])
def test_restored_bit_for_bit(titanium, sampler, sampled, tmp_path, kind, most):
    """All draws of all references, through a checkpoint; the parameters have moved on since."""
    drawer = sampler(kind, max_references=most)
    before = drawer.initial(titanium, [HCP, BCC])
    for step, sources in ((1, [HCP]), (2, [HCP, BCC]), (3, [BCC])):
        _moved(titanium, 1.0001)
        changed, _ = _redrawn(drawer, titanium, {s: before[s] for s in sources}, f"step-{step:04d}")
        before |= changed
    write_checkpoint(tmp_path, 4, saved_ensembles(before))
    _moved(titanium, 1.01)
    moved, calls = titanium.parameters(), len(sampled)
    after = restored_ensembles(drawer, titanium, read_latest(tmp_path))
    assert list(after) == [HCP, BCC]
    assert len(sampled) == calls
    for source, ensemble in before.items():
        again = after[source]
        assert [r.stage for r in again.references] == [r.stage for r in ensemble.references]
        assert (again.shift, again.frames_per_draw) == (ensemble.shift, ensemble.frames_per_draw)
        for name in ("energies", "shift_influence", "volume", "log_q"):
            assert torch.equal(getattr(again, name), getattr(ensemble, name))
        energy = titanium.energies(again.structures)
        assert torch.equal(energy, titanium.energies(ensemble.structures))
        assert again.frames({"energy": energy}).shift == ensemble.frames({"energy": energy}).shift
        for one, other in zip(again.references, ensemble.references, strict=True):
            assert torch.equal(one.ends[0], other.ends[0])
            for name, value in other.parameters.items():
                assert torch.equal(one.parameters[name], value)
    for name, value in titanium.parameters().items():
        assert torch.equal(value, moved[name])


WARM = EnsembleSource("hcp", 1040.0, 2.0)


@pytest.mark.parametrize("kind", ["nvt", "npt"])
def test_frames_are_lent_within_a_phase(titanium, sampler, sampled, kind):
    """From 1000 to 1040 K and back: nearly two whole draws each; and they come back from a checkpoint."""
    drawer = sampler(kind, lend=True)
    warm = replace(drawer.points[HCP], name=WARM.name, temperature=WARM.temperature)
    drawer.points |= {WARM: warm}
    ensembles = drawer.initial(titanium, [HCP, BCC, WARM])
    assert {s: [r.point.name for r in e.references] for s, e in ensembles.items()} == {
        HCP: [HCP.name, WARM.name],
        BCC: [BCC.name],
        WARM: [WARM.name, HCP.name],
    }
    assert ensembles[HCP].n_eff(ensembles[HCP].energies[0]) > 1.6
    _moved(titanium, 1.0002)
    energies = {s: titanium.energies(e.structures) for s, e in ensembles.items()}
    fresh, known = drawer.redraw(titanium, ensembles, energies, [HCP], "step-0001")
    assert set(fresh) == {HCP, WARM}
    assert [r.stage for r in fresh[WARM].references] == ["initial", "initial", "step-0001"]
    for source, ensemble in fresh.items():
        assert torch.allclose(known[source], titanium.energies(ensemble.structures), rtol=1e-12)
    after = restored_ensembles(drawer, titanium, saved_ensembles(ensembles | fresh))
    for source, ensemble in (ensembles | fresh).items():
        assert torch.equal(after[source].log_q, ensemble.log_q)


@pytest.mark.parametrize("most", [1, 2])
def test_lent_frames_are_references_too(titanium, sampler, sampled, most):
    """Three temperatures lend to each other, again and again, and no state keeps more than it may."""
    drawer = sampler("npt", lend=True, max_references=most, refresh=1.0)
    for temperature in (980.0, 1020.0):
        source = EnsembleSource("hcp", temperature, 2.0)
        drawer.points |= {source: replace(drawer.points[HCP], name=source.name, temperature=temperature)}
    hot = [s for s in drawer.points if s != BCC]
    ensembles = drawer.initial(titanium, hot)
    assert [len(e.references) for e in ensembles.values()] == [most] * 3
    _moved(titanium, 1.0002)
    ensembles, known = _redrawn(drawer, titanium, ensembles, "step-0001")
    for source, ensemble in ensembles.items():
        assert len(ensemble.references) <= most
        assert ensemble.latest.stage == "step-0001"
        assert torch.allclose(known[source], titanium.energies(ensemble.structures), rtol=1e-12)


def test_only_configurations_of_a_state_are_lent(sampler):
    free, fixed = sampler("npt").points, sampler("nvt").points
    squeezed = fixed[HCP].with_cell(0.99 * fixed[HCP].atoms.cell.array)
    assert may_lend(free[HCP], replace(free[HCP], pressure=9.0))
    assert may_lend(fixed[HCP], replace(fixed[HCP], temperature=9.0))
    assert not may_lend(fixed[HCP], squeezed)
    assert not may_lend(fixed[HCP], free[HCP])
    assert not may_lend(free[HCP], replace(free[HCP], cell_freedom="isotropic"))


def test_frames_that_are_gone_are_refused(titanium, sampler):
    drawer = sampler()
    saved = saved_ensembles(drawer.initial(titanium, [HCP]))
    drawer.store.path("initial", 0).unlink()
    with pytest.raises(InputError, match="the frames of the stage 'initial' are gone"):
        restored_ensembles(drawer, titanium, saved)


def test_other_frames_are_refused(titanium, sampler):
    """Those of another seed, in the place of the run's own: each file is sound by itself."""
    drawer, other = sampler(), sampler()
    other.seed += 1
    other.store = FrameStore(drawer.store.folder / "other", {})
    saved = saved_ensembles(drawer.initial(titanium, [HCP]))
    saved["checksums"] = drawer.checksums([HCP], "initial")
    assert restored_ensembles(drawer, titanium, saved)
    other.initial(titanium, [HCP])
    shutil.copy(other.store.path("initial", 0), drawer.store.path("initial", 0))
    with pytest.raises(InputError, match="are not those that this run has drawn") as caught:
        restored_ensembles(drawer, titanium, saved)
    assert caught.value.where.endswith("initial.0000.h5")


def test_every_stage_has_its_own_seed():
    seeds = {stage_seed(seed, stage) for seed in range(5) for stage in ("initial", "step-0001", "before")}
    assert len(seeds) == 15
    assert stage_seed(3, "initial") == stage_seed(3, "initial")
    assert all(0 <= seed < 2**32 for seed in seeds)
