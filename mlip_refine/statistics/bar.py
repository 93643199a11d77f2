"""Free-energy differences from samples of both states: Bennett's acceptance ratio."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mlip_refine.errors import StatisticsError
from mlip_refine.statistics.free_energy import FreeEnergyEstimate, exp_estimate, relative_variance
from mlip_refine.statistics.series import Samples, as_inefficiency, as_samples

_MAX_STEPS = 400


def bar_estimate(
    forward: Samples, reverse: Samples, inefficiency: tuple[float, float] = (1.0, 1.0)
) -> FreeEnergyEstimate:
    """Estimate ``f_1 - f_0`` from samples of states 0 and 1 (Bennett 1976, Shirts et al. 2003).

    Both works have the same sign, end minus start: ``forward = (u_1 - u_0)(x ~ p_0)`` and
    ``reverse = (u_1 - u_0)(x ~ p_1)``. With ``M = ln(n_0 / n_1)`` and the Fermi function
    ``s(y) = 1 / (1 + exp(-y))``, the value f solves

    ``sum_0 s(f - M - w) = sum_1 s(M + w - f)``,

    exact for any pair of sample numbers, and by the implicit function theorem ``df/dw_i`` is
    ``s_i (1 - s_i)`` over its sum. The error is Bennett's, each state with its own inefficiency.

    Args:
        forward: ``u_1 - u_0`` of the samples of state 0 ``[n_0]``, dimensionless.
        reverse: ``u_1 - u_0`` of the samples of state 1 ``[n_1]``, dimensionless.
        inefficiency: Statistical inefficiencies of the two sets, each at least 1.

    Returns:
        The estimate, differentiable to any order in both works. With no samples on one side it is that of
        exponential averaging over the other.

    Raises:
        StatisticsError: No samples at all, a work that is not finite, or an inefficiency below 1.
    """
    forward = as_samples(forward, "forward work", allow_empty=True)
    reverse = as_samples(reverse, "reverse work", allow_empty=True)
    if len(forward) + len(reverse) == 0:
        raise StatisticsError("neither state has samples", needed="samples of at least one state")
    if len(reverse) == 0:
        return exp_estimate(forward, inefficiency[0])
    if len(forward) == 0:
        return _negated(exp_estimate(-reverse, inefficiency[1]))
    g0 = as_inefficiency(inefficiency[0], "inefficiency of state 0")
    g1 = as_inefficiency(inefficiency[1], "inefficiency of state 1")
    return _two_sided(forward, reverse, g0, g1)


def _negated(estimate: FreeEnergyEstimate) -> FreeEnergyEstimate:
    return FreeEnergyEstimate(-estimate.value, estimate.se, estimate.n_eff, estimate.overlap)


def _two_sided(forward: Tensor, reverse: Tensor, g0: float, g1: float) -> FreeEnergyEstimate:
    offset = math.log(len(forward) / len(reverse))
    works = torch.cat([forward, reverse])
    root = _solve(forward.detach(), reverse.detach(), offset)
    value: Tensor = _ImplicitRoot.apply(works, root, offset)
    with torch.no_grad():
        return FreeEnergyEstimate(
            value=value,
            se=_bennett_error(forward, reverse, root - offset, g0, g1),
            n_eff=_effective(works, root - offset, len(forward), g0, g1),
            overlap=_overlap(works, root, len(forward)),
        )


def _bennett_error(forward: Tensor, reverse: Tensor, level: float, g0: float, g1: float) -> float:
    variance_0 = relative_variance(logsigmoid(level - forward), g0)
    variance_1 = relative_variance(logsigmoid(reverse - level), g1)
    return math.sqrt(variance_0 + variance_1)


def _effective(works: Tensor, level: float, n_forward: int, g0: float, g1: float) -> float:
    squares = _shares(works - level) ** 2
    return 1.0 / float(g0 * squares[:n_forward].sum() + g1 * squares[n_forward:].sum())


def _overlap(works: Tensor, root: float, n_forward: int) -> float:
    """Return ``2 int p_0 p_1 / (p_0 + p_1)``, all samples taken as drawn from the mixture of both states."""
    log_r = root - works
    n_reverse = len(works) - n_forward
    log_mixture = torch.logaddexp(torch.full_like(log_r, math.log(n_forward)), math.log(n_reverse) + log_r)
    return float(2.0 * torch.exp(logsigmoid(log_r) - log_mixture).sum())


def _shares(y: Tensor) -> Tensor:
    """Return ``s(y) s(-y)`` over its sum: the derivative of the root in every work."""
    return torch.softmax(logsigmoid(y) + logsigmoid(-y), dim=0)


def _solve(forward: Tensor, reverse: Tensor, offset: float) -> float:
    """Find the root by Newton's method inside a shrinking bracket, which bisection keeps safe.

    The logarithms of both sides are compared, so that states without overlap underflow nowhere.
    """
    margin = abs(offset) + 1.0
    low = min(float(forward.min()), float(reverse.min())) + offset - margin
    high = max(float(forward.max()), float(reverse.max())) + offset + margin
    f = 0.5 * (low + high)
    for step in range(_MAX_STEPS):
        mismatch, slope = _mismatch(forward, reverse, f - offset)
        low, high = (f, high) if mismatch < 0.0 else (low, f)
        proposal = f - mismatch / slope if slope > 0.0 else math.inf
        if step % 4 == 3 or not low < proposal < high:
            proposal = 0.5 * (low + high)
        resolution = 2.0 * torch.finfo(forward.dtype).eps * max(1.0, abs(f))
        if mismatch == 0.0 or abs(f - proposal) <= resolution:
            return f
        f = proposal
    return f


def _mismatch(forward: Tensor, reverse: Tensor, level: float) -> tuple[float, float]:
    """Return ``ln sum_0 s - ln sum_1 s``, increasing in the level, and its derivative."""
    log_0, log_1 = logsigmoid(level - forward), logsigmoid(reverse - level)
    mismatch = torch.logsumexp(log_0, dim=0) - torch.logsumexp(log_1, dim=0)
    slope_0 = torch.softmax(log_0, dim=0) @ torch.sigmoid(forward - level)
    slope_1 = torch.softmax(log_1, dim=0) @ torch.sigmoid(level - reverse)
    return float(mismatch), float(slope_0 + slope_1)


class _ImplicitRoot(torch.autograd.Function):
    """The root as a differentiable function of the works, by the implicit function theorem."""

    @staticmethod
    def forward(ctx: Any, works: Tensor, root: float, offset: float) -> Tensor:
        value = works.new_tensor(root)
        ctx.offset = offset
        ctx.save_for_backward(works, value)
        return value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        works, value = ctx.saved_tensors
        return grad_outputs[0] * _shares(ctx.offset + works - value), None, None
