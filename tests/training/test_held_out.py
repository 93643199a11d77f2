"""Errors on held-out frames: when a run may stop, and which parameters it delivers."""

import math

import pytest
import torch

from mlip_refine.training import held_out
from mlip_refine.training.held_out import STALLED, HeldOutGuard
from mlip_refine.training.replay import HeldOutErrors


@pytest.fixture
def errors(monkeypatch):
    """Errors that the next looks find: growth of energy and forces as shares of 10 meV/atom and 100 meV/Å."""
    queue: list[tuple[float, float]] = [(0.0, 0.0)]

    def next_errors(_potential, frames):
        energy, forces = queue.pop(0)
        return HeldOutErrors(10.0 * (1 + energy), 100.0 * (1 + forces), None, len(frames))

    monkeypatch.setattr(held_out, "held_out_errors", next_errors)
    return queue


class Still:
    """A potential that nobody evaluates."""

    def holding(self, _parameters):
        return torch.no_grad()


def _guard(**options) -> HeldOutGuard:
    return HeldOutGuard.of(Still(), [object()] * 3, 0.1, **options)


def _parameters(value: float) -> dict[str, torch.Tensor]:
    return {"p": torch.tensor([value])}


def test_errors_within_the_limit_let_a_run_stop(errors):
    guard = _guard()
    errors += [(0.099, -0.3), (0.0, 0.101), (0.101, 0.0)]
    assert [guard.lets_stop(Still(), _parameters(k), k) for k in range(3)] == [True, False, False]
    assert guard.kept.step == 0


def test_the_newest_within_the_limit_is_kept_and_before_there_is_one_the_least(errors):
    guard = _guard()
    errors += [(0.5, 0.0), (0.9, 0.0), (0.3, 0.2), (0.04, 0.0), (0.08, 0.0), (0.2, 0.0)]
    kept = []
    for step in range(6):
        guard.look(Still(), _parameters(step), step)
        kept.append(guard.kept.step)
        assert float(guard.kept.parameters["p"]) == kept[-1]
    assert kept == [0, 0, 2, 3, 4, 4]


def test_errors_that_fall_no_more_let_a_run_stop_beyond_the_limit(errors):
    guard = _guard()
    falling = [0.9, 0.7, 0.5]
    errors += [(x, 0.0) for x in falling + [0.495] * STALLED]
    seen = [guard.lets_stop(Still(), _parameters(k), k) for k in range(3 + STALLED)]
    assert seen == [False] * (2 + STALLED) + [True]


def test_what_is_not_finite_is_no_small_growth(errors):
    guard = _guard()
    errors += [(math.nan, 0.0), (0.3, 0.0)]
    assert guard.look(Still(), _parameters(0), 0) == math.inf
    assert guard.look(Still(), _parameters(1), 1) == pytest.approx(3.0)
    assert guard.kept.step == 1


def test_energies_have_no_say_where_their_zero_is_shifted_later(errors):
    guard = _guard(energies=False)
    errors += [(5.0, 0.05)]
    assert guard.look(Still(), _parameters(0), 0) == pytest.approx(0.5)


def test_kept_parameters_are_copies_and_survive_a_checkpoint(errors):
    guard, moving = _guard(), _parameters(1.0)
    errors += [(0.2, 0.0), (0.0, 0.0)]
    guard.look(Still(), moving, 7)
    moving["p"] += 1
    again = _guard()
    again.load_state_dict(guard.state_dict())
    assert float(again.kept.parameters["p"]) == 1.0
    assert (again.kept.step, again.kept.excess, again.lowest, again.stalled) == (7, 2.0, 2.0, 0)
    again.begin_anew()
    assert (again.kept, again.lowest, again.stalled) == (None, math.inf, 0)


def test_errors_of_labels_that_the_model_made_may_grow_to_what_is_resolved(errors):
    errors[:] = [(-1.0, -1.0), (-0.95, -1.0), (-0.8, -1.0)]
    guard = _guard()
    assert guard.look(Still(), _parameters(0), 0) == pytest.approx(0.5)
    assert guard.look(Still(), _parameters(1), 1) == pytest.approx(2.0)
