"""By how much errors became smaller, from the same cases before and after."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mlip_refine.errors import StatisticsError

_RESAMPLES = 10_000
_SEED = 0
_FEWEST = 5


@dataclass(frozen=True)
class Reduction:
    """Share by which mean absolute errors became smaller, with a 95 % interval.

    Attributes:
        value: 1 - mean error after / mean error before, over quantities the mean.
        low: Lower end of the interval.
        high: Its upper end.
        of_quantities: Value, lower and upper end of every quantity.
    """

    value: float
    low: float
    high: float
    of_quantities: tuple[tuple[float, float, float], ...]


def paired_reduction(before: Tensor, after: Tensor) -> Reduction:
    """Compare absolute errors of the same cases.

    The interval is that of the percentile bootstrap over cases, each with its errors before and after (Efron
    and Tibshirani, An Introduction to the Bootstrap, 1993): what is common to both cancels.

    Args:
        before: Absolute errors `[n_cases, n_quantities]`, in any units.
        after: The same cases and quantities.

    Raises:
        StatisticsError: The shapes differ, a number is not finite, there are fewer than five cases, or there
            were no errors before.
    """
    if before.shape != after.shape or before.dim() != 2 or len(before) < _FEWEST:
        raise StatisticsError(
            f"errors of shapes {tuple(before.shape)} and {tuple(after.shape)}",
            needed=f"the same at least {_FEWEST} cases before and after",
        )
    if not (before.isfinite().all() and after.isfinite().all() and (before.mean(0) > 0).all()):
        raise StatisticsError("errors that are not finite, or none before", needed="errors above zero before")
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.randint(len(before), (_RESAMPLES, len(before)), generator=generator)
    counts = torch.zeros(_RESAMPLES, len(before), dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    resampled = 1 - (counts @ after.double()) / (counts @ before.double())
    value = 1 - after.double().mean(0) / before.double().mean(0)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = resampled.quantile(ends, dim=0)
    total_low, total_high = resampled.mean(1).quantile(ends).tolist()
    of_each = zip(value.tolist(), low.tolist(), high.tolist(), strict=True)
    return Reduction(float(value.mean()), total_low, total_high, tuple(of_each))
