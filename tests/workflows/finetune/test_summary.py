"""What the summary keeps of the log: first and last values beside their targets."""

from types import SimpleNamespace

import pytest

from mlip_refine.quantities import Measured, Target
from mlip_refine.workflows.finetune.records import Course, Update
from mlip_refine.workflows.finetune.summary import courses, deviations

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
    found = courses(UPDATES, LOSSES, delivered)
    assert found["lattice"]["a"] == Course(
        first=Measured(2.90, 0.02, "Å"), last=Measured(2.94, 0.02, "Å"), target=Measured(2.95, 0.01, "Å")
    )
    assert found["g"]["rms"].target is None
    assert found["g"]["rms"].delivered == Measured(1.4, 0.1, "sigma")
    assert found["g"]["validation, loss"] == Course(delivered=Measured(0.5, 0.0, ""))


def test_deviations_are_of_losses_with_targets():
    found = deviations(UPDATES, LOSSES)
    assert set(found) == {"lattice"}
    assert found["lattice"].first_sigma == pytest.approx(5.0)
    assert found["lattice"].last_sigma == pytest.approx(1.0)
