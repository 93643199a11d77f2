"""Stress tensor."""

from typing import ClassVar

from torch import Tensor

from mlip_refine.observables.base import Observable, Sample
from mlip_refine.quantities import GPA

_ROWS, _COLUMNS = (0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1)


class Stress(Observable):
    """Total stress σ_ij - δ_ij N kT/V in Voigt order, GPa, tensile positive (as ASE's sign).

    σ is the stress of the configuration, (1/V) ∂U/∂ε; frames hold no momenta, so the kinetic part is its
    mean.
    """

    probes: ClassVar[frozenset[str]] = frozenset({"stress"})
    labels = ("xx", "yy", "zz", "yz", "xz", "xy")
    unit = "GPa"

    def columns(self, sample: Sample) -> Tensor:
        """Six components of every frame `[n, 6]`."""
        return sample.total_stress[:, _ROWS, _COLUMNS] / GPA
