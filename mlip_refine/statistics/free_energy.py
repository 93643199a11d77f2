"""Free-energy differences from samples of one state: exponential averaging.

The sign convention holds for the whole room: work is ``w = u_1 - u_0``, the reduced potential of the end
state minus that of the start state, and the estimate is ``f_1 - f_0`` in units of k_B T.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mlip_refine.statistics.series import Samples, as_inefficiency, as_samples
from mlip_refine.statistics.weights import kish_size


@dataclass(frozen=True)
class FreeEnergyEstimate:
    """A dimensionless free-energy difference with what is needed to judge it.

    Attributes:
        value: ``f_1 - f_0`` in units of k_B T, 0-d and differentiable in the works it came from.
        se: Asymptotic standard error, in units of k_B T; infinite where the samples cannot tell.
        n_eff: Independent samples that carry the estimate: ``1 / sum_i g_i c_i^2``, where ``c_i`` is the
            derivative of the value in work i (they sum to 1). Kish's size over g for one state.
        overlap: ``2 * integral of p_0 p_1 / (p_0 + p_1)``, 1 for equal states and 0 for disjoint ones,
            whatever the numbers of samples. It is one minus the second eigenvalue of the overlap matrix
            (twice its off-diagonal element) when both states have the same number.
    """

    value: Tensor
    se: float
    n_eff: float
    overlap: float


def exp_estimate(work: Samples, inefficiency: float = 1.0) -> FreeEnergyEstimate:
    """Estimate ``f_1 - f_0 = -ln <exp(-w)>_0`` from samples of state 0 (Zwanzig 1954).

    Args:
        work: ``u_1 - u_0`` of every sample of state 0 ``[n]``, dimensionless.
        inefficiency: Statistical inefficiency g of the samples, at least 1.

    Returns:
        The estimate; its value has the normalised weights as gradient in ``work``.

    Raises:
        StatisticsError: No samples, a work that is not finite, or g below 1.
    """
    work = as_samples(work, "work")
    g = as_inefficiency(inefficiency)
    value = math.log(len(work)) - torch.logsumexp(-work, dim=0)
    with torch.no_grad():
        log_r = value - work
        return FreeEnergyEstimate(
            value=value,
            se=math.sqrt(relative_variance(-work, g)),
            n_eff=float(kish_size(-work)) / g,
            overlap=float(2.0 * torch.sigmoid(log_r).mean()),
        )


def relative_variance(log_x: Tensor, inefficiency: float) -> float:
    """Variance of the logarithm of a mean, ``g var(x) / (n <x>^2)``, by the delta method.

    The sample variance is divided by ``1 - g/n``, its expected share of the true one.

    Args:
        log_x: Logarithms of positive samples ``[n]``.
        inefficiency: Statistical inefficiency g.

    Returns:
        Variance of ``ln mean(x)``: infinite unless n exceeds g, zero where several samples agree exactly.
    """
    n = len(log_x)
    spread = float(torch.sum((torch.softmax(log_x, dim=0) - 1.0 / n) ** 2))
    if n > 1 and spread <= n * torch.finfo(log_x.dtype).eps ** 2:
        return 0.0
    return inefficiency * spread * n / (n - inefficiency) if n > inefficiency else math.inf
