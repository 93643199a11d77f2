"""One NaN, one overheated and one melted system in a batch of eight of titanium: the others do not notice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.io import read
from torch import Tensor

from mlip_refine.potential import Potential
from mlip_refine.sampling import FrameStore, Length, MDSettings, StatePoint, Trajectory, sample
from mlip_refine.sampling.md import engine

pytestmark = pytest.mark.slow

SERIES = ("positions", "cells", "model_energy", "bias_energy", "stress")
LENGTH = Length(40.0, 12)
# Averages fill at steps 48 and 96: what is then found goes back to step 48, after the first frame.
FAULT, MELT, SAFE, SAFE_FRAMES = 110, 112, 48, 1
# Systems 0 to 3 are hcp's replicas, 4 to 7 bcc's.
LOST, HOT, MELTED = 1, 4, 7


def _points(ensemble: Any) -> list[StatePoint]:
    """54 atoms each, of both phases, at a temperature at which both are mechanically stable."""
    hcp, bcc = bulk("Ti", "hcp", a=2.93, c=4.66) * (3, 3, 3), bulk("Ti", "bcc", a=3.27, cubic=True) * 3
    return [
        StatePoint("hcp", hcp, 900.0, 0.0, ensemble, "hexagonal", replicas=4, identity="sites"),
        StatePoint("bcc", bcc, 1300.0, 0.0, ensemble, "isotropic", replicas=4, identity="sites"),
    ]


def _melt(state: Any, mine: Tensor) -> None:
    """Atoms anywhere in the cell, but no two of them nearer than 2.1 Å: a liquid, quenched a little."""
    n, cell, generator = int(mine.sum()), state.row_vector_cell[MELTED].double(), np.random.default_rng(7)
    places: list[np.ndarray] = []
    while len(places) < n:
        place = generator.random(3)
        delta = np.array(places).reshape(-1, 3) - place
        apart = np.linalg.norm((delta - delta.round()) @ cell.numpy(), axis=1)
        if (apart > 2.1).all():
            places.append(place)
    state.positions[mine] = torch.tensor(np.array(places) @ cell.numpy()).to(state.positions)


def _lose(state: Any, mine: Tensor) -> None:
    state.positions[mine.nonzero()[0], 0] = torch.nan


def _heat(state: Any, mine: Tensor) -> None:
    state.momenta[mine] *= 3.0


def _sample(
    dtype: str,
    ensemble: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    inject: Callable[..., None] | None,
) -> dict[str, Trajectory]:
    class Faulty(engine.MolecularDynamics):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            if inject:
                inject(self, _lose, LOST, [FAULT])
                inject(self, _heat, HOT, [FAULT])
                inject(self, _melt, MELTED, [MELT])

    monkeypatch.setattr("mlip_refine.sampling.sampler.MolecularDynamics", Faulty)
    potential = Potential.load("titanium-compact").frozen_copy(dtype)
    settings = MDSettings(timestep=4.0, friction=5.0, interval=80.0, barostat_time=400.0)
    store = FrameStore(folder, {})
    return sample(potential, _points(ensemble), settings, LENGTH, seed=61, stage="s", store=store)


@pytest.mark.parametrize(("dtype", "ensemble"), [("float32", "nvt"), ("float64", "nvt"), ("float32", "npt")])
def test_three_faults_in_a_batch_of_eight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inject: Callable[..., None], dtype: str, ensemble: str
) -> None:
    healthy = _sample(dtype, ensemble, tmp_path / "healthy", monkeypatch, None)
    runs = _sample(dtype, ensemble, tmp_path / "frames", monkeypatch, inject)
    assert all(run.kept.all() and not run.verdicts for run in healthy.values())
    verdicts = [line for run in runs.values() for line in run.verdicts]
    reasons = {
        ("hcp", LOST): (FAULT, "its positions or cell became non-finite"),
        ("bcc", HOT - 4): (FAULT, "it overheated"),
        ("bcc", MELTED - 4): (MELT, None),
    }
    for (name, replica), (step, reason) in reasons.items():
        first = next(line for line in verdicts if line.startswith(f"{name}, replica {replica}, step "))
        found = int(first.split("step ")[1].split(":")[0])
        assert step < found <= step + 100
        assert f": set back to step {SAFE} (restart 1 of 3), " in first
        assert first.endswith(reason or ("it overheated", "it left its lattice sites"))
        dump = tmp_path / "frames" / "failed" / f"s-{name}-{replica}-step-{found}.extxyz"
        assert all(len(frame) == 54 for frame in read(dump, ":"))
        kept = runs[name].kept[replica]
        assert not kept.all()
        assert kept[:SAFE_FRAMES].all(), "frames of the healthy time stay"
        assert kept[-1], "it goes on after the restart"
        assert torch.isfinite(runs[name].positions[replica][kept]).all()
    assert len(verdicts) == 3
    for name, run in runs.items():
        others = [r for r in range(4) if (name, r) not in reasons]
        for series in (*SERIES, "kept"):
            found_here, undisturbed = getattr(run, series)[others], getattr(healthy[name], series)[others]
            assert torch.equal(found_here, undisturbed), (name, series)
