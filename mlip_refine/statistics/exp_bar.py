"""Free-energy differences of two states: exponential averaging, Bennett's acceptance ratio, and refusals.

The sign convention holds for the whole room: work is ``w = u_1 - u_0``, the reduced potential of the end
state minus that of the start state, and the estimate is ``f_1 - f_0`` in units of k_B T.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mlip_refine.errors import StatisticsError
from mlip_refine.statistics.series import Samples, as_inefficiency, as_samples
from mlip_refine.statistics.weights import kish_size, require_effective

MINIMUM_OVERLAP = 0.03
MINIMUM_EFFECTIVE = 10.0

_MAX_STEPS = 400


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
            se=math.sqrt(_relative_variance(-work, g)),
            n_eff=float(kish_size(-work)) / g,
            overlap=float(2.0 * torch.sigmoid(log_r).mean()),
        )


def bar_estimate(
    forward: Samples, reverse: Samples, inefficiency: tuple[float, float] = (1.0, 1.0)
) -> FreeEnergyEstimate:
    """Estimate ``f_1 - f_0`` from samples of states 0 and 1 (Bennett 1976, Shirts et al. 2003).

    Both works have the same sign, end minus start: ``forward = (u_1 - u_0)(x ~ p_0)`` and
    ``reverse = (u_1 - u_0)(x ~ p_1)``. With ``M = ln(n_0 / n_1)`` and the Fermi function
    ``s(y) = 1 / (1 + exp(-y))``, the value f solves

    ``sum_0 s(f - M - w) = sum_1 s(M + w - f)``,

    exact for any pair of sample numbers, and by the implicit function theorem ``df/dw_i`` is
    ``s_i (1 - s_i)`` over its sum. The error is Bennett's, each state with its own inefficiency. The overlap
    takes all samples as drawn from the mixture of both states.

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
    n_0, n_1 = len(forward), len(reverse)
    if n_0 + n_1 == 0:
        raise StatisticsError("neither state has samples", needed="samples of at least one state")
    if n_1 == 0:
        return exp_estimate(forward, inefficiency[0])
    if n_0 == 0:
        backwards = exp_estimate(-reverse, inefficiency[1])
        return replace(backwards, value=-backwards.value)
    g0 = as_inefficiency(inefficiency[0], "inefficiency of state 0")
    g1 = as_inefficiency(inefficiency[1], "inefficiency of state 1")
    offset = math.log(n_0 / n_1)
    works = torch.cat([forward, reverse])
    root = _bar_root(forward.detach(), reverse.detach(), offset)
    value: Tensor = _ImplicitRoot.apply(works, root, offset)
    with torch.no_grad():
        level = root - offset
        variance_0 = _relative_variance(logsigmoid(level - forward), g0)
        variance_1 = _relative_variance(logsigmoid(reverse - level), g1)
        squares = _root_slopes(works - level) ** 2
        log_r = root - works
        log_mixture = torch.logaddexp(torch.full_like(log_r, math.log(n_0)), math.log(n_1) + log_r)
        return FreeEnergyEstimate(
            value=value,
            se=math.sqrt(variance_0 + variance_1),
            n_eff=1.0 / float(g0 * squares[:n_0].sum() + g1 * squares[n_0:].sum()),
            overlap=float(2.0 * torch.exp(logsigmoid(log_r) - log_mixture).sum()),
        )


def _relative_variance(log_x: Tensor, inefficiency: float) -> float:
    """Return the variance of the logarithm of a mean, ``g var(x) / (n <x>^2)``, by the delta method.

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


def _root_slopes(y: Tensor) -> Tensor:
    """Return ``s(y) s(-y)`` over its sum: the derivative of the root in every work."""
    return torch.softmax(logsigmoid(y) + logsigmoid(-y), dim=0)


def _bar_root(forward: Tensor, reverse: Tensor, offset: float) -> float:
    """Solve Bennett's equation by Newton's method inside a shrinking bracket, which bisection keeps safe.

    The mismatch is ``ln sum_0 s - ln sum_1 s``, which increases with f: with logarithms of both sides, states
    without overlap underflow nowhere.
    """
    margin = abs(offset) + 1.0
    low = min(float(forward.min()), float(reverse.min())) + offset - margin
    high = max(float(forward.max()), float(reverse.max())) + offset + margin
    f = 0.5 * (low + high)
    for step in range(_MAX_STEPS):
        level = f - offset
        log_0, log_1 = logsigmoid(level - forward), logsigmoid(reverse - level)
        mismatch = float(torch.logsumexp(log_0, dim=0) - torch.logsumexp(log_1, dim=0))
        slope_0 = torch.softmax(log_0, dim=0) @ torch.sigmoid(forward - level)
        slope_1 = torch.softmax(log_1, dim=0) @ torch.sigmoid(level - reverse)
        slope = float(slope_0 + slope_1)
        low, high = (f, high) if mismatch < 0.0 else (low, f)
        proposal = f - mismatch / slope if slope > 0.0 else math.inf
        if step % 4 == 3 or not low < proposal < high:
            proposal = 0.5 * (low + high)
        resolution = 2.0 * torch.finfo(forward.dtype).eps * max(1.0, abs(f))
        if mismatch == 0.0 or abs(f - proposal) <= resolution:
            return f
        f = proposal
    return f


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
        return grad_outputs[0] * _root_slopes(ctx.offset + works - value), None, None


def require_overlap(overlap: float, what: str, minimum: float = MINIMUM_OVERLAP) -> None:
    """Refuse a free-energy difference between states that hardly share configurations.

    More samples do not change the overlap of two states, but the variance falls as
    ``1 / (n * overlap)``, so the message gives both cures: states in between, and the factor of samples.
    The number of states assumes that ``-ln(overlap)`` grows with the square of the distance, as for
    Gaussians.

    Args:
        overlap: As in `FreeEnergyEstimate`: 1 for equal states, 0 for disjoint ones.
        what: Name of the estimate in the message.
        minimum: Smallest overlap that is accepted.

    Raises:
        StatisticsError: The overlap is below the minimum or not a number.
    """
    if overlap >= minimum:
        return
    if not overlap > 0.0 or minimum >= 1.0:
        needed = "fresh samples from a state nearer to the end state, or several states in between"
    else:
        between = max(1, math.ceil(math.sqrt(math.log(overlap) / math.log(minimum))) - 1)
        states = "state" if between == 1 else "states"
        needed = (
            f"at least {between} {states} in between, or fresh samples from a nearer state; with these two "
            f"alone, {minimum / overlap:.2g} times as many samples for the error that the least overlap gives"
        )
    problem = f"{what}: the states overlap by {overlap:.2g}, less than {minimum:.2g}"
    raise StatisticsError(problem, needed=needed)


def require_estimate(
    estimate: FreeEnergyEstimate,
    what: str,
    *,
    min_effective: float = MINIMUM_EFFECTIVE,
    min_overlap: float = MINIMUM_OVERLAP,
    have_length: float | None = None,
    unit: str = "samples",
) -> None:
    """Refuse a free-energy difference for too little overlap, or for too few independent samples.

    Args:
        estimate: Result of `exp_estimate`, `bar_estimate` or `MbarResult.perturb`.
        what: Name of the estimate in the message.
        min_effective: Smallest number of independent samples that is accepted.
        min_overlap: Smallest overlap that is accepted.
        have_length: Length of the data at hand, see `require_effective`.
        unit: Unit of that length.

    Raises:
        StatisticsError: Either is below its minimum.
    """
    require_overlap(estimate.overlap, what, min_overlap)
    require_effective(estimate.n_eff, min_effective, what, have_length, unit)
