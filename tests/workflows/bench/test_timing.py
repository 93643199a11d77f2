"""Two things timed against each other: on a clock of our own the ratio is exact."""

from dataclasses import replace

import pytest
import torch

from mlip_refine.testing import sigma_bound
from mlip_refine.workflows.bench import timing
from mlip_refine.workflows.bench.timing import Side, compare, median, repetitions
from mlip_refine.workflows.bench.workloads import QUICK, Effort

CPU = torch.device("cpu")


def _rounds(n: int) -> Effort:
    return replace(QUICK, rounds=n, duration=0.0)


class Clock:
    """A clock that only the work moves, and the order in which the work was done."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, []

    def perf_counter(self) -> float:
        return self.now

    def work(self, name: str, seconds: float):
        def run() -> None:
            self.log.append(name)
            self.now += seconds

        return run


@pytest.fixture
def clock(monkeypatch):
    own = Clock()
    monkeypatch.setattr(timing, "time", own)
    return own


def test_ratios_are_those_of_time_per_work(clock):
    pairs = compare(
        Side(clock.work("a", 3.0), 30.0), Side(clock.work("b", 1.0), 5.0), _rounds(4), CPU, "steps/s"
    )
    assert (pairs.our_speed.value, pairs.our_speed.unit) == (10.0, "steps/s")
    assert pairs.reference_speed.value == 5.0
    assert pairs.time_ratio.value == 0.5
    assert pairs.speed_ratio.value == 2.0
    assert pairs.time_ratio.se == 0.0


def test_the_first_of_a_pair_changes_and_preparation_is_not_timed(clock):
    compare_log = clock.log
    prepare = clock.work("p", 100.0)
    pairs = compare(
        Side(clock.work("a", 1.0), 1.0), Side(clock.work("b", 1.0), 1.0), _rounds(3), CPU, "", prepare
    )
    warm_up, timed = compare_log[:4], compare_log[4:]
    assert warm_up == ["p", "a", "p", "b"]
    assert timed == ["p", "a", "b", "p", "b", "a", "p", "a", "b"]
    assert pairs.our_speed.value == 1.0


def test_a_slow_spell_moves_neither_the_median_nor_a_pair(clock):
    """A pair of blocks ten times slower keeps its ratio; a single slow block is an outlier."""
    slow = iter([1, 1, 1, 1, 1, 100, 10, 10] + [1] * 100)

    def run() -> None:
        clock.now += next(slow)

    pairs = compare(Side(run, 1.0), Side(run, 1.0), _rounds(9), CPU, "")
    assert pairs.time_ratio.value == 1.0
    assert sorted((pairs.reference / pairs.ours).tolist()) == [1.0] * 8 + [100.0]


@pytest.mark.statistical
def test_the_error_of_a_median_is_that_of_normal_numbers():
    """sqrt(π/2n) sigma for many normal numbers; one bootstrap error scatters by 17 %, the mean of 16 by 4."""
    samples = torch.randn(16, 400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = [median(values, "s") for values in samples]
    expected = (torch.pi / 2 / 400) ** 0.5
    assert all(abs(one.value) < sigma_bound(len(found)) * expected for one in found)
    assert sum(one.se for one in found) / 16 == pytest.approx(expected, rel=0.35)
    assert median([2.0], "s").known_se is None


def test_blocks_last_as_long_as_wanted(clock):
    assert repetitions(clock.work("a", 0.02), CPU, target=0.5, least=4) == 25
    assert repetitions(clock.work("a", 2.0), CPU, target=0.5, least=4) == 4


def test_pairs_go_on_while_there_is_time(clock):
    """Two seconds a pair: at least three, eight in fifteen seconds, at most nine."""
    numbers = []
    for duration in (0.0, 15.0, 1000.0):
        effort = replace(QUICK, rounds=3, most_rounds=9, duration=duration)
        pairs = compare(Side(clock.work("a", 1.0), 1.0), Side(clock.work("b", 1.0), 1.0), effort, CPU, "")
        numbers.append(len(pairs.ours))
    assert numbers == [3, 8, 9]
