"""Weights, effective sizes, free-energy differences, correlation and error bars.

Pure float64 torch: this room knows no atoms and no units. Energies enter as dimensionless reduced
potentials (``U / k_B T`` and the like), times as sample counts. Every estimate comes with its error and
with the two numbers that say whether to believe it (effective samples and overlap); the ``require_*``
functions turn a bad one into a `StatisticsError` that says what would do.
"""

from mlip_refine.statistics.bar import bar_estimate
from mlip_refine.statistics.bootstrap import block_bootstrap, block_length
from mlip_refine.statistics.correlation import (
    Equilibration,
    detect_equilibration,
    effective_samples,
    statistical_inefficiency,
)
from mlip_refine.statistics.free_energy import FreeEnergyEstimate, exp_estimate
from mlip_refine.statistics.mbar import MbarResult, mbar
from mlip_refine.statistics.mbar_errors import stratified_error
from mlip_refine.statistics.polynomial import PolynomialFit, polynomial_fit
from mlip_refine.statistics.requirements import require_effective, require_estimate, require_overlap
from mlip_refine.statistics.series import Samples
from mlip_refine.statistics.weights import (
    entropy_size,
    kish_size,
    log_weights,
    weighted_error,
    weighted_mean,
)

__all__ = [
    "Equilibration",
    "FreeEnergyEstimate",
    "MbarResult",
    "PolynomialFit",
    "Samples",
    "bar_estimate",
    "block_bootstrap",
    "block_length",
    "detect_equilibration",
    "effective_samples",
    "entropy_size",
    "exp_estimate",
    "kish_size",
    "log_weights",
    "mbar",
    "polynomial_fit",
    "require_effective",
    "require_estimate",
    "require_overlap",
    "statistical_inefficiency",
    "stratified_error",
    "weighted_error",
    "weighted_mean",
]
