"""Errors of the multistate equations: from the covariance of their noise, or sample by sample."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_DISCONNECTED = 1e-12


def _meaningful(error: float) -> float:
    """An error to ten digits: the last ones of a linear solver change from run to run."""
    return float(f"{error:.10g}")


def error_of_difference(theta: Tensor, i: int, j: int) -> float:
    """Standard error of ``f_j - f_i`` from the covariance of free energies ``[K, K]``."""
    variance = float(theta[i, i] + theta[j, j] - 2.0 * theta[i, j])
    return _meaningful(math.sqrt(max(variance, 0.0))) if math.isfinite(variance) else math.inf


def equations(weights: Tensor, n_k: Tensor, multiplicity: Tensor) -> Tensor:
    """Derivative ``A = 1 - M N`` of the estimating equations in the free energies ``[K, K]``.

    ``A`` has the constant vector as its null space; adding the projector ``1 n^T / N`` picks the solution
    with ``sum_k n_k f_k = 0`` without a threshold on singular values.

    Args:
        weights: Of every sample in every state ``[K, N]``.
        n_k: Counted samples of each state ``[K]``.
        multiplicity: How many samples each one counts for ``[N]``.
    """
    second = (weights / multiplicity) @ weights.T
    return torch.eye(len(n_k), dtype=weights.dtype, device=weights.device) - second * n_k + n_k / n_k.sum()


def covariance(weights: Tensor, n_k: Tensor, g_k: Tensor, multiplicity: Tensor) -> Tensor:
    """Covariance of the free energies relative to the first state ``[K, K]``, from weights ``[K, N]``.

    Averages over one state are taken over all samples with that state's weights.
    """
    per_count = weights / multiplicity
    second = per_count @ weights.T
    sample_g = (g_k * n_k) @ per_count
    drawn = (per_count * sample_g) @ weights.T - (second * (n_k * g_k)) @ second
    if 1.0 - second_eigenvalue(second * n_k, n_k) < _DISCONNECTED:
        return torch.full_like(drawn, torch.nan)
    a = equations(weights, n_k, multiplicity)
    theta: Tensor = torch.linalg.solve(a, torch.linalg.solve(a, drawn).T)
    relative: Tensor = theta - theta[:1] - theta[:, :1] + theta[0, 0]
    return 0.5 * (relative + relative.T)


def centred(values: Tensor, drawn: Tensor) -> Tensor:
    """Values ``[..., N]`` minus their mean over the samples of their state; samples state after state."""
    parts = torch.split(values, [int(n) for n in drawn if n > 0], dim=-1)
    return torch.cat([part - part.mean(dim=-1, keepdim=True) for part in parts], dim=-1)


def stratified_error(influence: Tensor, sizes: Sequence[int], inefficiencies: Sequence[float]) -> float:
    """Standard error of an estimate from what every sample contributes to it.

    ``se^2 = sum_k g_k n_k / (n_k - g_k) sum_(i in k) psi_i^2``, psi about its mean over the samples of
    state k; the factor undoes the bias of measuring the spread about the samples' own mean.

    Args:
        influence: First-order change of the estimate with every sample ``[N]``, state after state.
        sizes: Samples of each state; they sum to N.
        inefficiencies: Statistical inefficiency of each state's samples, at least 1.

    Returns:
        The standard error; infinite where a state has a single independent sample or less.
    """
    variance = 0.0
    for part, n, g in zip(torch.split(influence, list(sizes)), sizes, inefficiencies, strict=True):
        spread = float(((part - part.mean()) ** 2).sum())
        variance += (g * n / (n - g) * spread if n > g else math.inf) if spread > 0.0 else 0.0
    return _meaningful(math.sqrt(variance))


def second_eigenvalue(overlap: Tensor, n_k: Tensor) -> float:
    """Second eigenvalue of the overlap matrix of the sampled states, in its symmetric form."""
    sampled = n_k > 0
    if int(sampled.sum()) < 2:
        return 0.0
    root = torch.sqrt(n_k[sampled])
    symmetric = overlap[sampled][:, sampled] * root[:, None] / root
    return float(torch.linalg.eigvalsh(0.5 * (symmetric + symmetric.T))[-2])
