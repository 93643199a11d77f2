"""Ensembles come back from a checkpoint and the store as they were, whatever the kind of ensemble."""

from typing import ClassVar

import numpy as np
import pytest
import torch

from mlip_refine.losses import EnsembleSource
from mlip_refine.quantities import Measured
from mlip_refine.sampling import FrameStore, Length, MDSettings, StatePoint, Trajectory
from mlip_refine.training.ensembles import Ensemble
from mlip_refine.training.resampling import EnsembleSampler, saved_ensembles, stage_seed

HCP, BCC = EnsembleSource("hcp", 1000.0, 2.0), EnsembleSource("bcc", 1000.0, 2.0)


class Recording(EnsembleSampler):
    """Notes what it is asked to draw, and under which parameters."""

    drawn: ClassVar[list] = []

    def draw(self, potential, sources, stage, start=None):
        self.drawn.append((stage, list(sources), potential.parameters()))
        return {s: _ensemble(potential, self.points[s], stage) for s in sources}


def _trajectory(point: StatePoint) -> Trajectory:
    noise = np.random.default_rng(len(point.name)).normal(0, 0.08, (2, 3, len(point.atoms), 3))
    series = torch.zeros(2, 3, dtype=torch.float64)
    return Trajectory(
        point=point,
        positions=torch.from_numpy(point.atoms.positions + noise),
        cells=torch.from_numpy(np.array(point.atoms.cell)).expand(2, 3, 3, 3).contiguous(),
        model_energy=series,
        bias_energy=series,
        stress=series[..., None, None].expand(2, 3, 3, 3).contiguous(),
        kept=torch.ones(2, 3, dtype=torch.bool),
    )


def _ensemble(potential, point: StatePoint, stage: str) -> Ensemble:
    return Ensemble.from_trajectory(potential, _trajectory(point), stage)


@pytest.fixture
def sampler(tmp_path, hcp, bcc):
    def make(kind: str) -> Recording:
        freedom = {"hcp": "anisotropic", "bcc": "isotropic"}
        points = {
            s: StatePoint(s.name, atoms, s.temperature, s.pressure, kind, freedom[s.phase], replicas=2)
            for s, atoms in ((HCP, hcp), (BCC, bcc))
        }
        store = FrameStore(tmp_path / "frames", {"seed": 1})
        made = Recording(points, MDSettings(), Length(0.0, 3), store, 1, "float64", 0.1)
        made.drawn.clear()
        return made

    return make


def _write(sampler: EnsembleSampler, stage: str, by_label: dict[str, list[EnsembleSource]]) -> None:
    for label, sources in by_label.items():
        frames = {sampler.points[s].name: _trajectory(sampler.points[s]) for s in sources}
        sampler.store.write(f"{stage}{label}", 0, frames, {"step": torch.tensor(3)}, "key")


@pytest.mark.parametrize(
    ("kind", "labels"),
    [("nvt", {"": [BCC, HCP]}), ("npt", {"-npt-anisotropic": [HCP], "-npt-isotropic": [BCC]})],
)
def test_restored_bit_for_bit(titanium, sampler, kind, labels):
    """The parameters have moved on since; energies are those of the reference, on the path of training."""
    drawer = sampler(kind)
    _write(drawer, "initial", labels)
    before = {s: _ensemble(titanium, drawer.points[s], "initial") for s in (HCP, BCC)}
    saved = saved_ensembles(before)
    saved[0]["shift"] = [0.25, 0.01]
    with torch.no_grad():
        for parameter in titanium.trainable_parameters().values():
            parameter.mul_(1.01)
    moved = titanium.parameters()
    after = drawer.restore(titanium, saved)
    assert list(after) == [HCP, BCC]
    assert drawer.drawn == []
    for source, ensemble in before.items():
        assert torch.equal(after[source].energy, ensemble.energy)
        assert after[source].inefficiency == ensemble.inefficiency
        for name, value in ensemble.reference.items():
            assert torch.equal(after[source].reference[name], value)
    assert after[HCP].shift == Measured(0.25, 0.01, "eV")
    for name, value in titanium.parameters().items():
        assert torch.equal(value, moved[name])


def test_stages_that_are_gone_are_drawn_as_they_were(titanium, sampler):
    """All sources of a stage at once, under its reference; the order of the checkpoint stays."""
    drawer = sampler("nvt")
    _write(drawer, "step-0003", {"": [HCP]})
    ensembles = {
        BCC: _ensemble(titanium, drawer.points[BCC], "initial"),
        HCP: _ensemble(titanium, drawer.points[HCP], "step-0003"),
    }
    saved = saved_ensembles(ensembles)
    with torch.no_grad():
        for parameter in titanium.trainable_parameters().values():
            parameter.mul_(1.01)
    after = drawer.restore(titanium, saved)
    assert list(after) == [BCC, HCP]
    ((stage, sources, parameters),) = drawer.drawn
    assert (stage, sources) == ("initial", [BCC])
    for name, value in ensembles[BCC].reference.items():
        assert torch.equal(parameters[name], value)


def test_every_stage_has_its_own_seed():
    seeds = {stage_seed(seed, stage) for seed in range(5) for stage in ("initial", "step-0001", "before")}
    assert len(seeds) == 15
    assert stage_seed(3, "initial") == stage_seed(3, "initial")
    assert all(0 <= seed < 2**32 for seed in seeds)
