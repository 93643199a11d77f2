"""Verdicts on running systems: non-finite, overheated, or no longer in the phase they started in."""

from dataclasses import dataclass

import torch
from ase import Atoms
from ase.neighborlist import neighbor_list
from torch import Tensor

# Displacements are judged on positions averaged over at least this time, fs: thermal noise averages out.
AVERAGING_TIME = 200.0


@dataclass(frozen=True)
class GuardSettings:
    """When a system is stopped.

    Attributes:
        max_temperature_ratio: Instantaneous over target temperature.
        max_displacement: Root-mean-square displacement of time-averaged positions from the lattice sites, as
            a fraction of the nearest-neighbour distance.
        check_interval: Steps between checks.
    """

    max_temperature_ratio: float = 3.0
    max_displacement: float = 0.2
    check_interval: int = 20


class PhaseGuard:
    """Averages positions over a window and compares them with the lattice sites.

    The mass-weighted drift of the whole crystal does not count; in NPT the sites follow the cell.
    """

    def __init__(self, scaled_sites: Tensor, masses: Tensor, system_idx: Tensor, window: int) -> None:
        """Start a window.

        Args:
            scaled_sites: Fractional coordinates of the lattice sites `[n_atoms, 3]`.
            masses: `[n_atoms]`, amu.
            system_idx: System of every atom `[n_atoms]`.
            window: Steps that are averaged.
        """
        self.sites, self.system_idx, self.window = scaled_sites, system_idx, window
        n_systems = int(system_idx[-1]) + 1
        total = masses.new_zeros(n_systems).index_add_(0, system_idx, masses)
        self.weights = masses / total[system_idx]
        self.counts = torch.bincount(system_idx).to(masses.dtype)
        self.reset()

    def reset(self) -> None:
        """Start a new window."""
        self.sum, self.steps = torch.zeros_like(self.sites), 0

    def add(self, positions: Tensor, row_cell: Tensor) -> Tensor | None:
        """Add a step; at the end of a window return the displacements `[n_systems]`, Å, else `None`."""
        inverse = torch.linalg.inv(row_cell)[self.system_idx]
        self.sum += torch.bmm(positions.unsqueeze(1), inverse).squeeze(1)
        self.steps += 1
        if self.steps < self.window:
            return None
        delta = self.sum / self.steps - self.sites
        self.reset()
        return self._rms(torch.bmm(delta.unsqueeze(1), row_cell[self.system_idx]).squeeze(1))

    def _rms(self, delta: Tensor) -> Tensor:
        drift = delta.new_zeros(len(self.counts), 3).index_add_(
            0, self.system_idx, self.weights[:, None] * delta
        )
        squares = (delta - drift[self.system_idx]).square().sum(-1)
        mean = squares.new_zeros(len(self.counts)).index_add_(0, self.system_idx, squares) / self.counts
        return mean.sqrt()


def nearest_neighbour_distance(atoms: Atoms) -> float:
    """Shortest distance between atoms of a periodic crystal, Å."""
    cutoff = 1.5 * (atoms.cell.volume / len(atoms)) ** (1 / 3)
    return float(neighbor_list("d", atoms, cutoff).min())
