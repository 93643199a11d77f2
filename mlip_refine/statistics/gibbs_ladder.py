"""G, H and V of one phase over temperature and pressure, from a ladder of NPT ensembles joined by MBAR.

A rung k samples exp(-u_k) with u_k = β_k (U + P_k V), in the measure dV d(shape of the cell). MBAR over all
rungs gives f = -ln ∫ exp(-β(U + P V)) at any (T, P) that they cover. What a cell at its equilibrium volume
and shape has, in place of one that fluctuates, is

    βG = f + ½ ln det cov + ln⟨V⟩ - (3/2) N ln T + constant,

with the covariance of the free logarithmic strains (the Gaussian integral over them), and the momenta of N
atoms. The constant is the same everywhere; absolute free energies at one state or more give it.

Errors are those of a jackknife (Efron and Tibshirani 1993): every series is cut into blocks, the estimate is
repeated without the b-th block of all rungs, and what is computed from several states keeps their correlation
as long as it is computed for every block left out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlip_refine.errors import StatisticsError
from mlip_refine.quantities import KB
from mlip_refine.statistics.mbar import MbarResult, mbar

BLOCKS = 20
"""Blocks of every series, of which the jackknife leaves out one at a time."""

FRAMES_PER_BLOCK = 3.0
"""Independent frames of a block, below which blocks are not independent of each other."""


@dataclass(frozen=True, eq=False)
class Rung:
    """Frames of one NPT ensemble.

    Attributes:
        temperature: Temperature, K.
        pressure: Pressure, eV/Å³.
        energy: Potential energy of the cell in every frame `[n]`, eV.
        volume: Volume of the cell `[n]`, Å³.
        strains: Logarithmic strains that are free `[n, n_strains]`; the reference does not matter.
        block: Block of the jackknife that a frame is in `[n]`, from 0.
        inefficiency: Statistical inefficiency of U + P V, in frames.
    """

    temperature: float
    pressure: float
    energy: Tensor
    volume: Tensor
    strains: Tensor
    block: Tensor
    inefficiency: float = 1.0

    def __len__(self) -> int:
        return len(self.energy)


@dataclass(frozen=True, eq=False)
class LadderState:
    """What a ladder says about one (T, P): row 0 the estimate, row b + 1 that without block b.

    Attributes:
        reduced_gibbs: βG of a cell at its equilibrium volume and shape, less a constant `[1 + blocks]`.
        enthalpy: ⟨U + P V⟩ of the cell, without the kinetic energy `[1 + blocks]`, eV.
        volume: Mean volume of the cell `[1 + blocks]`, Å³.
        variance: Variance of that volume `[1 + blocks]`, Å⁶.
        n_eff: Independent frames that carry the estimate.
    """

    reduced_gibbs: Tensor
    enthalpy: Tensor
    volume: Tensor
    variance: Tensor
    n_eff: float


@dataclass(frozen=True, eq=False)
class _Joined:
    """Frames of all rungs with their MBAR solution.

    Attributes:
        solution: MBAR over the rungs.
        energy: Potential energies `[N]`, eV.
        volume: Volumes `[N]`, Å³.
        strains: Free logarithmic strains `[N, n_strains]`.
    """

    solution: MbarResult
    energy: Tensor
    volume: Tensor
    strains: Tensor

    def reduced(self, temperature: float, pressure: float) -> Tensor:
        """Return u = β(U + P V) of every frame `[N]`."""
        return (self.energy + pressure * self.volume) / (KB * temperature)


class GibbsLadder:
    """The rungs of one phase, joined.

    Attributes:
        n_atoms: Atoms of the cell.
        rungs: The rungs.
        overlap: Overlap matrix of the rungs `[n_rungs, n_rungs]` (see `MbarResult`).
    """

    def __init__(self, rungs: Sequence[Rung], n_atoms: int) -> None:
        """Join the rungs.

        Args:
            rungs: NPT ensembles of one cell, all with the same barostat.
            n_atoms: Atoms of the cell.

        Raises:
            StatisticsError: If there is no rung, the runs are too short for the blocks of the jackknife, or
                the multistate equations do not converge.
        """
        if not rungs:
            raise StatisticsError("a ladder without rungs", needed="at least one NPT ensemble")
        for rung in rungs:
            independent = len(rung) / rung.inefficiency / BLOCKS
            if independent < FRAMES_PER_BLOCK:
                raise StatisticsError(
                    f"the rung at {rung.temperature:g} K has {len(rung) / rung.inefficiency:.0f} independent "
                    f"frames ({len(rung)} frames, inefficiency {rung.inefficiency:.1f})",
                    needed=f"at least {BLOCKS * FRAMES_PER_BLOCK:.0f}: a run about "
                    f"{FRAMES_PER_BLOCK / max(independent, 1e-9):.2g} times as long",
                )
        self.n_atoms, self.rungs = n_atoms, tuple(rungs)
        block = torch.cat([rung.block for rung in rungs])
        whole = _join(self.rungs, None, block)
        self._joined = [whole, *(_join(self.rungs, b, block) for b in range(BLOCKS))]
        self.overlap = whole.solution.overlap

    @property
    def temperatures(self) -> tuple[float, float]:
        """Lowest and highest temperature of the rungs, K."""
        values = [rung.temperature for rung in self.rungs]
        return min(values), max(values)

    @property
    def pressures(self) -> tuple[float, float]:
        """Lowest and highest pressure of the rungs, eV/Å³."""
        values = [rung.pressure for rung in self.rungs]
        return min(values), max(values)

    def at(self, temperature: float, pressure: float, *, errors: bool = True) -> LadderState:
        """Return the state at a temperature, K, and pressure, eV/Å³.

        Args:
            temperature: Temperature, K.
            pressure: Pressure, eV/Å³.
            errors: Whether the rows of the jackknife are wanted too; without them there is row 0 alone.
        """
        parts = self._joined if errors else self._joined[:1]
        rows = [_state(part, temperature, pressure, self.n_atoms) for part in parts]
        columns = torch.tensor(rows, dtype=torch.float64).T
        whole = self._joined[0]
        n_eff = whole.solution.perturb(whole.reduced(temperature, pressure)).n_eff
        return LadderState(columns[0], columns[1], columns[2], columns[3], n_eff)

    def mean_shape(self, temperature: float, pressure: float) -> tuple[Tensor, Tensor]:
        """Return the mean free logarithmic strains `[n_strains]` and the mean volume, Å³, at a state.

        Args:
            temperature: Temperature, K.
            pressure: Pressure, eV/Å³.
        """
        whole = self._joined[0]
        weights = torch.softmax(-whole.reduced(temperature, pressure) - whole.solution.log_q, dim=0)
        return weights @ whole.strains, weights @ whole.volume


def jackknife_error(rows: Tensor) -> float:
    """Return the standard error of an estimate: row 0 is the estimate, the others leave out one block each.

    Args:
        rows: Estimates `[1 + blocks]`.
    """
    left_out = rows[1:]
    n = len(left_out)
    return math.sqrt((n - 1) / n * float((left_out - left_out.mean()).square().sum()))


def blocks_of(n_frames: int) -> Tensor:
    """Return the block of each of so many frames `[n_frames]`: equal parts in their order in time."""
    return torch.arange(n_frames) * BLOCKS // max(n_frames, 1)


def _join(rungs: Sequence[Rung], left_out: int | None, block: Tensor) -> _Joined:
    """Solve the multistate equations of all rungs without one block."""
    chosen = torch.ones_like(block, dtype=torch.bool) if left_out is None else block != left_out
    energy, volume, strains = (
        torch.cat([getattr(rung, name) for rung in rungs]).double()[chosen]
        for name in ("energy", "volume", "strains")
    )
    counts = [int(part.sum()) for part in torch.split(chosen, [len(rung) for rung in rungs])]
    u = torch.stack([(energy + r.pressure * volume) / (KB * r.temperature) for r in rungs])
    return _Joined(mbar(u, counts, [r.inefficiency for r in rungs]), energy, volume, strains)


def _state(part: _Joined, temperature: float, pressure: float, n_atoms: int) -> list[float]:
    """Return reduced G, enthalpy, volume and its variance at one (T, P)."""
    u = part.reduced(temperature, pressure)
    log_ratio = -u - part.solution.log_q
    f = -torch.logsumexp(log_ratio, dim=0)
    weights = torch.exp(log_ratio + f)
    volume = weights @ part.volume
    variance = weights @ (part.volume - volume).square()
    strains = part.strains - weights @ part.strains
    log_det = torch.linalg.slogdet((strains * weights[:, None]).T @ strains).logabsdet
    reduced = f + 0.5 * log_det + torch.log(volume) - 1.5 * n_atoms * math.log(temperature)
    enthalpy = weights @ (part.energy + pressure * part.volume)
    return [float(reduced), float(enthalpy), float(volume), float(variance)]
