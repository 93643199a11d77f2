"""What the summary keeps of the log: first and last values beside their targets."""

from types import SimpleNamespace

import pytest
from ase.build import bulk

from mlip_refine import testing
from mlip_refine.quantities import Measured, Target
from mlip_refine.training.replay import HeldOutErrors
from mlip_refine.workflows.finetune.records import Course, Update
from mlip_refine.workflows.finetune.summary import (
    courses,
    deviations,
    held_out_notes,
    hints,
    validation_notes,
)

LOSSES = [
    SimpleNamespace(name="lattice", targets={"a": Target(2.95, 0.01, "Å")}),
    SimpleNamespace(name="g", targets={}),
]


def _update(step: int, a: float) -> Update:
    found = {"lattice": {"a": Measured(a, 0.02, "Å")}, "g": {"rms": Measured(1.5, 0.1, "sigma")}}
    losses = {"total": 1.0, "lattice": ((a - 2.95) / 0.01) ** 2, "g": 2.25}
    return Update(step, losses, found, {}, ())


def _paused(step: int) -> Update:
    """An update of replay alone."""
    return Update(step, {"total": 1.0, "replay.energy": 1.0}, {}, {}, ())


UPDATES = [_paused(0), _update(1, 2.90), _update(2, 2.93), _update(3, 2.94), _paused(4)]


def test_first_and_last_values_stand_beside_their_targets():
    delivered = {"g": {"validation, loss": Measured(0.5, 0.0, ""), "rms": Measured(1.4, 0.1, "sigma")}}
    found = courses(UPDATES, LOSSES, delivered, {})
    assert found["lattice"]["a"] == Course(
        first=Measured(2.90, 0.02, "Å"), last=Measured(2.94, 0.02, "Å"), target=Measured(2.95, 0.01, "Å")
    )
    assert found["g"]["rms"].target is None
    assert found["g"]["rms"].delivered == Measured(1.4, 0.1, "sigma")
    assert found["g"]["validation, loss"] == Course(delivered=Measured(0.5, 0.0, ""))


def test_what_was_measured_afresh_is_what_a_target_is_judged_by():
    after = {"lattice": {"a": Measured(2.958, 0.004, "Å"), "c": Measured(4.7, 0.01, "Å")}}
    found = courses(UPDATES, LOSSES, {}, after)["lattice"]
    assert found["a"].met is True
    assert found["a"].deviations == pytest.approx((-5.0, 0.8))
    assert found["c"] == Course(after=Measured(4.7, 0.01, "Å"))
    assert deviations(UPDATES, LOSSES, after)["lattice"].after_sigma == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("value", "se", "met"),
    [
        (129.0, 1.0, True),
        (132.0, 1.0, True),
        (132.3, 1.0, False),
        (126.0, 2.9, True),
        (129.0, 29.0, False),
        (129.0, float("nan"), False),
    ],
)
def test_noise_is_no_success(value, se, met):
    """The target is 129(3): it is met by a value within both errors, whose own error is no larger."""
    course = Course(after=Measured(value, se, "GPa"), target=Measured(129.0, 3.0, "GPa"))
    assert course.met is met


@pytest.mark.parametrize(
    ("end", "hint"), [(2.905, True), (2.93, False), (2.948, False), (2.99, True), (2.97, False)]
)
def test_a_cell_that_hardly_moves_is_better_matched_by_its_stress(end, hint):
    """From 2.90 Å towards 2.950(10): less than half of the way, or as far beyond."""
    node = {"type": "lattice", "phase": "fcc", "temperature": 300, "target": 2.95, "uncertainty": 0.01}
    loss = testing.loss_of(node, bulk("Al", "fcc", a=2.9, cubic=True))
    first, after, target = (Measured(*found, "Å") for found in ((2.9, 0.02), (end, 0.002), (2.95, 0.01)))
    course = Course(first=first, last=first, target=target, after=after)
    found = hints([loss], {loss.name: {"a": course}})
    assert len(found) == hint
    assert all("lattice: the cell has moved by less than half of its way" in text for text in found)


def test_deviations_are_of_losses_with_targets():
    found = deviations(UPDATES, LOSSES, {})
    assert set(found) == {"lattice"}
    assert found["lattice"].first_sigma == pytest.approx(5.0)
    assert found["lattice"].last_sigma == pytest.approx(1.0)
    assert found["lattice"].after_sigma is None


@pytest.mark.parametrize(("end", "worse"), [(0.4, False), (0.5, False), (0.6, True)])
def test_a_validation_that_got_worse_is_said(end, worse):
    values = [Measured(value, 0.2, "") for value in (0.5, 0.3, 0.45)]
    updates = [Update(i, {}, {"hvp": {"validation, loss": v}}, {}, ()) for i, v in enumerate(values)]
    delivered = {"hvp": {"validation, loss": Measured(end, 0.2, "")}}
    measured = courses(updates, [], delivered, {})
    course = measured["hvp"]["validation, loss"]
    assert course.end.value == end
    assert course.change == pytest.approx(end / 0.5 - 1)
    notes = validation_notes(measured, updates)
    assert bool(notes) == worse
    if worse:
        assert notes[0].startswith(
            "hvp: the validation got worse, loss 0.5 → 0.6 (lowest: 0.3 at update 1); a smaller"
        )


def _errors(energy: float | None, forces: float, stress: float) -> HeldOutErrors:
    return HeldOutErrors(energy, forces, stress, 7)


def test_a_run_that_got_worse_on_held_out_frames_says_so():
    before = _errors(4.0, 50.0, 0.5)
    assert held_out_notes(before, _errors(4.3, 54.0, 0.54)) == []
    assert held_out_notes(None, None) == []
    (note,) = held_out_notes(before, _errors(10.4, 50.0, 1.0))
    assert note.startswith(
        "held-out errors grew by more than 10 %: energy by 160 %, stress by 100 %. Give replay"
    )
    # Labels of the model itself: no growth is a small share of no error.
    exact = _errors(1e-7, 1e-5, 1e-9)
    assert held_out_notes(exact, _errors(0.9, 4.0, 0.01)) == []
    assert "energy from 0 to 3" in held_out_notes(exact, _errors(3.0, 4.0, 0.01))[0]
    assert held_out_notes(_errors(None, 50.0, 0.5), _errors(None, 50.0, 0.5)) == []
