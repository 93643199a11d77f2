"""The ensembles that dynamics draws, against exact answers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from mlip_refine import testing
from mlip_refine.quantities import KB
from mlip_refine.sampling import Hamiltonian, HarmonicReference, Length, StatePoint, Trajectory, sample
from mlip_refine.testing import chi_squared_bounds

pytestmark = pytest.mark.statistical

REPLICAS = 32
CASES = pytest.mark.parametrize("name", ["NaCl-200", "NaCl-1100", "hcp-200", "hcp-1100"])


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
                StatePoint(
                    name, atoms, temperature, replicas=REPLICAS, hamiltonian=Hamiltonian(0.0, 1.0, reference)
                )
            )
    gas = testing.IdealGas([11, 17, 22], 0.1)
    settings = open_guards(timestep=4.0, friction=8.0, interval=80.0)
    runs = sample(gas, points, settings, Length(1200.0, 45), seed=11, stage="nvt")
    return {name: (run, references[name]) for name, run in runs.items()}


@CASES
def test_langevin_gives_every_mode_half_kt(
    biased: dict[str, Any], require_means: Callable[..., None], name: str
) -> None:
    run, _ = biased[name]
    assert run.kept.all()
    require_means({"U": (run.bias_energy, 1.5 * (run.n_atoms - 1) * KB * run.point.temperature)})
    assert not run.model_energy.any()


def _modes(run: Trajectory, reference: HarmonicReference) -> tuple[Tensor, list[int]]:
    """Amplitudes of the modes, in √(kT/k), `[replicas, frames, 3N - 3]`, and sizes of degenerate sets."""
    root = reference.masses.repeat_interleave(3).sqrt()
    values, vectors = torch.linalg.eigh(reference.projected / root[:, None] / root)
    u = (run.positions - reference.sites).flatten(2) * root
    q = (u @ vectors[:, 3:]) * (values[3:] / (KB * run.point.temperature)).sqrt()
    apart = values[4:].diff() > 1e-6 * values[-1]
    ends = [0, *(apart.nonzero().flatten() + 1).tolist(), len(values) - 3]
    return q, torch.tensor(ends).diff().tolist()


@CASES
def test_displacements_have_the_covariance_kt_over_k(biased: dict[str, Any], name: str) -> None:
    """Variances of the modes, summed over degenerate ones, and the whole covariance, in units of kT/k.

    Neither depends on the basis of degenerate modes. Means over independent replicas tell the errors.
    """
    q, sizes = _modes(*biased[name])
    variances = [part.square().mean((1, 2)) for part in q.split(sizes, dim=-1)]
    t = torch.stack([(v.mean() - 1) / (v.std() / REPLICAS**0.5) for v in variances]).numpy()
    normal = stats.norm.isf(stats.t.sf(t, REPLICAS - 1))
    low, high = chi_squared_bounds(len(sizes), comparisons=2)
    assert low < (normal**2).sum() < high, dict(zip(range(len(sizes)), normal, strict=True))

    # Squared Frobenius norm of the deviation from unity: about chi-squared (Satterthwaite 1946).
    deviation = torch.einsum("rtm,rtn->rmn", q, q) / q.shape[1] - torch.eye(q.shape[-1]).double()
    rows, columns = torch.triu_indices(q.shape[-1], q.shape[-1])
    elements = deviation[:, rows, columns] * torch.where(rows == columns, 1.0, 2.0**0.5)
    variance = elements.var(0) / REPLICAS
    dof = float(variance.sum() ** 2 / variance.square().sum())
    low, high = chi_squared_bounds(dof, comparisons=2)
    assert low < dof * float(elements.mean(0).square().sum() / variance.sum()) < high
