"""Transition temperatures of linear free-energy differences, their errors and refusals."""

import math

import numpy as np
import pytest

from mlip_refine.quantities import Measured
from mlip_refine.statistics import entropy_difference, transition_temperature


def _seen_from(temperature: float, delta_g: Measured, delta_h: Measured) -> tuple[Measured | None, str]:
    return transition_temperature(temperature, delta_g, entropy_difference(temperature, delta_g, delta_h))


def test_transition_temperature_of_a_linear_difference():
    """ΔG = 40 - 0.035 T meV/atom vanishes at 1142.857 K, seen from any temperature."""
    for temperature in (1000.0, 1142.857, 1300.0):
        delta_g = Measured(40 - 0.035 * temperature, 0.1, "meV/atom")
        found, note = _seen_from(temperature, delta_g, Measured(40.0, 0.5, "meV/atom"))
        assert found is not None
        assert found.value == pytest.approx(40 / 0.035, abs=1e-6)
        assert (found.unit, note) == ("K", "")


@pytest.mark.parametrize(("delta_g", "delta_h"), [(-6.0, 38.0), (0.0, 30.0), (4.0, -35.0)])
def test_its_error_is_that_of_a_million_draws(delta_g, delta_h):
    """Linear propagation of 0.3 and 1.2 meV/atom against Monte Carlo, to 3 %."""
    found, _ = _seen_from(1005.0, Measured(delta_g, 0.3, "meV/atom"), Measured(delta_h, 1.2, "meV/atom"))
    rng = np.random.default_rng(0)
    g, h = rng.normal(delta_g, 0.3, 10**6), rng.normal(delta_h, 1.2, 10**6)
    drawn = 1005.0 + g * 1005.0 / (h - g)
    assert found is not None
    assert found.value == pytest.approx(float(drawn.mean()), abs=1.0)
    assert found.se == pytest.approx(float(drawn.std()), rel=0.03)


@pytest.mark.parametrize(
    ("delta_g", "delta_h", "note"),
    [
        (Measured(1.0, 0.5, "meV/atom"), Measured(2.0, 1.0, "meV/atom"), "is not known to 3 σ"),
        (Measured(1.0, 0.0, "meV/atom"), Measured(1.0, 0.0, "meV/atom"), "is not known to 3 σ"),
        (Measured(-20.0, 0.1, "meV/atom"), Measured(40.0, 0.1, "meV/atom"), "-335 K away"),
        (Measured(0.5, 0.1, "meV/atom"), Measured(30.0, math.inf, "meV/atom"), "is not known to 3 σ"),
    ],
)
def test_transition_temperature_is_refused(delta_g, delta_h, note):
    found, why = _seen_from(1005.0, delta_g, delta_h)
    assert found is None
    assert why.startswith("no transition temperature: ")
    assert note in why
