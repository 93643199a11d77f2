"""Labelled frames as batches, their gradients at once and streamed, and held-out errors."""

from dataclasses import replace

import pytest
import torch

from mlip_refine.losses.options import ReplayOptions
from mlip_refine.losses.replay import Replay
from mlip_refine.potential import Potential, batching
from mlip_refine.quantities import GPA
from mlip_refine.training.replay import (
    LabelledFrame,
    backpropagate_batch,
    held_out_errors,
    labelled_by,
    labels,
)


@pytest.mark.parametrize("chunk_atoms", [1, 900])
def test_held_out_errors_are_those_put_in(titanium, frames, label_errors, monkeypatch, chunk_atoms):
    monkeypatch.setitem(batching.CHUNK_ATOMS, "cpu", chunk_atoms)
    errors = held_out_errors(titanium, frames)
    assert errors.energy_mae_mev_per_atom == pytest.approx(1e3 * label_errors.energy, rel=1e-9)
    assert errors.forces_mae_mev_per_A == pytest.approx(1e3 * label_errors.forces, rel=1e-9)
    assert errors.stress_mae_gpa == pytest.approx(label_errors.stress / GPA, rel=1e-9)
    assert errors.n_frames == 3


def test_no_stress_labels_no_stress_error(titanium, frames):
    assert held_out_errors(titanium, frames[2:]).stress_mae_gpa is None


def test_a_model_labels_frames_itself(titanium, frames, monkeypatch):
    monkeypatch.setitem(batching.CHUNK_ATOMS, "cpu", 20)
    bare = [replace(f, energy=None, forces=None, stress=None, source=f"{i}") for i, f in enumerate(frames)]
    found = labelled_by(titanium, bare)
    assert [f.source for f in found] == ["0", "1", "2"]
    errors = held_out_errors(titanium, found)
    assert max(errors.energy_mae_mev_per_atom, errors.forces_mae_mev_per_A, errors.stress_mae_gpa) < 1e-9


def test_frames_count_for_the_labels_that_they_have(titanium, frames, label_errors):
    """Errors of the rest are those of a set without the missing labels."""
    bare = [
        replace(frames[0], energy=None),
        replace(frames[1], forces=None, weights={"energy": 3.0, "forces": 0.0, "stress": 0.5}),
        frames[2],
    ]
    errors = held_out_errors(titanium, bare)
    assert errors.energy_mae_mev_per_atom == pytest.approx(1e3 * label_errors.energy, rel=1e-9)
    assert errors.forces_mae_mev_per_A == pytest.approx(1e3 * label_errors.forces, rel=1e-9)
    nothing = [replace(f, energy=None, forces=None) for f in frames]
    assert held_out_errors(titanium, nothing).energy_mae_mev_per_atom is None
    assert held_out_errors(titanium, nothing).forces_mae_mev_per_A is None
    found = labels(bare, titanium.device, titanium.dtype)
    assert found["has_energy"].tolist() == [0, 1, 1]
    assert found["has_forces"].tolist() == [1, 0, 1]
    assert found["has_stress"].tolist() == [1, 1, 0]
    assert found["energy_weight"].tolist() == [1, 3, 1]
    assert found["stress_weight"].tolist() == [1, 0.5, 1]
    outputs = titanium.evaluate(
        titanium.graphs.collate([f.structure for f in bare]), ("energy", "forces", "stress")
    )
    result = Replay("replay", 1.0, ReplayOptions()).evaluate(outputs, found)
    # Energies count as 3 and 1 over two frames, stresses as 1 and 0.5.
    assert result.components["replay.energy"] == pytest.approx(2 * label_errors.energy**2, rel=1e-9)
    assert result.components["replay.forces"] == pytest.approx(100 * label_errors.forces**2, rel=1e-9)
    assert result.components["replay.stress"] == pytest.approx(7.5 * label_errors.stress**2, rel=1e-9)


def test_labels_line_up_with_the_outputs(titanium, frames, label_errors):
    """The loss is exactly that of the offsets, stress over the two frames that have one."""
    outputs = titanium.evaluate(
        titanium.graphs.collate([f.structure for f in frames]),
        ("energy", "forces", "stress"),
        create_graph=True,
    )
    loss = Replay("replay", 1.0, ReplayOptions(energy_weight=2.0, forces_weight=3.0, stress_weight=5.0))
    result = loss.evaluate(outputs, labels(frames, titanium.device, titanium.dtype))
    assert result.components["replay.energy"] == pytest.approx(2 * label_errors.energy**2, rel=1e-9)
    assert result.components["replay.forces"] == pytest.approx(3 * label_errors.forces**2, rel=1e-9)
    assert result.components["replay.stress"] == pytest.approx(5 * label_errors.stress**2, rel=1e-9)


