"""What every estimator asks of its input: finite float64 samples and an inefficiency of at least one."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlip_refine.errors import StatisticsError

type Samples = Tensor | NDArray[np.float64] | Sequence[float]


def as_samples(values: Samples, name: str, *, dims: int | None = 1, allow_empty: bool = False) -> Tensor:
    """Return the values as a finite float64 tensor, keeping the autograd graph.

    Args:
        values: Samples of any float type.
        name: What they are, for the error message.
        dims: Number of dimensions that they must have; None accepts one or more.
        allow_empty: Whether no sample at all is fine.

    Raises:
        StatisticsError: Wrong number of dimensions, no samples, or a value that is not finite.
    """
    samples = torch.as_tensor(values, dtype=torch.float64)
    if samples.ndim == 0 or (dims is not None and samples.ndim != dims):
        wanted = "at least 1" if dims is None else str(dims)
        raise StatisticsError(f"{name} has {samples.ndim} dimensions", needed=f"{wanted} of them")
    if samples.numel() == 0 and not allow_empty:
        raise StatisticsError(f"{name} holds no samples", needed="at least one")
    _require_finite(samples, name)
    return samples


def _require_finite(samples: Tensor, name: str) -> None:
    bad = ~torch.isfinite(samples.detach())
    if bool(bad.any()):
        place = torch.nonzero(bad)[0].tolist()
        raise StatisticsError(
            f"{name} holds {int(bad.sum())} values that are not finite, the first at index {place}",
            needed="finite numbers: leave out the frames that carry them, and find out why they do",
        )


def as_inefficiency(value: float, name: str = "statistical inefficiency") -> float:
    """Return a statistical inefficiency as a float.

    Raises:
        StatisticsError: The value is below one or not finite.
    """
    if not math.isfinite(value) or value < 1.0:
        raise StatisticsError(f"{name} is {value}", needed="a finite number, at least 1")
    return float(value)
