"""Timing two things against each other on a machine that does other things as well.

Both run in turn in short blocks, so that a slow spell of the machine meets both of them; what counts is the
ratio within a pair of blocks, and its median over the pairs.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlip_refine.quantities import Measured
from mlip_refine.statistics import block_bootstrap
from mlip_refine.workflows.bench.records import Outcome
from mlip_refine.workflows.bench.workloads import Effort

RESAMPLES = 400


@dataclass(frozen=True)
class Side:
    """One of the two things that are timed.

    Attributes:
        run: Runs one block.
        work: What one block gets done, such as atoms times steps.
    """

    run: Callable[[], object]
    work: float


@dataclass(frozen=True)
class Pairs:
    """Speeds of both sides, pair by pair.

    Attributes:
        ours: Work per second of every block `[n_pairs]`, float64.
        reference: Work per second of the other side `[n_pairs]`.
        unit: Unit of the speeds.
    """

    ours: Tensor
    reference: Tensor
    unit: str

    @property
    def our_speed(self) -> Measured:
        """Median of our speeds."""
        return median(self.ours, self.unit)

    @property
    def reference_speed(self) -> Measured:
        """Median of the reference's speeds."""
        return median(self.reference, self.unit)

    @property
    def time_ratio(self) -> Measured:
        """Our time over the reference's for the same work."""
        return median(self.reference / self.ours, "")

    @property
    def speed_ratio(self) -> Measured:
        """Our speed over the reference's."""
        return median(self.ours / self.reference, "")

    def outcome(self, ratio: Measured, details: Mapping[str, float]) -> Outcome:
        """A row of the table with one of the ratios."""
        return Outcome(
            ours=self.our_speed, reference=self.reference_speed, ratio=ratio, details=dict(details)
        )


def median(values: Sequence[float] | Tensor, unit: str) -> Measured:
    """Median of readings `[n]` with its bootstrap error."""
    series = torch.as_tensor(values, dtype=torch.float64)
    if len(series) < 2:
        return Measured(float(series[0]), math.nan, unit)
    error = block_bootstrap(lambda s: s[0].quantile(0.5), [series], RESAMPLES, inefficiencies=[1.0])
    return Measured(float(series.quantile(0.5)), error, unit)


def compare(
    ours: Side,
    reference: Side,
    effort: Effort,
    device: torch.device,
    unit: str,
    prepare: Callable[[], object] = lambda: None,
) -> Pairs:
    """Time both sides in turn, after one block of each that does not count.

    Args:
        ours: What is measured.
        reference: What it is measured against.
        effort: How many pairs of blocks, for how long; which side goes first changes from pair to pair.
        device: Where the work is done.
        unit: Unit of work per second.
        prepare: Called before every pair, outside the timing.
    """
    sides: tuple[Side, Side] = (ours, reference)
    for side in sides:
        prepare()
        side.run()
    speeds: list[list[float]] = []
    start = time.perf_counter()
    while len(speeds) < effort.rounds or (
        len(speeds) < effort.most_rounds and time.perf_counter() - start < effort.duration
    ):
        prepare()
        pair = [0.0, 0.0]
        for k in (0, 1) if len(speeds) % 2 == 0 else (1, 0):
            pair[k] = sides[k].work / seconds(sides[k].run, device)
        speeds.append(pair)
    table = torch.tensor(speeds, dtype=torch.float64)
    return Pairs(table[:, 0], table[:, 1], unit)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, until the device has finished."""
    _synchronise(device)
    start = time.perf_counter()
    run()
    _synchronise(device)
    return time.perf_counter() - start


def repeat(run: Callable[[], object], times: int) -> None:
    """Run something a number of times."""
    for _ in range(times):
        run()


def repetitions(run: Callable[[], object], device: torch.device, target: float, least: int) -> int:
    """Return how often something runs in about `target` seconds, at least `least` times."""
    run()
    return max(least, math.ceil(target / max(seconds(run, device), 1e-6)))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
