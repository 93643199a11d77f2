"""The ensembles that dynamics draws, against exact answers: all bounds are 3 sigma, all seeds fixed."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mlip_refine import testing
from mlip_refine.quantities import KB
from mlip_refine.sampling import Hamiltonian, Length, StatePoint, Trajectory, sample
from mlip_refine.statistics import statistical_inefficiency


def _mean_se(series: Tensor) -> tuple[float, float]:
    """Mean and standard error of series `[replicas, n]`."""
    n = series.numel() / statistical_inefficiency(series)
    return series.mean().item(), series.std().item() / math.sqrt(n)


def _z(series: Tensor, exact: float) -> float:
    mean, se = _mean_se(series)
    return (mean - exact) / se


@pytest.fixture(scope="module")
def biased(open_guards: Callable[..., Any]) -> dict[str, tuple[Trajectory, Any]]:
    """Crystals of two sizes at two temperatures in one batch, held by their harmonic bias alone."""
    points, references = [], {}
    for kind in ("NaCl", "hcp"):
        atoms, reference = testing.harmonic_crystal(kind)
        for temperature in (200.0, 1100.0):
            name = f"{kind}-{temperature:g}"
            references[name] = reference
            points.append(
                StatePoint(name, atoms, temperature, replicas=8, hamiltonian=Hamiltonian(0.0, 1.0, reference))
            )
    gas = testing.IdealGas([11, 17, 22], 0.1)
    settings = open_guards(timestep=4.0, friction=8.0, interval=80.0)
    runs = sample(gas, points, settings, Length(1200.0, 90), seed=11, stage="nvt")
    return {name: (run, references[name]) for name, run in runs.items()}


@pytest.mark.parametrize("name", ["NaCl-200", "NaCl-1100", "hcp-200", "hcp-1100"])
def test_langevin_gives_every_mode_half_kt(biased: dict[str, Any], name: str) -> None:
    run, _ = biased[name]
    exact = 1.5 * (run.n_atoms - 1) * KB * run.point.temperature
    assert run.kept.all()
    assert abs(_z(run.bias_energy, exact)) < 3
    assert not run.model_energy.any()


@pytest.mark.parametrize("name", ["NaCl-200", "NaCl-1100", "hcp-200", "hcp-1100"])
def test_displacements_have_the_covariance_kt_over_k(biased: dict[str, Any], name: str) -> None:
    """Every normal mode's variance in units of kT/k: chi squared over all modes within 3 sigma."""
    run, reference = biased[name]
    root = reference.masses.repeat_interleave(3).sqrt()
    values, vectors = torch.linalg.eigh(reference.projected / root[:, None] / root)
    u = (run.positions - reference.sites).flatten(2) * root
    q = (u @ vectors[:, 3:]) * (values[3:] / (KB * run.point.temperature)).sqrt()
    z = torch.tensor([_z(q[..., m].square(), 1.0) for m in range(q.shape[-1])])
    assert abs((z.square().sum() - len(z)) / math.sqrt(2 * len(z))) < 3
    cross = q.flatten(0, 1).T @ q.flatten(0, 1) / q[..., 0].numel()
    off = cross - torch.diag(torch.diagonal(cross))
    assert off.abs().max() < 6 * math.sqrt(2 / q[..., 0].numel())
