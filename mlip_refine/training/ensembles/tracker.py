"""The ensembles of a training run, kept within reach of the model that is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from mlip_refine.errors import InputError, MlipRefineError
from mlip_refine.losses import EnsembleLoss, EnsembleSource
from mlip_refine.potential import Potential
from mlip_refine.quantities import Measured
from mlip_refine.training.ensembles.ensemble import Draw, Ensemble
from mlip_refine.training.ensembles.sampler import EnsembleSampler
from mlip_refine.training.gradients.streaming import probe_energies
from mlip_refine.training.optimisers.trust_region import Settled

LOST = 0.2
"""Effective frames, in whole draws, below which old frames are not joined to new ones if nobody needs it."""

UNKNOWN = Measured(float("nan"), float("nan"), "eV")
"""Free energy of a reference from the initial model, where no chain of references leads back to it."""


type Stage = tuple[str, EnsembleSource]
"""Name of a sampling, and the state that it sampled."""


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
        self._know_energies(potential, step)
        n_eff = self.n_eff()
        stale = [s for s, n in n_eff.items() if s in self.exhausted or n < self.sampler.policy.threshold]
        lost = [s for s in stale if paused and n_eff[s] < LOST and s not in self.chained]
        self._redraw(potential, [s for s in stale if s not in lost], f"step-{step:04d}")
        self._begin_anew(potential, lost, f"step-{step:04d}-anew")
        return stale

    def n_eff(self) -> dict[EnsembleSource, float]:
        """Effective frames of the current model by source, in whole draws."""
        return {s: self.current[s].n_eff(energy) for s, energy in self.energies.items()}

    def moved(self, settled: Settled | None = None) -> None:
        """The model has changed: what is known of it is what its step was settled with, or nothing."""
        self.energies = {} if settled is None else dict(settled.energies)
        if settled is not None:
            self.exhausted = settled.exhausted

    def _know_energies(self, potential: Potential, step: int) -> None:
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

    def _redraw(self, potential: Potential, stale: Sequence[EnsembleSource], stage: str) -> None:
        """Join new frames to the old ones."""
        if stale:
            fresh, known = self.sampler.redraw(potential, self.current, self.energies, stale, stage)
            self.current |= fresh
            self.energies |= known

    def _begin_anew(self, potential: Potential, lost: Sequence[EnsembleSource], stage: str) -> None:
        """Replace frames that say nothing any more."""
        if lost:
            start = {self.sampler.points[s].name: self.current[s].latest.ends for s in lost}
            drawn = self.sampler.draw(potential, lost, stage, start=start)
            self.current |= {s: Ensemble.of(draw, UNKNOWN) for s, draw in drawn.items()}
            self.energies |= {s: draw.energy for s, draw in drawn.items()}

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint; the frames stay in the store."""
        return {
            "ensembles": saved_ensembles(self.current),
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
        "references": {d.stage: dict(d.reference) for e in ensembles.values() for d in e.draws},
        "ensembles": [
            {
                "source": asdict(source),
                "draws": [{"stage": d.stage, "source": asdict(by_name[d.point.name])} for d in e.draws],
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
    found: dict[Stage, Draw] = {}
    for stage, sources in wanted.items():
        drawn = sampler.stored(potential, sorted(sources), stage, saved["references"][stage])
        if drawn is None:
            raise InputError(
                f"the frames of the stage {stage!r} are gone",
                where=str(sampler.store.folder),
                fix="bring the folder back, or start again under another name",
            )
        found |= {(stage, s): d for s, d in drawn.items()}
    return {EnsembleSource(**e["source"]): _ensemble(sampler, e, found) for e in saved["ensembles"]}


def _ensemble(sampler: EnsembleSampler, entry: Mapping[str, Any], found: Mapping[Stage, Draw]) -> Ensemble:
    energies: Tensor = entry["energies"]
    draws = tuple(found[d["stage"], EnsembleSource(**d["source"])] for d in entry["draws"])
    own = torch.split(energies, [len(d) for d in draws], dim=1)
    value, se = entry["shift"]
    return Ensemble(
        point=sampler.points[EnsembleSource(**entry["source"])],
        draws=tuple(replace(d, energy=own[k][k]) for k, d in enumerate(draws)),
        energies=energies,
        shift=Measured(value, se, "eV"),
        shift_influence=entry["pull"],
        frames_per_draw=entry["whole"],
    )
