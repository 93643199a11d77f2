"""Free energies and weights from samples of many states: the multistate acceptance ratio (MBAR).

Shirts & Chodera 2008. Reduced potentials ``u_k(x)`` are dimensionless; ``beta (U + P V)`` makes NPT states.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlip_refine.errors import StatisticsError
from mlip_refine.statistics.free_energy import FreeEnergyEstimate
from mlip_refine.statistics.mbar_solver import log_mixture, solve_free_energies
from mlip_refine.statistics.series import Samples, as_inefficiency, as_samples

_DISCONNECTED = 1e-12


@dataclass(frozen=True, eq=False)
class MbarResult:
    """Free energies of K states from N samples drawn from any of them.

    Attributes:
        f_k: Reduced free energies ``[K]``, zero for state 0.
        theta: Covariance of ``f_k`` ``[K, K]``, so that row and column 0 vanish; all of it NaN where the
            sampled states fall into groups without overlap (errors are then infinite).
        overlap: Overlap matrix ``[K, K]`` (Klimovich et al. 2015): element ij is the probability that a
            sample of state i would be taken for one of state j; rows sum to 1.
        log_q: Log-density of the mixture that all samples together were drawn from,
            ``ln sum_k n_k exp(f_k - u_k(x))`` ``[N]``.
        n_k: Samples drawn from each state ``[K]``.
        inefficiency: Statistical inefficiency of each state's samples ``[K]``.
        log_p: ``f_k - u_k(x)``, the normalised log-density of every state at every sample ``[K, N]``.
    """

    f_k: Tensor
    theta: Tensor
    overlap: Tensor
    log_q: Tensor
    n_k: Tensor
    inefficiency: Tensor
    log_p: Tensor

    @property
    def second_eigenvalue(self) -> float:
        """Second largest eigenvalue of the overlap matrix: 1 means states in two groups apart."""
        return _second_eigenvalue(self.overlap, self.n_k)

    def difference(self, i: int, j: int) -> tuple[float, float]:
        """Return ``f_j - f_i``, from i to j, and its standard error, in units of k_B T."""
        variance = float(self.theta[i, i] + self.theta[j, j] - 2.0 * self.theta[i, j])
        se = math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else math.inf
        return float(self.f_k[j] - self.f_k[i]), 0.0 if i == j else se

    def log_weights(self, u_n: Samples) -> Tensor:
        """Return the weights that turn the samples of all states into those of another state.

        Args:
            u_n: Reduced potential of that state at every sample ``[N]``, columns as in `mbar`.

        Returns:
            Normalised ``ln w_n = -u_n - log_q`` ``[N]``, differentiable in ``u_n``.

        Raises:
            StatisticsError: Not one finite potential for each sample.
        """
        log_ratio = self._log_ratio(u_n)
        return log_ratio - torch.logsumexp(log_ratio, dim=0)

    def perturb(self, u_n: Samples, start: int = 0) -> FreeEnergyEstimate:
        """Estimate the free energy of another state from the samples of all states.

        Args:
            u_n: Reduced potential of that state at every sample ``[N]``, columns as in `mbar`.
            start: State that the difference starts from.

        Returns:
            ``f - f_start``; its value has the weights as gradient in ``u_n``. The overlap is that of the
            new state with the mixture of all samples.

        Raises:
            StatisticsError: Not one finite potential for each sample.
        """
        log_ratio = self._log_ratio(u_n)
        f_new = -torch.logsumexp(log_ratio, dim=0)
        value = f_new - self.f_k[start]
        with torch.no_grad():
            log_w = log_ratio + f_new
            return FreeEnergyEstimate(
                value=value,
                se=self._perturbed_error(log_w, start),
                n_eff=self._perturbed_size(log_w),
                overlap=float(2.0 * torch.sigmoid(log_w + math.log(len(log_w))).mean()),
            )

    def _log_ratio(self, u_n: Samples) -> Tensor:
        potential = as_samples(u_n, "reduced potential of the new state")
        if len(potential) != len(self.log_q):
            problem = f"{len(potential)} potentials of the new state for {len(self.log_q)} samples"
            raise StatisticsError(problem, needed="one for each sample")
        return -potential - self.log_q

    def _log_state_weights(self) -> Tensor:
        """``ln W_nk`` of Shirts & Chodera: weights of every sample in every state [K, N]."""
        return self.log_p - self.log_q

    def _perturbed_error(self, log_w: Tensor, start: int) -> float:
        weights = torch.exp(torch.cat([self._log_state_weights(), log_w[None]]))
        n_k = torch.cat([self.n_k, self.n_k.new_zeros(1)])
        theta = _covariance(weights, n_k, torch.cat([self.inefficiency, self.inefficiency.new_ones(1)]))
        variance = float(theta[start, start] + theta[-1, -1] - 2.0 * theta[start, -1])
        return math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else math.inf

    def _perturbed_size(self, log_w: Tensor) -> float:
        """Kish's size, each sample with the inefficiency of the states that it may have come from."""
        origin = torch.exp(self._log_state_weights()) * self.n_k[:, None]
        return 1.0 / float(torch.sum(torch.exp(2.0 * log_w) * (self.inefficiency @ origin)))


