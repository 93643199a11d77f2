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
from mlip_refine.losses.ensemble.free_energy import FreeEnergyDifference
from mlip_refine.losses.ensemble.observable import ObservableLoss
from mlip_refine.losses.ensemble.observable_options import ObservableOptions, ScalarOptions
from mlip_refine.losses.ensemble.phase_difference import EnthalpyDifference, PhaseDifference, VolumeDifference
from mlip_refine.losses.phonons.base import PhononLoss
from mlip_refine.losses.phonons.frequencies import PhononFrequencies
from mlip_refine.losses.phonons.hvp import PhononHVP
from mlip_refine.losses.registry import build_losses, registry
from mlip_refine.losses.replay import Replay

__all__ = [
    "BatchLoss",
    "EnsembleLoss",
    "EnsembleSource",
    "EnthalpyDifference",
    "Frames",
    "FreeEnergyDifference",
    "Loss",
    "LossResult",
    "ObservableLoss",
    "ObservableOptions",
    "PhaseDifference",
    "PhononFrequencies",
    "PhononHVP",
    "PhononLoss",
    "PotentialLoss",
    "Replay",
    "ScalarOptions",
    "VolumeDifference",
    "build_losses",
    "registry",
]
