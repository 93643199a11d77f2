"""Frames of losses on the potential itself: drawn when due, each from where its own draw ended."""

from types import SimpleNamespace

import torch

from mlip_refine.losses import EnsembleSource, PotentialLoss
from mlip_refine.losses.base import LossResult
from mlip_refine.training.tracker import ThermalCorrections

HOT = EnsembleSource("wells", 500.0, 0.0)


class Looking(PotentialLoss):
    """Asks for frames, and for nothing of them."""

    def __init__(self, name: str, every: int) -> None:
        super().__init__(name, 1.0)
        self.every = every

    @property
    def sources(self):
        return (HOT,)

    def evaluate(self, potential) -> LossResult:
        return LossResult(torch.zeros(()))


def test_every_loss_goes_on_from_its_own_frames(wells):
    """Two losses at one state, every update and every second one: neither starts where the other ended."""
    potential, drawn, started = wells(1.0), {}, []

    def draw(potential, sources, stage, start=None):
        started.append((stage, start))
        drawn[stage] = potential.draw(len(drawn), 20)
        return dict.fromkeys(sources, drawn[stage])

    points = {HOT: SimpleNamespace(name="hot")}
    sampler = SimpleNamespace(points=points, draw=draw, checksums=lambda *_: {})
    thermal = ThermalCorrections(sampler)
    for step in range(3):
        for loss in (Looking("often", 1), Looking("seldom", 2)):
            thermal.follow(potential, loss, step)
    before = {
        "often-0000": None,
        "seldom-0000": None,
        "often-0001": "often-0000",
        "often-0002": "often-0001",
        "seldom-0002": "seldom-0000",
    }
    assert [stage for stage, _ in started] == list(before)
    for stage, start in started:
        if before[stage] is None:
            assert start is None
        else:
            assert start["hot"] is drawn[before[stage]].latest.ends
