"""`mlip-refine finetune`: evaluate a potential, correct it, and evaluate it again."""

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlip_refine.config import Config, Training
from mlip_refine.data import ReplayBuffer
from mlip_refine.errors import InputError
from mlip_refine.losses import (
    BatchLoss,
    EnsembleSource,
    FreeEnergyDifference,
    Loss,
    LossSpec,
    loss_specs,
)
from mlip_refine.potential import Potential
from mlip_refine.potential.energy_shift import Compositions, shift_energies
from mlip_refine.sampling import FrameStore, StatePoint
from mlip_refine.training.ensembles.sampler import EnsembleSampler
from mlip_refine.training.replay_batches import LabelledFrame, held_out_errors
from mlip_refine.training.schedule import make_schedule
from mlip_refine.training.trainer import StepReport, Trainer
from mlip_refine.workflows.finetune.evaluation import (
    EvaluationSettings,
    PhaseChange,
    phase_changes,
    transition,
)
from mlip_refine.workflows.finetune.figures import write_figures
from mlip_refine.workflows.finetune.records import Replay, Summary, Transition, read_log
from mlip_refine.workflows.finetune.summary import courses, deviations, held_out_record, phase_record
from mlip_refine.workflows.free_energy.differences import (
    FreeEnergySettings,
    in_result_cells,
    initial_free_energies,
    read_initial,
    require_crystals,
    require_equal_sizes,
)
from mlip_refine.workflows.free_energy.records import FreeEnergyResult
from mlip_refine.workflows.from_config import (
    ReplayData,
    bind_losses,
    ensemble_sampler,
    evaluation_settings,
    free_energy_settings,
    load_potential,
    load_replay,
    with_timestep,
)
from mlip_refine.workflows.records import write_record
from mlip_refine.workflows.run_folder import open_run_folder, packages


@dataclass(frozen=True)
class FinetuneResult:
    """Results of a run.

    Attributes:
        folder: The run folder.
        model: `NAME.model`, for `mace.calculators.MACECalculator`.
        safetensors: `NAME.safetensors`.
        summary: Content of `summary.json`.
        potential: The refined potential.
        transitions: ΔG before and after.
    """

    folder: Path
    model: Path
    safetensors: Path
    summary: Summary
    potential: Potential
    transitions: tuple[Transition, ...]


@dataclass(frozen=True)
class Prepared:
    """Everything that a run starts from.

    Attributes:
        name: Name of the run and of its model files.
        folder: The run folder.
        potential: The potential that is trained, in place.
        losses: All losses.
        replay: Labelled frames, if there are any.
        training: Settings of the training.
        sampler: Draws ensembles for the losses, with the points in their starting cells.
        given: Initial free-energy differences that were read from files, by loss name.
        free_energy: How the others are computed.
        evaluation: How both potentials are sampled at the end.
    """

    name: str
    folder: Path
    potential: Potential
    losses: list[Loss]
    replay: ReplayData | None
    training: Training
    sampler: EnsembleSampler
    given: Mapping[str, FreeEnergyResult]
    free_energy: FreeEnergySettings
    evaluation: EvaluationSettings

    @property
    def matched(self) -> list[FreeEnergyDifference]:
        """The losses that have an initial free-energy difference."""
        return [loss for loss in self.losses if isinstance(loss, FreeEnergyDifference)]


def finetune(
    config: Config,
    *,
    resume: bool = False,
    report: Callable[[StepReport], None] = lambda _: None,
    opened: Callable[[Path], None] = lambda _: None,
) -> FinetuneResult:
    """Correct a potential and measure what changed.

    Args:
        config: The config.
        resume: Whether an interrupted run is continued.
        report: Called after every update.
        opened: Called with the run folder, once the input has been checked.

    Returns:
        The refined potential, its files and the summary.

    Raises:
        InputError: For bad input; nothing has been overwritten.
        StatisticsError: If the samples do not determine a number that the run needs.
        SamplingError: If a phase does not stay what it is.
    """
    started = time.monotonic()
    run = prepare(config, resume=resume)
    opened(run.folder)
    initial = run.potential.frozen_copy()
    held_out = run.replay.valid if run.replay else None
    errors_before = held_out_errors(initial, held_out) if held_out else None
    trainer = make_trainer(run, report)
    run = replace(run, losses=list(trainer.losses))
    trainer.resume()
    trainer.run()
    shift = None
    if run.training.energy_shift != "none" and run.replay:
        frames = run.replay.buffer.frames
        shift = shift_energies(run.potential, initial, [frame.structure for frame in frames])
    model, safetensors = run.potential.save(run.folder, run.name)
    changes = evaluate(run, initial, trainer.sampler.points)
    transitions = tuple(
        transition(loss, changes, len(trainer.sampler.points[loss.phase_from].atoms)) for loss in run.matched
    )
    delivered = {loss.name: loss.validation.measure(run.potential) for loss in run.losses if loss.validation}
    updates = read_log(run.folder)
    summary = Summary(
        name=run.name,
        model_hash=run.potential.hash,
        initial_model_hash=initial.hash,
        seed=run.sampler.seed,
        device=str(run.potential.device),
        steps=trainer.step,
        converged=trainer.converged,
        transitions=transitions,
        phases=tuple(phase_record(source, change) for source, change in changes.items()),
        replay=Replay(
            before=held_out_record(errors_before),
            after=held_out_record(held_out_errors(run.potential, held_out) if held_out else None),
        ),
        measured=courses(updates, run.losses, delivered),
        deviations=deviations(updates, run.losses),
        packages=packages(),
        energy_shift_eV=shift,
        wall_time_s=trainer.earlier + time.monotonic() - started,
    )
    write_record(run.folder / "summary.json", summary)
    if config.output.figures:
        write_figures(run.folder)
    if not config.output.keep_frames:
        shutil.rmtree(run.sampler.store.folder, ignore_errors=True)
    return FinetuneResult(run.folder, model, safetensors, summary, run.potential, transitions)


