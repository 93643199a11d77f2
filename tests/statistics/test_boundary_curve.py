"""Boundaries between their pressures, and the points where they meet, against closed forms and resampling."""

import math

import numpy as np
import pytest

from mlip_refine.quantities import Measured
from mlip_refine.statistics.boundary_curve import BoundaryCurve, CurvePoint, crossings, triple_points


def curve(of, pressures, se=1.0, common=0.6, slope_se=0.0) -> BoundaryCurve:
    """The boundary of a polynomial, numbers from the highest power down."""
    rise = np.polyder(of)
    return BoundaryCurve(
        pressures,
        [
            CurvePoint(
                Measured(float(np.polyval(of, p)), se, "K"),
                common,
                Measured(float(np.polyval(rise, p)), slope_se, "K/GPa"),
            )
            for p in pressures
        ],
    )


CUBIC = [1.5, -4.0, -20.0, 1150.0]


def test_a_cubic_is_exact_and_its_pressures_are_ordered():
    found = curve(CUBIC, [5.0, 0.0, 2.0])
    assert found.pressures == (0.0, 2.0, 5.0)
    for p in np.linspace(0.0, 5.0, 23):
        point = found.at(float(p))
        assert point is not None
        assert point.temperature.value == pytest.approx(np.polyval(CUBIC, p), abs=1e-9)
        assert point.slope.value == pytest.approx(np.polyval(np.polyder(CUBIC), p), abs=1e-9)


def test_a_quartic_is_off_by_no_more_than_the_bound():
    of = [0.3, 0.0, 0.0, -10.0, 1000.0]
    found, bound = curve(of, [0.0, 2.0]), 2.0**4 / 384 * 0.3 * 24
    off = [abs(found.temperature(p) - np.polyval(of, p)) for p in np.linspace(0.0, 2.0, 41)]
    assert max(off) == pytest.approx(bound, rel=1e-6)


def test_nothing_is_known_outside():
    found = curve(CUBIC, [1.0, 2.0])
    assert found.at(0.99) is None
    assert found.at(2.01) is None
    assert found.at(2.0) is not None
    single = curve(CUBIC, [1.0])
    assert single.at(1.0) == single.points[0]
    assert single.at(1.1) is None


def test_errors_between_two_pressures():
    points = [
        CurvePoint(Measured(1000.0, 5.0, "K"), 3.0, Measured(10.0, 2.0, "K/GPa")),
        CurvePoint(Measured(1040.0, 13.0, "K"), 5.0, Measured(10.0, 4.0, "K/GPa")),
    ]
    found = BoundaryCurve([0.0, 4.0], points)
    for p, point in zip((0.0, 4.0), points, strict=True):
        here = found.at(p)
        assert here is not None
        assert here.temperature.se == pytest.approx(point.temperature.se)
        assert (here.common, here.slope.se) == (point.common, point.slope.se)
    middle = found.at(2.0)
    assert middle is not None
    # h10 = -h11 = 1/8 of the width; own errors 4 and 12, common ones 3 and 5.
    own = math.hypot(8.0, 4 * 2 / 8, 4 * 4 / 8)
    assert middle.common == pytest.approx(4.0)
    assert middle.temperature.se == pytest.approx(math.hypot(own, 4.0))


@pytest.mark.parametrize("pressures", [[], [1.0, 1.0]])
def test_no_boundary(pressures):
    with pytest.raises(ValueError, match="different pressures"):
        curve(CUBIC, pressures)


def test_crossings_of_cubics_are_their_roots():
    one = curve(CUBIC, [0.0, 1.0, 5.0])
    gap = np.poly([1.2, 3.4, 9.0])
    two = curve(np.polyadd(CUBIC, gap), [0.5, 2.5, 4.5, 6.0])
    assert crossings(one, two) == pytest.approx([1.2, 3.4])
    assert crossings(two, one) == pytest.approx([1.2, 3.4])
    assert crossings(one, curve(np.polyadd(CUBIC, [1.0]), [0.0, 5.0])) == []
    assert crossings(one, curve(CUBIC, [6.0, 7.0])) == []


def test_a_crossing_at_the_last_pressure_counts():
    one, two = curve([10.0, 1000.0], [0.0, 2.0]), curve([-10.0, 1040.0], [0.0, 2.0])
    assert crossings(one, two) == pytest.approx([2.0])
    (point,) = triple_points([one, two])
    assert point.pressure.value == pytest.approx(2.0)


def test_triple_point_and_its_covariance_against_resampling():
    ends = [0.0, 4.0]
    one, two = curve([-30.0, 1150.0], ends, se=4.0), curve([45.0, 1000.0], ends, se=7.0)
    (point,) = triple_points([one, two])
    assert point.pressure.value == pytest.approx(2.0)
    assert point.temperature.value == pytest.approx(1090.0)
    assert point.mismatch is None
    # δP = (δ2 - δ1)/(s1 - s2), δT = (s1 δ2 - s2 δ1)/(s1 - s2)
    assert point.pressure.se == pytest.approx(math.hypot(4.0, 7.0) / 75)
    assert point.temperature.se == pytest.approx(math.hypot(30 * 7, 45 * 4) / 75)
    assert point.covariance == pytest.approx((45 * 16 - 30 * 49) / 75**2)

    rng = np.random.default_rng(5)
    shifts = rng.normal(size=(400, 2)) * [4.0, 7.0]
    moved = [
        triple_points([curve([-30.0, 1150.0 + a], ends), curve([45.0, 1000.0 + b], ends)])[0]
        for a, b in shifts
    ]
    sampled = np.cov([p.pressure.value for p in moved], [p.temperature.value for p in moved])
    expected = [[point.pressure.se**2, point.covariance], [point.covariance, point.temperature.se**2]]
    # Relative errors of covariances of 400 draws are about √(2/400) = 7 %.
    scale = np.sqrt(np.outer(np.diag(sampled), np.diag(sampled)))
    assert np.abs((sampled - expected) / scale).max() < 5 * 0.071


def test_three_boundaries_are_fitted_and_judged():
    ends = [0.0, 4.0]
    one, two = curve([-30.0, 1150.0], ends, se=4.0), curve([45.0, 1000.0], ends, se=7.0)
    third = curve([10.0, 1070.0], ends, se=5.0)
    (met,) = triple_points([one, two, third])
    assert met.pressure.value == pytest.approx(2.0)
    assert met.mismatch == pytest.approx(0.0, abs=1e-6)
    (pair,) = triple_points([one, two])
    assert met.temperature.se < pair.temperature.se
    off = curve([10.0, 1070.0 + 40.0], ends, se=5.0)
    (point,) = triple_points([one, two, off])
    # χ² of one degree of freedom: the gap of the third at the crossing of the others over its error.
    gap_se = math.hypot(5.0, (-30 - 10) * 7 / 75, (45 - 10) * 4 / 75)
    assert point.mismatch == pytest.approx(40.0 / gap_se)


def test_boundaries_that_touch_or_coincide_have_no_triple_point():
    ends = [0.0, 2.0, 4.0]
    flat = curve([1000.0], ends)
    assert triple_points([flat, flat]) == []
    assert triple_points([flat, curve([5.0, -20.0, 1020.0], ends)]) == []
