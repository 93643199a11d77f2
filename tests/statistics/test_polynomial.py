"""Polynomial fits: exact for polynomials, with errors that cover the truth."""

import numpy as np
import pytest
import torch

from mlip_refine.errors import StatisticsError
from mlip_refine.statistics import polynomial_fit

X = np.array([23.0, 323.0, 623.0, 923.0, 973.0])


def test_a_parabola_is_found_exactly():
    y = 176 - 0.03 * X - 2e-5 * X**2
    fit = polynomial_fit(X, y, np.ones(5), (0, 1, 2))
    assert fit.values.numpy() == pytest.approx(y, rel=1e-9)
    assert fit.chi_squared == pytest.approx(0.0, abs=1e-12)
    assert fit.freedom == 2


def test_what_vanishes_at_zero_does():
    fit = polynomial_fit(X, 0.01 * X + 1.0, np.ones(5), (1, 2))
    line = np.polyfit(X, fit.values.numpy(), 2)
    assert line[2] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.statistical
def test_errors_are_those_of_many_experiments():
    """Standard deviation of the fitted values over 10000 draws to 4 % (5 sigma), and χ² about its freedom."""
    generator, sigma = np.random.default_rng(1), np.array([0.5, 1.0, 1.0, 2.0, 1.0])
    truth = 100 - 0.05 * X
    fits = [
        polynomial_fit(X, truth + sigma * generator.standard_normal(5), sigma, (0, 1, 2))
        for _ in range(10_000)
    ]
    spread = torch.stack([f.values for f in fits]).std(0)
    assert fits[0].errors.numpy() == pytest.approx(spread.numpy(), rel=0.04)
    assert np.mean([f.chi_squared for f in fits]) == pytest.approx(2.0, abs=0.1)


def test_too_few_points_and_missing_errors_are_refused():
    with pytest.raises(StatisticsError, match="2 points for 3"):
        polynomial_fit([1.0, 2.0], [1.0, 2.0], [1.0, 1.0], (0, 1, 2))
    with pytest.raises(StatisticsError, match="without an error"):
        polynomial_fit([1.0, 2.0], [1.0, 2.0], [1.0, 0.0], (0, 1))
