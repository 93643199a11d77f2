"""A run from experiments alone ends with the energies that it began with, or is refused at once."""

import json
from collections.abc import Callable
from functools import partial

import pytest
import torch

from mlip_refine.config import Config
from mlip_refine.errors import InputError
from mlip_refine.potential import Potential
from mlip_refine.workflows.finetune import finetune
from mlip_refine.workflows.finetune.run import FinetuneResult
from mlip_refine.workflows.from_config import load_replay

ELASTIC = {
    "type": "elastic_constants",
    "phase": "hcp",
    "method": "static",
    "thermal": False,
    "kind": "isothermal",
    "targets": [{"temperature": 300.0, "lattice": [2.95, 4.68], "constants": {"C11": 120.0}}],
}
TRAINING = {"steps": 3, "learning_rate": 1e-3, "energy_shift": "replay"}


def _mean_error(potential: Potential, frames) -> float:
    """Signed error of the energy per atom, eV, over frames of two atoms."""
    energies = potential.energies([frame.structure for frame in frames])
    return float((energies - torch.tensor([frame.energy for frame in frames])).mean() / 2)


@pytest.fixture(scope="module")
def configured(tmp_path_factory, tiny_in) -> Callable[..., Config]:
    return partial(tiny_in, tmp_path_factory.mktemp("shift"), losses=[ELASTIC])


@pytest.fixture(scope="module")
def finished(configured) -> FinetuneResult:
    return finetune(configured(training=TRAINING))


def test_energies_are_taken_back(configured, finished):
    initial = Potential.load("titanium-compact")
    frames = load_replay(configured(), initial).buffer.frames
    shift = finished.summary.energy_shift_eV
    assert list(shift) == ["Ti"]
    assert abs(shift["Ti"]) > 1e-4
    assert json.loads((finished.folder / "summary.json").read_text())["energy_shift_eV"] == shift
    assert abs(_mean_error(finished.potential, frames) - _mean_error(initial, frames)) < 1e-12
    saved = Potential.load(str(finished.model))
    assert saved.hash == finished.potential.hash == finished.summary.model_hash


def test_a_finished_run_that_goes_on_is_not_shifted_twice(configured, finished):
    again = finetune(configured(training=TRAINING), resume=True)
    assert again.potential.hash == finished.potential.hash
    assert again.summary.energy_shift_eV == finished.summary.energy_shift_eV


def test_a_shift_needs_frames(configured):
    config = configured(name="bare", training=TRAINING, replay=None)
    with pytest.raises(InputError, match="energy_shift needs labelled frames, but the config has no section"):
        finetune(config)
    assert not config.run_folder.exists()


def test_turns_without_losses_are_refused_before_anything_is_written(configured):
    config = configured(name="turns", training={"schedule": "alternate"})
    with pytest.raises(InputError, match="the schedule alternate has no turns to take; found no loss of lab"):
        finetune(config)
    assert not config.run_folder.exists()
