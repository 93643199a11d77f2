"""Correlation in time: statistical inefficiency, effective samples, and where equilibrium begins."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mlip_refine.errors import StatisticsError
from mlip_refine.statistics.series import Samples, as_samples

_MIN_LAG = 3


class Equilibration(NamedTuple):
    """Where to cut a series so that most independent samples are left.

    Attributes:
        t0: Index of the first sample to keep.
        g: Statistical inefficiency of what is kept.
        n_eff: Independent samples in what is kept, over all replicas.
    """

    t0: int
    g: float
    n_eff: float


def statistical_inefficiency(series: Samples, kept: Tensor | None = None) -> float:
    """Return how many consecutive samples count as one independent sample.

    ``g = 1 + 2 sum_t (1 - t/n) C(t)``, summed until the normalised autocorrelation first drops to zero or
    below after lag 3 (Chodera et al. 2007). Replicas share one mean and average their autocovariance, so
    a replica that is stuck elsewhere raises g.

    Args:
        series: One value for each sample ``[n]``, or of several replicas ``[n_replicas, n]``, evenly
            spaced in time.
        kept: Which samples count, of the same shape; the others are gaps in time. All by default.

    Returns:
        g, at least 1; exactly 1 for a series that never changes, whose mean has no error.

    Raises:
        StatisticsError: No samples, or a value that is not finite.
    """
    if kept is None:
        return _inefficiency(_replicas(series))
    if not bool(kept.any()):
        raise StatisticsError("no sample of the series is kept", needed="at least one")
    replicas = _replicas(torch.where(kept, torch.as_tensor(series, dtype=torch.float64), 0.0))
    return _inefficiency(replicas, kept.reshape(replicas.shape))


def effective_samples(series: Samples) -> float:
    """Return the number of independent samples in a series, all its samples over g.

    Args:
        series: ``[n]`` or ``[n_replicas, n]``, see `statistical_inefficiency`.

    Raises:
        StatisticsError: No samples, or a value that is not finite.
    """
    replicas = _replicas(series)
    return replicas.numel() / _inefficiency(replicas)


def detect_equilibration(series: Samples, n_origins: int = 100) -> Equilibration:
    """Choose the cut that leaves the most independent samples (Chodera 2016).

    Args:
        series: ``[n]`` or ``[n_replicas, n]``; replicas are cut at the same time.
        n_origins: At most this many evenly spaced cuts are tried.

    Returns:
        First sample to keep, g and effective samples of the rest. A series that never changes is kept
        whole, as a single effective sample: nothing in it shows that it moves at all.

    Raises:
        StatisticsError: No samples, a value that is not finite, or no cut to try.
    """
    if n_origins < 1:
        raise StatisticsError(f"{n_origins} cuts to try", needed="at least 1")
    replicas = _replicas(series)
    length = replicas.shape[1]
    if bool((replicas == replicas[0, 0]).all()):
        return Equilibration(0, 1.0, 1.0)
    stride = max(1, math.ceil(length / n_origins))
    candidates = (_cut(replicas, t0) for t0 in range(0, max(length - 1, 1), stride))
    return max(candidates, key=lambda cut: cut.n_eff)


def _cut(replicas: Tensor, t0: int) -> Equilibration:
    """Judge one cut; a tail in which nothing moves counts as one sample, not as many good ones."""
    kept = replicas[:, t0:]
    if bool((kept == kept[0, 0]).all()):
        return Equilibration(t0, float(kept.numel()), 1.0)
    g = _inefficiency(kept)
    return Equilibration(t0, g, kept.numel() / g)


def _replicas(series: Samples) -> Tensor:
    samples = as_samples(series, "series", dims=None).detach()
    if samples.ndim > 2:
        raise StatisticsError(f"series has {samples.ndim} dimensions", needed="[n] or [n_replicas, n]")
    return samples.reshape(-1, samples.shape[-1])


def _inefficiency(replicas: Tensor, kept: Tensor | None = None) -> float:
    n = replicas.shape[1]
    mask = torch.ones_like(replicas) if kept is None else kept.to(replicas)
    mean = (replicas * mask).sum() / mask.sum()
    deviations = (replicas - mean) * mask
    variance = float((deviations**2).sum() / mask.sum())
    if n < 3 or variance <= (torch.finfo(replicas.dtype).eps * float(replicas.abs().max())) ** 2:
        return 1.0
    pairs = _pair_sums(mask).round()
    observed = pairs > 0
    correlation = torch.where(observed, _pair_sums(deviations) / pairs.clamp(min=1.0), 0.0) / variance
    lags = torch.arange(1, n - 1, dtype=replicas.dtype, device=replicas.device)
    terms = correlation[1 : n - 1] * (1.0 - lags / n)
    g = 1.0 + 2.0 * float(terms[: _first_crossing(correlation[1 : n - 1])].sum())
    # Ten digits: the last ones of a Fourier transform change from call to call.
    return max(1.0, float(f"{g:.10g}"))


def _first_crossing(correlation: Tensor) -> int:
    """Return how many lags to sum: all before the first non-positive one past the shortest lags."""
    negative = correlation <= 0.0
    negative[:_MIN_LAG] = False
    found = torch.nonzero(negative)
    return int(found[0]) if len(found) else len(correlation)


def _pair_sums(values: Tensor) -> Tensor:
    """Sum over replicas of x_t x_(t + lag) for every lag: [n_replicas, n] to [n]."""
    n = values.shape[1]
    spectrum = torch.fft.rfft(values, n=2 * n)
    sums: Tensor = torch.fft.irfft(spectrum.abs() ** 2, n=2 * n)[:, :n]
    return sums.sum(dim=0)
