"""Reweighting: normalised weights, effective sample sizes, weighted means and their errors.

Functions of tensors are differentiable in them; weights are kept as logarithms throughout.
"""

import math

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
    mean: Tensor = torch.tensordot(weights, samples, dims=1)
    return mean


def weighted_error(values: Samples, log_w: Samples, inefficiency: float = 1.0) -> Tensor:
    """Return the standard error of `weighted_mean`, by the delta method for a ratio of two sums.

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
    mean = torch.tensordot(weights, samples, dims=1)
    spread = torch.tensordot(squares, (samples - mean) ** 2, dims=1)
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


def require_effective(
    n_eff: float, minimum: float, what: str, have_length: float | None = None, unit: str = "samples"
) -> None:
    """Refuse an estimate that rests on too few independent samples.

    Args:
        n_eff: Number of independent samples, after weights and correlation.
        minimum: Smallest number that is accepted.
        what: Name of the estimate in the message.
        have_length: Length of the data at hand; the message then says which length would be enough.
        unit: Unit of that length (``"frames"``, ``"ps"``).

    Raises:
        StatisticsError: ``n_eff`` is below the minimum or not a number.
    """
    if n_eff >= minimum:
        return
    if not n_eff > 0.0:
        needed = f"samples that carry {minimum:.3g} independent ones"
    elif have_length is None:
        needed = f"about {minimum / n_eff:.2g} times as many samples"
    else:
        factor = minimum / n_eff
        length = have_length * factor
        text = f"{math.ceil(length):d}" if length >= 10.0 else f"{length:.3g}"
        needed = f"about {text} {unit} in place of {have_length:.6g} ({factor:.2g} times as many)"
    problem = f"{what} rests on {n_eff:.3g} independent samples, fewer than {minimum:.3g}"
    raise StatisticsError(problem, needed=needed)
