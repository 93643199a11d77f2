"""Boundaries of two phases between the pressures at which they are known, and the points where they meet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.interpolate import CubicHermiteSpline

from mlip_refine.quantities import Measured

SLACK = 1e-9
"""How far beyond its last pressure a boundary is still known, GPa: rounding."""

_ITERATIONS = 50
_CONVERGED = 1e-10
_SMALLEST_ERROR = 1e-6
"""Standard error of a temperature that is taken for zero, K: it keeps the weights finite."""


@dataclass(frozen=True)
class CurvePoint:
    """A boundary at one pressure.

    Attributes:
        temperature: Temperature, K, with all its errors.
        common: Part of its standard error that all pressures share, K.
        slope: dT/dP, K/GPa.
    """

    temperature: Measured
    common: float
    slope: Measured

    @property
    def own(self) -> float:
        """Part of the standard error of the temperature that is not common to all pressures, K."""
        return math.sqrt(max(self.temperature.se**2 - self.common**2, 0.0))


class BoundaryCurve:
    """T(P) of two phases: cubic between neighbouring pressures, with the values and slopes of both ends.

    With t = (P - P_i)/h, h = P_{i+1} - P_i:

        T(P) = h00 T_i + h01 T_{i+1} + h (h10 T'_i + h11 T'_{i+1})
        h00 = 2t³ - 3t² + 1, h01 = 1 - h00, h10 = t³ - 2t² + t, h11 = t³ - t²

    The interpolation is off by at most h⁴/384 times the largest fourth derivative (Kahaner, Moler and Nash
    1989). Outside the pressures nothing is known.

    Attributes:
        pressures: Pressures, GPa, ascending `[n]`.
        points: The boundary there `[n]`.
    """

    def __init__(self, pressures: Sequence[float], points: Sequence[CurvePoint]) -> None:
        """Order the points by pressure.

        Args:
            pressures: Pressures, GPa, all different; at least one.
            points: The boundary there.

        Raises:
            ValueError: For no points, or two at one pressure.
        """
        order = sorted(range(len(pressures)), key=lambda i: pressures[i])
        self.pressures = tuple(pressures[i] for i in order)
        self.points = tuple(points[i] for i in order)
        if not self.points or len(set(self.pressures)) < len(self.pressures):
            raise ValueError("a boundary needs points at different pressures")

    def covers(self, pressure: float) -> bool:
        """Return whether a pressure, GPa, lies between the first and the last one."""
        return self.pressures[0] - SLACK <= pressure <= self.pressures[-1] + SLACK

    def temperature(self, pressure: float) -> float:
        """Return the temperature at a pressure, GPa, within the range of the boundary, K."""
        if self._spline is None:
            return self.points[0].temperature.value
        return float(self._spline(pressure))

    def slope(self, pressure: float) -> float:
        """Return dT/dP at a pressure, GPa, within the range of the boundary, K/GPa."""
        if self._spline is None:
            return self.points[0].slope.value
        return float(self._spline(pressure, nu=1))

    def at(self, pressure: float) -> CurvePoint | None:
        """Return the boundary at a pressure, GPa; None outside its range.

        Errors of neighbouring temperatures are taken as common to both and interpolated linearly, so that
        none becomes smaller between them; those of the slopes count as independent of the rest.
        """
        if not self.covers(pressure):
            return None
        if len(self.points) == 1:
            return self.points[0]
        i = int(np.clip(np.searchsorted(self.pressures, pressure, side="right") - 1, 0, len(self.points) - 2))
        width = self.pressures[i + 1] - self.pressures[i]
        t = min(max((pressure - self.pressures[i]) / width, 0.0), 1.0)
        one, two = self.points[i], self.points[i + 1]
        from_slopes = math.hypot(
            width * t * (1 - t) ** 2 * one.slope.se, width * t**2 * (1 - t) * two.slope.se
        )
        own = math.hypot((1 - t) * one.own + t * two.own, from_slopes)
        common = (1 - t) * one.common + t * two.common
        slope_se = (1 - t) * one.slope.se + t * two.slope.se
        return CurvePoint(
            temperature=Measured(self.temperature(pressure), math.hypot(own, common), "K"),
            common=common,
            slope=Measured(self.slope(pressure), slope_se, "K/GPa"),
        )

    @cached_property
    def _spline(self) -> CubicHermiteSpline | None:
        """The interpolation; None of a single point."""
        if len(self.points) == 1:
            return None
        return CubicHermiteSpline(
            self.pressures,
            [point.temperature.value for point in self.points],
            [point.slope.value for point in self.points],
        )


@dataclass(frozen=True)
class TriplePoint:
    """Where three phases coexist.

    Attributes:
        pressure: Pressure, GPa.
        temperature: Temperature, K.
        covariance: Covariance of both, K·GPa.
        mismatch: How far the third of three boundaries passes by the crossing of the other two, in standard
            errors; None of two boundaries, which cross anyway.
    """

    pressure: Measured
    temperature: Measured
    covariance: float
    mismatch: float | None


def crossings(one: BoundaryCurve, two: BoundaryCurve) -> list[float]:
    """Return the pressures, GPa, at which two boundaries have the same temperature, ascending."""
    low, high = (pick(curve.pressures[end] for curve in (one, two)) for pick, end in ((max, 0), (min, -1)))
    if high - low <= 0:
        same = high == low and one.temperature(low) == two.temperature(low)
        return [low] if same else []
    # Between the pressures of both, each is a cubic; so is their difference.
    knots = sorted({p for p in (*one.pressures, *two.pressures, low, high) if low <= p <= high})
    gaps = [one.temperature(p) - two.temperature(p) for p in knots]
    rises = [one.slope(p) - two.slope(p) for p in knots]
    roots = CubicHermiteSpline(knots, gaps, rises).roots(extrapolate=False)
    return sorted({round(float(root), 12) for root in roots if math.isfinite(root)})


def triple_points(curves: Sequence[BoundaryCurve]) -> list[TriplePoint]:
    """Return where two or three boundaries between the same three phases meet.

    Two boundaries meet where they cross. Three are fitted: (P, T) minimises Σ (T - T_i(P))²/σ_i², which one
    degree of freedom is left to judge by. In both cases the covariance is (JᵀWJ)⁻¹ with the rows
    (-dT_i/dP, 1) of J and W = diag(1/σ_i²): errors of different boundaries count as independent, the error
    of each with its common part.

    Args:
        curves: Two or three boundaries.
    """
    found: list[TriplePoint] = []
    starts = [p for i, one in enumerate(curves) for two in curves[i + 1 :] for p in crossings(one, two)]
    for start in starts:
        point = _met(curves, start)
        if point is not None and not any(_same(point, other) for other in found):
            found.append(point)
    judged = [point for point in found if point.mismatch is not None]
    return sorted(judged or found, key=lambda point: point.pressure.value)


def _met(curves: Sequence[BoundaryCurve], start: float) -> TriplePoint | None:
    """Return the meeting point next to a pressure, of those boundaries that are known there."""
    here = [curve for curve in curves if curve.covers(start)]
    pressure, temperature = start, float(np.mean([curve.temperature(start) for curve in here]))
    for _ in range(_ITERATIONS):
        states = [state for state in (curve.at(pressure) for curve in here) if state is not None]
        if len(states) < len(here):
            return None
        errors = np.array([max(state.temperature.se, _SMALLEST_ERROR) for state in states])
        jacobian = np.array([[-state.slope.value, 1.0] for state in states]) / errors[:, None]
        residuals = (temperature - np.array([state.temperature.value for state in states])) / errors
        information = jacobian.T @ jacobian
        # Boundaries that touch without crossing fix no pressure.
        if np.linalg.cond(information) > 1 / np.finfo(float).eps:
            return None
        step = np.linalg.solve(information, -jacobian.T @ residuals)
        pressure, temperature = pressure + float(step[0]), temperature + float(step[1])
        if abs(step[0]) < _CONVERGED and abs(step[1]) < _CONVERGED * max(temperature, 1.0):
            break
    else:
        return None
    if not all(curve.covers(pressure) for curve in here):
        return None
    covariance = np.linalg.inv(information)
    mismatch = float(np.linalg.norm(residuals)) if len(here) > 2 else None
    return TriplePoint(
        pressure=Measured(pressure, math.sqrt(covariance[0, 0]), "GPa"),
        temperature=Measured(temperature, math.sqrt(covariance[1, 1]), "K"),
        covariance=float(covariance[0, 1]),
        mismatch=mismatch,
    )


def _same(one: TriplePoint, two: TriplePoint) -> bool:
    """Return whether two fits ended at one point."""
    return (
        abs(one.pressure.value - two.pressure.value) < 1e-6
        and abs(one.temperature.value - two.temperature.value) < 1e-3
    )
