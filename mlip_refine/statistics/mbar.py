"""Free energies and weights from samples of many states: the multistate acceptance ratio (MBAR).

Shirts & Chodera 2008. Reduced potentials ``u_k(x)`` are dimensionless; ``beta (U + P V)`` makes NPT states.

Why not pymbar: results here are differentiable in the potential of a new state, samples may count by their
independence, every state has its own inefficiency, and states without overlap give an infinite error instead
of a failure. The tests compare with pymbar.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlip_refine.errors import StatisticsError
from mlip_refine.statistics.exp_bar import FreeEnergyEstimate
from mlip_refine.statistics.mbar_solver import log_mixture, solve_free_energies
from mlip_refine.statistics.series import Samples, as_inefficiency, as_samples

_DISCONNECTED = 1e-12
"""Gap of the overlap matrix below which the sampled states fall into groups apart."""


@dataclass(frozen=True, eq=False)
class MbarResult:
    """Free energies of K states from N samples drawn from any of them.

    Attributes:
        f_k: Reduced free energies ``[K]``, zero for state 0.
        theta: Covariance of ``f_k`` ``[K, K]``, so that row and column 0 vanish; all of it NaN where the
            sampled states fall into groups without overlap (errors are then infinite).
        overlap: Overlap matrix ``[K, K]`` (Klimovich et al. 2015): element ij is the probability that a
            sample of state i would be taken for one of state j; rows sum to 1.
        log_q: Log-density of the mixture that all samples together were drawn from, per sample,
            ``ln sum_k n_k exp(f_k - u_k(x)) - ln(multiplicity)`` ``[N]``.
        n_k: Samples drawn from each state ``[K]``; independent ones, if so counted.
        inefficiency: Statistical inefficiency of each state's counted samples ``[K]``.
        log_p: ``f_k - u_k(x)``, the normalised log-density of every state at every sample ``[K, N]``.
        multiplicity: How many samples each one counts for ``[N]``: 1, or ``1/g`` of its state.
        drawn: Samples drawn from each state, each counted once ``[K]``.
    """

    f_k: Tensor
    theta: Tensor
    overlap: Tensor
    log_q: Tensor
    n_k: Tensor
    inefficiency: Tensor
    log_p: Tensor
    multiplicity: Tensor
    drawn: Tensor

    @property
    def second_eigenvalue(self) -> float:
        """Second largest eigenvalue of the overlap matrix: 1 means states in two groups apart."""
        return _second_eigenvalue(self.overlap, self.n_k)

    def difference(self, i: int, j: int) -> tuple[float, float]:
        """Return ``f_j - f_i``, from i to j, and its standard error, in units of k_B T."""
        return float(self.f_k[j] - self.f_k[i]), 0.0 if i == j else _error_of_difference(self.theta, i, j)

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
            # Kish's size, each sample with the inefficiency of the states that it may have come from.
            origin = torch.exp(self._log_state_weights()) * self.n_k[:, None]
            share = torch.exp(log_w) / self.multiplicity
            part = self.multiplicity / self.multiplicity.sum()
            return FreeEnergyEstimate(
                value=value,
                se=_error_of_difference(self._augmented(torch.exp(log_w)[None]), start, -1),
                n_eff=1.0 / float(torch.sum(share**2 * (self.inefficiency @ origin))),
                overlap=float(2.0 * torch.sigmoid(log_w - torch.log(part)) @ part),
            )

    def average(self, values: Samples, u_n: Samples) -> tuple[float, float]:
        """Estimate the mean of an observable in another state from the samples of all states.

        The error counts that the weights rest on estimated free energies: the observable, shifted and scaled
        to a mean of one, makes a density of its own, whose free energy relative to the state is linear in the
        mean (Shirts & Chodera 2008, Eqs. 13-16).

        Args:
            values: The observable at every sample ``[N]``.
            u_n: Reduced potential of the state at every sample ``[N]``, columns as in `mbar`.

        Returns:
            The mean and its standard error.

        Raises:
            StatisticsError: Not one finite value and potential for each sample.
        """
        observed = as_samples(values, "observable").detach()
        weights = torch.exp(self.log_weights(u_n).detach())
        if observed.shape != weights.shape:
            problem = f"{len(observed)} values for {len(weights)} samples"
            raise StatisticsError(problem, needed="one for each sample")
        mean = weights @ observed
        scale = torch.sqrt(weights @ (observed - mean) ** 2)
        if float(scale) == 0.0:
            return float(mean), 0.0
        theta = self._augmented(torch.stack([weights, weights * (1.0 + (observed - mean) / scale)]))
        return float(mean), float(scale) * _error_of_difference(theta, -2, -1)

    def influence(self, u_n: Samples, start: int = 0) -> Tensor:
        """Return what every sample contributes to the error of `perturb`, to first order.

        Estimates that share samples have correlated errors; their influences add, sample by sample (see
        `stratified_error`).

        Args:
            u_n: Reduced potential of the other state at every sample ``[N]``, state after state.
            start: State that the difference starts from.

        Returns:
            Influences on ``f - f_start`` ``[N]``, of mean zero over the samples of every state.

        Raises:
            StatisticsError: Not one finite potential for each sample.
        """
        further = torch.exp(self.log_weights(u_n).detach())[None]
        weights = torch.cat([torch.exp(self._log_state_weights()), further])
        n_k = torch.cat([self.n_k, self.n_k.new_zeros(1)])
        # The weights about their mean over the samples of each state, which come state after state.
        parts = torch.split(weights, [int(n) for n in self.drawn if n > 0], dim=-1)
        noise = torch.cat([part - part.mean(dim=-1, keepdim=True) for part in parts], dim=-1)
        solved: Tensor = torch.linalg.solve(_equations(weights, n_k, self.multiplicity), -noise)
        return solved[-1] - solved[start]

    def _log_ratio(self, u_n: Samples) -> Tensor:
        potential = as_samples(u_n, "reduced potential of the new state")
        if len(potential) != len(self.log_q):
            problem = f"{len(potential)} potentials of the new state for {len(self.log_q)} samples"
            raise StatisticsError(problem, needed="one for each sample")
        return -potential - self.log_q

    def _log_state_weights(self) -> Tensor:
        """Return ``ln W_nk`` of Shirts & Chodera: weights of every sample in every state ``[K, N]``."""
        return self.log_p - self.log_q

    def _augmented(self, weights: Tensor) -> Tensor:
        """Return the covariance of the free energies with M unsampled states, from weights ``[M, N]``."""
        further = len(weights)
        return _covariance(
            torch.cat([torch.exp(self._log_state_weights()), weights]),
            torch.cat([self.n_k, self.n_k.new_zeros(further)]),
            torch.cat([self.inefficiency, self.inefficiency.new_ones(further)]),
            self.multiplicity,
        )


def mbar(
    u_kn: Samples,
    n_k: Sequence[int] | Tensor,
    inefficiency: float | Sequence[float] = 1.0,
    *,
    by_independence: bool = False,
) -> MbarResult:
    """Solve the multistate equations ``f_i = -ln sum_n exp(-u_i(x_n)) / sum_k n_k exp(f_k - u_k(x_n))``.

    The free energies count every sample once (Shirts & Chodera 2008, Eq. 11), or, `by_independence`, as
    ``1/g`` of its state, so that correlated samples do not outvote independent ones; state k then has
    ``n_k / g_k`` samples, as after subsampling, but none is thrown away. Their covariance is that of the
    estimating equations, ``A^-1 B A^-T`` with ``M = W^T W``, ``A = 1 - M N`` and
    ``B = sum_k g_k n_k cov_k(W)``: the sum of every state's own covariance of the weights, times its
    inefficiency. With equal g it is g times Eq. D6 of the same paper.

    Args:
        u_kn: Reduced potential of every state at every sample ``[K, N]``; samples in any order, but state
            after state where they are counted by independence.
        n_k: Samples drawn from each state ``[K]``, zeros allowed; they sum to N.
        inefficiency: Statistical inefficiency of the samples of each state, or one for all.
        by_independence: Whether a sample counts as ``1/g`` of its state.

    Returns:
        Free energies relative to state 0 with covariance, overlap and weights.

    Raises:
        StatisticsError: Shapes or counts that do not fit, a potential that is not finite, an
            inefficiency below 1, or no convergence.
    """
    potentials = as_samples(u_kn, "reduced potentials", dims=2).detach()
    counts = drawn = _as_counts(n_k, potentials)
    n_states = len(potentials)
    values = [inefficiency] * n_states if isinstance(inefficiency, int | float) else list(inefficiency)
    if len(values) != n_states:
        raise StatisticsError(f"{len(values)} inefficiencies", needed=f"one for each of {n_states} states")
    g_k = potentials.new_tensor(
        [as_inefficiency(g, f"inefficiency of state {k}") for k, g in enumerate(values)]
    )
    multiplicity = potentials.new_ones(potentials.shape[1])
    if by_independence:
        multiplicity = torch.repeat_interleave(1.0 / g_k, counts.long())
        counts, g_k = counts / g_k, torch.ones_like(g_k)
    shift = potentials.mean(dim=1) if len(potentials) > 1 else potentials.new_zeros(1)
    relative = potentials - shift[:, None]
    f = solve_free_energies(relative, counts, multiplicity)
    f_k = f - f[0] + shift - shift[0]
    log_p = f_k[:, None] - potentials
    log_q = log_mixture(log_p, counts) - torch.log(multiplicity)
    weights = torch.exp(log_p - log_q)
    return MbarResult(
        f_k=f_k,
        theta=_covariance(weights, counts, g_k, multiplicity),
        overlap=((weights / multiplicity) @ weights.T) * counts,
        log_q=log_q,
        n_k=counts,
        inefficiency=g_k,
        log_p=log_p,
        multiplicity=multiplicity,
        drawn=drawn,
    )


def stratified_error(influence: Tensor, sizes: Sequence[int], inefficiencies: Sequence[float]) -> float:
    """Return the standard error of an estimate from what every sample contributes to it.

    ``se^2 = sum_k g_k n_k / (n_k - g_k) sum_(i in k) psi_i^2``, psi about its mean over the samples of
    state k; the factor undoes the bias of measuring the spread about the samples' own mean.

    Args:
        influence: First-order change of the estimate with every sample ``[N]``, state after state.
        sizes: Samples of each state; they sum to N.
        inefficiencies: Statistical inefficiency of each state's samples, at least 1.

    Returns:
        The standard error; infinite where a state has a single independent sample or less.
    """
    variance = 0.0
    for part, n, g in zip(torch.split(influence, list(sizes)), sizes, inefficiencies, strict=True):
        spread = float(((part - part.mean()) ** 2).sum())
        variance += (g * n / (n - g) * spread if n > g else math.inf) if spread > 0.0 else 0.0
    return _meaningful(math.sqrt(variance))


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


def _meaningful(error: float) -> float:
    """Round an error to ten digits: the last ones of a linear solver change from run to run."""
    return float(f"{error:.10g}")


def _error_of_difference(theta: Tensor, i: int, j: int) -> float:
    """Return the standard error of ``f_j - f_i`` from the covariance of free energies ``[K, K]``."""
    variance = float(theta[i, i] + theta[j, j] - 2.0 * theta[i, j])
    return _meaningful(math.sqrt(max(variance, 0.0))) if math.isfinite(variance) else math.inf


def _equations(weights: Tensor, n_k: Tensor, multiplicity: Tensor) -> Tensor:
    """Return the derivative ``A = 1 - M N`` of the estimating equations in the free energies ``[K, K]``.

    ``A`` has the constant vector as its null space; adding the projector ``1 n^T / N`` picks the solution
    with ``sum_k n_k f_k = 0`` without a threshold on singular values.

    Args:
        weights: Weights of every sample in every state ``[K, N]``.
        n_k: Counted samples of each state ``[K]``.
        multiplicity: How many samples each one counts for ``[N]``.
    """
    second = (weights / multiplicity) @ weights.T
    return torch.eye(len(n_k), dtype=weights.dtype, device=weights.device) - second * n_k + n_k / n_k.sum()


def _covariance(weights: Tensor, n_k: Tensor, g_k: Tensor, multiplicity: Tensor) -> Tensor:
    """Return the covariance ``[K, K]`` of the free energies relative to the first state.

    Averages over one state are taken over all samples with that state's weights.
    """
    per_count = weights / multiplicity
    second = per_count @ weights.T
    sample_g = (g_k * n_k) @ per_count
    drawn = (per_count * sample_g) @ weights.T - (second * (n_k * g_k)) @ second
    if 1.0 - _second_eigenvalue(second * n_k, n_k) < _DISCONNECTED:
        return torch.full_like(drawn, torch.nan)
    a = _equations(weights, n_k, multiplicity)
    theta: Tensor = torch.linalg.solve(a, torch.linalg.solve(a, drawn).T)
    relative: Tensor = theta - theta[:1] - theta[:, :1] + theta[0, 0]
    return 0.5 * (relative + relative.T)


def _second_eigenvalue(overlap: Tensor, n_k: Tensor) -> float:
    """Return the second eigenvalue of the overlap matrix of the sampled states, in its symmetric form."""
    sampled = n_k > 0
    if int(sampled.sum()) < 2:
        return 0.0
    root = torch.sqrt(n_k[sampled])
    symmetric = overlap[sampled][:, sampled] * root[:, None] / root
    return float(torch.linalg.eigvalsh(0.5 * (symmetric + symmetric.T))[-2])
