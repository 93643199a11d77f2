"""Springs that hold some atoms near their places, such as those of a crystal beside which others melt."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from mlip_refine.sampling.biases import BatchBias, BiasValues


@dataclass(frozen=True)
class Tethers:
    """U = ½ Σ k_i |r_i - s_i|²: a bias of a fixed cell.

    Attributes:
        sites: Places `[n_atoms, 3]`, Å, float64.
        springs: Spring constants `[n_atoms]`, eV/Å², float64; 0 for atoms that are free.
    """

    sites: Tensor
    springs: Tensor

    @property
    def moves_with_cell(self) -> bool:
        """Places do not follow the cell."""
        return False

    def key(self) -> bytes:
        """Return a hash of places and springs."""
        arrays = self.sites.numpy().tobytes() + self.springs.numpy().tobytes()
        return b"tethers" + hashlib.sha256(arrays).digest()

    def on(self, device: torch.device, dtype: torch.dtype) -> BatchBias:
        """Return what evaluates the tethers of one batch."""
        return _BatchTethers(
            self.sites.to(device=device, dtype=dtype), self.springs.to(device=device, dtype=dtype)
        )


class _BatchTethers(BatchBias):
    def __init__(self, sites: Tensor, springs: Tensor) -> None:
        self._sites, self._springs = sites, springs[:, None]

    def energy_forces(self, positions: Tensor, cells: Tensor, *, virial: bool = False) -> BiasValues:  # noqa: ARG002 - cells are fixed
        """Return energies and forces (see `BatchBias.energy_forces`)."""
        pull = self._springs * (self._sites - positions)
        return BiasValues(0.5 * (pull * (self._sites - positions)).sum((1, 2)), pull)
