import math

import pytest
import torch

from mlip_refine.errors import StatisticsError
from mlip_refine.statistics import bar_estimate, require_effective, require_estimate, require_overlap


def test_enough_passes():
    require_effective(10.0, 10.0, "hcp at 1154.7 K")
    require_overlap(0.5, "hcp at 1154.7 K")
    require_estimate(bar_estimate(torch.zeros(10), torch.zeros(10)), "hcp at 1154.7 K")


def test_too_few_samples_say_the_length_that_would_do():
    with pytest.raises(StatisticsError) as caught:
        require_effective(4.0, 10.0, "hcp at 1154.7 K", have_length=2.0, unit="ps")
    message = str(caught.value)
    assert "hcp at 1154.7 K rests on 4 independent samples, fewer than 10" in message
    assert "about 5 ps in place of 2 (2.5 times as many)" in message
    with pytest.raises(StatisticsError, match="about 200 frames in place of 80"):
        require_effective(4.0, 10.0, "hcp", have_length=80, unit="frames")
    with pytest.raises(StatisticsError, match=r"about 2\.5 times as many samples"):
        require_effective(4.0, 10.0, "hcp")


@pytest.mark.parametrize("n_eff", [0.0, math.nan])
def test_no_effective_samples_at_all(n_eff):
    with pytest.raises(StatisticsError, match="samples that carry 10 independent ones"):
        require_effective(n_eff, 10.0, "hcp", have_length=5)


def test_too_little_overlap_says_how_to_bridge_it():
    with pytest.raises(
        StatisticsError,
        match=r"hcp: the states overlap by 0.001, less than 0.03; needed: at least 1 state in between",
    ):
        require_overlap(0.001, "hcp")
    with pytest.raises(StatisticsError, match="30 times as many samples"):
        require_overlap(0.001, "hcp")
    with pytest.raises(StatisticsError, match="at least 4 states in between"):
        require_overlap(0.03**16.1, "hcp")
    with pytest.raises(StatisticsError, match="nearer to the end state"):
        require_overlap(0.0, "hcp")
    with pytest.raises(StatisticsError):
        require_overlap(math.nan, "hcp")


def test_estimates_of_far_states_are_refused(pair, normal):
    forward, reverse = 40.0 + 9.0 * normal(100), -40.0 + 9.0 * normal(100)
    with pytest.raises(StatisticsError, match="bcc at 5 GPa: the states overlap"):
        require_estimate(bar_estimate(forward, reverse), "bcc at 5 GPa")


def test_estimates_of_slow_samples_are_refused(pair, normal):
    works = [pair.work(pair.place(k, normal(100))) for k in (0, 1)]
    require_estimate(bar_estimate(*works), "bcc at 5 GPa")
    with pytest.raises(StatisticsError, match="bcc at 5 GPa rests on"):
        require_estimate(bar_estimate(*works, (50.0, 50.0)), "bcc at 5 GPa", have_length=100)
