"""Samples with known averages."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mlip_refine.observables import Sample

type MakeSample = Callable[..., Sample]


@pytest.fixture
def make_sample() -> MakeSample:
    """Build a sample from what a test gives, the rest without meaning: one atom in a cell of 10 Å."""

    def build(n: int | None = None, **given: Any) -> Sample:
        probes: dict[str, Tensor] = given.pop("probes", {})
        if n is None:
            n = next(len(v) for v in (*probes.values(), *given.values()) if isinstance(v, Tensor))
        positions = given.pop("positions", torch.zeros(n, 1, 3, dtype=torch.float64))
        atoms = positions.shape[1]
        options: dict[str, Any] = {
            "cells": 10.0 * torch.eye(3, dtype=torch.float64).expand(n, 3, 3),
            "numbers": np.full(atoms, 22),
            "masses": torch.full((atoms,), 47.867, dtype=torch.float64),
            "temperature": 300.0,
            "pressure": 0.0,
            "free_cell": False,
        }
        return Sample(probes=probes, positions=positions, **options | given)

    return build


@pytest.fixture
def replicas() -> Callable[[int], Callable[[Tensor], float]]:
    """Return the statistical inefficiency of a sample made of replicas of equal length."""
    from mlip_refine.statistics import statistical_inefficiency

    def of(n_replicas: int) -> Callable[[Tensor], float]:
        return lambda values: statistical_inefficiency(values.reshape(n_replicas, -1))

    return of
