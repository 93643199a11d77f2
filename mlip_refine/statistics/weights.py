"""Reweighting: normalised weights, effective sample sizes, weighted means and their errors.

All functions are differentiable in their tensors; weights live as logarithms throughout.
"""

import torch
from torch import Tensor

from mlip_refine.errors import StatisticsError
from mlip_refine.statistics.series import Samples, as_inefficiency, as_samples


def log_weights(log_ratio: Samples) -> Tensor:
    """Normalise the logarithms of density ratios so that their weights sum to one.

    Args:
        log_ratio: ``ln p(x_i) - ln q(x_i)`` up to a constant ``[n]``, where the samples were drawn
            from q, for example ``-beta * (U_new - U_old)``.

    Returns:
        ``ln w_i`` ``[n]`` with ``sum(w) = 1``.

    Raises:
        StatisticsError: No samples, or a ratio that is not finite.
    """
    ratio = as_samples(log_ratio, "log weight ratio")
    return ratio - torch.logsumexp(ratio, dim=0)


def kish_size(log_w: Samples) -> Tensor:
    """Return Kish's effective size ``(sum w)^2 / sum w^2`` (Kish 1965), between 1 and n.

    Args:
        log_w: Logarithms of weights ``[n]``, normalised or not.

    Returns:
        Effective number of samples, 0-d, before any correction for correlation in time.
    """
    log_w = log_weights(log_w)
    return torch.exp(-torch.logsumexp(2.0 * log_w, dim=0))


def entropy_size(log_w: Samples) -> Tensor:
    """Return the entropy effective size ``exp(-sum w ln w)``, between 1 and n.

    Args:
        log_w: Logarithms of weights ``[n]``, normalised or not.

    Returns:
        Effective number of samples (Thaler & Zavadlav 2021), 0-d; never below Kish's.
    """
    log_w = log_weights(log_w)
    return torch.exp(-torch.sum(torch.exp(log_w) * log_w))


def weighted_mean(values: Samples, log_w: Samples) -> Tensor:
    """Average over samples with weights.

    Args:
        values: One value or array for each sample ``[n, ...]``.
        log_w: Logarithms of weights ``[n]``, normalised or not.

    Returns:
        ``sum_i w_i values_i`` ``[...]``.

    Raises:
        StatisticsError: Not finite, no samples, or lengths that differ.
    """
    samples, weights = _aligned(values, log_w)
    return _contract(weights, samples)


def weighted_error(values: Samples, log_w: Samples, inefficiency: float = 1.0) -> Tensor:
    """Standard error of `weighted_mean`, by the delta method for a ratio of two sums.

    ``se^2 = g sum_i w_i^2 (values_i - mean)^2 / (1 - g sum_i w_i^2)`` (Owen 2013, chapter 9); the denominator
    undoes the bias of measuring the spread about the samples' own mean, and for equal weights and g = 1
    leaves the textbook ``s / sqrt(n)``.

    Args:
        values: One value or array for each sample ``[n, ...]``.
        log_w: Logarithms of weights ``[n]``, normalised or not.
        inefficiency: Statistical inefficiency g of the samples, at least 1.

    Returns:
        Standard error ``[...]``; infinite where a single independent sample or less is left.

    Raises:
        StatisticsError: Not finite, no samples, lengths that differ, or g below 1.
    """
    samples, weights = _aligned(values, log_w)
    g = as_inefficiency(inefficiency)
    squares = weights**2
    spread = _contract(squares, (samples - _contract(weights, samples)) ** 2)
    left = 1.0 - g * squares.sum()
    if bool(left <= 0.0):
        return torch.full_like(spread, torch.inf)
    return torch.sqrt(g * spread / left)


def _aligned(values: Samples, log_w: Samples) -> tuple[Tensor, Tensor]:
    samples = as_samples(values, "weighted values", dims=None)
    weights = torch.exp(log_weights(log_w))
    if samples.shape[0] != weights.shape[0]:
        raise StatisticsError(
            f"{samples.shape[0]} values came with {weights.shape[0]} weights", needed="one weight each"
        )
    return samples, weights


def _contract(weights: Tensor, samples: Tensor) -> Tensor:
    total: Tensor = torch.tensordot(weights, samples, dims=1)
    return total
