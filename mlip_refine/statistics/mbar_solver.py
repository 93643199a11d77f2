"""The multistate equations as a convex minimisation, solved by damped Newton steps."""

import torch
from torch import Tensor

from mlip_refine.errors import StatisticsError

_MAX_STEPS = 300
_TOLERANCE = 1e-12
_FLAT = 1e-9


def log_mixture(log_p: Tensor, n_k: Tensor) -> Tensor:
    """Return ``ln sum_k n_k p_k(x_n)`` of every sample ``[N]`` from log-densities ``[K, N]``."""
    sampled = n_k > 0
    return torch.logsumexp(log_p[sampled] + torch.log(n_k[sampled])[:, None], dim=0)


def solve_free_energies(u_kn: Tensor, n_k: Tensor, multiplicity: Tensor) -> Tensor:
    """Solve the multistate equations for all states.

    Args:
        u_kn: Reduced potentials ``[K, N]``, states shifted to comparable means.
        n_k: Samples drawn from each state ``[K]``, as float64, zeros allowed.
        multiplicity: How many samples each one counts for ``[N]``; sums to ``n_k`` over a state's samples.

    Returns:
        Reduced free energies ``[K]`` up to a common constant.

    Raises:
        StatisticsError: The iteration does not converge.
    """
    sampled = n_k > 0
    problem = _Objective(u_kn[sampled], n_k[sampled], multiplicity)
    f = _minimise(problem)
    return -torch.logsumexp(torch.log(multiplicity) - u_kn - problem.mixture(f), dim=1)


class _Objective:
    """``L(f) = mean_n ln sum_k n_k exp(f_k - u_kn) - sum_k n_k f_k / N``, convex in f (Tan et al. 2012).

    The mean over samples counts each with its multiplicity.
    """

    def __init__(self, u_kn: Tensor, n_k: Tensor, multiplicity: Tensor) -> None:
        self.u = u_kn - u_kn.min(dim=0).values
        self.removed = u_kn.min(dim=0).values
        self.share = n_k / n_k.sum()
        self.log_n = torch.log(n_k)[:, None]
        self.part = multiplicity / multiplicity.sum()

    def mixture(self, f: Tensor) -> Tensor:
        """Return the log-density of the mixture at the potentials as they were given ``[N]``."""
        return self._log_mixture(f) - self.removed

    def value(self, f: Tensor) -> Tensor:
        """Return the objective, 0-d."""
        return self._log_mixture(f) @ self.part - self.share @ f

    def slopes(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient ``[K]`` and the Hessian ``[K, K]`` of the objective."""
        origin = torch.exp(self.log_n + f[:, None] - self.u - self._log_mixture(f))
        mean = origin @ self.part
        return mean - self.share, torch.diag(mean) - (origin * self.part) @ origin.T

    def iterate(self, f: Tensor) -> Tensor:
        """Do one self-consistent iteration, which never raises the objective."""
        updated = -torch.logsumexp(torch.log(self.part) - self.u - self._log_mixture(f), dim=1)
        return updated - updated[0]

    def _log_mixture(self, f: Tensor) -> Tensor:
        return torch.logsumexp(self.log_n + f[:, None] - self.u, dim=0)


def _minimise(problem: _Objective) -> Tensor:
    """Minimise by Newton steps with the first state held; self-consistent ones where those fail."""
    f = problem.iterate(torch.zeros_like(problem.share))
    for _ in range(_MAX_STEPS):
        gradient, hessian = problem.slopes(f)
        step = torch.zeros_like(gradient)
        step[1:], info = torch.linalg.solve_ex(hessian[1:, 1:], -gradient[1:])
        usable = int(info) == 0 and bool(torch.isfinite(step).all())
        slope = float(gradient @ step)
        if usable:
            # Below the tolerance, or with a gain far below that of the statistical error.
            small = float(step.abs().max()) <= _TOLERANCE * max(1.0, float(f.abs().max()))
            if small or 0.0 <= -slope <= _TOLERANCE**2:
                return f + step
        if float(gradient.abs().max()) <= 4.0 * torch.finfo(f.dtype).eps:
            return f
        moved = _line_search(problem, f, step, slope) if usable else None
        f = problem.iterate(f) if moved is None else moved
    residual = float(problem.slopes(f)[0].abs().max())
    if residual > _FLAT:  # less is rounding that keeps the steps above the tolerance
        raise StatisticsError(
            f"the multistate equations did not converge in {_MAX_STEPS} steps (residual {residual:.1e})",
            needed="states that share configurations: more states in between, or longer runs",
        )
    return f


def _line_search(problem: _Objective, f: Tensor, step: Tensor, slope: float) -> Tensor | None:
    """Halve the step until the objective falls; None if it does not, or if the step leads uphill."""
    if slope > 0.0:
        return None
    start = float(problem.value(f))
    noise = 1e-14 * max(1.0, abs(start))
    length = 1.0
    for _ in range(40):
        trial = f + length * step
        if float(problem.value(trial)) <= start + 1e-4 * length * slope + noise:
            return trial
        length *= 0.5
    return None
