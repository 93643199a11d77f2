"""The optimiser: exact running mean, clipping, refusals, state."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mlip_refine.config import Training
from mlip_refine.errors import MlipRefineError
from mlip_refine.training.adamw import AdamW


def _potential(*values: float) -> SimpleNamespace:
    """Parameters by name: all that the optimiser sees of a potential."""
    named = {
        f"p{i}": torch.nn.Parameter(torch.tensor([v, -v], dtype=torch.float64)) for i, v in enumerate(values)
    }
    return SimpleNamespace(trainable_parameters=lambda: named, named=named)


def _pull(potential: SimpleNamespace, factor: float = 1.0) -> None:
    for parameter in potential.named.values():
        parameter.grad = factor * (parameter.detach() + 0.3)


def test_running_mean_is_exactly_bias_corrected():
    """Σ d^(n-1-i) p_i / Σ d^(n-1-i)."""
    potential, decay = _potential(1.0, 2.0), 0.8
    optimiser = AdamW(potential, Training(ema_decay=decay, learning_rate=0.05))
    seen = []
    for _ in range(7):
        _pull(potential)
        optimiser.step()
        seen.append(potential.named["p1"].detach().clone())
    weights = torch.tensor([decay ** (6 - i) for i in range(7)], dtype=torch.float64)
    wanted = (weights[:, None] * torch.stack(seen)).sum(0) / weights.sum()
    assert torch.allclose(optimiser.averaged()["p1"], wanted, rtol=1e-13)


def test_running_mean_after_one_step_is_that_step():
    potential = _potential(1.0)
    optimiser = AdamW(potential, Training(ema_decay=0.999))
    before = optimiser.averaged()["p0"]
    assert torch.equal(before, potential.named["p0"])
    _pull(potential)
    optimiser.step()
    assert torch.allclose(optimiser.averaged()["p0"], potential.named["p0"].detach(), rtol=1e-12)


def test_no_running_mean_keeps_the_last_parameters():
    potential = _potential(1.0)
    optimiser = AdamW(potential, Training(ema_decay=0.0))
    for _ in range(3):
        _pull(potential)
        optimiser.step()
    kept = optimiser.averaged()["p0"]
    assert torch.equal(kept, potential.named["p0"])
    assert kept.data_ptr() != potential.named["p0"].data_ptr()


@pytest.mark.parametrize(("limit", "scaled"), [(0.5, True), (1e6, False), (None, False)])
def test_gradient_is_clipped_to_its_norm(limit, scaled):
    potential = _potential(3.0, 4.0)
    optimiser = AdamW(potential, Training(clip_gradient=limit))
    _pull(potential)
    before = torch.cat([p.grad for p in potential.named.values()]).clone()
    norm = optimiser.step()
    after = torch.cat([p.grad for p in potential.named.values()])
    assert norm == pytest.approx(float(before.norm()))
    wanted = before * (limit / norm) if scaled else before
    assert torch.allclose(after, wanted, rtol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(value):
    potential = _potential(3.0, 4.0)
    optimiser = AdamW(potential, Training())
    _pull(potential)
    optimiser.step()
    before = {name: p.detach().clone() for name, p in potential.named.items()}
    mean, state = optimiser.averaged(), copy.deepcopy(optimiser.state_dict())
    _pull(potential)
    potential.named["p0"].grad[1] = value
    with pytest.raises(MlipRefineError, match="the gradient is not finite"):
        optimiser.step()
    for name, parameter in potential.named.items():
        assert torch.equal(parameter, before[name])
        assert torch.equal(optimiser.averaged()[name], mean[name])
    assert optimiser.state_dict()["weight"] == state["weight"]


def test_nothing_to_train_is_refused():
    with pytest.raises(MlipRefineError, match="every parameter is frozen"):
        AdamW(_potential(), Training())


def test_goes_on_from_its_state_bit_for_bit():
    settings = Training(ema_decay=0.7, learning_rate=0.02, weight_decay=0.01)
    one = _potential(1.0, -2.0)
    first = AdamW(one, settings)
    for _ in range(3):
        _pull(one)
        first.step()
    state = copy.deepcopy(first.state_dict())
    two = _potential(0.0, 0.0)
    second = AdamW(two, settings)
    with torch.no_grad():
        for name, parameter in two.named.items():
            parameter.copy_(one.named[name])
    second.load_state_dict(state)
    for _ in range(3):
        for potential, optimiser in ((one, first), (two, second)):
            _pull(potential)
            optimiser.step()
    for name in one.named:
        assert torch.equal(one.named[name], two.named[name])
        assert torch.equal(first.averaged()[name], second.averaged()[name])


def test_a_shortened_step_is_what_is_averaged():
    """Half the step is taken; the moments of Adam are those of the whole gradient."""
    whole, half = _potential(1.0), _potential(1.0)
    start = half.named["p0"].detach().clone()
    one, two = (AdamW(p, Training(ema_decay=0.5)) for p in (whole, half))

    def shorten() -> None:
        with torch.no_grad():
            half.named["p0"].lerp_(start, 0.5)

    _pull(whole)
    _pull(half)
    assert one.step() == two.step(SimpleNamespace(settle=shorten))
    assert torch.allclose(half.named["p0"], 0.5 * (start + whole.named["p0"]))
    assert torch.allclose(two.averaged()["p0"], half.named["p0"].detach())
    moments = [o.adam.state_dict()["state"][0]["exp_avg"] for o in (one, two)]
    assert torch.equal(*moments)


def test_the_step_size_falls_along_a_cosine_and_goes_on_after_a_resume():
    settings = Training(learning_rate=1e-2, final_learning_rate=1e-3, steps=5)
    potential = _potential(1.0)
    optimiser, seen = AdamW(potential, settings), []
    for k in range(5):
        _pull(potential)
        optimiser.step()
        seen.append(optimiser.adam.param_groups[0]["lr"])
        if k == 2:
            again = AdamW(potential, settings)
            again.load_state_dict(copy.deepcopy(optimiser.state_dict()))
            optimiser = again
    wanted = [1e-3 + 9e-3 * (1 + np.cos(np.pi * k / 4)) / 2 for k in range(5)]
    assert seen == pytest.approx(wanted)


def test_the_step_size_grows_before_it_falls():
    potential = _potential(1.0)
    optimiser = AdamW(potential, Training(learning_rate=1e-2, warmup=3, steps=6))
    seen = []
    for _ in range(6):
        _pull(potential)
        optimiser.step()
        seen.append(optimiser.adam.param_groups[0]["lr"])
    assert seen == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2, 1e-2, 1e-2])
