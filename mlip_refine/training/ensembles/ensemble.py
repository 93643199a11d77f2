"""Reweightable ensembles: draws of one or several references, and the free energy that leads to them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Self

import torch
from torch import Tensor

from mlip_refine.losses import Frames
from mlip_refine.observables.base import Probes, Sample, sample_at, values_of
from mlip_refine.potential import Potential, Structure
from mlip_refine.quantities import GPA, Measured
from mlip_refine.sampling import StatePoint, Trajectory
from mlip_refine.sampling.state_points import inefficiency_on_grid
from mlip_refine.statistics import (
    FreeEnergyEstimate,
    MbarResult,
    exp_estimate,
    kish_size,
    mbar,
    require_effective,
    stratified_error,
)

ROUNDING = 1e-6


@dataclass(frozen=True)
class Draw:
    """Frames that one reference model drew at one state.

    Attributes:
        point: The state.
        structures: Frames with their neighbours, replica after replica.
        energy: Energies of the reference, recomputed on the path that training uses `[n]`, eV, float64.
        volume: Volumes of the frames `[n]`, Å³.
        inefficiency: Statistical inefficiency of the energies, in frames.
        stage: Where the frames lie in the store.
        ends: Positions `[replicas, n_atoms, 3]` and cells of the last good frame of every replica, Å.
        reference: Parameters of the reference model, by name.
        verdicts: What happened to systems, one line each.
        kept: Where in time the frames lie `[replicas, n_frames]`, n of them true.
    """

    point: StatePoint
    structures: Sequence[Structure]
    energy: Tensor
    volume: Tensor
    inefficiency: float
    stage: str
    ends: tuple[Tensor, Tensor]
    reference: Mapping[str, Tensor]
    verdicts: tuple[str, ...] = ()
    kept: Tensor | None = None

    @classmethod
    def from_trajectory(
        cls,
        potential: Potential,
        trajectory: Trajectory,
        stage: str,
        reference: Mapping[str, Tensor] | None = None,
    ) -> Self:
        """Prepare the good frames of a trajectory that `potential` drew.

        Several draws under the same parameters may share one copy of them as `reference`.
        """
        point, cells = trajectory.point, trajectory.cells[trajectory.kept]
        positions = trajectory.positions[trajectory.kept]
        structures = potential.graphs.frames(positions, cells, point.atoms.numbers)
        energy = potential.energies(structures)
        return cls(
            point=point,
            structures=structures,
            energy=energy,
            volume=torch.linalg.det(cells).abs(),
            inefficiency=trajectory.inefficiency(energy),
            stage=stage,
            ends=trajectory.last(),
            reference=potential.parameters() if reference is None else reference,
            verdicts=trajectory.verdicts,
            kept=trajectory.kept,
        )

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.structures)

    @property
    def independent(self) -> float:
        """Number of independent frames."""
        return len(self) / self.inefficiency

    def inefficiency_of(self, values: Tensor) -> float:
        """Statistical inefficiency of values of the frames `[n]`; without times, of the energies."""
        return self.inefficiency if self.kept is None else inefficiency_on_grid(values, self.kept)

    def require_frames(self, minimum: float) -> None:
        """Refuse a draw with too few independent frames.

        Raises:
            StatisticsError: With the number of frames that would do.
        """
        what = f"the ensemble {self.point.name}"
        require_effective(self.independent, minimum, what, have_length=len(self), unit="frames")


@dataclass(frozen=True)
class Ensemble:
    """What is known of one state: draws of several reference models, joined by MBAR.

    Every frame carries its log-density under the mixture of all draws (Shirts & Chodera 2008), in which a
    draw counts with its independent frames. One draw alone is plain reweighting.

    Attributes:
        point: The state.
        draws: Frames, draw after draw. The first, the anchor, was drawn at this state; others may come from
            another temperature or pressure.
        energies: Energies of every reference on all frames `[n_draws, n]`, eV.
        shift: Free energy of the anchor's reference minus that of the initial model, eV, whole cell. Its
            error is what comes from frames that are no longer held.
        shift_influence: Contribution of every frame to the error of `shift` `[n]`, eV, which later estimates
            share.
        frames_per_draw: Number of frames of a whole draw, the unit of `n_eff`.
    """

    point: StatePoint
    draws: tuple[Draw, ...]
    energies: Tensor
    shift: Measured
    shift_influence: Tensor
    frames_per_draw: int

    @classmethod
    def of(cls, draw: Draw, shift: Measured | None = None) -> Self:
        """The ensemble of a single draw, by default of the initial model."""
        shift = shift or Measured(0.0, 0.0, "eV")
        return cls(draw.point, (draw,), draw.energy[None], shift, torch.zeros_like(draw.energy), len(draw))

    @classmethod
    def from_trajectory(cls, potential: Potential, trajectory: Trajectory, stage: str) -> Self:
        """The ensemble of the good frames of a trajectory that `potential`, the initial model, drew."""
        return cls.of(Draw.from_trajectory(potential, trajectory, stage))

    @cached_property
    def structures(self) -> list[Structure]:
        """All frames."""
        return list(chain.from_iterable(d.structures for d in self.draws))

    @cached_property
    def volume(self) -> Tensor:
        """Volumes of all frames `[n]`, Å³."""
        return torch.cat([d.volume for d in self.draws])

    @property
    def pv(self) -> Tensor:
        """Pressure times volume of all frames `[n]`, eV."""
        return self.point.pressure * GPA * self.volume

    @property
    def latest(self) -> Draw:
        """The newest draw at this state, whose ends the next one starts from."""
        return next(d for d in reversed(self.draws) if d.point.name == self.point.name)

    @cached_property
    def mixture(self) -> MbarResult:
        """Free energies of the references, relative to the anchor, and the density of the mixture."""
        u_kn = [reduced(d.point, u, self.volume) for d, u in zip(self.draws, self.energies, strict=True)]
        counts = [len(d) for d in self.draws]
        return mbar(torch.stack(u_kn), counts, [d.inefficiency for d in self.draws], by_independence=True)

    @property
    def log_q(self) -> Tensor:
        """Log-density that every frame was drawn from `[n]`, relative to the anchor's partition function."""
        return self.mixture.log_q - math.log(len(self.mixture.log_q))

    @property
    def independent(self) -> float:
        """Number of independent frames, of all draws."""
        return sum(d.independent for d in self.draws)

    def change(self, energy: Tensor) -> FreeEnergyEstimate:
        """Free energy of a model with energies `[n]` (eV) minus that of the anchor, in kT, whole cell."""
        return self.mixture.perturb(reduced(self.point, energy, self.volume))

    def n_eff(self, energy: Tensor) -> float:
        """Effective frames under a model with energies `[n]` (eV), in whole draws.

        `1 / Σ g_i w_i²`, w the weights of the frames in the mixture and g the statistical inefficiency of
        their draw (Kish 1965), over the independent frames of a whole draw: 1 right after a first draw, more
        where old frames still count.
        """
        per_frame = self.independent / sum(len(d) for d in self.draws)
        # Ten digits: decisions that rest on it must not depend on how a product happens to be summed.
        return float(f"{self.change(energy).n_eff / (self.frames_per_draw * per_frame):.10g}")

    @cached_property
    def positions(self) -> Tensor:
        """Of all frames `[n, n_atoms, 3]`, Å, unwrapped."""
        return torch.stack([s.positions for s in self.structures])

    @cached_property
    def cells(self) -> Tensor:
        """Of all frames, rows `[n, 3, 3]`, Å."""
        return torch.stack([s.cell for s in self.structures])

    def sample(self, probes: Probes) -> Sample:
        """The frames as observables see them."""
        return sample_at(self.point, self.positions, self.cells, probes)

    def inefficiency_of(self, values: Tensor) -> float:
        """Statistical inefficiency of values of all frames `[n]`, each draw with its part of their spread."""
        total = spread = 0.0
        for draw, part in zip(self.draws, values.detach().split([len(d) for d in self.draws]), strict=True):
            own = float((part - part.mean()).square().sum())
            total, spread = total + draw.inefficiency_of(part) * own, spread + own
        return total / spread if spread > 0 else 1.0

    def frames(self, probes: Probes) -> Frames:
        """What a loss sees, with the probes of the current model on every frame, `energy` `[n]` among them.

        The error of `shift` is such that, with that of exponential averaging over the frames as if their
        log-density were exact, it gives the error of the multistate estimate from the initial model.
        """
        fixed = values_of(probes["energy"]).detach()
        work = reduced(self.point, fixed, self.volume) + self.log_q
        inefficiency = max(1.0, float(kish_size(-work)) / self.change(fixed).n_eff)
        apparent = exp_estimate(work, inefficiency).se / self.point.beta
        whole = self.error(fixed) ** 2
        # Below this share the difference is rounding.
        rest = math.sqrt(whole - apparent**2) if whole - apparent**2 > ROUNDING * whole else 0.0
        return Frames(
            probes=probes,
            log_q=self.log_q,
            pv=self.pv,
            beta=self.point.beta,
            n_atoms=len(self.point.atoms),
            inefficiency=inefficiency,
            shift=Measured(self.shift.value, rest, self.shift.unit),
            enthalpy=self.enthalpy(fixed),
            geometry=self.sample(probes),
            inefficiency_of=self.inefficiency_of,
        )

    def error(self, energy: Tensor) -> float:
        """Standard error of the free energy of a model with energies `[n]` from the initial model's, eV."""
        last = self.mixture.influence(reduced(self.point, energy, self.volume)) / self.point.beta
        return math.hypot(self.shift.se, self.stratified(self.shift_influence + last))

    def stratified(self, influence: Tensor) -> float:
        """Standard error of an estimate from what every frame contributes to it `[n]`."""
        return stratified_error(influence, [len(d) for d in self.draws], [d.inefficiency for d in self.draws])

    def enthalpy(self, energy: Tensor) -> Measured:
        """Mean U + PV under a model with energies `[n]`, eV, whole cell.

        At fixed cell, P is the wanted pressure.
        """
        u_n = reduced(self.point, energy, self.volume)
        return Measured(*self.mixture.average(energy + self.pv, u_n), "eV")

    def require_frames(self, minimum: float) -> None:
        """Refuse an ensemble whose newest draw has too few independent frames.

        Raises:
            StatisticsError: With the number of frames that would do.
        """
        self.latest.require_frames(minimum)


def reduced(point: StatePoint, energy: Tensor, volume: Tensor) -> Tensor:
    """Reduced potential β(U + PV) of a state for energies `[n]`, eV, and volumes `[n]`, Å³."""
    return point.beta * (energy + point.pressure * GPA * volume)
