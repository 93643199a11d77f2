"""The training loop: resample where needed, match, replay, as the schedule says; update, checkpoint.

All updates are of one optimiser, whatever losses they are from: the moments of AdamW are running means over
the gradients of all of them, Gauss-Newton weighs them in one step. A checkpoint holds plain tensors and
numbers; it is written atomically and read without pickle code.
"""

import json
import pickle
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from mlip_refine.config import Training
from mlip_refine.data import ReplayBuffer
from mlip_refine.errors import InputError
from mlip_refine.files import require_regular, room_named, write_bytes, written
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
from mlip_refine.progress import console
from mlip_refine.quantities import Measured
from mlip_refine.training.adamw import AdamW
from mlip_refine.training.gauss_newton import GaussNewton
from mlip_refine.training.held_out import EVERY, HeldOutGuard
from mlip_refine.training.replay import LabelledFrame, batch_value
from mlip_refine.training.schedule import Group, Schedule, make_schedule
from mlip_refine.training.streaming import evaluate_losses, further_probes, probe_energies, wanted_probes
from mlip_refine.training.tracker import EnsembleSampler, EnsembleTracker, ThermalCorrections
from mlip_refine.training.trust_region import ProposedStep, Settled

FORMAT = "mlip_refine checkpoint 2"

_CORRUPT = (
    *(RuntimeError, OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, EOFError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, NotImplementedError),
)
"""What a damaged file raises somewhere between its first byte and its last tensor."""


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
        settings: Optimiser, tolerance, checkpoints.
        schedule: Which losses act in an update.
        optimiser: Takes the steps; holds moments, or the damping.
        ensembles: Frames of thermal losses, which follow the model.
        thermal: Frames of losses on the potential itself.
        replay: Batches of labelled frames, if there are batch losses.
        folder: Run folder: `log.jsonl` and `checkpoints/`.
        report: Called after every update.
        guard: Held-out frames that have a say in when to stop and what to deliver, if there are any.
        step: Updates that were made.
        updates_within_tolerance: Updates of experiments in a row that met all targets.
        judged: Whether a loss has said how far its targets are away.
        converged: Whether the run has met its targets.
        delivered: Updates before the parameters that the run ends with.
        batches: Labelled frames of the newest update that had any.
        resumed: Whether the run goes on from a checkpoint.
        earlier: Wall time of the sessions before a resume, s.
        started: Reading of the clock when this process began, s.
    """

    potential: Potential
    losses: Sequence[Loss]
    settings: Training
    schedule: Schedule
    optimiser: AdamW | GaussNewton
    ensembles: EnsembleTracker
    thermal: ThermalCorrections
    replay: ReplayBuffer[LabelledFrame] | None
    folder: Path
    report: Callable[[StepReport], None] = lambda _: None
    guard: HeldOutGuard | None = None
    step: int = 0
    updates_within_tolerance: int = 0
    judged: bool = False
    converged: bool = False
    delivered: int = 0
    batches: Sequence[Sequence[LabelledFrame]] = ()
    resumed: bool = False
    earlier: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def prepare(
        cls,
        potential: Potential,
        losses: Sequence[Loss],
        settings: Training,
        sampler: EnsembleSampler,
        replay: ReplayBuffer[LabelledFrame] | None,
        folder: Path,
        report: Callable[[StepReport], None] = lambda _: None,
        guard: HeldOutGuard | None = None,
    ) -> Self:
        """Make the schedule, the optimiser and what follows the model; nothing is sampled yet.

        Args:
            potential: The model that is trained, in place.
            losses: All losses.
            settings: Schedule, optimiser, tolerance, checkpoints.
            sampler: Draws ensembles, and says when a state point is sampled anew.
            replay: Batches of labelled frames, if there are batch losses.
            folder: Run folder.
            report: Called after every update.
            guard: Held-out frames that have a say in when to stop and what to deliver.

        Raises:
            InputError: The schedule has no turns to take.
            MlipRefineError: Nothing is trainable.
        """
        optimiser: AdamW | GaussNewton
        if settings.optimiser == "gauss_newton":
            optimiser = GaussNewton(potential, settings, sampler.seed)
        else:
            optimiser = AdamW(potential, settings)
        return cls(
            potential=potential,
            losses=losses,
            settings=settings,
            schedule=make_schedule(settings, losses, replay),
            optimiser=optimiser,
            ensembles=EnsembleTracker(sampler, [loss for loss in losses if isinstance(loss, EnsembleLoss)]),
            thermal=ThermalCorrections(sampler),
            replay=replay,
            folder=folder,
            report=report,
            guard=guard,
        )

    @property
    def sampler(self) -> EnsembleSampler:
        """What draws all frames, and counts the steps of molecular dynamics."""
        return self.ensembles.sampler

    @property
    def ensemble_losses(self) -> list[EnsembleLoss]:
        """Losses on thermal frames."""
        return [loss for loss in self.losses if isinstance(loss, EnsembleLoss)]

    @property
    def batch_losses(self) -> list[BatchLoss]:
        """Losses on labelled frames."""
        return [loss for loss in self.losses if isinstance(loss, BatchLoss)]

    @property
    def potential_losses(self) -> list[PotentialLoss]:
        """Losses on the potential itself."""
        return [loss for loss in self.losses if isinstance(loss, PotentialLoss)]

    @property
    def finished(self) -> bool:
        """Whether no update is left to make."""
        return self.converged or self.step >= self.settings.steps

    def run(self) -> None:
        """Train until the targets are met or the steps are used up; then hold the parameters to deliver.

        They are the averaged ones of the end. With held-out frames, they are those that met the targets while
        errors on these frames had grown little or least (see `HeldOutGuard`), if the run went on from there.
        """
        if not self.resumed:
            if self.guard is not None and len(self.batch_losses) == len(self.losses):
                self.guard.start(self.potential.parameters())
            self.ensembles.begin(self.potential, acting=Group.EXPERIMENT in self.schedule.acting(0))
            self._checkpoint()
        while not self.finished:
            report = self.update()
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(report.as_json()) + "\n")
            self.report(report)
            if self.step % self.settings.checkpoint_every == 0 or self.finished:
                self._checkpoint()
        kept, self.delivered = self.guard.kept if self.guard else None, self.step
        # Losses without targets are there to be followed: they are not given up for held-out errors.
        if kept is not None and (kept.excess <= 1.0 or self.judged):
            self.delivered = kept.step
            self.potential.set_parameters(kept.parameters)
        else:
            self.potential.set_parameters(self.optimiser.averaged())

    def update(self) -> StepReport:
        """Make one update, and return what it saw; losses that do not act in it are not evaluated.

        Raises:
            MlipRefineError: Energies or the gradient are not finite.
            SamplingError: A phase does not survive.
            StatisticsError: Frames are too few or too correlated, or a chain of references is broken.
        """
        settings, acting = self.settings, self.schedule.acting(self.step)
        experiment = Group.EXPERIMENT in acting
        results: dict[str, LossResult] = {}
        resampled: list[EnsembleSource] = []
        self.optimiser.zero_grad()

        if experiment:
            # The ensembles follow the model, and thermal averages are matched.
            paused = self.step > 0 and Group.EXPERIMENT not in self.schedule.acting(self.step - 1)
            resampled = self.ensembles.follow(self.potential, self.step, paused=paused)
            probes = self._probes(self.ensembles.energies)
            results = self.optimiser.ensembles(self.ensemble_losses, self.ensembles.current, probes)
            # Counted in updates of experiments: how often frames are drawn does not depend on the schedule.
            turn = self.schedule.acted(Group.EXPERIMENT, self.step)
            for loss in self.potential_losses:
                self.thermal.follow(self.potential, loss, turn)
                loss.at(turn)
                results[loss.name] = self.optimiser.direct(loss)
            for validated in self.losses:
                validation = validated.validation
                if validation is not None and validated.name in results and turn % validation.every == 0:
                    result = results[validated.name]
                    measured = {**result.diagnostics, **validation.measure(self.potential)}
                    results[validated.name] = replace(result, diagnostics=measured)
            if not self.judged and any(result.deviation is not None for result in results.values()):
                self.judged = True
                if self.guard is not None:
                    self.guard.begin_anew()
            met = self._targets_met(results)
            self.updates_within_tolerance = self.updates_within_tolerance + 1 if met else 0
            self.converged = self.updates_within_tolerance >= settings.patience and (
                self.guard is None
                or self.guard.lets_stop(self.potential, self.optimiser.averaged(), self.step)
            )
        n_eff = self.ensembles.n_eff() if experiment else {}

        if Group.REPLAY in acting and self.replay is not None and self.batch_losses:
            # Of the results, those of the last batch are reported.
            self.batches = [self.replay.next_batch() for _ in range(settings.replay_batches)]
            for frames in self.batches:
                results |= self.optimiser.batch(self.batch_losses, frames, 1 / settings.replay_batches)

        # Of ensembles that act, enough frames must still count at the end of the step.
        norm, end = None, Settled(1.0, self.ensembles.energies, ())
        if not self.converged:
            trial = ProposedStep(
                potential=self.potential,
                start=self.potential.parameters(),
                ensembles=self.ensembles.current,
                energies=self.ensembles.energies,
                n_eff=n_eff,
                threshold=self.sampler.policy.threshold if settings.trust_region else 0.0,
                losses=self.objective,
            )
            norm = self.optimiser.step(trial)
            end = trial.end

        weights = {loss.name: loss.weight for loss in self.losses}
        total = sum(weights[name] * float(r.value.detach()) for name, r in results.items())
        report = StepReport(
            step=self.step,
            losses={"total": total} | {k: v for r in results.values() for k, v in r.components.items()},
            diagnostics={name: r.diagnostics for name, r in results.items() if r.diagnostics},
            n_eff={s.name: n for s, n in n_eff.items()},
            references={s.name: len(self.ensembles.current[s].references) for s in n_eff},
            resampled=[s.name for s in resampled],
            gradient_norm=norm,
            alpha=None if norm is None else end.alpha,
            md_steps=self.sampler.md_steps,
        )
        self.ensembles.moved(end if experiment else None)
        self.step += 1
        if self.guard is not None and not self.judged and (self.step % EVERY == 0 or self.finished):
            self.guard.look(self.potential, self.optimiser.averaged(), self.step)
        return report

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

    def _probes(self, energies: Mapping[EnsembleSource, Tensor]) -> dict[EnsembleSource, Probes]:
        """The probes of the potential as it is now on all frames, energies known."""
        wanted, probes = wanted_probes(self.ensemble_losses), dict[EnsembleSource, Probes]()
        for source, energy in energies.items():
            structures = self.ensembles.current[source].structures
            probes[source] = {"energy": energy, **further_probes(self.potential, structures, wanted[source])}
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

    def _checkpoint(self) -> None:
        content = {
            "model": self.potential.parameters(),
            "optimiser": self.optimiser.state_dict(),
            "replay": self.replay.state_dict() if self.replay else None,
            **self.ensembles.state_dict(),
            "thermal": self.thermal.state_dict(),
            "md_steps": self.sampler.md_steps,
            "inside": self.updates_within_tolerance,
            "judged": self.judged,
            "converged": self.converged,
            "guard": self.guard.state_dict() if self.guard else None,
            "wall_time_s": self.earlier + time.monotonic() - self.started,
        }
        write_checkpoint(self.folder / "checkpoints", self.step, content)

    def resume(self) -> bool:
        """Go on from the newest checkpoint of the folder; `False` if there is none.

        The log is cut back to what the checkpoint knows: updates that will be made again go, and so does a
        line that was not written to its end.
        """
        content, log = read_latest(self.folder / "checkpoints"), self.folder / "log.jsonl"
        known = content["step"] if content else 0
        kept, later = _split_log(log, known)
        if content is None and later:
            raise InputError(
                "the checkpoints of the run are gone",
                where=str(self.folder / "checkpoints"),
                found=f"{later} updates in {log}",
                fix="Bring the folder back; or remove log.jsonl to train from the initial model again.",
            )
        if log.exists():
            write_bytes(log, kept)
        if content is None:
            return False
        self.potential.set_parameters(content["model"])
        self.optimiser.load_state_dict(content["optimiser"])
        if self.guard and content.get("guard"):
            self.guard.load_state_dict(content["guard"])
        if self.replay and content["replay"]:
            self.replay.load_state_dict(content["replay"])
        self.step, self.converged = content["step"], content["converged"]
        self.updates_within_tolerance, self.judged = content["inside"], content.get("judged", False)
        self.earlier, self.resumed = content["wall_time_s"], True
        self.sampler.md_steps = content["md_steps"]
        if not self.finished:
            self.ensembles.load_state_dict(self.potential, content)
            self.thermal.load_state_dict(self.potential, self.potential_losses, content["thermal"])
        return True


def _split_log(log: Path, step: int) -> tuple[bytes, int]:
    """Return the lines of the updates before a step, and how many there are of later ones.

    Lines that are no updates are in neither: the last that a power cut left, or one that was not written to
    its end.
    """
    kept, later = b"", 0
    content = log.read_bytes() if require_regular(log).exists() else b""
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            continue
        try:
            made = int(json.loads(line)["step"])
        except (ValueError, LookupError, TypeError, RecursionError):
            what = f"{log}:{number}: left out, this is no update of a run"
            console.print(what, markup=False, soft_wrap=True)
            continue
        if made < step:
            kept += line
        else:
            later += 1
    return kept, later


def write_checkpoint(folder: Path, step: int, content: dict[str, Any], keep: int = 2) -> Path:
    """Write `step-NNNN.pt`; it appears whole or not at all. Older ones beyond `keep` are removed.

    Raises:
        StorageError: If there is no room for it; the ones before stay.
    """
    path = folder / f"step-{step:04d}.pt"
    with room_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    before = _written(folder)
    # Checkpoints of a run are of much the same size.
    needed = before[-1].stat().st_size if before else None
    with written(path, needed=needed) as partial:
        torch.save(content | {"format": FORMAT, "step": step}, partial)
    for old in _written(folder)[:-keep]:
        old.unlink()
    return path


def read_latest(folder: Path) -> dict[str, Any] | None:
    """Read the newest sound checkpoint of a run, or `None` if there is none at all.

    A damaged one is named, and the one before it is read.

    Raises:
        InputError: If none of them is a sound checkpoint of this package.
    """
    paths, problems = _written(folder)[::-1], list[InputError]()
    for path in paths:
        try:
            content = _read_checkpoint(path)
        except InputError as error:
            problems.append(error)
            continue
        for problem in problems:
            console.print(f"{problem}; going on from {path.name}", markup=False, soft_wrap=True)
        return content
    if problems:
        first = problems[0]
        first.fix = (
            "No other checkpoint is sound. Bring one back from a copy; or remove the folder checkpoints and "
            "log.jsonl to train from the initial model again, with the frames that are there."
        )
        raise first
    return None


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint whose bytes are those that were written.

    Raises:
        InputError: If it is damaged, or something else.
    """
    try:
        if not zipfile.is_zipfile(require_regular(path)):
            raise zipfile.BadZipFile("it is not a whole zip archive")
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of {damaged} is another one")
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except _CORRUPT as error:
        why = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"the checkpoint cannot be read ({why})", where=str(path)) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError("this is not a checkpoint of a run", where=str(path), expected=FORMAT)
    return content


def _written(folder: Path) -> list[Path]:
    """Checkpoints of a folder, oldest first."""
    return sorted(folder.glob("step-*.pt"), key=lambda path: (len(path.name), path.name))
