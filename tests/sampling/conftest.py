"""What tests of dynamics share: faults to put into it, series to take from it, bounds on means."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from mlip_refine.testing import sigma_bound

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


@pytest.fixture(scope="session")
def observe() -> Callable[..., dict[str, Tensor]]:
    """Return a function that takes series `[n_systems, frames, ...]` of what trajectories do not hold."""

    def observe(dynamics: Any, frames: int, every: int, equilibration: int = 0) -> dict[str, Tensor]:
        dynamics.advance(equilibration)
        series: dict[str, list[Tensor]] = {}
        for _ in range(frames):
            dynamics.advance(every)
            now = {
                "kinetic": dynamics.integrator.kinetic(),
                "potential": dynamics.state.energy,
                "conserved": dynamics.integrator.conserved(),
                "cells": dynamics.state.row_vector_cell,
                "volume": torch.linalg.det(dynamics.state.cell),
            }
            for name, value in now.items():
                series.setdefault(name, []).append(value.clone())
        return {name: torch.stack(values, dim=1) for name, values in series.items()}

    return observe


@pytest.fixture(scope="session")
def require_means() -> Callable[[Mapping[str, tuple[Tensor, float]]], None]:
    """Return a check of series `[replicas, frames]` against exact means.

    Replicas are independent, so their means tell the error: Student's t, for all comparisons together.
    """

    def require(comparisons: Mapping[str, tuple[Tensor, float]]) -> None:
        for name, (series, exact) in comparisons.items():
            means = series.double().mean(1)
            error = means.std() / len(means) ** 0.5
            z, bound = (means.mean() - exact) / error, sigma_bound(len(comparisons), len(means) - 1)
            assert abs(z) < bound, (
                f"{name}: {means.mean():.6g}({error:.2g}), exact {exact:.6g}: {z:.1f} sigma"
            )

    return require
