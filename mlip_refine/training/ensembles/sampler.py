"""Ensembles that follow the model: sample a state point anew, and join the frames to the older ones."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from mlip_refine.errors import MlipRefineError
from mlip_refine.losses import EnsembleSource
from mlip_refine.potential import Acceleration, Potential
from mlip_refine.sampling import FrameStore, Length, MDSettings, StatePoint, Trajectory, sample
from mlip_refine.training.ensembles.ensemble import Draw, Ensemble
from mlip_refine.training.ensembles.mixture import joined, pruned, reference_energies, with_lent

Start = Mapping[str, tuple[Tensor, Tensor]]


def stage_seed(seed: int, stage: str) -> int:
    """A seed of its own for every stage of a run."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stage}".encode()).digest()[:4], "big")


@dataclass(frozen=True)
class Policy:
    """When and how a state point is sampled anew.

    Attributes:
        threshold: Effective frames, in whole draws (see `Ensemble.n_eff`), below which it is.
        max_references: Reference models whose frames are kept at a state; 1 keeps the newest alone.
        refresh: Least share of a whole draw, its equilibration included, that is sampled anew.
        lend: Whether new frames are lent to other state points of their phase.
    """

    threshold: float = 0.5
    max_references: int = 6
    refresh: float = 0.5
    lend: bool = False

    def share(self, n_eff: float) -> float:
        """Share of a whole draw that makes up for what is missing of one."""
        if self.max_references == 1:
            return 1.0
        return min(1.0, max(self.refresh, 1.0 - n_eff))


@dataclass
class EnsembleSampler:
    """Draws ensembles of the current model for the sources of the losses.

    Attributes:
        points: State point of every source, in its cell.
        settings: How to integrate.
        length: How long to sample.
        store: Where frames are kept.
        seed: Random seed of the run.
        sampling_dtype: Precision of the sampling copy.
        min_effective: Independent frames below which an ensemble is refused.
        policy: When and how state points are sampled anew.
        md_steps: Steps of molecular dynamics taken so far, summed over atoms.
        accelerate: How the sampling copy finds forces (see `Potential.frozen_copy`).
    """

    points: Mapping[EnsembleSource, StatePoint]
    settings: MDSettings
    length: Length
    store: FrameStore
    seed: int
    sampling_dtype: str
    min_effective: float
    policy: Policy = field(default_factory=Policy)
    md_steps: int = 0
    accelerate: Acceleration = "none"

    def initial(
        self, potential: Potential, sources: Sequence[EnsembleSource]
    ) -> dict[EnsembleSource, Ensemble]:
        """First ensembles of a run.

        Raises:
            SamplingError: If a phase does not survive.
            StatisticsError: If the frames are too few or too correlated.
        """
        drawn = self.draw(potential, sources, "initial")
        ensembles = {s: Ensemble.of(d) for s, d in drawn.items()}
        if self.policy.lend:
            known = {s: d.energy for s, d in drawn.items()}
            references = reference_energies(potential)
            ensembles |= with_lent(ensembles, drawn, known, references, self.policy.max_references)[0]
        return ensembles

    def draw(
        self,
        potential: Potential,
        sources: Sequence[EnsembleSource],
        stage: str,
        share: float = 1.0,
        start: Start | None = None,
    ) -> dict[EnsembleSource, Draw]:
        """Sample the sources in one batch with a frozen copy of the potential.

        Raises:
            SamplingError: If a phase does not survive.
            StatisticsError: If the frames are too few or too correlated.
        """
        points = [self.points[s] for s in sources]
        frames = max(1, round(share * self.length.frames))
        length = Length(share * self.length.equilibration, frames, self.length.segment)
        frozen = potential.frozen_copy(self.sampling_dtype, self.accelerate)
        seed = stage_seed(self.seed, stage)
        runs = sample(
            frozen, points, self.settings, length, seed=seed, stage=stage, store=self.store, start=start
        )
        self.md_steps += self._cost(points, length)
        reference = potential.parameters()
        drawn = {
            s: Draw.from_trajectory(potential, runs[self.points[s].name], stage, reference) for s in sources
        }
        for one in drawn.values():
            one.require_frames(self.min_effective * share)
        return drawn

    def _cost(self, points: Sequence[StatePoint], length: Length) -> int:
        """Steps times atoms of a draw."""
        if self.settings.timestep is None:
            raise MlipRefineError("steps cannot be counted without a time step: give sampling.timestep")
        per_frame = max(1, round(self.settings.interval / self.settings.timestep))
        steps = round(length.equilibration / self.settings.timestep) + length.frames * per_frame
        return steps * sum(p.replicas * len(p.atoms) for p in points)

    def redraw(
        self,
        potential: Potential,
        old: Mapping[EnsembleSource, Ensemble],
        energies: Mapping[EnsembleSource, Tensor],
        stale: Sequence[EnsembleSource],
        stage: str,
    ) -> tuple[dict[EnsembleSource, Ensemble], dict[EnsembleSource, Tensor]]:
        """Sample sources anew from their last frames, and join the draws to what is known.

        Args:
            potential: The current model.
            old: The ensembles of all sources.
            energies: Energies of the current model on their frames `[n]`, eV.
            stale: The sources that are sampled.
            stage: Name of the sampling.

        Returns:
            The ensembles that have changed, and the energies of the current model on their frames: it is the
            reference of the new draws, so none has to be evaluated.

        Raises:
            SamplingError: If a phase does not survive.
            StatisticsError: If new frames are too few or too correlated, or a reference has lost its overlap.
        """
        start = {self.points[s].name: old[s].latest.ends for s in stale}
        share = max(self.policy.share(old[s].n_eff(energies[s])) for s in stale)
        drawn = self.draw(potential, stale, stage, share, start)
        references = reference_energies(potential)
        fresh, known = {}, dict(energies)
        for s in stale:
            grown = joined(old[s], drawn[s], energies[s], references)
            fresh[s], known[s] = pruned(grown, grown.energies[-1], self.policy.max_references)
        if self.policy.lend:
            lent = with_lent({**old, **fresh}, drawn, known, references, self.policy.max_references)
            fresh, known = fresh | lent[0], known | lent[1]
        return fresh, {s: known[s] for s in fresh}

    def stored(
        self,
        potential: Potential,
        sources: Sequence[EnsembleSource],
        stage: str,
        reference: Mapping[str, Tensor],
    ) -> dict[EnsembleSource, Draw] | None:
        """Draws of one stage from the store, or `None` if files are gone."""
        runs = {s: self._read(self.points[s], stage) for s in sources}
        found = {s: run for s, run in runs.items() if run is not None}
        if len(found) < len(runs):
            return None
        with potential.holding(reference):
            return {s: Draw.from_trajectory(potential, run, stage, reference) for s, run in found.items()}

    def _read(self, point: StatePoint, stage: str) -> Trajectory | None:
        """Frames of a point."""
        found = self.store.read(stage, 0, {point.name: point}, None)
        return None if found is None else found[0][point.name]
