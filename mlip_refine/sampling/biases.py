"""What a bias is to the dynamics: an energy of the atoms beside that of the model.

A `Bias` describes the energy; `Bias.on` makes of it a `BatchBias`, which evaluates the systems of one batch
on its device and in its precision, and may keep neighbour lists for them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class BiasValues(NamedTuple):
    """Energies and their derivatives.

    Attributes:
        energy: Energies `[n]`, eV.
        forces: Forces `[n, n_atoms, 3]`, eV/Å.
        virial: Derivative of the energy in a homogeneous strain of atoms and cell, dU/dε `[n, 3, 3]`, eV,
            symmetric; `None` if it was not asked for, or does not exist.
    """

    energy: Tensor
    forces: Tensor
    virial: Tensor | None = None


class BatchBias(ABC):
    """Evaluates one bias for the systems of a batch that have it.

    A bias without neighbours only has to give `energy_forces`. One that keeps lists says when they hold, and
    finds them when it is told to: so a run that is restored has the lists of one that was never interrupted.
    """

    @abstractmethod
    def energy_forces(self, positions: Tensor, cells: Tensor, *, virial: bool = False) -> BiasValues:
        """Return energies and forces.

        Args:
            positions: Positions `[n, n_atoms, 3]`, Å, unwrapped; always the same systems in the same order.
            cells: Cells (rows) `[n, 3, 3]`, Å.
            virial: Whether the virial is wanted too.
        """

    def holds(self, positions: Tensor, cells: Tensor) -> bool:  # noqa: ARG002 - they matter to lists
        """Return whether the lists, if there are any, hold here; lists hold only at finite positions."""
        return True

    def find(self, positions: Tensor, cells: Tensor) -> None:  # noqa: B027 - nothing to find by default
        """Find the neighbours at finite positions and cells, if the bias needs any."""

    def forget(self) -> None:  # noqa: B027
        """Find the neighbours anew at the next call."""

    def found_at(self) -> Mapping[str, Tensor]:
        """Return `positions` and `cells` at which the neighbours were found; nothing without a list."""
        return {}


class Bias(Protocol):
    """An energy of the atoms of a cell that is added to that of the model."""

    @property
    def moves_with_cell(self) -> bool:
        """Whether it has a virial, so that the cell may move."""
        ...

    def key(self) -> bytes:
        """Return what tells it apart from other biases: stored frames are found again by it."""
        ...

    def on(self, device: torch.device, dtype: torch.dtype) -> BatchBias:
        """Return what evaluates it for the systems of one batch, with all tensors where the batch is."""
        ...
