"""Reweightable ensembles: frames that several reference models drew, and the free energy between these.

References are joined one by one, and dropped when they have become useless. Draws may also be lent between
state points of a phase: neighbours in temperature and pressure help each other.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Self

import numpy as np
import torch
from torch import Tensor

from mlip_refine.errors import StatisticsError
from mlip_refine.losses import EnsembleSource, Frames
from mlip_refine.observables.base import Probes, values_of
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
    require_overlap,
    stratified_error,
)

ROUNDING = 1e-6

USELESS = 0.05
"""A reference is dropped if at most this share of the effective frames of the current model goes with it."""

WORTH = 0.25
"""A lent frame must add at least this fraction of what a frame of the state itself would add."""


@dataclass(frozen=True)
class Reference:
    """A model that drew frames of an ensemble, in one sampling.

    Attributes:
        point: State at which it drew them.
        parameters: Parameters of the model, by name.
        stage: Where the frames lie in the store.
        n_frames: Number of frames.
        inefficiency: Statistical inefficiency of their energies, in frames.
        ends: Positions `[replicas, n_atoms, 3]` and cells of the last good frame of every replica, Å.
        verdicts: What happened to systems, one line each.
        kept: Where in time the frames lie `[replicas, n_times]`, as many of them true.
    """

    point: StatePoint
    parameters: Mapping[str, Tensor]
    stage: str
    n_frames: int
    inefficiency: float
    ends: tuple[Tensor, Tensor]
    verdicts: tuple[str, ...] = ()
    kept: Tensor | None = None

    @property
    def independent(self) -> float:
        """Number of independent frames."""
        return self.n_frames / self.inefficiency

    def inefficiency_of(self, values: Tensor) -> float:
        """Statistical inefficiency of values of the frames `[n]`; without times, of the energies."""
        return self.inefficiency if self.kept is None else inefficiency_on_grid(values, self.kept)


@dataclass(frozen=True)
class Ensemble:
    """What is known of one state: frames that several reference models drew, joined by MBAR.

    Every frame carries its log-density under the mixture of all references (Shirts & Chodera 2008), in which
    a reference counts with its independent frames. One reference alone is plain reweighting.

    Attributes:
        point: The state.
        references: Models that drew the frames. The first, the anchor, drew at this state; others may have
            drawn at another temperature or pressure.
        structures: Frames with their neighbours, reference after reference, replica after replica.
        volume: Volumes of the frames `[n]`, Å³.
        energies: Energies of every reference on all frames `[n_references, n]`, eV, float64, on the path that
            training uses.
        shift: Free energy of the anchor minus that of the initial model, eV, whole cell. Its error is what
            comes from frames that are no longer held.
        shift_influence: Contribution of every frame to the error of `shift` `[n]`, eV, which later estimates
            share.
        frames_per_draw: Number of frames of a whole draw, the unit of `n_eff`.
    """

    point: StatePoint
    references: tuple[Reference, ...]
    structures: Sequence[Structure]
    volume: Tensor
    energies: Tensor
    shift: Measured
    shift_influence: Tensor
    frames_per_draw: int

    @classmethod
    def from_trajectory(
        cls,
        potential: Potential,
        trajectory: Trajectory,
        stage: str,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> Self:
        """The good frames of a trajectory that `potential` drew, as if it were the initial model.

        Several draws under the same parameters may share one copy of them as `parameters`.
        """
        point, cells = trajectory.point, trajectory.cells[trajectory.kept]
        positions = trajectory.positions[trajectory.kept]
        structures = potential.graphs.frames(positions, cells, point.atoms.numbers)
        energy = potential.energies(structures)
        reference = Reference(
            point=point,
            parameters=potential.parameters() if parameters is None else parameters,
            stage=stage,
            n_frames=len(structures),
            inefficiency=trajectory.inefficiency(energy),
            ends=trajectory.last(),
            verdicts=trajectory.verdicts,
            kept=trajectory.kept,
        )
        return cls(
            point=point,
            references=(reference,),
            structures=structures,
            volume=torch.linalg.det(cells).abs(),
            energies=energy[None],
            shift=Measured(0.0, 0.0, "eV"),
            shift_influence=torch.zeros_like(energy),
            frames_per_draw=len(structures),
        )

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.structures)

    @cached_property
    def sizes(self) -> list[int]:
        """Number of frames of every reference."""
        return [r.n_frames for r in self.references]

    @property
    def pv(self) -> Tensor:
        """Pressure times volume of all frames `[n]`, eV."""
        return self.point.pressure * GPA * self.volume

    @property
    def latest(self) -> Reference:
        """The newest reference at this state, from whose ends the next draw starts."""
        return next(r for r in reversed(self.references) if r.point.name == self.point.name)

    @cached_property
    def mixture(self) -> MbarResult:
        """Free energies of the references, relative to the anchor, and the density of the mixture."""
        drawn = zip(self.references, self.energies, strict=True)
        u_kn = torch.stack([reduced(r.point, energy, self.volume) for r, energy in drawn])
        return mbar(u_kn, self.sizes, [r.inefficiency for r in self.references], by_independence=True)

    @property
    def log_q(self) -> Tensor:
        """Log-density that every frame was drawn from `[n]`, relative to the anchor's partition function."""
        return self.mixture.log_q - math.log(len(self.mixture.log_q))

    @property
    def independent(self) -> float:
        """Number of independent frames, of all references."""
        return sum(r.independent for r in self.references)

    def change(self, energy: Tensor) -> FreeEnergyEstimate:
        """Free energy of a model with energies `[n]` (eV) minus that of the anchor, in kT, whole cell."""
        return self.mixture.perturb(reduced(self.point, energy, self.volume))

    def n_eff(self, energy: Tensor) -> float:
        """Effective frames under a model with energies `[n]` (eV), in whole draws.

        `1 / Σ g_i w_i²`, w the weights of the frames in the mixture and g the statistical inefficiency of
        their draw (Kish 1965), over the independent frames of a whole draw: 1 right after a first draw, more
        where old frames still count.
        """
        per_frame = self.independent / len(self)
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

    def inefficiency_of(self, values: Tensor) -> float:
        """Statistical inefficiency of values of all frames `[n]`, each draw with its part of their spread."""
        total = spread = 0.0
        for reference, part in zip(self.references, values.detach().split(self.sizes), strict=True):
            own = float((part - part.mean()).square().sum())
            total, spread = total + reference.inefficiency_of(part) * own, spread + own
        return total / spread if spread > 0 else 1.0

    def frames(self, probes: Probes) -> Frames:
        """What a loss sees, with the probes of the current model on every frame, `energy` `[n]` among them.

        The error of `shift` is such that, with that of exponential averaging over the frames as if their
        log-density were exact, it gives the error of the multistate estimate from the initial model.
        """
        point, fixed = self.point, values_of(probes["energy"]).detach()
        work = reduced(point, fixed, self.volume) + self.log_q
        inefficiency = max(1.0, float(kish_size(-work)) / self.change(fixed).n_eff)
        apparent = exp_estimate(work, inefficiency).se / point.beta
        whole = self.error(fixed) ** 2
        # Below this share the difference is rounding.
        rest = math.sqrt(whole - apparent**2) if whole - apparent**2 > ROUNDING * whole else 0.0
        return Frames(
            probes=probes,
            positions=self.positions,
            cells=self.cells,
            numbers=point.atoms.numbers,
            masses=torch.from_numpy(point.atoms.get_masses()),
            temperature=point.temperature,
            pressure=point.pressure,
            free_cell=point.freedom != "fixed",
            log_q=self.log_q,
            inefficiency=inefficiency,
            shift=Measured(self.shift.value, rest, self.shift.unit),
            mean_enthalpy=self.enthalpy(fixed),
            inefficiency_of=self.inefficiency_of,
        )

    def error(self, energy: Tensor) -> float:
        """Standard error of the free energy of a model with energies `[n]` from the initial model's, eV."""
        last = self.mixture.influence(reduced(self.point, energy, self.volume)) / self.point.beta
        return math.hypot(self.shift.se, self.stratified(self.shift_influence + last))

    def stratified(self, influence: Tensor) -> float:
        """Standard error of an estimate from what every frame contributes to it `[n]`."""
        return stratified_error(influence, self.sizes, [r.inefficiency for r in self.references])

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
        newest, what = self.latest, f"the ensemble {self.point.name}"
        require_effective(newest.independent, minimum, what, have_length=newest.n_frames, unit="frames")

    def of_references(self, order: Sequence[int]) -> Self:
        """The frames of some of the references alone, these in another order; `shift` stays what it is."""
        bounds = pairwise(accumulate(self.sizes, initial=0))
        parts = [slice(*bound) for bound in bounds]
        energies = self.energies[list(order)]
        return replace(
            self,
            references=tuple(self.references[k] for k in order),
            structures=[s for k in order for s in self.structures[parts[k]]],
            volume=torch.cat([self.volume[parts[k]] for k in order]),
            energies=torch.cat([energies[:, parts[k]] for k in order], dim=1),
            shift_influence=torch.cat([self.shift_influence[parts[k]] for k in order]),
        )


