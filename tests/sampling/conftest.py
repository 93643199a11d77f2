"""Faults that tests put into running dynamics."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from torch import Tensor

Fault = Callable[[Any, Tensor], None]


@pytest.fixture(scope="session")
def inject() -> Callable[..., None]:
    """Return a function that lets a fault happen to one system before some steps."""

    def inject(
        dynamics: Any, fault: Callable[[Any, Tensor], None], system: int, steps: Iterable[int]
    ) -> None:
        step, atoms, moments = dynamics.integrator.step, dynamics.state.system_idx == system, set(steps)

        def faulty(number: int) -> None:
            if number in moments:
                fault(dynamics.state, atoms)
            step(number)

        dynamics.integrator.step = faulty

    return inject
