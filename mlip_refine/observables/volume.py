"""Volume."""

from torch import Tensor

from mlip_refine.observables.base import Observable, Sample


class Volume(Observable):
    """Atomic volume ⟨V⟩/N, Å³/atom."""

    labels = ("volume",)
    unit = "Å³/atom"

    def columns(self, sample: Sample) -> Tensor:
        """Atomic volume of every frame `[n, 1]`."""
        return sample.volumes[:, None] / sample.n_atoms
