"""The training loop: resample where needed, match, replay, as the schedule says; update, checkpoint.

All updates are of one optimiser, whatever losses they are from: the moments of AdamW are running means over
the gradients of all of them, Gauss-Newton weighs them in one step.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mlip_refine.config import Training
from mlip_refine.data import ReplayBuffer
from mlip_refine.errors import MlipRefineError
from mlip_refine.files import write_text
from mlip_refine.losses import (
    BatchLoss,
    EnsembleLoss,
    EnsembleSource,
    Loss,
    LossResult,
    PotentialLoss,
)
from mlip_refine.observables.base import Probes
from mlip_refine.potential import Potential
from mlip_refine.quantities import Measured
from mlip_refine.training.checkpoint import read_latest, write_checkpoint
from mlip_refine.training.ensembles.sampler import EnsembleSampler
from mlip_refine.training.ensembles.thermal_corrections import ThermalCorrections
from mlip_refine.training.ensembles.tracker import EnsembleTracker
from mlip_refine.training.gradients.replay import batch_value
from mlip_refine.training.gradients.streaming import (
    evaluate_losses,
    further_probes,
    probe_energies,
    wanted_probes,
)
from mlip_refine.training.optimisers.adamw import AdamW
from mlip_refine.training.optimisers.gauss_newton import GaussNewton
from mlip_refine.training.optimisers.trust_region import Settled, TrustRegion
from mlip_refine.training.replay_batches import LabelledFrame
from mlip_refine.training.schedule import Group, make_schedule


@dataclass(frozen=True)
class StepReport:
    """What one update saw, of the losses that acted in it.

    Attributes:
        step: Number of the update, from 0.
        losses: Weighted total and named components.
        diagnostics: Measured quantities by loss, then name.
        n_eff: Effective frames by source, in whole draws.
        references: Reference models whose frames are in use, by source.
        resampled: Sources that were sampled anew.
        gradient_norm: Before clipping; `None` where no update was made.
        alpha: Part of the proposed step that was taken; `None` where no update was made.
        md_steps: Steps of molecular dynamics taken so far, summed over atoms.
    """

    step: int
    losses: Mapping[str, float]
    diagnostics: Mapping[str, Mapping[str, Measured]]
    n_eff: Mapping[str, float]
    references: Mapping[str, int]
    resampled: Sequence[str]
    gradient_norm: float | None
    alpha: float | None
    md_steps: int

    def as_json(self) -> dict[str, Any]:
        """Plain data for the log."""
        measured = {
            loss: {name: {"value": m.value, "se": m.known_se, "unit": m.unit} for name, m in values.items()}
            for loss, values in self.diagnostics.items()
        }
        return {
            "step": self.step,
            "losses": dict(self.losses),
            "diagnostics": measured,
            "n_eff": dict(self.n_eff),
            "references": dict(self.references),
            "resampled": list(self.resampled),
            "gradient_norm": self.gradient_norm,
            "alpha": self.alpha,
            "md_steps": self.md_steps,
        }


@dataclass
class Trainer:
    """A training run that can be stopped after any update and resumed.

    Attributes:
        potential: The model that is trained, in place.
        losses: All losses.
        settings: Schedule, optimiser, tolerance, checkpoints.
        sampler: Draws ensembles, and says when a state point is sampled anew.
        replay: Batches of labelled frames, if there are batch losses.
        folder: Run folder: `log.jsonl` and `checkpoints/`.
        report: Called after every update.
        earlier: Wall time of the sessions before a resume, s.
    """

    potential: Potential
    losses: Sequence[Loss]
    settings: Training
    sampler: EnsembleSampler
    replay: ReplayBuffer[LabelledFrame] | None
    folder: Path
    report: Callable[[StepReport], None] = lambda _: None
    step: int = 0
    updates_within_tolerance: int = 0
    converged: bool = False
    earlier: float = 0.0
    resumed: bool = False
    ensembles: EnsembleTracker = field(init=False)
    thermal: ThermalCorrections = field(init=False)
    batches: list[Sequence[LabelledFrame]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        """Sort the losses, make the schedule and the optimiser."""
        self._started = time.monotonic()
        self.schedule = make_schedule(self.settings, self.losses, self.replay)
        self.optimiser: AdamW | GaussNewton = (
            GaussNewton(self.potential, self.settings, self.sampler.seed)
            if self.settings.optimiser == "gauss_newton"
            else AdamW(self.potential, self.settings)
        )
        self.thermal = ThermalCorrections(self.sampler)
        self.ensemble_losses = [loss for loss in self.losses if isinstance(loss, EnsembleLoss)]
        self.batch_losses = [loss for loss in self.losses if isinstance(loss, BatchLoss)]
        self.potential_losses = [loss for loss in self.losses if isinstance(loss, PotentialLoss)]
        self.ensembles = EnsembleTracker(self.sampler, self.ensemble_losses)
        self.wanted = wanted_probes(self.ensemble_losses)

    def run(self) -> None:
        """Train until the targets are met or the steps are used up; then hold the averaged parameters."""
        if not self.resumed:
            self.ensembles.begin(self.potential, acting=self._acts(Group.EXPERIMENT, 0))
            self._checkpoint()
        while not self._finished:
            self._update()
            if self.step % self.settings.checkpoint_every == 0 or self._finished:
                self._checkpoint()
        self.potential.set_parameters(self.optimiser.averaged())

    @property
    def _finished(self) -> bool:
        return self.converged or self.step >= self.settings.steps

    def _acts(self, group: Group, step: int) -> bool:
        return group in self.schedule.acting(step)

    def _update(self) -> None:
        """One update; what does not act in it is not evaluated."""
        self.optimiser.zero_grad()
        results: dict[str, LossResult] = {}
        resampled: list[EnsembleSource] = []
        experiment = self._acts(Group.EXPERIMENT, self.step)
        if experiment:
            paused = self.step > 0 and not self._acts(Group.EXPERIMENT, self.step - 1)
            resampled = self.ensembles.follow(self.potential, self.step, paused=paused)
            results = self._experiments()
        if self._acts(Group.REPLAY, self.step):
            results |= self._replay()
        n_eff = self.ensembles.n_eff() if experiment else {}
        norm, settled = self._step(n_eff)
        self._log(results, n_eff, resampled, norm, settled)
        self.ensembles.moved(settled if experiment else None)
        self.step += 1

    def _experiments(self) -> dict[str, LossResult]:
        """Evaluate and back-propagate the losses of experiments, and see whether the targets are met."""
        probes = self._probes(self.ensembles.energies)
        results = self.optimiser.ensembles(self.ensemble_losses, self.ensembles.current, probes)
        results |= self._direct()
        self._validate(results)
        met = self._targets_met(results)
        self.updates_within_tolerance = self.updates_within_tolerance + 1 if met else 0
        self.converged = self.updates_within_tolerance >= self.settings.patience
        return results

    def _step(self, n_eff: Mapping[EnsembleSource, float]) -> tuple[float | None, Settled]:
        """Update the parameters; of ensembles that act, enough frames must still count at the end."""
        if self.converged:
            return None, Settled(1.0, self.ensembles.energies, ())
        threshold = self.sampler.policy.threshold if self.settings.trust_region else 0.0
        trial = ProposedStep(self.potential, self.ensembles, n_eff, threshold, self.objective)
        norm = self.optimiser.step(trial)
        return norm, trial.end

    def objective(self, known: Mapping[EnsembleSource, Tensor]) -> float:
        """Weighted sum of the losses at the parameters as they are, on the frames of this update.

        Args:
            known: Energies of the potential on frames of all sources that act.
        """
        _, results = evaluate_losses(self.ensemble_losses, self.ensembles.current, self._probes(known))
        results |= {loss.name: loss.measure(self.potential) for loss in self.potential_losses}
        weights = {loss.name: loss.weight for loss in self.losses}
        total = sum(weights[name] * float(r.value.detach()) for name, r in results.items())
        share = 1 / self.settings.replay_batches
        return total + sum(batch_value(self.potential, self.batch_losses, b, share) for b in self.batches)

    def _direct(self) -> dict[str, LossResult]:
        """Evaluate and back-propagate the losses on the potential itself."""
        results = {}
        # Counted in updates of experiments: how often frames are drawn does not depend on the schedule.
        turn = self.schedule.acted(Group.EXPERIMENT, self.step)
        for loss in self.potential_losses:
            self.thermal.follow(self.potential, loss, turn)
            loss.at(turn)
            results[loss.name] = self.optimiser.direct(loss)
        return results

    def _validate(self, results: dict[str, LossResult]) -> None:
        """Add what is measured on held-out data, of every loss for which it is due, to its diagnostics."""
        turn = self.schedule.acted(Group.EXPERIMENT, self.step)
        for loss in self.losses:
            validation = loss.validation
            if validation is not None and loss.name in results and turn % validation.every == 0:
                result = results[loss.name]
                measured = {**result.diagnostics, **validation.measure(self.potential)}
                results[loss.name] = replace(result, diagnostics=measured)

    def _probes(self, energies: Mapping[EnsembleSource, Tensor]) -> dict[EnsembleSource, Probes]:
        """The probes of the potential as it is now on all frames, energies known."""
        probes: dict[EnsembleSource, Probes] = {}
        for source, energy in energies.items():
            structures, wanted = self.ensembles.current[source].structures, self.wanted.get(source, {})
            probes[source] = {"energy": energy, **further_probes(self.potential, structures, wanted)}
        return probes

    def _targets_met(self, results: Mapping[str, LossResult]) -> bool:
        """Whether the current parameters meet every target, and so does their running mean, which is kept."""
        if not self._close(results):
            return False
        with self.potential.holding(self.optimiser.averaged()):
            probes = self._probes(probe_energies(self.potential, self.ensembles.current))
            # What has no target of its own, such as a batch of data, has no say in when to stop.
            judged = [loss for loss in self.potential_losses if results[loss.name].deviation is not None]
            direct = {loss.name: loss.measure(self.potential) for loss in judged}
        _, averaged = evaluate_losses(self.ensemble_losses, self.ensembles.current, probes)
        averaged |= direct
        return self._close(averaged)

    def _close(self, results: Mapping[str, LossResult]) -> bool:
        """Whether every deviation is resolved and within its tolerance, and there is one at all."""
        close = []
        for result in results.values():
            if result.deviation is not None:
                limit = result.tolerance
                if limit is None:
                    limit = min(self.settings.tolerance, result.deviation.se)
                close.append(result.resolved and abs(result.deviation.value) <= limit)
        return bool(close) and all(close)

    def _replay(self) -> dict[str, LossResult]:
        """Back-propagate the batch losses; the results are those of the last batch."""
        results: dict[str, LossResult] = {}
        if self.replay is None or not self.batch_losses:
            return results
        count = self.settings.replay_batches
        self.batches = [self.replay.next_batch() for _ in range(count)]
        for frames in self.batches:
            results = self.optimiser.batch(self.batch_losses, frames, 1 / count)
        return results

    def _log(
        self,
        results: Mapping[str, LossResult],
        n_eff: Mapping[EnsembleSource, float],
        resampled: Sequence[EnsembleSource],
        norm: float | None,
        settled: Settled,
    ) -> None:
        weights = {loss.name: loss.weight for loss in self.losses}
        total = sum(weights[name] * float(r.value.detach()) for name, r in results.items())
        components = {k: v for r in results.values() for k, v in r.components.items()}
        report = StepReport(
            step=self.step,
            losses={"total": total} | components,
            diagnostics={name: r.diagnostics for name, r in results.items() if r.diagnostics},
            n_eff={s.name: n for s, n in n_eff.items()},
            references={s.name: len(self.ensembles.current[s].draws) for s in n_eff},
            resampled=[s.name for s in resampled],
            gradient_norm=norm,
            alpha=None if norm is None else settled.alpha,
            md_steps=self.sampler.md_steps,
        )
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(report.as_json()) + "\n")
        self.report(report)

    def _checkpoint(self) -> None:
        content = {
            "model": self.potential.parameters(),
            "optimiser": self.optimiser.state_dict(),
            "replay": self.replay.state_dict() if self.replay else None,
            **self.ensembles.state_dict(),
            "thermal": self.thermal.state_dict(),
            "md_steps": self.sampler.md_steps,
            "inside": self.updates_within_tolerance,
            "converged": self.converged,
            "wall_time_s": self.earlier + time.monotonic() - self._started,
        }
        write_checkpoint(self.folder / "checkpoints", self.step, content)

    def resume(self) -> bool:
        """Go on from the newest checkpoint of the folder; `False` if there is none.

        The log is cut back to what the checkpoint knows.
        """
        content = read_latest(self.folder / "checkpoints")
        _cut_log(self.folder / "log.jsonl", content["step"] if content else 0)
        if content is None:
            return False
        self.potential.set_parameters(content["model"])
        self.optimiser.load_state_dict(content["optimiser"])
        if self.replay and content["replay"]:
            self.replay.load_state_dict(content["replay"])
        self.step, self.converged = content["step"], content["converged"]
        self.updates_within_tolerance = content["inside"]
        self.earlier, self.resumed = content["wall_time_s"], True
        self.sampler.md_steps = content["md_steps"]
        if not self._finished:
            self.ensembles.load_state_dict(self.potential, content)
            self.thermal.load_state_dict(self.potential, self.potential_losses, content["thermal"])
        return True


@dataclass
class ProposedStep:
    """A step of the optimiser before it is taken.

    Attributes:
        potential: The potential, at the end of the step.
        ensembles: Frames and energies of the sources that act.
        n_eff: Effective frames of every source before the step, in whole draws.
        threshold: Effective frames of a trust region, in whole draws; 0 without one.
        losses: Weighted sum of the losses at the parameters as they are, from energies of all frames.
        end: Where the step ends.
    """

    potential: Potential
    ensembles: EnsembleTracker
    n_eff: Mapping[EnsembleSource, float]
    threshold: float
    losses: Callable[[Mapping[EnsembleSource, Tensor]], float]
    end: Settled = field(default_factory=lambda: Settled(1.0, {}, ()))

    def __post_init__(self) -> None:
        """Remember where the step starts."""
        self._start = self.potential.parameters()
        self._exhausted: set[EnsembleSource] = set()

    def settle(self, fewest: float = 0.0) -> float:
        """Shorten the step so that every source keeps `fewest` effective frames and the threshold."""
        threshold = max(self.threshold, fewest)
        if threshold > 0 and self.n_eff:
            region = TrustRegion(threshold)
            self.end = region.settle(self.potential, self._start, self.ensembles.current, self.n_eff)
            self._exhausted.update(self.end.exhausted)
        return self.end.alpha

    def objective(self) -> float:
        """Return the losses at the end of the step; infinite where they cannot be evaluated."""
        current = self.ensembles.current
        missing = {s: e for s, e in current.items() if s not in self.end.energies}
        energies = {**self.end.energies, **probe_energies(self.potential, missing)}
        self.end = replace(self.end, energies=energies)
        if not all(bool(e.isfinite().all()) for e in energies.values()):
            return math.inf
        try:
            return self.losses({s: energies[s] for s in current})
        except MlipRefineError:
            # Such as a crystal that does not come to rest.
            return math.inf

    def refuse(self) -> None:
        """Take no step; sources with too few effective frames for one are sampled anew."""
        exhausted = tuple(s for s in self.ensembles.current if s in self._exhausted)
        self.end = Settled(0.0, self.ensembles.energies, exhausted)


def _cut_log(path: Path, step: int) -> None:
    """Drop lines of updates that will be made again, and a line that was not written to its end."""
    if not path.exists():
        return
    complete = [
        line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
    ]
    kept = [line for line in complete if json.loads(line)["step"] < step]
    write_text(path, "".join(kept))
