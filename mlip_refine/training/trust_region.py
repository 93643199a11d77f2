"""A trust region for reweighting: a step is shortened so that enough frames still count at its end.

Far from their references, frames say nothing about the model. So a proposed step is taken whole only if the
effective frames of every state stay above the threshold; else it is shortened to where the poorest state
meets it. What is paid are energies of stored frames, which the next update needs anyway, not new dynamics.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mlip_refine.errors import MlipRefineError
from mlip_refine.losses import EnsembleSource
from mlip_refine.potential import Potential
from mlip_refine.training.ensemble import Ensemble
from mlip_refine.training.streaming import probe_energies

SEARCHES = 5
"""Most lengths that are tried for one state after the whole step."""

CLOSE = 1.05
"""A length is settled when the effective frames are above the threshold by this factor at most."""

LEAST = 1e-3
"""Effective frames, in whole draws, that stand for none at all."""

type Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class Settled:
    """The end of a proposed step.

    Attributes:
        alpha: Part of the step that was taken.
        energies: Energies of the model at the end of the step, on the frames of the sources evaluated there
            `[n]`, eV.
        exhausted: Sources that allow too little of a step: it is time to sample them anew.
    """

    alpha: float
    energies: Mapping[EnsembleSource, Tensor]
    exhausted: tuple[EnsembleSource, ...]


@dataclass(frozen=True)
class TrustRegion:
    """How far a step may go.

    Attributes:
        threshold: Effective frames, in whole draws, that every state must keep.
        floor: Part of a step below which it is better to sample anew than to shorten further.
    """

    threshold: float
    floor: float = 0.5

    def settle(
        self,
        potential: Potential,
        start: Parameters,
        ensembles: Mapping[EnsembleSource, Ensemble],
        before: Mapping[EnsembleSource, float],
    ) -> Settled:
        """Shorten the step from `start` to the parameters of the potential, which are changed in place.

        Args:
            potential: At the end of the proposed step.
            start: Parameters before the step.
            ensembles: Frames of every state.
            before: Effective frames of every state at `start`, in whole draws.
        """
        line = _Line(potential, start, ensembles)
        whole = {s: line.at(1.0, s) for s in ensembles}
        goals = {s: self.goal(before[s]) for s in ensembles}
        allowed = dict.fromkeys(ensembles, 1.0)
        poor = [s for s in ensembles if whole[s] < goals[s]]
        for s in poor:
            # What a model quadratic in the length, as for Gaussian energies, allows.
            lost = math.log(before[s] / max(whole[s], LEAST))
            allowed[s] = math.sqrt(math.log(before[s] / goals[s]) / lost)
        alpha = 1.0
        for source in sorted(poor, key=whole.__getitem__):
            shorter = _longest(line, source, goals[source], before[source], alpha)
            if shorter < alpha:
                alpha = allowed[source] = shorter
        exhausted = tuple(s for s in ensembles if alpha < self.floor and allowed[s] < self.floor)
        return Settled(alpha, line.end(alpha), exhausted)

    def goal(self, n_eff: float) -> float:
        """Effective frames that a step must leave; a state that is below the threshold may not lose much."""
        return self.threshold if n_eff > self.threshold else 0.95 * n_eff


class _Line:
    """Effective frames along a step; energies that were evaluated are kept."""

    def __init__(
        self, potential: Potential, start: Parameters, ensembles: Mapping[EnsembleSource, Ensemble]
    ) -> None:
        self.potential, self.ensembles = potential, ensembles
        self.start, self.stop = start, potential.parameters()
        self.seen: dict[tuple[float, EnsembleSource], Tensor] = {}

    def at(self, alpha: float, source: EnsembleSource) -> float:
        """Effective frames of a source after this part of the step; none if energies are not finite."""
        if (alpha, source) not in self.seen:
            self._move(alpha)
            self.seen[alpha, source] = self.potential.energies(self.ensembles[source].structures)
        energy = self.seen[alpha, source]
        return self.ensembles[source].n_eff(energy) if bool(energy.isfinite().all()) else 0.0

    def end(self, alpha: float) -> dict[EnsembleSource, Tensor]:
        """Stay here; energies that are known here."""
        self._move(alpha)
        return {s: energy for (a, s), energy in self.seen.items() if a == alpha}

    def _move(self, alpha: float) -> None:
        if alpha in (0.0, 1.0):
            self.potential.set_parameters(self.stop if alpha else self.start)
            return
        self.potential.set_parameters({k: torch.lerp(v, self.stop[k], alpha) for k, v in self.start.items()})


def _longest(line: _Line, source: EnsembleSource, goal: float, before: float, limit: float) -> float:
    """The longest part of a step, up to `limit`, that leaves a source its goal."""
    low, n_low, high, n_high = 0.0, before, limit, line.at(limit, source)
    if n_high >= goal:
        return limit
    aim, caution = math.log(0.5 * (1.0 + CLOSE) * goal), 1.0
    for _ in range(SEARCHES):
        # Where ln n, quadratic in the length as for Gaussian energies, meets the goal.
        top, bottom = math.log(n_low), math.log(max(n_high, LEAST))
        part = caution * min(max((top - aim) / (top - bottom), 0.02), 0.98)
        alpha = math.sqrt(low**2 + part * (high**2 - low**2))
        n = line.at(alpha, source)
        if n < goal:
            # Few frames say little about how few they are: such points make the model too bold.
            high, n_high, caution = alpha, n, 0.7 * caution
            continue
        low, n_low, caution = alpha, n, 1.0
        if n <= CLOSE * goal:
            break
    return low


@dataclass
class ProposedStep:
    """A step of the optimiser before it is taken.

    Attributes:
        potential: The potential, at the end of the step.
        start: Parameters before the step.
        ensembles: Frames of the sources that act.
        energies: Energies of the potential on them before the step `[n]`, eV.
        n_eff: Effective frames of every source before the step, in whole draws.
        threshold: Effective frames of a trust region, in whole draws; 0 without one.
        losses: Weighted sum of the losses at the parameters as they are, from energies of all frames.
        end: Where the step ends.
        exhausted: Sources that have allowed too little of one of the steps that were tried.
    """

    potential: Potential
    start: Parameters
    ensembles: Mapping[EnsembleSource, Ensemble]
    energies: Mapping[EnsembleSource, Tensor]
    n_eff: Mapping[EnsembleSource, float]
    threshold: float
    losses: Callable[[Mapping[EnsembleSource, Tensor]], float]
    end: Settled = field(default_factory=lambda: Settled(1.0, {}, ()))
    exhausted: set[EnsembleSource] = field(default_factory=set)

    def settle(self, fewest: float = 0.0) -> float:
        """Shorten the step so that every source keeps `fewest` effective frames and the threshold."""
        threshold = max(self.threshold, fewest)
        if threshold > 0 and self.n_eff:
            self.end = TrustRegion(threshold).settle(self.potential, self.start, self.ensembles, self.n_eff)
            self.exhausted.update(self.end.exhausted)
        return self.end.alpha

    def objective(self) -> float:
        """Return the losses at the end of the step; infinite where they cannot be evaluated."""
        missing = {s: e for s, e in self.ensembles.items() if s not in self.end.energies}
        energies = {**self.end.energies, **probe_energies(self.potential, missing)}
        self.end = replace(self.end, energies=energies)
        if not all(bool(e.isfinite().all()) for e in energies.values()):
            return math.inf
        try:
            return self.losses({s: energies[s] for s in self.ensembles})
        except MlipRefineError:
            # Such as a crystal that does not come to rest.
            return math.inf

    def refuse(self) -> None:
        """Take no step; sources with too few effective frames for one are sampled anew."""
        exhausted = tuple(s for s in self.ensembles if s in self.exhausted)
        self.end = Settled(0.0, self.energies, exhausted)
