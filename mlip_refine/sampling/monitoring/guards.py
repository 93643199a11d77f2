"""Verdicts on running systems: overheated, or no longer in the phase they started in."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from ase import Atoms
from ase.neighborlist import neighbor_list
from torch import Tensor

# Displacements and structures are judged on positions averaged over this time, fs: noise averages out.
AVERAGING_TIME = 200.0

# The average rolls on in so many parts, and is built from positions this far apart, fs.
PARTS = 4
STRIDE = 10.0


@dataclass(frozen=True)
class GuardSettings:
    """When a system is set back, and how often.

    Attributes:
        max_temperature_ratio: Kinetic over set temperature; small systems may exceed it as they fluctuate.
        max_displacement: Root-mean-square displacement of time-averaged positions from the lattice sites, as
            a fraction of the nearest-neighbour distance, beyond which the structure is looked at.
        restarts: How often a system is restarted from its last good state before it is given up.
        forgiving_time: Without a fault for so long, fs, a system has one of its restarts forgiven.
    """

    max_temperature_ratio: float = 3.0
    max_displacement: float = 0.2
    restarts: int = 3
    forgiving_time: float = 50_000.0


class RollingAverage:
    """Positions of every atom averaged over the last `AVERAGING_TIME`, following the cells.

    Attributes:
        filled: Parts that every system has filled since it was last set back `[n_systems]`.
    """

    def __init__(self, system_idx: Tensor, n_systems: int, steps: int) -> None:
        """Start empty.

        Args:
            system_idx: System of every atom `[n_atoms]`.
            n_systems: Number of systems.
            steps: Steps in `AVERAGING_TIME`.
        """
        self._index = system_idx
        self._stride = max(1, round(steps * STRIDE / AVERAGING_TIME))
        self.part_steps = self._stride * max(1, round(steps / (PARTS * self._stride)))
        self._samples = self.part_steps // self._stride
        self.filled = torch.zeros(n_systems, dtype=torch.long)
        self._step = 0
        self._sums: list[Tensor] = []
        self._sum: Tensor | None = None

    def forget(self, system: int) -> None:
        """Let a system that was set back fill its parts anew."""
        # A part that is under way has seen what went wrong.
        self.filled[system] = 0 if self._sum is None else -1

    def add(self, positions: Tensor, row_cell: Tensor) -> bool:
        """Look at a step; true when a part was completed."""
        self._step += 1
        if self._step % self._stride:
            return False
        inverse = torch.linalg.inv(row_cell)[self._index]
        fractional = (positions[:, :, None] * inverse).sum(1)
        self._sum = fractional if self._sum is None else self._sum + fractional
        if self._step % self.part_steps:
            return False
        self._sums = [*self._sums[1 - PARTS :], self._sum / self._samples]
        self._sum = None
        self.filled += 1
        return True

    @property
    def ready(self) -> Tensor:
        """Systems whose average is full `[n_systems]`."""
        return self.filled >= PARTS

    def mean(self) -> Tensor:
        """Averaged fractional positions `[n_atoms, 3]`."""
        return torch.stack(self._sums).mean(0)

    def snapshot(self) -> dict[str, Tensor]:
        """What `restore` goes on from."""
        empty = torch.empty(0)
        return {
            "average.parts": torch.stack(self._sums) if self._sums else empty,
            "average.sum": empty if self._sum is None else self._sum.clone(),
            "average.step": torch.tensor(self._step),
            "average.filled": self.filled.clone(),
        }

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from a snapshot."""
        device = self._index.device
        self._sums = list(saved["average.parts"].to(device)) if len(saved["average.parts"]) else []
        self._sum = saved["average.sum"].to(device) if len(saved["average.sum"]) else None
        self._step, self.filled = int(saved["average.step"]), saved["average.filled"].clone()

    def parts(self) -> list[Tensor]:
        """Fractional positions averaged over each part, the oldest first."""
        return self._sums


class Displacement:
    """Root-mean-square displacement from lattice sites; the drift of the whole crystal does not count."""

    def __init__(self, scaled_sites: Tensor, masses: Tensor, system_idx: Tensor) -> None:
        """Keep the sites: fractional coordinates `[n_atoms, 3]`, so that they follow the cells."""
        self.sites, self._index = scaled_sites, system_idx
        self.counts = torch.bincount(system_idx).to(masses.dtype)
        total = masses.new_zeros(len(self.counts)).index_add_(0, system_idx, masses)
        self._weights = masses / total[system_idx]

    def settle(self, system: int, fractional: Tensor) -> None:
        """Take the present places of a crystal that slipped as its sites."""
        mine = self._index == system
        self.sites[mine] = fractional[mine]

    def __call__(self, fractional: Tensor, row_cell: Tensor) -> Tensor:
        """Displacements of fractional positions in cells (rows) `[n_systems]`, Å."""
        delta = ((fractional - self.sites)[:, :, None] * row_cell[self._index]).sum(1)
        drift = delta.new_zeros(len(self.counts), 3)
        drift.index_add_(0, self._index, self._weights[:, None] * delta)
        squares = (delta - drift[self._index]).square().sum(-1)
        mean = squares.new_zeros(len(self.counts)).index_add_(0, self._index, squares) / self.counts
        return mean.sqrt()


def hottest(settings: GuardSettings, dof: Tensor) -> Tensor:
    """Highest kinetic over set temperature of systems with so many degrees of freedom `[n_systems]`.

    Eight standard deviations of the canonical fluctuation, √(2/dof), are never a fault.
    """
    fluctuation = 1.0 + 8.0 * (2.0 / dof.clamp(min=1.0)).sqrt()
    return fluctuation.clamp(min=settings.max_temperature_ratio)


def nearest_neighbour_distance(atoms: Atoms) -> float:
    """Shortest distance between atoms of a periodic crystal, Å."""
    cutoff = 1.5 * (atoms.cell.volume / len(atoms)) ** (1 / 3)
    return float(neighbor_list("d", atoms, cutoff).min())
