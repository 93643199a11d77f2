"""Losses: what is matched, each a pure function of probes."""

from mlip_refine.losses.base import (
    BatchLoss,
    EnsembleLoss,
    EnsembleSource,
    Frames,
    Loss,
    LossResult,
    PotentialLoss,
)
from mlip_refine.losses.free_energy_difference import FreeEnergyDifference
from mlip_refine.losses.registry import build_losses, registry
from mlip_refine.losses.replay import Replay

__all__ = [
    "BatchLoss",
    "EnsembleLoss",
    "EnsembleSource",
    "Frames",
    "FreeEnergyDifference",
    "Loss",
    "LossResult",
    "PotentialLoss",
    "Replay",
    "build_losses",
    "registry",
]
