"""Polynomials through values with errors."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mlip_refine.errors import StatisticsError
from mlip_refine.statistics.series import Samples, as_samples


class PolynomialFit(NamedTuple):
    """A weighted least-squares fit.

    Attributes:
        values: Values of the polynomial at the given points ``[n]``.
        errors: Standard errors of these values ``[n]``, from the errors of the data alone.
        chi_squared: Sum of squared residuals in standard errors.
        freedom: Degrees of freedom: points less coefficients.
    """

    values: Tensor
    errors: Tensor
    chi_squared: float
    freedom: int


def polynomial_fit(x: Samples, y: Samples, errors: Samples, powers: Sequence[int]) -> PolynomialFit:
    """Fit ``sum_k c_k x^k`` to independent values with known errors.

    Args:
        x: Points ``[n]``.
        y: Values ``[n]``.
        errors: Standard errors of the values ``[n]``, above zero.
        powers: Powers k, such as (0, 1, 2), or (1, 2) for a function that vanishes at zero.

    Raises:
        StatisticsError: Fewer points than coefficients, or an error that is not above zero.
    """
    points, values, sigma = (
        as_samples(v, n) for v, n in ((x, "points"), (y, "values"), (errors, "standard errors"))
    )
    if len(points) < len(powers):
        raise StatisticsError(
            f"{len(points)} points for {len(powers)} coefficients", needed="at least as many points"
        )
    if bool((sigma <= 0).any()):
        raise StatisticsError("a value without an error cannot be weighted", needed="errors above zero")
    # Points of order one keep the normal equations well conditioned.
    scaled = points / points.abs().max().clamp(min=1e-300)
    design = torch.stack([scaled**k for k in powers], dim=1)
    weighted = design / sigma[:, None]
    covariance = torch.linalg.inv(weighted.T @ weighted)
    fitted = design @ covariance @ weighted.T @ (values / sigma)
    spread = torch.einsum("ni,ij,nj->n", design, covariance, design).sqrt()
    chi_squared = float(((fitted - values) / sigma).square().sum())
    return PolynomialFit(fitted, spread, chi_squared, len(points) - len(powers))
