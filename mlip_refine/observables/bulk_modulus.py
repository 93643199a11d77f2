"""Isothermal bulk modulus from the fluctuations of the volume."""

import torch
from torch import Tensor

from mlip_refine.observables.base import Observable, Sample
from mlip_refine.quantities import GPA


class BulkModulus(Observable):
    """Isothermal bulk modulus K_T = kT ⟨V⟩/var(V), GPa (Allen and Tildesley 2017, section 2.5).

    With the density exp(-β(U + P V)) dV of the volume this is -⟨V⟩ d P/d⟨V⟩ of the sampled ensemble exactly.
    """

    labels = ("K_T",)
    unit = "GPa"

    def columns(self, sample: Sample) -> Tensor:
        """V and V² of every frame `[n, 2]`, Å³ and Å⁶.

        Raises:
            InputError: The cell is fixed.
        """
        sample.require_free_cell("the bulk modulus")
        return torch.stack([sample.volumes, sample.volumes.square()], dim=1)

    def derive(self, means: Tensor, sample: Sample) -> Tensor:
        """K_T `[1]`."""
        return (sample.kt * means[0] / (means[1] - means[0].square()) / GPA)[None]