def mbar(
    u_kn: Samples, n_k: Sequence[int] | Tensor, inefficiency: float | Sequence[float] = 1.0
) -> MbarResult:
    """Solve the multistate equations ``f_i = -ln sum_n exp(-u_i(x_n)) / sum_k n_k exp(f_k - u_k(x_n))``.

    The free energies count every sample once (Shirts & Chodera 2008, Eq. 11). Their covariance is that of the
    estimating equations, ``A^-1 B A^-T`` with ``M = W^T W``, ``A = 1 - M N`` and
    ``B = sum_k g_k n_k cov_k(W)``: the sum of every state's own covariance of the weights, times its
    inefficiency. With equal g it is g times Eq. D6 of the same paper.

    Args:
        u_kn: Reduced potential of every state at every sample ``[K, N]``; samples in any order.
        n_k: Samples drawn from each state ``[K]``, zeros allowed; they sum to N.
        inefficiency: Statistical inefficiency of the samples of each state, or one for all.

    Returns:
        Free energies relative to state 0 with covariance, overlap and weights.

    Raises:
        StatisticsError: Shapes or counts that do not fit, a potential that is not finite, an
            inefficiency below 1, or no convergence.
    """
    potentials = as_samples(u_kn, "reduced potentials", dims=2).detach()
    counts = _as_counts(n_k, potentials)
    g_k = _as_inefficiencies(inefficiency, potentials)
    shift = potentials.mean(dim=1) if len(potentials) > 1 else potentials.new_zeros(1)
    relative = potentials - shift[:, None]
    f = solve_free_energies(relative, counts)
    f_k = f - f[0] + shift - shift[0]
    log_p = f_k[:, None] - potentials
    log_q = log_mixture(log_p, counts)
    weights = torch.exp(log_p - log_q)
    return MbarResult(
        f_k=f_k,
        theta=_covariance(weights, counts, g_k),
        overlap=(weights @ weights.T) * counts,
        log_q=log_q,
        n_k=counts,
        inefficiency=g_k,
        log_p=log_p,
    )


def _as_counts(n_k: Sequence[int] | Tensor, potentials: Tensor) -> Tensor:
    n_states, n_samples = potentials.shape
    counts = torch.as_tensor(n_k, dtype=torch.float64, device=potentials.device)
    if counts.shape != (n_states,):
        raise StatisticsError(
            f"sample counts of shape {list(counts.shape)}", needed=f"one for each of {n_states} states"
        )
    if bool((counts != counts.round()).any()) or bool((counts < 0).any()):
        raise StatisticsError(f"sample counts {counts.tolist()}", needed="whole numbers, none negative")
    if int(counts.sum()) != n_samples:
        problem = f"sample counts sum to {int(counts.sum())}, but there are {n_samples} samples"
        raise StatisticsError(problem, needed="counts that sum to the number of samples")
    return counts


def _as_inefficiencies(inefficiency: float | Sequence[float], potentials: Tensor) -> Tensor:
    n_states = potentials.shape[0]
    values = [inefficiency] * n_states if isinstance(inefficiency, int | float) else list(inefficiency)
    if len(values) != n_states:
        raise StatisticsError(f"{len(values)} inefficiencies", needed=f"one for each of {n_states} states")
    checked = [as_inefficiency(g, f"inefficiency of state {k}") for k, g in enumerate(values)]
    return potentials.new_tensor(checked)


def _covariance(weights: Tensor, n_k: Tensor, g_k: Tensor) -> Tensor:
    """Covariance of the free energies relative to the first state [K, K], from weights [K, N].

    Averages over one state are taken over all samples with that state's weights. ``A`` has the constant
    vector as its null space; adding the projector ``1 n^T / N`` picks the solution with ``sum_k n_k f_k = 0``
    without a threshold on singular values.
    """
    second = weights @ weights.T
    sample_g = (g_k * n_k) @ weights
    drawn = (weights * sample_g) @ weights.T - (second * (n_k * g_k)) @ second
    a = torch.eye(len(n_k), dtype=weights.dtype, device=weights.device) - second * n_k + n_k / n_k.sum()
    if 1.0 - _second_eigenvalue(second * n_k, n_k) < _DISCONNECTED:
        return torch.full_like(drawn, torch.nan)
    theta: Tensor = torch.linalg.solve(a, torch.linalg.solve(a, drawn).T)
    relative: Tensor = theta - theta[:1] - theta[:, :1] + theta[0, 0]
    return 0.5 * (relative + relative.T)


def _second_eigenvalue(overlap: Tensor, n_k: Tensor) -> float:
    """Second eigenvalue of the overlap matrix of the sampled states, in its symmetric form."""
    sampled = n_k > 0
    if int(sampled.sum()) < 2:
        return 0.0
    root = torch.sqrt(n_k[sampled])
    symmetric = overlap[sampled][:, sampled] * root[:, None] / root
    return float(torch.linalg.eigvalsh(0.5 * (symmetric + symmetric.T))[-2])
