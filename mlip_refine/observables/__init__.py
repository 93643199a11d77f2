"""Observables: what is averaged over frames, reweightable, differentiable and with errors.

One file per quantity. Pure functions of a `Sample`: no model and no dynamics here.
"""

from mlip_refine.observables.base import Observable, Sample, average, measure

__all__ = ["Observable", "Sample", "average", "measure"]
