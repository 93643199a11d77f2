"""Series of samples: what every estimator asks of its input, and how correlated samples are in time."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlip_refine.errors import StatisticsError

type Samples = Tensor | NDArray[np.float64] | Sequence[float]

_MIN_LAG = 3
"""Shortest lags whose autocorrelation is summed whatever its sign."""


def as_samples(values: Samples, name: str, *, dims: int | None = 1, allow_empty: bool = False) -> Tensor:
    """Return the values as a finite float64 tensor, keeping the autograd graph.

    Args:
        values: Samples of any float type.
        name: Name of the samples in error messages.
        dims: Number of dimensions that they must have; None accepts one or more.
        allow_empty: Whether an empty tensor is accepted.

    Raises:
        StatisticsError: Wrong number of dimensions, no samples, or a value that is not finite.
    """
    samples = torch.as_tensor(values, dtype=torch.float64)
    if samples.ndim == 0 or (dims is not None and samples.ndim != dims):
        wanted = "at least 1" if dims is None else str(dims)
        raise StatisticsError(f"{name} has {samples.ndim} dimensions", needed=f"{wanted} of them")
    if samples.numel() == 0 and not allow_empty:
        raise StatisticsError(f"{name} holds no samples", needed="at least one")
    bad = ~torch.isfinite(samples.detach())
    if bool(bad.any()):
        place = torch.nonzero(bad)[0].tolist()
        raise StatisticsError(
            f"{name} holds {int(bad.sum())} values that are not finite, the first at index {place}",
            needed="finite numbers: leave out the frames that carry them, and find out why they do",
        )
    return samples


def as_inefficiency(value: float, name: str = "statistical inefficiency") -> float:
    """Return a statistical inefficiency as a float.

    Raises:
        StatisticsError: The value is below one or not finite.
    """
    if not math.isfinite(value) or value < 1.0:
        raise StatisticsError(f"{name} is {value}", needed="a finite number, at least 1")
    return float(value)


class Equilibration(NamedTuple):
    """Where to cut a series so that most independent samples are left.

    Attributes:
        t0: Index of the first sample to keep.
        g: Statistical inefficiency of the samples that are kept.
        n_eff: Number of independent samples among those kept, over all replicas.
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
        kept: Mask of the samples that count, of the same shape; the others are gaps in time. All by default.

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


def detect_equilibration(series: Samples, n_origins: int = 100) -> Equilibration:
    """Choose the cut that leaves the most independent samples (Chodera 2016).

    A tail in which nothing moves counts as one sample, not as many good ones.

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
    cuts = []
    for t0 in range(0, max(length - 1, 1), max(1, math.ceil(length / n_origins))):
        tail = replicas[:, t0:]
        constant = bool((tail == tail[0, 0]).all())
        g = float(tail.numel()) if constant else _inefficiency(tail)
        cuts.append(Equilibration(t0, g, 1.0 if constant else tail.numel() / g))
    return max(cuts, key=lambda cut: cut.n_eff)


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
    pairs = _lagged_products(mask).round()
    observed = pairs > 0
    correlation = torch.where(observed, _lagged_products(deviations) / pairs.clamp(min=1.0), 0.0) / variance
    correlation = correlation[1 : n - 1]
    lags = torch.arange(1, n - 1, dtype=replicas.dtype, device=replicas.device)
    terms = correlation * (1.0 - lags / n)
    decayed = correlation <= 0.0
    decayed[:_MIN_LAG] = False
    crossing = torch.nonzero(decayed)
    last = int(crossing[0]) if len(crossing) else len(terms)
    g = 1.0 + 2.0 * float(terms[:last].sum())
    # Ten digits: the last ones of a Fourier transform change from call to call.
    return max(1.0, float(f"{g:.10g}"))


def _lagged_products(values: Tensor) -> Tensor:
    """Sum x_t x_(t + lag) over t and replicas for every lag: ``[n_replicas, n]`` to ``[n]``."""
    n = values.shape[1]
    spectrum = torch.fft.rfft(values, n=2 * n)
    sums: Tensor = torch.fft.irfft(spectrum.abs() ** 2, n=2 * n)[:, :n]
    return sums.sum(dim=0)