def reduced(point: StatePoint, energy: Tensor, volume: Tensor) -> Tensor:
    """Reduced potential β(U + PV) of a state for energies `[n]`, eV, and volumes `[n]`, Å³."""
    return point.beta * (energy + point.pressure * GPA * volume)


type Energies = Callable[[Reference, Sequence[Structure]], Tensor]
"""Energies `[n]`, eV, of a reference on any frames."""


def reference_energies(potential: Potential) -> Energies:
    """Energies under the parameters of a reference, by the model that is trained."""

    def energies(reference: Reference, structures: Sequence[Structure]) -> Tensor:
        with potential.holding(reference.parameters):
            return potential.energies(structures)

    return energies


def joined(ensemble: Ensemble, draw: Ensemble, here: Tensor, energies: Energies) -> Ensemble:
    """The ensemble with the frames of one more reference, drawn at its state or at another one.

    Args:
        ensemble: What is known so far.
        draw: The new frames, of one reference.
        here: Energies of the new reference on the frames of the ensemble `[n]`, eV.
        energies: Evaluates the older references on the new frames.

    Raises:
        StatisticsError: If the references overlap too little.
    """
    there = torch.stack([energies(r, draw.structures) for r in ensemble.references])
    rows = [torch.cat([ensemble.energies, there], 1), torch.cat([here, draw.energies[0]])[None]]
    grown = replace(
        ensemble,
        references=(*ensemble.references, *draw.references),
        structures=[*ensemble.structures, *draw.structures],
        volume=torch.cat([ensemble.volume, draw.volume]),
        energies=torch.cat(rows),
        shift_influence=torch.cat([ensemble.shift_influence, torch.zeros_like(draw.energies[0])]),
    )
    what = f"the chain of references of {ensemble.point.name}"
    require_overlap(1.0 - grown.mixture.second_eigenvalue, what)
    return grown


