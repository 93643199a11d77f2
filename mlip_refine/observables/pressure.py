"""Pressure."""

from typing import ClassVar

from torch import Tensor

from mlip_refine.observables.base import Observable, Sample
from mlip_refine.quantities import GPA


class Pressure(Observable):
    """Total pressure N kT/V - tr σ/3, GPa (Allen and Tildesley 2017, section 2.4).

    σ is the stress of the configuration, tensile positive; frames hold no momenta, so the kinetic part is its
    mean.
    """

    probes: ClassVar[frozenset[str]] = frozenset({"stress"})
    labels = ("pressure",)
    unit = "GPa"

    def columns(self, sample: Sample) -> Tensor:
        """Pressure of every frame `[n, 1]`."""
        return -sample.total_stress.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) / GPA
