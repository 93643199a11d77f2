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
from mlip_refine.losses.enthalpy_difference import EnthalpyDifference, PhaseDifference, VolumeDifference
from mlip_refine.losses.free_energy_difference import FreeEnergyDifference
from mlip_refine.losses.observable_options import ObservableOptions, ScalarOptions
from mlip_refine.losses.observables import ObservableLoss
from mlip_refine.losses.phonon_frequencies import PhononFrequencies
from mlip_refine.losses.phonon_hvp import PhononHVP
from mlip_refine.losses.phonons import PhononLoss
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