def without(ensemble: Ensemble, index: int) -> Ensemble:
    """The ensemble without one of its references; the next one at the state takes over from the anchor.

    The new `shift` was estimated from frames that stay and from frames that go. What the former contribute to
    its error is kept frame by frame, for they are also in all later estimates; the latter's is kept as a
    number.
    """
    names = [r.point.name for r in ensemble.references]
    gone, kept = ensemble.references[index], [k for k in range(len(names)) if k != index]
    if index == 0:
        anchor = names.index(ensemble.point.name, 1)
        kept = [anchor, *(k for k in kept if k != anchor)]
        kt, energy = 1.0 / ensemble.point.beta, ensemble.energies[anchor]
        newest = ensemble.mixture.influence(reduced(ensemble.point, energy, ensemble.volume))
        change = Measured(kt * ensemble.mixture.difference(0, anchor)[0], 0.0, "eV")
        ensemble = replace(
            ensemble,
            shift=ensemble.shift + change,
            shift_influence=ensemble.shift_influence + kt * newest,
        )
    left = ensemble.shift_influence.split(ensemble.sizes)[index]
    lost = Measured(0.0, stratified_error(left, [gone.n_frames], [gone.inefficiency]), "eV")
    return replace(ensemble.of_references(kept), shift=ensemble.shift + lost)


