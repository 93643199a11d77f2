"""`mlip-refine finetune`: evaluate a potential, correct it, and evaluate it again."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ase import Atoms

from mlip_refine.config import Config, Training
from mlip_refine.data import ReplayBuffer
from mlip_refine.errors import InputError
from mlip_refine.losses import (
    BatchLoss,
    EnsembleLoss,
    EnsembleSource,
    FreeEnergyDifference,
    Loss,
    Replay,
    loss_specs,
)
from mlip_refine.losses.replay import SIZE
from mlip_refine.potential import Potential
from mlip_refine.potential.energy_shift import Compositions, shift_energies
from mlip_refine.progress import console
from mlip_refine.sampling import FrameStore, StatePoint
from mlip_refine.training.held_out import HeldOutGuard
from mlip_refine.training.label_checks import compare, error_scales, require_sound_labels
from mlip_refine.training.replay import LabelledFrame, held_out_errors, labelled_by
from mlip_refine.training.schedule import make_schedule
from mlip_refine.training.tracker import EnsembleSampler
from mlip_refine.training.trainer import Trainer
from mlip_refine.workflows.base import Run
from mlip_refine.workflows.finetune.evaluation import (
    EvaluationSettings,
    PhaseChange,
    phase_changes,
    transition,
)
from mlip_refine.workflows.finetune.heads import displaced_crystals, head_drifts
from mlip_refine.workflows.finetune.records import HeldOutChange, Summary, Transition, read_log
from mlip_refine.workflows.finetune.summary import (
    courses,
    delivery_notes,
    deviations,
    held_out_notes,
    held_out_record,
    hints,
    phase_record,
    validation_notes,
)
from mlip_refine.workflows.finetune.targets import measured_afresh
from mlip_refine.workflows.free_energy.differences import (
    FreeEnergySettings,
    in_result_cells,
    initial_free_energies,
    read_initial,
    require_paths,
)
from mlip_refine.workflows.free_energy.finite_size import convention_of, require_comparable
from mlip_refine.workflows.free_energy.records import FreeEnergyResult
from mlip_refine.workflows.from_config import (
    ReplayData,
    bind_losses,
    ensemble_sampling,
    evaluation_settings,
    free_energy_settings,
    load_potential,
    load_replay,
    melting,
    timestep,
    with_timestep,
)
from mlip_refine.workflows.melt import Melting
from mlip_refine.workflows.run_folder import packages

HELD_OUT = 5
"""One of so many frames of the run itself is held out."""

WITHOUT_REPLAY = (
    "no loss on labelled frames: nothing keeps what the potential knows beside the targets "
    "(mlip-refine guide loss-replay)"
)


@dataclass(frozen=True)
class Prepared:
    """Everything that a run starts from.

    Attributes:
        name: Name of the run and of its model files.
        potential: The potential that is trained, in place.
        losses: All losses.
        points: State points of their sources, in starting cells.
        melting: Which of them are to be molten, and how.
        replay: Labelled frames, if there are any.
        training: Settings of the training.
        sampling: How ensembles are drawn for the losses.
        given: Initial free-energy differences that were read from files, by loss name.
        free_energy: How the others are computed.
        evaluation: How both potentials are sampled at the end.
        own_frames: Makes the replay buffer of frames that the run samples first, where these are replayed.
    """

    name: str
    potential: Potential
    losses: list[Loss]
    points: dict[EnsembleSource, StatePoint]
    melting: Melting
    replay: ReplayData | None
    training: Training
    sampling: partial[EnsembleSampler]
    given: Mapping[str, FreeEnergyResult]
    free_energy: FreeEnergySettings
    evaluation: EvaluationSettings
    own_frames: Callable[[list[LabelledFrame]], ReplayBuffer[LabelledFrame]] | None = None

    @property
    def matched(self) -> list[FreeEnergyDifference]:
        """The losses that have an initial free-energy difference."""
        return [loss for loss in self.losses if isinstance(loss, FreeEnergyDifference)]

    @property
    def crystals(self) -> list[Atoms]:
        """Crystals that losses are about: those of the state points, and those that losses bring along."""
        at_points = [point.atoms for point in self.points.values()]
        return [*at_points, *(atoms for loss in self.losses for atoms in loss.crystals_at_rest)]


@dataclass(frozen=True)
class FinetuneResult:
    """Results of a run.

    Attributes:
        folder: The run folder.
        model: `NAME.model`, for `mace.calculators.MACECalculator`.
        safetensors: `NAME.safetensors`.
        summary: Content of `summary.json`.
        potential: The refined potential.
    """

    folder: Path
    model: Path
    safetensors: Path
    summary: Summary
    potential: Potential

    @property
    def transitions(self) -> tuple[Transition, ...]:
        """ΔG before and after."""
        return self.summary.transitions

    def to_json(self) -> dict[str, Any]:
        """Return the content of `summary.json`."""
        return self.summary.as_json()

    def files(self) -> dict[str, Any]:
        """Return the JSON files of the run folder by name."""
        return {"summary.json": self.to_json()}


def prepare(config: Config) -> Prepared:
    """Check the input, and turn the config into what each part of a run needs.

    Raises:
        InputError: For bad input.
    """
    specs = loss_specs(config.losses)
    others = [spec.name for spec in specs if not spec.type.loss_class.squares]
    if config.training.optimiser == "gauss_newton" and others:
        raise InputError(
            f"loss {others[0]!r} is no mean of squared deviations from targets",
            where=config.where("training", "optimiser"),
            found="gauss_newton",
            expected="adam",
        )
    potential = load_potential(config)
    if not potential.trainable_parameters():
        where = config.where("potential", "freeze") or config.where("potential")
        raise InputError("every parameter is frozen: there is nothing to train", where=where)
    losses, points = bind_losses(config, specs, potential)
    config = with_timestep(config, potential, points.values())
    replay = load_replay(config, potential)
    buffer = replay.buffer if replay else None
    own = None
    if config.replay is not None and buffer is None:
        section, where = config.replay, config.where("replay")
        own = partial(
            ReplayBuffer, batch_size=section.batch_size, seed=config.seed, max_frames=section.max_frames
        )
        if not any(isinstance(loss, EnsembleLoss) for loss in losses) or config.training.schedule != "joint":
            raise InputError(
                "frames that the run samples come from losses on averages, with schedule: joint",
                where=where,
                found="from: model without train",
                fix="Name structures under replay.train and replay.valid.",
            )
    if buffer is None and own is None and any(isinstance(loss, BatchLoss) for loss in losses):
        raise InputError(
            "a loss needs labelled frames, but the config has no section replay", where=config.where("losses")
        )
    make_schedule(config.training, losses, buffer, config.where("training", "schedule"))
    if config.training.energy_shift != "none":
        where = config.where("training", "energy_shift")
        if buffer is None:
            problem = "training.energy_shift needs labelled frames, but the config has no section replay"
            raise InputError(problem, where=where)
        elements = {int(number) for point in points.values() for number in point.atoms.numbers}
        structures = [frame.structure for frame in buffer.frames]
        Compositions.of(potential, structures).require(elements, where)
    given = {}
    for loss in losses:
        if isinstance(loss, FreeEnergyDifference):
            finite_size = config.free_energy.finite_size
            require_comparable(loss, points, finite_size)
            if loss.options.initial == "compute":
                require_paths(loss, points, config.where)
            else:
                path = config.resolve(loss.options.initial)
                given[loss.name] = read_initial(path, loss, points, potential, timestep(config), finite_size)
    if replay is not None and config.replay is not None:
        losses = judged(replay, potential, losses, trusted=config.replay.trust_labels)
    elif own is None:
        console.print(WITHOUT_REPLAY, soft_wrap=True)
    return Prepared(
        name=config.name,
        potential=potential,
        losses=losses,
        points=points,
        melting=melting(config, points),
        replay=replay,
        training=config.training,
        sampling=ensemble_sampling(config),
        given=given,
        free_energy=free_energy_settings(config),
        evaluation=evaluation_settings(config),
        own_frames=own,
    )


def judged(replay: ReplayData, potential: Potential, losses: Sequence[Loss], *, trusted: bool) -> list[Loss]:
    """Hold the labels of replay against the initial potential, and return losses that its errors weigh.

    Raises:
        InputError: If labels are not what they are taken for, unless they are trusted.
    """
    train = compare(potential, replay.buffer.frames)
    require_sound_labels([*train, *compare(potential, replay.valid)], trusted=trusted)
    errors = error_scales(train)
    found = [loss.scaled_to(errors) if isinstance(loss, Replay) else loss for loss in losses]
    for loss in found:
        if isinstance(loss, Replay):
            weights = ", ".join(f"{name}_weight {loss.weights[name]:.3g}" for name in errors)
            console.print(
                f"{loss.name}: {weights}; each starts at {SIZE:g} unless it was given", soft_wrap=True
            )
    if not any(isinstance(loss, BatchLoss) for loss in losses):
        console.print(WITHOUT_REPLAY, soft_wrap=True)
    return found


def run(prepared: Prepared, run: Run) -> FinetuneResult:
    """Correct the potential and measure what changed.

    Raises:
        StatisticsError: If the samples do not determine a number that the run needs.
        SamplingError: If a phase does not stay what it is.
    """
    started = time.monotonic()
    potential = prepared.potential
    initial = potential.frozen_copy()
    prepared = with_own_frames(anchored(molten(prepared, run), run), run)
    replay = prepared.replay
    held_out = replay.valid if replay else None
    errors_before = held_out_errors(initial, held_out) if held_out else None
    guard, limit = None, prepared.training.held_out_growth
    if held_out and limit is not None:
        kept_zero = prepared.training.energy_shift == "none"
        guard = HeldOutGuard.of(initial, held_out, limit, energies=kept_zero)
    trainer = make_trainer(prepared, run, guard)
    trainer.resume()
    trainer.run()
    shift = None
    if prepared.training.energy_shift != "none" and prepared.replay:
        frames = prepared.replay.buffer.frames
        shift = shift_energies(potential, initial, [frame.structure for frame in frames])
    model, safetensors = potential.save(run.folder, prepared.name)
    changes = evaluate(prepared, initial, run.store)
    sampler = prepared.sampling(points=prepared.points, store=run.store, seed=prepared.evaluation.seed)
    afresh, unmeasured = measured_afresh(potential, prepared.losses, sampler)
    errors_after = held_out_errors(potential, held_out) if held_out else None
    delivered = {loss.name: x.measure(potential) for loss in prepared.losses if (x := loss.validation)}
    updates = read_log(run.folder)
    measured = courses(updates, prepared.losses, delivered, afresh)
    replayed = [frame.structure for frame in held_out or (replay.buffer.frames if replay else ())]
    summary = Summary(
        name=prepared.name,
        model_hash=potential.hash,
        initial_model_hash=initial.hash,
        head=potential.head,
        other_heads=head_drifts(
            initial, potential, replayed or displaced_crystals(potential, prepared.crystals)
        ),
        seed=run.seed,
        device=str(potential.device),
        steps=trainer.step,
        converged=trainer.converged,
        transitions=tuple(
            transition(
                loss,
                changes,
                [len(prepared.points[source].atoms) for source in loss.sources],
                convention_of(loss, prepared.points, prepared.free_energy.finite_size),
            )
            for loss in prepared.matched
        ),
        phases=tuple(phase_record(source, change) for source, change in changes.items()),
        replay=HeldOutChange(before=held_out_record(errors_before), after=held_out_record(errors_after)),
        measured=measured,
        deviations=deviations(updates, prepared.losses, afresh),
        notes=(
            *unmeasured,
            *hints(prepared.losses, measured),
            *validation_notes(measured, updates),
            *delivery_notes(trainer.delivered, trainer.step),
            *held_out_notes(errors_before, errors_after),
        ),
        packages=packages(),
        energy_shift_eV=shift,
        wall_time_s=trainer.earlier + time.monotonic() - started,
    )
    return FinetuneResult(run.folder, model, safetensors, summary, potential)


def molten(prepared: Prepared, run: Run) -> Prepared:
    """Return the run with its liquids made, but for those that come with an initial ΔG.

    Raises:
        SamplingError: If a crystal does not melt, or its melt boils, freezes or does not flow.
    """
    known = {s for loss in prepared.matched if loss.name in prepared.given for s in loss.sources}
    points = prepared.melting.molten(prepared.potential, prepared.points, run.store, known)
    return replace(prepared, points=points)


def anchored(prepared: Prepared, run: Run) -> Prepared:
    """Return the run with the initial ΔG of every loss, and the points in the cells that it belongs to.

    Raises:
        InputError: If a file in the folder belongs to another model, state or crystal.
        StatisticsError: If windows do not overlap, or the error of a difference is too large.
        SamplingError: If a phase does not stay what it is.
    """
    results = initial_free_energies(
        prepared.matched,
        prepared.given,
        prepared.points,
        prepared.potential,
        prepared.free_energy,
        run.store,
        run.folder,
    )
    losses, points = list[Loss](), dict(prepared.points)
    for loss in prepared.losses:
        if isinstance(loss, FreeEnergyDifference):
            points |= in_result_cells(prepared.points, loss, results[loss.name])
            losses.append(loss.with_initial(results[loss.name].delta_g))
        else:
            losses.append(loss)
    return replace(prepared, losses=losses, points=points)


def with_own_frames(prepared: Prepared, run: Run) -> Prepared:
    """Return the run with the frames that it samples first as replay, labelled by the initial potential.

    They are those that the training starts from: nothing is sampled twice.

    Raises:
        SamplingError: If a phase does not survive.
        StatisticsError: If the frames are too few or too correlated.
    """
    if prepared.own_frames is None:
        return prepared
    sources = sorted({s for loss in prepared.losses if isinstance(loss, EnsembleLoss) for s in loss.sources})
    sampler = prepared.sampling(points=prepared.points, store=run.store)
    train, valid = list[LabelledFrame](), list[LabelledFrame]()
    for source, ensemble in sampler.initial(prepared.potential, sources).items():
        frames = [
            LabelledFrame(structure, None, None, None, source=f"{source.name}, frame {i}")
            for i, structure in enumerate(ensemble.structures)
        ]
        labelled = labelled_by(prepared.potential, frames)
        valid += labelled[HELD_OUT - 1 :: HELD_OUT]
        train += [frame for i, frame in enumerate(labelled) if i % HELD_OUT != HELD_OUT - 1]
    replay = ReplayData(prepared.own_frames(train), valid)
    losses = judged(replay, prepared.potential, prepared.losses, trusted=True)
    return replace(prepared, replay=replay, losses=losses)


def make_trainer(prepared: Prepared, run: Run, guard: HeldOutGuard | None = None) -> Trainer:
    """Return the trainer of a run whose losses are anchored."""
    return Trainer.prepare(
        potential=prepared.potential,
        losses=prepared.losses,
        settings=prepared.training,
        sampler=prepared.sampling(points=prepared.points, store=run.store),
        replay=prepared.replay.buffer if prepared.replay else None,
        folder=run.folder,
        report=run.report,
        guard=guard,
    )


def evaluate(prepared: Prepared, initial: Potential, store: FrameStore) -> dict[EnsembleSource, PhaseChange]:
    """Return what the training changed for every phase that has a free-energy difference."""
    matched = {s: prepared.points[s] for loss in prepared.matched for s in loss.sources}
    if not matched:
        return {}
    return phase_changes(initial, prepared.potential, matched, prepared.evaluation, store)
