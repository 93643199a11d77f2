"""Weights, effective sizes, free-energy differences, correlation and error bars.

Pure float64 torch: this room knows no atoms. Energies enter as dimensionless reduced potentials
(``U / k_B T`` and the like), times as sample counts. Every estimate comes with its error and with the two
numbers that say whether to believe it (effective samples and overlap); the ``require_*`` functions turn a
bad one into a `StatisticsError` that says what would be enough.
"""

from mlip_refine.statistics.bootstrap import Reduction, block_bootstrap, block_length, paired_reduction
from mlip_refine.statistics.exp_bar import (
    FreeEnergyEstimate,
    bar_estimate,
    exp_estimate,
    require_estimate,
    require_overlap,
)
from mlip_refine.statistics.mbar import MbarResult, mbar, stratified_error
from mlip_refine.statistics.polynomial import PolynomialFit, polynomial_fit
from mlip_refine.statistics.series import (
    Equilibration,
    Samples,
    detect_equilibration,
    statistical_inefficiency,
)
from mlip_refine.statistics.transitions import entropy_difference, transition_temperature
from mlip_refine.statistics.weights import (
    kish_size,
    log_weights,
    require_effective,
    weighted_error,
    weighted_mean,
)

__all__ = [
    "Equilibration",
    "FreeEnergyEstimate",
    "MbarResult",
    "PolynomialFit",
    "Reduction",
    "Samples",
    "bar_estimate",
    "block_bootstrap",
    "block_length",
    "detect_equilibration",
    "entropy_difference",
    "exp_estimate",
    "kish_size",
    "log_weights",
    "mbar",
    "paired_reduction",
    "polynomial_fit",
    "require_effective",
    "require_estimate",
    "require_overlap",
    "statistical_inefficiency",
    "stratified_error",
    "transition_temperature",
    "weighted_error",
    "weighted_mean",
]
