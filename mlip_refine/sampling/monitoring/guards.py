"""What the monitor goes by: limits, time-averaged positions, displacements from sites, counts of restarts."""

from collections.abc import Mapping, Sequence
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
        max_temperature_ratio: Largest kinetic over set temperature; small systems may exceed it as they
            fluctuate (see `max_temperature_ratios`).
        max_displacement: Root-mean-square displacement of time-averaged positions from the lattice sites, as
            a fraction of the nearest-neighbour distance, beyond which the structure is looked at.
        restarts: Number of restarts from the last good state before a system is given up.
        forgiving_time: Time without a fault, fs, that makes up for one restart.
    """

    max_temperature_ratio: float = 3.0
    max_displacement: float = 0.2
    restarts: int = 3
    forgiving_time: float = 50_000.0


class RollingAverage:
    """Positions of every atom averaged over the last `AVERAGING_TIME`, following the cells.

    Attributes:
        filled: Parts that every system has filled since it was last set back `[n_systems]`.
        parts: Fractional positions averaged over each of the last parts `[n_atoms, 3]`, the oldest first.
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
        self.parts: list[Tensor] = []
        self._sum: Tensor | None = None

    def reset(self, system: int) -> None:
        """Let a system that was set back fill its parts anew."""
        # A part that is under way has seen what went wrong.
        self.filled[system] = 0 if self._sum is None else -1

    def add(self, positions: Tensor, row_cell: Tensor) -> bool:
        """Add the positions of a step; return whether a part was completed."""
        self._step += 1
        if self._step % self._stride:
            return False
        inverse = torch.linalg.inv(row_cell)[self._index]
        fractional = (positions[:, :, None] * inverse).sum(1)
        self._sum = fractional if self._sum is None else self._sum + fractional
        if self._step % self.part_steps:
            return False
        self.parts = [*self.parts[1 - PARTS :], self._sum / self._samples]
        self._sum = None
        self.filled += 1
        return True

    @property
    def ready(self) -> Tensor:
        """Systems whose average is full `[n_systems]`."""
        return self.filled >= PARTS

    def mean(self) -> Tensor:
        """Return the averaged fractional positions `[n_atoms, 3]`."""
        return torch.stack(self.parts).mean(0)

    def snapshot(self) -> dict[str, Tensor]:
        """Return what `restore` goes on from."""
        empty = torch.empty(0)
        return {
            "average.parts": torch.stack(self.parts) if self.parts else empty,
            "average.sum": empty if self._sum is None else self._sum.clone(),
            "average.step": torch.tensor(self._step),
            "average.filled": self.filled.clone(),
        }

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from a snapshot."""
        device = self._index.device
        self.parts = list(saved["average.parts"].to(device)) if len(saved["average.parts"]) else []
        self._sum = saved["average.sum"].to(device) if len(saved["average.sum"]) else None
        self._step, self.filled = int(saved["average.step"]), saved["average.filled"].clone()


class SiteDisplacement:
    """Root-mean-square displacement from lattice sites; the drift of the whole crystal does not count.

    Attributes:
        sites: Fractional coordinates of the sites `[n_atoms, 3]`: they follow the cells.
    """

    def __init__(self, scaled_sites: Tensor, masses: Tensor, system_idx: Tensor) -> None:
        """Set the sites, and the mass and the system of every atom `[n_atoms]`."""
        self.sites, self._index = scaled_sites, system_idx
        self.counts = torch.bincount(system_idx).to(masses.dtype)
        total = masses.new_zeros(len(self.counts)).index_add_(0, system_idx, masses)
        self._weights = masses / total[system_idx]

    def move_sites(self, system: int, fractional: Tensor) -> None:
        """Take the present positions of a crystal that slipped as its sites."""
        mine = self._index == system
        self.sites[mine] = fractional[mine]

    def __call__(self, fractional: Tensor, row_cell: Tensor) -> Tensor:
        """Return displacements `[n_systems]`, Å, of fractional positions in cells (rows)."""
        delta = ((fractional - self.sites)[:, :, None] * row_cell[self._index]).sum(1)
        drift = delta.new_zeros(len(self.counts), 3)
        drift.index_add_(0, self._index, self._weights[:, None] * delta)
        squares = (delta - drift[self._index]).square().sum(-1)
        mean = squares.new_zeros(len(self.counts)).index_add_(0, self._index, squares) / self.counts
        return mean.sqrt()


_COUNTS = ("total", "counted", "shortenings", "last_fault")


class Restarts:
    """Counts restarts; time without a fault makes up for them, so that a rare one ends no long run.

    Attributes:
        total: Number of restarts of each system, which is the number of its noise stream.
        counted: Number of restarts that time has not made up for, by system.
        allowed: Largest number of those before a system is given up, by system.
        shortenings: How often the time step of each system is halved.
    """

    def __init__(self, allowed: Sequence[int], forgiving_steps: int) -> None:
        """Start at zero.

        Args:
            allowed: Allowed number of restarts of every system.
            forgiving_steps: Steps without a fault that make up for one restart.
        """
        self.allowed, self._forgiving_steps = tuple(allowed), forgiving_steps
        self.total, self.counted, self.shortenings, self._last_fault = ([0] * len(allowed) for _ in _COUNTS)

    @property
    def given_up(self) -> list[int]:
        """Systems that failed too often, by number."""
        return [i for i, n in enumerate(self.counted) if n > self.allowed[i]]

    def add(self, system: int, step: int) -> None:
        """Count a restart, after what the time since the last one makes up for.

        A time step that was shortened is only made longer together with a restart: never in a system that
        goes well with it.
        """
        forgiven = (step - self._last_fault[system]) // self._forgiving_steps
        self.counted[system] = max(0, self.counted[system] - forgiven) + 1
        self.shortenings[system] = max(0, self.shortenings[system] - forgiven)
        self.total[system] += 1
        self._last_fault[system] = step

    def snapshot(self) -> dict[str, Tensor]:
        """Return what `restore` goes on from."""
        counts = (self.total, self.counted, self.shortenings, self._last_fault)
        return {f"restarts.{k}": torch.tensor(v) for k, v in zip(_COUNTS, counts, strict=True)}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from a snapshot."""
        counts = (saved[f"restarts.{name}"].tolist() for name in _COUNTS)
        self.total, self.counted, self.shortenings, self._last_fault = counts


def max_temperature_ratios(settings: GuardSettings, dof: Tensor) -> Tensor:
    """Return the highest kinetic over set temperature that is no fault `[n_systems]`.

    Eight standard deviations of the canonical fluctuation, √(2/dof), are never a fault.

    Args:
        settings: The limit.
        dof: Degrees of freedom of every system `[n_systems]`.
    """
    fluctuation = 1.0 + 8.0 * (2.0 / dof.clamp(min=1.0)).sqrt()
    return fluctuation.clamp(min=settings.max_temperature_ratio)


def nearest_neighbour_distance(atoms: Atoms) -> float:
    """Return the shortest distance between atoms of a periodic crystal, Å."""
    cutoff = 1.5 * (atoms.cell.volume / len(atoms)) ** (1 / 3)
    return float(neighbor_list("d", atoms, cutoff).min())
