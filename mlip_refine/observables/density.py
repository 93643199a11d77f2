"""Mass density."""

from ase import units
from torch import Tensor

from mlip_refine.observables.base import Observable, Sample

GRAMS_PER_CM3: float = float(units._amu) * 1e27
"""One amu/Å³ in g/cm³."""


class Density(Observable):
    """Mass density ⟨M/V⟩, g/cm³."""

    labels = ("density",)
    unit = "g/cm³"

    def columns(self, sample: Sample) -> Tensor:
        """Density of every frame `[n, 1]`."""
        return (GRAMS_PER_CM3 * sample.masses.sum().double() / sample.volumes)[:, None]