def pruned(ensemble: Ensemble, energy: Tensor, most: int) -> tuple[Ensemble, Tensor]:
    """Drop references that the current model no longer needs, and the least needed ones beyond `most`.

    The newest reference at the state itself stays. Free energies keep their path to the initial model:
    `shift` moves with the anchor.

    Args:
        ensemble: References in the order in which they were joined.
        energy: Energies of the current model `[n]`, eV.
        most: References that may stay.

    Returns:
        The ensemble, and the energies of the current model on what is left of its frames.
    """
    while len(ensemble.references) > 1:
        own = dict(zip(map(id, ensemble.references), energy.split(ensemble.sizes), strict=True))
        smaller: list[tuple[Ensemble, Tensor]] = []
        for index, reference in enumerate(ensemble.references):
            if reference is not ensemble.latest:
                rest = without(ensemble, index)
                smaller.append((rest, torch.cat([own[id(r)] for r in rest.references])))
        left = [one.n_eff(u) for one, u in smaller]
        best = max(range(len(left)), key=left.__getitem__)
        if len(ensemble.references) <= most and left[best] < (1.0 - USELESS) * ensemble.n_eff(energy):
            break
        ensemble, energy = smaller[best]
    return ensemble, energy


def may_lend(one: StatePoint, other: StatePoint) -> bool:
    """Whether frames of one state are configurations of the other: cells free alike, or one fixed cell."""
    kinds = (one.ensemble, one.cell_freedom) == (other.ensemble, other.cell_freedom)
    same_cell = np.array_equal(one.atoms.cell.array, other.atoms.cell.array)
    return kinds and (one.ensemble == "npt" or same_cell)


def with_lent(
    ensembles: Mapping[EnsembleSource, Ensemble],
    drawn: Mapping[EnsembleSource, Ensemble],
    energies: Mapping[EnsembleSource, Tensor],
    references: Energies,
    most: int,
) -> tuple[dict[EnsembleSource, Ensemble], dict[EnsembleSource, Tensor]]:
    """Lend the newest draws to the other state points of their phase, where they are worth their evaluation.

    A lent draw counts with what the state gains once references that then help least have made room for it.

    Args:
        ensembles: Ensembles of all sources.
        drawn: New frames, of the current model alone.
        energies: Energies of the current model on all frames of every source `[n]`, eV.
        references: Evaluates older references on new frames.
        most: References that may stay at a state, lent ones among them (see `pruned`).

    Returns:
        The ensembles that have changed, and the energies of the current model on their frames.
    """
    changed: dict[EnsembleSource, Ensemble] = {}
    known: dict[EnsembleSource, Tensor] = {}
    for source, ensemble in ensembles.items():
        current, energy = ensemble, energies[source]
        for lender, draw in drawn.items():
            if lender.phase != source.phase or lender == source or not may_lend(draw.point, ensemble.point):
                continue
            try:
                grown = joined(current, draw, energy, references)
            except StatisticsError:
                continue
            left, now = pruned(grown, grown.energies[-1], most)
            gain = left.n_eff(now) - current.n_eff(energy)
            if gain >= WORTH * len(draw) / current.frames_per_draw:
                current, energy = left, now
        if current is not ensemble:
            changed[source], known[source] = current, energy
    return changed, known