def prepare(config: Config, *, resume: bool) -> Prepared:
    """Check everything that can be checked before a file is written, then open the run folder.

    Raises:
        InputError: With everything that is wrong about the input.
    """
    specs = loss_specs(config.losses)
    _require_trainable_losses(config, specs)
    potential = load_potential(config)
    if not potential.trainable_parameters():
        where = config.where("potential", "freeze") or config.where("potential")
        raise InputError("every parameter is frozen: there is nothing to train", where=where)
    losses, points = bind_losses(config, specs, potential)
    config, given = with_timestep(config, potential, points.values()), config
    free_energy = free_energy_settings(config)
    replay = load_replay(config, potential)
    buffer = replay.buffer if replay else None
    if buffer is None and any(isinstance(loss, BatchLoss) for loss in losses):
        raise InputError(
            "a loss needs labelled frames, but the config has no section replay", where=config.where("losses")
        )
    make_schedule(config.training, losses, buffer, config.where("training", "schedule"))
    if config.training.energy_shift != "none":
        _require_shift(potential, buffer, points.values(), config.where("training", "energy_shift"))
    initial = {}
    for loss in losses:
        if isinstance(loss, FreeEnergyDifference):
            require_equal_sizes(loss, points)
            if loss.options.initial == "compute":
                require_crystals(loss, points, config.where)
            else:
                path = config.resolve(loss.options.initial)
                initial[loss.name] = read_initial(path, loss, points, potential, free_energy.timestep)
    folder = open_run_folder(given, resume=resume)
    store = FrameStore(folder / "frames", {"seed": config.seed, "packages": packages()})
    return Prepared(
        name=config.name,
        folder=folder,
        potential=potential,
        losses=losses,
        replay=replay,
        training=config.training,
        sampler=ensemble_sampler(config, points, store),
        given=initial,
        free_energy=free_energy,
        evaluation=evaluation_settings(config),
    )


def _require_trainable_losses(config: Config, specs: Sequence[LossSpec]) -> None:
    """Refuse a config without losses, or with losses that the optimiser cannot linearise."""
    if not specs:
        raise InputError("there is nothing to do: the config has no losses", where=config.where("losses"))
    others = [spec.name for spec in specs if not spec.type.loss_class.squares]
    if config.training.optimiser == "gauss_newton" and others:
        raise InputError(
            f"loss {others[0]!r} is no mean of squared deviations from targets",
            where=config.where("training", "optimiser"),
            found="gauss_newton",
            expected="adam",
        )


def _require_shift(
    potential: Potential,
    buffer: ReplayBuffer[LabelledFrame] | None,
    points: Iterable[StatePoint],
    where: str | None,
) -> None:
    """Refuse a shift of atomic energies that the training frames do not determine.

    Raises:
        InputError: If there are no frames, or they do not determine the energies of all elements.
    """
    if buffer is None:
        problem = "training.energy_shift needs labelled frames, but the config has no section replay"
        raise InputError(problem, where=where)
    elements = {int(number) for point in points for number in point.atoms.numbers}
    structures = [frame.structure for frame in buffer.frames]
    Compositions.of(potential, structures).require(elements, where)


def make_trainer(run: Prepared, report: Callable[[StepReport], None]) -> Trainer:
    """Give every loss its initial ΔG, and return the trainer, with points in the cells that ΔG belongs to."""
    points = dict(run.sampler.points)
    results = initial_free_energies(
        run.matched,
        run.given,
        run.sampler.points,
        run.potential,
        run.free_energy,
        run.sampler.store,
        run.folder,
    )
    losses = list[Loss]()
    for loss in run.losses:
        if isinstance(loss, FreeEnergyDifference):
            points |= in_result_cells(run.sampler.points, loss, results[loss.name])
            losses.append(loss.with_initial(results[loss.name].delta_g))
        else:
            losses.append(loss)
    return Trainer(
        potential=run.potential,
        losses=losses,
        settings=run.training,
        sampler=replace(run.sampler, points=points),
        replay=run.replay.buffer if run.replay else None,
        folder=run.folder,
        report=report,
    )


def evaluate(
    run: Prepared, initial: Potential, points: Mapping[EnsembleSource, StatePoint]
) -> dict[EnsembleSource, PhaseChange]:
    """Return what the training changed for every phase that has a free-energy difference."""
    matched = {s: points[s] for loss in run.matched for s in loss.sources}
    if not matched:
        return {}
    return phase_changes(initial, run.potential, matched, run.evaluation, run.sampler.store)
