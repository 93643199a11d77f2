"""Where two phases coexist: the root of ΔG over temperature, the slope of the boundary, and their errors."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from scipy.optimize import brentq
from torch import Tensor

from mlip_refine.quantities import GPA, MEV, Measured
from mlip_refine.statistics.gibbs_ladder import jackknife_error
from mlip_refine.statistics.transitions import MIN_ENTROPY_SIGNAL

TOLERANCE = 1e-3
"""How closely the root is found, K."""


@dataclass(frozen=True, eq=False)
class PhaseState:
    """One phase at one temperature and pressure, per atom; rows as those of `LadderState`.

    Attributes:
        gibbs: Gibbs energy `[1 + blocks]`, meV/atom.
        enthalpy: Enthalpy, with the kinetic energy or without it in both phases `[1 + blocks]`, meV/atom.
        volume: Volume `[1 + blocks]`, Å³/atom.
        anchor_se: Standard error of the Gibbs energy that comes from the anchors, meV/atom.
        n_eff: Independent frames that carry the estimate.
    """

    gibbs: Tensor
    enthalpy: Tensor
    volume: Tensor
    anchor_se: float
    n_eff: float


class PhaseSurface(Protocol):
    """State of a phase over temperature at one pressure."""

    def __call__(self, temperature: float, *, errors: bool = True) -> PhaseState:
        """Return the state at a temperature, K; without `errors` its rows may be the estimates alone."""


@dataclass(frozen=True)
class Difference:
    """Two phases at one temperature and pressure: second less first.

    Attributes:
        temperature: Temperature, K.
        delta_g: ΔG, meV/atom, with all its errors.
        delta_g_common: Part of its standard error that the anchors have in common for all states, meV/atom.
        delta_h: ΔH, meV/atom.
        delta_v: ΔV, Å³/atom.
        delta_s: ΔS = (ΔH - ΔG)/T, meV/atom/K.
        n_eff: Independent frames of the phase that has fewer.
    """

    temperature: float
    delta_g: Measured
    delta_g_common: float
    delta_h: Measured
    delta_v: Measured
    delta_s: Measured
    n_eff: float


@dataclass(frozen=True)
class BoundaryPoint:
    """Where two phases coexist at one pressure.

    Attributes:
        temperature: Temperature, K, with all its errors.
        common: Part of its standard error that all pressures have in common: that of the anchors, K.
        slope: dT/dP, K/GPa, by Clausius and Clapeyron.
        difference: The two phases at that temperature.
    """

    temperature: Measured
    common: float
    slope: Measured
    difference: Difference


def difference(one: PhaseState, two: PhaseState, temperature: float) -> Difference:
    """Return what the second phase has beyond the first, with errors.

    Args:
        one: The first phase.
        two: The second phase, sampled independently.
        temperature: Temperature of both, K.
    """
    ladder, common = _joint(_gibbs, one, two), math.hypot(one.anchor_se, two.anchor_se)
    gap = _joint(lambda a, b: (_enthalpy(a, b) - _gibbs(a, b)) / temperature, one, two)
    return Difference(
        temperature=temperature,
        delta_g=Measured(ladder.value, math.hypot(ladder.se, common), "meV/atom"),
        delta_g_common=common,
        delta_h=_joint(_enthalpy, one, two).scaled(1.0, "meV/atom"),
        delta_v=_joint(_volume, one, two).scaled(1.0, "Å³/atom"),
        delta_s=Measured(gap.value, math.hypot(gap.se, common / temperature), "meV/atom/K"),
        n_eff=min(one.n_eff, two.n_eff),
    )


def boundary_point(
    one: PhaseSurface, two: PhaseSurface, low: float, high: float
) -> tuple[BoundaryPoint | None, str]:
    """Find where ΔG vanishes between two temperatures.

    δT = δΔG/|ΔS|, with ΔS = ΔH/T at the boundary; the slope is ΔV/ΔS.

    Args:
        one: The first phase over temperature.
        two: The second phase, sampled independently.
        low: Lowest temperature that both are known at, K.
        high: Highest temperature, K.

    Returns:
        The point and an empty note, or None and the reason: ΔG keeps its sign, or ΔS is not known to
        `MIN_ENTROPY_SIGNAL` standard errors.
    """

    def delta_g(temperature: float) -> float:
        first, second = (surface(temperature, errors=False) for surface in (one, two))
        return float(second.gibbs[0] - first.gibbs[0])

    ends = delta_g(low), delta_g(high)
    # Not "> 0", so that what is not a number is refused.
    if not ends[0] * ends[1] <= 0:
        return None, (
            f"ΔG keeps its sign from {low:g} K ({ends[0]:+.2f} meV/atom) to {high:g} K ({ends[1]:+.2f} "
            "meV/atom): sample other temperatures"
        )
    temperature = float(brentq(delta_g, low, high, xtol=TOLERANCE))
    at_one, at_two = one(temperature), two(temperature)
    found = difference(at_one, at_two, temperature)
    entropy = found.delta_s
    if not abs(entropy.value) > MIN_ENTROPY_SIGNAL * entropy.se:
        return None, f"ΔS = {entropy} is not known to {MIN_ENTROPY_SIGNAL:g} σ: sample longer"
    slope = _joint(lambda a, b: _volume(a, b) * temperature / _enthalpy(a, b) * GPA / MEV, at_one, at_two)
    point = BoundaryPoint(
        temperature=Measured(temperature, found.delta_g.se / abs(entropy.value), "K"),
        common=found.delta_g_common / abs(entropy.value),
        slope=slope.scaled(1.0, "K/GPa"),
        difference=found,
    )
    return point, ""


def _joint(
    quantity: Callable[[PhaseState, PhaseState], Tensor], one: PhaseState, two: PhaseState
) -> Measured:
    """Return a quantity of both phases with the error of their ladders, each sampled by itself."""
    first, second = _alone(one), _alone(two)
    rows = quantity(one, second), quantity(first, two)
    return Measured(float(rows[0][0]), math.hypot(*map(jackknife_error, rows)), "")


def _alone(state: PhaseState) -> PhaseState:
    """Return the state with its estimate in place of every row."""
    gibbs, enthalpy, volume = (x[0].expand_as(x) for x in (state.gibbs, state.enthalpy, state.volume))
    return PhaseState(gibbs, enthalpy, volume, anchor_se=0.0, n_eff=state.n_eff)


def _gibbs(one: PhaseState, two: PhaseState) -> Tensor:
    return two.gibbs - one.gibbs


def _enthalpy(one: PhaseState, two: PhaseState) -> Tensor:
    return two.enthalpy - one.enthalpy


def _volume(one: PhaseState, two: PhaseState) -> Tensor:
    return two.volume - one.volume
