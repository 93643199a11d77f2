"""Errors of arbitrary statistics of correlated series, by resampling blocks."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mlip_refine.errors import StatisticsError
from mlip_refine.statistics.correlation import statistical_inefficiency
from mlip_refine.statistics.series import Samples, as_inefficiency, as_samples


def block_length(n: int, inefficiency: float) -> int:
    """Return the block length that makes the variance of a mean most accurate.

    ``(1.5 n r^2)^(1/3)`` with ``r = (g^2 - 1) / 2g`` (Politis & White 2004, for circular blocks of
    a process whose autocorrelation decays exponentially), at least g and at most n/4.

    Args:
        n: Length of the series.
        inefficiency: Its statistical inefficiency g, at least 1.
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
            which asks for one-dimensional series.

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
    measured = _measure(columns, inefficiencies)
    blocks = [block_length(len(one), g) for one, g in zip(columns, measured, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    values = [float(statistic(_resample(columns, blocks, generator))) for _ in range(n_resamples)]
    return float(as_samples(values, "resampled statistic").std())


def _measure(columns: list[Tensor], inefficiencies: Sequence[float] | None) -> Sequence[float]:
    if inefficiencies is None:
        if any(one.ndim != 1 for one in columns):
            raise StatisticsError("a series has several columns", needed="the inefficiency of each series")
        return [statistical_inefficiency(one) for one in columns]
    if len(inefficiencies) != len(columns):
        raise StatisticsError(
            f"{len(inefficiencies)} inefficiencies for {len(columns)} series", needed="one each"
        )
    return inefficiencies


def _resample(columns: list[Tensor], blocks: list[int], generator: torch.Generator) -> list[Tensor]:
    return [_shuffle(one, block, generator) for one, block in zip(columns, blocks, strict=True)]


def _shuffle(one: Tensor, block: int, generator: torch.Generator) -> Tensor:
    n = len(one)
    starts = torch.randint(n, (math.ceil(n / block), 1), generator=generator)
    index = (starts + torch.arange(block)).reshape(-1)[:n] % n
    return one[index.to(one.device)]
