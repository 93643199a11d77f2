"""The ensembles of a training run: sampled, kept within reach of the model, and restored from checkpoints.

`EnsembleSampler` draws frames and joins them to older ones. `EnsembleTracker` says when, for losses whose
frames are reweighted. `ThermalCorrections` draws for a `PotentialLoss`, which follows the current model
exactly and the thermal part of its property only from draw to draw: those frames are not reweighted, but
averaged once, under the parameters that drew them.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from mlip_refine.errors import InputError, MlipRefineError
from mlip_refine.losses import EnsembleLoss, EnsembleSource, Frames, Loss, PotentialLoss
from mlip_refine.potential import Acceleration, Potential
from mlip_refine.quantities import Measured
from mlip_refine.sampling import FrameStore, Length, MDSettings, StatePoint, sample
from mlip_refine.training.ensemble import Ensemble, joined, pruned, reference_energies, with_lent
from mlip_refine.training.streaming import further_probes, probe_energies, wanted_by
from mlip_refine.training.trust_region import Settled

LOST = 0.2
"""Effective frames, in whole draws, below which old frames are not joined to new ones if nobody needs it."""

UNKNOWN = Measured(float("nan"), float("nan"), "eV")
"""Free energy of a reference from the initial model, where no chain of references leads back to it."""

type Start = Mapping[str, tuple[Tensor, Tensor]]
"""Positions and cells to start from, by the name of a state point."""


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
    _checksums: dict[tuple[str, str], str | None] = field(init=False, default_factory=dict)

    def initial(
        self, potential: Potential, sources: Sequence[EnsembleSource]
    ) -> dict[EnsembleSource, Ensemble]:
        """First ensembles of a run.

        Raises:
            SamplingError: If a phase does not survive.
            StatisticsError: If the frames are too few or too correlated.
        """
        drawn = self.draw(potential, sources, "initial")
        if not self.policy.lend:
            return drawn
        known = {s: e.energies[0] for s, e in drawn.items()}
        references = reference_energies(potential)
        return drawn | with_lent(drawn, drawn, known, references, self.policy.max_references)[0]

    def draw(
        self,
        potential: Potential,
        sources: Sequence[EnsembleSource],
        stage: str,
        share: float = 1.0,
        start: Start | None = None,
    ) -> dict[EnsembleSource, Ensemble]:
        """Sample the sources in one batch with a frozen copy of the potential, which is their only reference.

        Args:
            potential: The current model.
            sources: What is sampled.
            stage: Name of the sampling.
            share: Part of a whole draw, its equilibration included.
            start: Where to start; by default the ideal crystals.

        Raises:
            SamplingError: If a phase does not survive.
            StatisticsError: If the frames are too few or too correlated.
        """
        points, settings = [self.points[s] for s in sources], self.settings
        if settings.timestep is None:
            raise MlipRefineError("steps cannot be counted without a time step: give sampling.timestep")
        frames = max(1, round(share * self.length.frames))
        length = Length(share * self.length.equilibration, frames, self.length.segment)
        frozen = potential.frozen_copy(self.sampling_dtype, self.accelerate)
        seed = stage_seed(self.seed, stage)
        runs = sample(frozen, points, settings, length, seed=seed, stage=stage, store=self.store, start=start)
        steps = round(length.equilibration / settings.timestep)
        steps += length.frames * max(1, round(settings.interval / settings.timestep))
        self.md_steps += steps * sum(p.replicas * len(p.atoms) for p in points)
        parameters = potential.parameters()
        drawn = {
            s: Ensemble.from_trajectory(potential, runs[self.points[s].name], stage, parameters)
            for s in sources
        }
        for ensemble in drawn.values():
            ensemble.require_frames(self.min_effective * share)
        return drawn

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
        parameters: Mapping[str, Tensor],
        checksums: Mapping[str, str | None],
    ) -> dict[EnsembleSource, Ensemble]:
        """Draws of one stage from the store, by a model of these parameters.

        Args:
            potential: The potential, whatever its parameters.
            sources: What was drawn.
            stage: Name of the draw.
            parameters: Parameters of the model that drew.
            checksums: Checksums that the frames have (see `checksums`), as far as they are known.

        Raises:
            InputError: If files are gone, damaged, or hold other frames.
        """
        drawn = {}
        with potential.holding(parameters):
            for source in sources:
                point = self.points[source]
                found = self.store.read(stage, 0, {point.name: point}, None)
                if found is None:
                    raise InputError(
                        f"the frames of the stage {stage!r} are gone",
                        where=str(self.store.folder),
                        fix="Bring the folder back, or start again under another name.",
                    )
                wanted = checksums.get(f"{stage}/{point.name}")
                if wanted not in (None, self.store.checksum(stage, 0, point.name)):
                    raise InputError(
                        f"the frames of {point.name} are not those that this run has drawn",
                        where=str(self.store.path(stage, 0)),
                        fix="Bring its own file back, or start again under another name.",
                    )
                trajectory = found[0][point.name]
                drawn[source] = Ensemble.from_trajectory(potential, trajectory, stage, parameters)
        return drawn

    def checksums(self, sources: Sequence[EnsembleSource], stage: str) -> dict[str, str | None]:
        """Checksums of the stored frames of a stage, by `STAGE/POINT`."""
        for name in (self.points[source].name for source in sources):
            if (stage, name) not in self._checksums:
                self._checksums[stage, name] = self.store.checksum(stage, 0, name)
        names = [self.points[source].name for source in sources]
        return {f"{stage}/{name}": self._checksums[stage, name] for name in names}


class EnsembleTracker:
    """Frames of every source, with energies of the current model, sampled anew where too few still count.

    Updates in which no ensemble acts move the model without looking at frames. If they have moved it out of
    reach, a source begins anew from its last frames; only where a free-energy difference needs the chain of
    references back to the initial model, the chain must hold, or the run stops.

    Attributes:
        sources: What is sampled.
        current: Ensembles by source; empty until they are needed.
        energies: Energies of the current model on their frames `[n]`, eV, as far as they are known.
        exhausted: Sources that are to be sampled anew at the next update, whatever their frames say.
    """

    def __init__(self, sampler: EnsembleSampler, losses: Sequence[EnsembleLoss]) -> None:
        """Collect the sources that the losses need; nothing is sampled yet."""
        self.sampler = sampler
        self.sources = sorted({s for loss in losses for s in loss.sources})
        self.chained = frozenset(s for loss in losses if loss.anchored for s in loss.sources)
        self.current: dict[EnsembleSource, Ensemble] = {}
        self.energies: dict[EnsembleSource, Tensor] = {}
        self.exhausted: tuple[EnsembleSource, ...] = ()

    def begin(self, potential: Potential, *, acting: bool) -> None:
        """Sample the initial model, if its frames are needed.

        Args:
            potential: The initial model.
            acting: Whether the ensembles act in the first update.

        Raises:
            SamplingError: If a phase does not survive.
            StatisticsError: If the frames are too few or too correlated.
        """
        if self.sources and (acting or self.chained):
            self.current = self.sampler.initial(potential, self.sources)

    def follow(self, potential: Potential, step: int, *, paused: bool) -> list[EnsembleSource]:
        """Update the energies of the current model on all frames; sample anew where too few still count.

        Args:
            potential: The current model.
            step: Number of the update, which names new frames.
            paused: Whether the update before this one did without ensembles.

        Returns:
            The sources that were sampled.

        Raises:
            MlipRefineError: If energies are not finite.
            SamplingError: If a phase does not survive.
            StatisticsError: If new frames are too few or too correlated, or a chain of references is broken.
        """
        if not self.current and self.sources:
            first = self.sampler.initial(potential, self.sources)
            self.current = {s: replace(ensemble, shift=UNKNOWN) for s, ensemble in first.items()}
            self.energies = probe_energies(potential, self.current)
            return self.sources
        missing = {s: e for s, e in self.current.items() if s not in self.energies}
        known = self.energies | probe_energies(potential, missing)
        # Gradients are summed in the order of the ensembles, whatever a trust region has evaluated already.
        self.energies = {s: known[s] for s in self.current}
        for source, energy in self.energies.items():
            if not bool(energy.isfinite().all()):
                raise MlipRefineError(
                    f"update {step}: energies of {source.name} became non-finite; lower "
                    "training.learning_rate, or raise training.damping, and start again under another name"
                )
        n_eff = self.n_eff()
        stale = [s for s, n in n_eff.items() if s in self.exhausted or n < self.sampler.policy.threshold]
        lost = [s for s in stale if paused and n_eff[s] < LOST and s not in self.chained]
        joining = [s for s in stale if s not in lost]
        if joining:
            fresh, known = self.sampler.redraw(
                potential, self.current, self.energies, joining, f"step-{step:04d}"
            )
            self.current |= fresh
            self.energies |= known
        if lost:
            # Their old frames say nothing any more: the new ones take their place.
            start = {self.sampler.points[s].name: self.current[s].latest.ends for s in lost}
            drawn = self.sampler.draw(potential, lost, f"step-{step:04d}-anew", start=start)
            self.current |= {s: replace(ensemble, shift=UNKNOWN) for s, ensemble in drawn.items()}
            self.energies |= {s: ensemble.energies[0] for s, ensemble in drawn.items()}
        return stale

    def n_eff(self) -> dict[EnsembleSource, float]:
        """Effective frames of the current model by source, in whole draws."""
        return {s: self.current[s].n_eff(energy) for s, energy in self.energies.items()}

    def moved(self, settled: Settled | None = None) -> None:
        """The model has changed: what is known of it is what its step was settled with, or nothing."""
        self.energies = {} if settled is None else dict(settled.energies)
        if settled is not None:
            self.exhausted = settled.exhausted

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint; the frames stay in the store."""
        by_name = {s.name: s for s in self.current}
        checksums = dict[str, str | None]()
        for reference in chain.from_iterable(e.references for e in self.current.values()):
            checksums |= self.sampler.checksums([by_name[reference.point.name]], reference.stage)
        return {
            "ensembles": saved_ensembles(self.current) | {"checksums": checksums},
            "exhausted": [s.name for s in self.exhausted],
        }

    def load_state_dict(self, potential: Potential, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            InputError: If frames are gone.
        """
        self.current = restored_ensembles(self.sampler, potential, state["ensembles"])
        self.exhausted = tuple(s for s in self.current if s.name in state["exhausted"])


def saved_ensembles(ensembles: Mapping[EnsembleSource, Ensemble]) -> dict[str, Any]:
    """What a checkpoint keeps of ensembles; the frames stay in the store."""
    by_name = {s.name: s for s in ensembles}
    return {
        "references": {r.stage: dict(r.parameters) for e in ensembles.values() for r in e.references},
        "ensembles": [
            {
                "source": asdict(source),
                "draws": [{"stage": r.stage, "source": asdict(by_name[r.point.name])} for r in e.references],
                "energies": e.energies,
                "shift": [e.shift.value, e.shift.se],
                "pull": e.shift_influence,
                "whole": e.frames_per_draw,
            }
            for source, e in ensembles.items()
        ],
    }


def restored_ensembles(
    sampler: EnsembleSampler, potential: Potential, saved: Mapping[str, Any]
) -> dict[EnsembleSource, Ensemble]:
    """Ensembles of a checkpoint, with the frames from the store, bit for bit as they were.

    Raises:
        InputError: If frames are gone.
    """
    wanted: dict[str, set[EnsembleSource]] = {}
    for entry in saved["ensembles"]:
        for draw in entry["draws"]:
            wanted.setdefault(draw["stage"], set()).add(EnsembleSource(**draw["source"]))
    found: dict[tuple[str, EnsembleSource], Ensemble] = {}
    for stage, sources in wanted.items():
        parameters, checksums = saved["references"][stage], saved.get("checksums", {})
        drawn = sampler.stored(potential, sorted(sources), stage, parameters, checksums)
        found |= {(stage, source): ensemble for source, ensemble in drawn.items()}
    restored = {}
    for entry in saved["ensembles"]:
        source = EnsembleSource(**entry["source"])
        value, se = entry["shift"]
        parts = [found[draw["stage"], EnsembleSource(**draw["source"])] for draw in entry["draws"]]
        restored[source] = Ensemble(
            point=sampler.points[source],
            references=tuple(chain.from_iterable(part.references for part in parts)),
            structures=list(chain.from_iterable(part.structures for part in parts)),
            volume=torch.cat([part.volume for part in parts]),
            energies=entry["energies"],
            shift=Measured(value, se, "eV"),
            shift_influence=entry["pull"],
            frames_per_draw=entry["whole"],
        )
    return restored


def own_frames(
    potential: Potential, loss: Loss, drawn: Mapping[EnsembleSource, Ensemble]
) -> dict[EnsembleSource, Frames]:
    """Return frames of the sources of a loss, with its probes, as the potential that drew them sees them."""
    wanted = wanted_by(loss)
    return {
        source: drawn[source].frames(
            {
                "energy": drawn[source].energies[0],
                **further_probes(potential, drawn[source].structures, wanted),
            }
        )
        for source in loss.sources
    }


class ThermalCorrections:
    """Draws frames for losses on the potential itself.

    Attributes:
        stages: Where the newest draw of every loss lies in the store, and the parameters that drew it.
    """

    def __init__(self, sampler: EnsembleSampler) -> None:
        """Draw with a sampler; nothing has been drawn yet."""
        self.sampler = sampler
        self.stages: dict[str, tuple[str, Mapping[str, Tensor]]] = {}
        self._ends: dict[str, dict[EnsembleSource, tuple[Tensor, Tensor]]] = {}
        self._checksums: dict[str, dict[str, str | None]] = {}

    def follow(self, potential: Potential, loss: PotentialLoss, step: int) -> None:
        """Draw the sources of a loss with the potential as it is, if that is due at this update.

        Raises:
            SamplingError: If a phase does not survive.
            StatisticsError: If the frames are too few or too correlated.
        """
        if not loss.sources or step % loss.every != 0:
            return
        stage = f"{loss.name}-{step:04d}"
        start = {self.sampler.points[s].name: ends for s, ends in self._ends.get(loss.name, {}).items()}
        drawn = self.sampler.draw(potential, loss.sources, stage, start=start or None)
        self.stages[loss.name] = stage, potential.parameters()
        self._checksums[loss.name] = self.sampler.checksums(loss.sources, stage)
        self._show(potential, loss, drawn)

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint; the frames stay in the store."""
        return {
            name: {"stage": stage, "reference": dict(p), "checksums": self._checksums[name]}
            for name, (stage, p) in self.stages.items()
        }

    def load_state_dict(
        self, potential: Potential, losses: Sequence[PotentialLoss], state: Mapping[str, Any]
    ) -> None:
        """Show every loss the frames that it saw last.

        Raises:
            InputError: If frames are gone.
        """
        for loss in losses:
            if loss.name in state:
                stage, parameters = state[loss.name]["stage"], state[loss.name]["reference"]
                checksums = state[loss.name].get("checksums", {})
                drawn = self.sampler.stored(potential, loss.sources, stage, parameters, checksums)
                self.stages[loss.name], self._checksums[loss.name] = (stage, parameters), checksums
                with potential.holding(parameters):
                    self._show(potential, loss, drawn)

    def _show(
        self, potential: Potential, loss: PotentialLoss, drawn: Mapping[EnsembleSource, Ensemble]
    ) -> None:
        """Let a loss see frames that the potential as it is has drawn."""
        frames = own_frames(potential, loss, drawn)
        self._ends[loss.name] = {source: ensemble.latest.ends for source, ensemble in drawn.items()}
        loss.follow(potential, frames)