LOSSES = (
    Replay("one", 0.7, ReplayOptions()),
    Replay("other", 2.0, ReplayOptions(energy_weight=5.0, forces_weight=0.0, stress_weight=0.0)),
)


def _gradient(potential: Potential, frames: list[LabelledFrame]) -> tuple[torch.Tensor, dict[str, float]]:
    parameters = list(potential.trainable_parameters().values())
    for parameter in parameters:
        parameter.grad = None
    results = backpropagate_batch(potential, LOSSES, frames, 0.5)
    assert not any(result.value.requires_grad for result in results.values())
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    components = {k: v for result in results.values() for k, v in result.components.items()}
    return torch.cat([g.flatten() for g in gradients]), components


def _direct(potential: Potential, frames: list[LabelledFrame]) -> torch.Tensor:
    outputs = potential.evaluate(
        potential.graphs.collate([f.structure for f in frames]),
        ("energy", "forces", "stress"),
        create_graph=True,
    )
    wanted = labels(frames, potential.device, potential.dtype)
    total = sum(0.5 * loss.weight * loss.evaluate(outputs, wanted).value for loss in LOSSES)
    parameters = list(potential.trainable_parameters().values())
    found = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize("chunk_atoms", [900, 24, 1])
def test_the_gradient_is_that_of_the_whole_batch(titanium, frames, label_errors, monkeypatch, chunk_atoms):
    """Frames of different size, one without stress: no mean of a chunk is one of the batch."""
    exact = _direct(titanium, frames)
    monkeypatch.setitem(batching.CHUNK_ATOMS, "cpu", chunk_atoms)
    found, components = _gradient(titanium, frames)
    assert float((found - exact).norm()) < 1e-10 * float(exact.norm())
    assert components["one.forces"] == pytest.approx(100 * label_errors.forces**2, rel=1e-9)
    assert components["other.energy"] == pytest.approx(5 * label_errors.energy**2, rel=1e-9)


@pytest.mark.parametrize("backward", [False, True])
def test_a_batch_that_runs_out_of_memory_is_streamed(titanium, frames, cramped, capsys, backward):
    exact = _direct(titanium, frames)
    limited = cramped(24, backward=backward)
    found, _ = _gradient(titanium, frames)
    assert float((found - exact).norm()) < 1e-10 * float(exact.norm())
    assert max(limited.sizes) == 40
    said = capsys.readouterr().err
    assert said.count("out of memory") == (1 if backward else 2)
    assert "out of memory in the gradients of forces of 40 atoms" in said
    _gradient(titanium, frames)
    assert capsys.readouterr().err == ""


def test_held_out_errors_survive_too_little_memory(titanium, frames, cramped):
    whole = held_out_errors(titanium, frames)
    limited = cramped(24, backward=False)
    less = held_out_errors(titanium, frames)
    assert limited.sizes[0] == 40
    assert less.energy_mae_mev_per_atom == pytest.approx(whole.energy_mae_mev_per_atom, rel=1e-9)
    assert less.forces_mae_mev_per_A == pytest.approx(whole.forces_mae_mev_per_A, rel=1e-9)
    assert less.stress_mae_gpa == pytest.approx(whole.stress_mae_gpa, rel=1e-9)


@pytest.mark.parametrize("name", ["energy", "forces", "stress"])
def test_each_weight_reaches_the_parameters(titanium, frames, name):
    """No weight is silently off: each quantity alone gives a gradient of its own."""

    def gradient(**weights: float) -> torch.Tensor:
        options = {"energy_weight": 1.0, "forces_weight": 1.0, "stress_weight": 1.0} | weights
        loss = Replay("replay", 1.0, ReplayOptions(**options))
        outputs = titanium.evaluate(
            titanium.graphs.collate([f.structure for f in frames]), loss.probes, create_graph=True
        )
        value = loss.evaluate(outputs, labels(frames, titanium.device, titanium.dtype)).value
        parameters = list(titanium.trainable_parameters().values())
        found = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in found])

    base, heavier, off = (gradient(**{f"{name}_weight": w}) for w in (1.0, 3.0, 0.0))
    part = base - off
    assert float(part.norm()) > 1e-6 * float(base.norm())
    assert torch.allclose(heavier - base, 2 * part, rtol=1e-6, atol=1e-9 * float(base.norm()))
