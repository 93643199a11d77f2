"""Bootstrap errors: of any statistic of correlated series by blocks, and of paired comparisons by cases.

Why not `scipy.stats.bootstrap`: it knows no blocks, and in the paired comparison it would gather 10,000
resamples of all quantities, where one matrix product with counts does.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlip_refine.errors import StatisticsError
from mlip_refine.statistics.series import Samples, as_inefficiency, as_samples, statistical_inefficiency

_PAIRED_RESAMPLES = 10_000
_PAIRED_SEED = 0
_FEWEST_CASES = 5


def block_length(n: int, inefficiency: float) -> int:
    """Return the block length that makes the variance of a mean most accurate.

    ``(1.5 n r^2)^(1/3)`` with ``r = (g^2 - 1) / 2g`` (Politis & White 2004, for circular blocks of
    a process whose autocorrelation decays exponentially), at least g and at most n/4.

    Args:
        n: Length of the series.
        inefficiency: Statistical inefficiency g of the series, at least 1.
    """
    g = as_inefficiency(inefficiency)
    ratio = (g * g - 1.0) / (2.0 * g)
    optimal = math.ceil(math.cbrt(1.5 * n * ratio * ratio))
    return max(1, min(max(optimal, math.ceil(g)), n // 4))


def block_bootstrap(
    statistic: Callable[[list[Tensor]], float | Tensor],
    series: Sequence[Samples],
    n_resamples: int = 200,
    seed: int = 0,
    inefficiencies: Sequence[float] | None = None,
) -> float:
    """Return the standard error of a statistic of several independent series.

    Every series is resampled by itself in circular blocks (Politis & Romano 1992), so that correlation
    within a block survives; quantities of one frame belong in the columns of one series.

    Args:
        statistic: Maps resampled series, in the order given, to one number.
        series: Independent series ``[n, ...]``, time first.
        n_resamples: Number of resamples, at least 2.
        seed: Seed of the resampling.
        inefficiencies: Statistical inefficiency of each series; measured on each where it is left out,
            which needs one-dimensional series.

    Returns:
        Standard deviation of the statistic over the resamples.

    Raises:
        StatisticsError: A series or a resampled statistic is not finite, no series, too few resamples, or
            no inefficiency for a series of several columns.
    """
    if n_resamples < 2 or not series:
        problem = f"{n_resamples} resamples of {len(series)} series"
        raise StatisticsError(problem, needed="at least 2 resamples of at least 1 series")
    columns = [as_samples(one, f"series {index}", dims=None).detach() for index, one in enumerate(series)]
    if inefficiencies is None:
        if any(one.ndim != 1 for one in columns):
            raise StatisticsError("a series has several columns", needed="the inefficiency of each series")
        inefficiencies = [statistical_inefficiency(one) for one in columns]
    if len(inefficiencies) != len(columns):
        problem = f"{len(inefficiencies)} inefficiencies for {len(columns)} series"
        raise StatisticsError(problem, needed="one each")
    blocks = [block_length(len(one), g) for one, g in zip(columns, inefficiencies, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(n_resamples):
        resampled = [_blocks_of(one, block, generator) for one, block in zip(columns, blocks, strict=True)]
        values.append(float(statistic(resampled)))
    return float(as_samples(values, "resampled statistic").std())


def _blocks_of(series: Tensor, block: int, generator: torch.Generator) -> Tensor:
    """Draw circular blocks until they make up a series of the same length."""
    n = len(series)
    starts = torch.randint(n, (math.ceil(n / block), 1), generator=generator)
    index = (starts + torch.arange(block)).reshape(-1)[:n] % n
    return series[index.to(series.device)]


@dataclass(frozen=True)
class Reduction:
    """Share by which mean absolute errors became smaller, with a 95 % interval.

    Attributes:
        value: 1 - mean error after / mean error before, over quantities the mean.
        low: Lower end of the interval.
        high: Upper end of the interval.
        of_quantities: Value, lower and upper end for every quantity.
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
    if before.shape != after.shape or before.dim() != 2 or len(before) < _FEWEST_CASES:
        raise StatisticsError(
            f"errors of shapes {tuple(before.shape)} and {tuple(after.shape)}",
            needed=f"the same at least {_FEWEST_CASES} cases before and after",
        )
    if not (before.isfinite().all() and after.isfinite().all() and (before.mean(0) > 0).all()):
        raise StatisticsError("errors that are not finite, or none before", needed="errors above zero before")
    generator = torch.Generator().manual_seed(_PAIRED_SEED)
    drawn = torch.randint(len(before), (_PAIRED_RESAMPLES, len(before)), generator=generator)
    counts = torch.zeros(_PAIRED_RESAMPLES, len(before), dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    resampled = 1 - (counts @ after.double()) / (counts @ before.double())
    value = 1 - after.double().mean(0) / before.double().mean(0)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = resampled.quantile(ends, dim=0)
    total_low, total_high = resampled.mean(1).quantile(ends).tolist()
    of_each = zip(value.tolist(), low.tolist(), high.tolist(), strict=True)
    return Reduction(float(value.mean()), total_low, total_high, tuple(of_each))
