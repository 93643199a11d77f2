"""Refusals: an estimate that the samples do not carry stops the run, and says what would carry it."""

import math

from mlip_refine.errors import StatisticsError
from mlip_refine.statistics.free_energy import FreeEnergyEstimate

MINIMUM_OVERLAP = 0.03
MINIMUM_EFFECTIVE = 10.0


def require_effective(
    n_eff: float, minimum: float, what: str, have_length: float | None = None, unit: str = "samples"
) -> None:
    """Refuse an estimate that rests on too few independent samples.

    Args:
        n_eff: Independent samples, after weights and correlation.
        minimum: The least that is accepted.
        what: The estimate, as the message names it.
        have_length: Length of the data at hand; the message then says the length that would do.
        unit: Unit of that length (``"frames"``, ``"ps"``).

    Raises:
        StatisticsError: ``n_eff`` is below the minimum or not a number.
    """
    if n_eff >= minimum:
        return
    problem = f"{what} rests on {n_eff:.3g} independent samples, fewer than {minimum:.3g}"
    raise StatisticsError(problem, needed=_longer(n_eff, minimum, have_length, unit))


def _longer(n_eff: float, minimum: float, have_length: float | None, unit: str) -> str:
    if not n_eff > 0.0:
        return f"samples that carry {minimum:.3g} independent ones"
    factor = minimum / n_eff
    if have_length is None:
        return f"about {factor:.2g} times as many samples"
    length = have_length * factor
    text = f"{math.ceil(length):d}" if length >= 10.0 else f"{length:.3g}"
    return f"about {text} {unit} in place of {have_length:.6g} ({factor:.2g} times as many)"


def require_overlap(overlap: float, what: str, minimum: float = MINIMUM_OVERLAP) -> None:
    """Refuse a free-energy difference between states that hardly share configurations.

    More samples do not change the overlap of two states, but the variance falls as
    ``1 / (n * overlap)``, so the message gives both cures: states in between, and the factor of samples.
    Their number assumes ``-ln(overlap)`` to grow with the square of the distance, as for Gaussians.

    Args:
        overlap: As in `FreeEnergyEstimate`: 1 for equal states, 0 for disjoint ones.
        what: The estimate, as the message names it.
        minimum: The least that is accepted.

    Raises:
        StatisticsError: The overlap is below the minimum or not a number.
    """
    if overlap >= minimum:
        return
    problem = f"{what}: the states overlap by {overlap:.2g}, less than {minimum:.2g}"
    raise StatisticsError(problem, needed=_bridges(overlap, minimum))


def _bridges(overlap: float, minimum: float) -> str:
    if not overlap > 0.0 or minimum >= 1.0:
        return "fresh samples from a state nearer to the end state, or several states in between"
    between = max(1, math.ceil(math.sqrt(math.log(overlap) / math.log(minimum))) - 1)
    states = "state" if between == 1 else "states"
    return (
        f"at least {between} {states} in between, or fresh samples from a nearer state; with these two "
        f"alone, {minimum / overlap:.2g} times as many samples for the error that the least overlap gives"
    )


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
        estimate: What `exp_estimate`, `bar_estimate` or `MbarResult.perturb` returned.
        what: The estimate, as the message names it.
        min_effective: Least number of independent samples.
        min_overlap: Least overlap.
        have_length: Length of the data at hand, see `require_effective`.
        unit: Unit of that length.

    Raises:
        StatisticsError: Either is below its minimum.
    """
    require_overlap(estimate.overlap, what, min_overlap)
    require_effective(estimate.n_eff, min_effective, what, have_length, unit)
