"""Losses: what is matched, each a pure function of probes.

Names are imported when they are first used, so that a config is checked without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlip_refine.losses.base import BatchLoss as BatchLoss
    from mlip_refine.losses.base import EnsembleLoss as EnsembleLoss
    from mlip_refine.losses.base import EnsembleSource as EnsembleSource
    from mlip_refine.losses.base import Frames as Frames
    from mlip_refine.losses.base import Loss as Loss
    from mlip_refine.losses.base import LossResult as LossResult
    from mlip_refine.losses.base import PotentialLoss as PotentialLoss
    from mlip_refine.losses.base import Setting as Setting
    from mlip_refine.losses.ensemble.observable import ObservableLoss as ObservableLoss
    from mlip_refine.losses.ensemble.observable_options import ObservableOptions as ObservableOptions
    from mlip_refine.losses.ensemble.observable_options import ScalarOptions as ScalarOptions
    from mlip_refine.losses.ensemble.two_phases import EnthalpyDifference as EnthalpyDifference
    from mlip_refine.losses.ensemble.two_phases import FreeEnergyDifference as FreeEnergyDifference
    from mlip_refine.losses.ensemble.two_phases import PhaseDifference as PhaseDifference
    from mlip_refine.losses.ensemble.two_phases import VolumeDifference as VolumeDifference
    from mlip_refine.losses.phonons.base import PhononLoss as PhononLoss
    from mlip_refine.losses.phonons.frequencies import PhononFrequencies as PhononFrequencies
    from mlip_refine.losses.phonons.hvp import PhononHVP as PhononHVP
    from mlip_refine.losses.registry import LossSpec as LossSpec
    from mlip_refine.losses.registry import LossType as LossType
    from mlip_refine.losses.registry import loss_specs as loss_specs
    from mlip_refine.losses.registry import loss_types as loss_types
    from mlip_refine.losses.replay import Replay as Replay

_HOMES = {
    "base": (
        *("BatchLoss", "EnsembleLoss", "EnsembleSource", "Frames", "Loss", "LossResult", "PotentialLoss"),
        "Setting",
    ),
    "ensemble.observable": ("ObservableLoss",),
    "ensemble.observable_options": ("ObservableOptions", "ScalarOptions"),
    "ensemble.two_phases": (
        *("EnthalpyDifference", "FreeEnergyDifference", "PhaseDifference", "VolumeDifference"),
    ),
    "phonons.base": ("PhononLoss",),
    "phonons.frequencies": ("PhononFrequencies",),
    "phonons.hvp": ("PhononHVP",),
    "registry": ("LossSpec", "LossType", "loss_specs", "loss_types"),
    "replay": ("Replay",),
}
_MODULES = {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Import a name on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value
