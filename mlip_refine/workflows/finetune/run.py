"""The main job: measure, correct, hold, and measure again."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlip_refine.config import Config, LocatedNode
from mlip_refine.data import ReplayBuffer
from mlip_refine.errors import InputError
from mlip_refine.files import write_json
from mlip_refine.losses import (
    BatchLoss,
    EnsembleSource,
    FreeEnergyDifference,
    Loss,
    PhononLoss,
    PotentialLoss,
    build_losses,
)
from mlip_refine.potential import Potential
from mlip_refine.quantities import Measured
from mlip_refine.sampling import FrameStore, StatePoint
from mlip_refine.training.ensembles.sampler import EnsembleSampler, Policy
from mlip_refine.training.replay_batches import HeldOutErrors, LabelledFrame, held_out_errors
from mlip_refine.training.schedule import make_schedule
from mlip_refine.training.trainer import StepReport, Trainer
from mlip_refine.workflows.finetune.energy_shift import require_shift, shift_after_training
from mlip_refine.workflows.finetune.evaluation import PhaseChange, Transition, phase_changes, transitions
from mlip_refine.workflows.finetune.figures import write_figures
from mlip_refine.workflows.finetune.measured import deviations_json, measured_json
from mlip_refine.workflows.finetune.records import read_log
from mlip_refine.workflows.free_energy.run import (
    FreeEnergyResult,
    compute_free_energies,
    in_result_cells,
    read_initial,
    require_crystals,
    require_equal_sizes,
    require_error,
)
from mlip_refine.workflows.from_config import (
    ReplayData,
    load_potential,
    load_replay,
    md_settings,
    sampling_length,
    state_points,
    with_timestep,
)
from mlip_refine.workflows.run_folder import open_run_folder

PACKAGES = ("mlip-refine", "torch", "mace-torch", "torch-sim-atomistic", "ase", "numpy")


@dataclass(frozen=True)
class FinetuneResult:
    """What a run left behind.

    Attributes:
        folder: The run folder.
        model: `NAME.model`, for `mace.calculators.MACECalculator`.
        safetensors: `NAME.safetensors`.
        summary: What `summary.json` holds.
        potential: The refined potential.
        transitions: ΔG before and after.
    """

    folder: Path
    model: Path
    safetensors: Path
    summary: dict[str, Any]
    potential: Potential
    transitions: tuple[Transition, ...]


@dataclass(frozen=True)
class Prepared:
    """Everything that a run starts from."""

    config: Config
    folder: Path
    store: FrameStore
    potential: Potential
    losses: list[Loss]
    points: dict[EnsembleSource, StatePoint]
    replay: ReplayData | None

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
        config: What to do.
        resume: Go on with a run that was interrupted.
        report: Called after every update.
        opened: Called with the run folder, once the input has been checked.

    Returns:
        The refined potential, its files and the summary.

    Raises:
        InputError: For bad input; nothing has been overwritten.
        StatisticsError: If the samples do not carry a number that the run needs.
        SamplingError: If a phase does not stay what it is.
    """
    started = time.monotonic()
    run = prepare(config, resume=resume)
    opened(run.folder)
    initial = run.potential.frozen_copy()
    errors_before = _errors(run, initial)
    points = _anchor(run)
    trainer = _trainer(run, points, report)
    trainer.resume()
    trainer.run()
    shift = shift_after_training(config, run.potential, initial, trainer.replay)
    model, safetensors = run.potential.save(run.folder, config.name)
    changes = _verdict(run, initial, points)
    n_atoms = {p.name: len(p.atoms) for p in points.values()}
    found = transitions(run.matched, changes, n_atoms)
    errors_after = _errors(run, run.potential)
    summary = _summary(run, initial, trainer, found, changes, errors_before, errors_after)
    summary["energy_shift_ev"] = shift
    summary["wall_time_s"] = trainer.earlier + time.monotonic() - started
    write_json(run.folder / "summary.json", summary)
    if config.output.figures:
        write_figures(run.folder)
    if not config.output.keep_frames:
        shutil.rmtree(run.store.folder, ignore_errors=True)
    return FinetuneResult(run.folder, model, safetensors, summary, run.potential, tuple(found))


def free_energies(config: Config, *, resume: bool = False) -> dict[str, FreeEnergyResult]:
    """Compute ΔG of the potential at the state of every `free_energy_difference` loss, ignoring `initial`.

    The results are written to the run folder as `initial-NAME.json`, for `initial:` of later runs.

    Raises:
        InputError: For bad input; nothing has been overwritten.
        StatisticsError: If the samples do not carry the numbers.
        SamplingError: If a phase does not stay what it is.
    """
    losses = tuple(_computed(loss) for loss in config.losses)
    return initial_free_energies(prepare(config.model_copy(update={"losses": losses}), resume=resume))


def _computed(loss: LocatedNode) -> LocatedNode:
    if loss.type != "free_energy_difference":
        return loss
    return LocatedNode(loss.to_dict() | {"initial": "compute"}, loss.places, loss.label)


def prepare(config: Config, *, resume: bool) -> Prepared:
    """Check everything that can be checked before a file is written, then open the run folder.

    Raises:
        InputError: With everything that is wrong about the input.
    """
    losses = build_losses(config.losses)
    if not losses:
        raise InputError("there is nothing to do: the config has no losses", where=config.where("losses"))
    _require_squares(config, losses)
    potential = load_potential(config)
    if not potential.trainable_parameters():
        where = config.where("potential", "freeze") or config.where("potential")
        raise InputError("every parameter is frozen: there is nothing to train", where=where)
    points = _points(config, losses, potential)
    config, given = with_timestep(config, potential, points.values()), config
    replay = load_replay(config, potential)
    if replay is None and any(isinstance(loss, BatchLoss) for loss in losses):
        raise InputError(
            "a loss needs labelled frames, but the config has no section replay", where=config.where("losses")
        )
    buffer = _replay_buffer(config, replay)
    make_schedule(config.training, losses, buffer, config.where("training", "schedule"))
    require_shift(config, potential, buffer, points.values())
    for loss in losses:
        if isinstance(loss, FreeEnergyDifference):
            require_equal_sizes(loss, points)
            if loss.options.initial == "compute":
                require_crystals(config, loss, points)
            else:
                read_initial(config.resolve(loss.options.initial), config, potential, loss, points)
    folder = open_run_folder(given, resume=resume)
    provenance = {"seed": config.seed, "packages": packages()}
    store = FrameStore(folder / "frames", provenance)
    return Prepared(config, folder, store, potential, losses, points, replay)


def _require_squares(config: Config, losses: Sequence[Loss]) -> None:
    """Refuse losses that the optimiser cannot linearise."""
    others = [loss.name for loss in losses if not loss.squares]
    if config.training.optimiser == "gauss_newton" and others:
        raise InputError(
            f"loss {others[0]!r} is no mean of squared deviations from targets",
            where=config.where("training", "optimiser"),
            found="gauss_newton",
            expected="adam",
        )


def _points(config: Config, losses: Sequence[Loss], potential: Potential) -> dict[EnsembleSource, StatePoint]:
    """State points of all sources; losses that ask for it know their crystals from here on."""
    for loss in losses:
        loss.prepare_files(config.resolve)
        if isinstance(loss, PhononLoss) and config.replay is not None:
            loss.warn_of_functionals(replay=config.replay.functional)
    described = sorted({s for loss in losses for s in loss.described})
    known = state_points(config, described, potential, config.sampling.replicas)
    for loss in losses:
        loss.prepare_crystals({s: known[s].atoms for s in loss.described})
    sources = sorted({s for loss in losses for s in loss.sources} - set(known))
    points = known | state_points(config, sources, potential, config.sampling.replicas)
    for loss in losses:
        loss.prepare_potential(potential)
        loss.prepare_cells({s: points[s].freedom != "fixed" for s in loss.sources})
    return points


def packages() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {name: version(name) for name in PACKAGES}


def initial_free_energies(run: Prepared) -> dict[str, FreeEnergyResult]:
    """ΔG of the initial model for every loss: read from its file, or computed and kept in the run folder."""
    results = {}
    missing = []
    for loss in run.matched:
        kept = run.folder / f"initial-{loss.name}.json"
        given = loss.options.initial
        path = run.config.resolve(given) if given != "compute" else kept
        if given != "compute" or kept.exists():
            results[loss.name] = read_initial(path, run.config, run.potential, loss, run.points)
        else:
            missing.append(loss)
    if missing:
        computed = compute_free_energies(run.config, run.potential, missing, run.store)
        for name, result in computed.items():
            result.write(run.folder / f"initial-{name}.json")
        results |= computed
    for name, result in results.items():
        require_error(name, result.delta_g_se, run.config.free_energy.max_error)
    return results


def _anchor(run: Prepared) -> dict[EnsembleSource, StatePoint]:
    """Give every loss its initial ΔG, and every point the cell that it was computed in."""
    points = dict(run.points)
    results = initial_free_energies(run)
    for loss in run.matched:
        result = results[loss.name]
        loss.prepare(result.delta_g)
        points |= in_result_cells(run.points, loss, result)
    return points


def _trainer(
    run: Prepared, points: Mapping[EnsembleSource, StatePoint], report: Callable[[StepReport], None]
) -> Trainer:
    config = run.config
    sampler = EnsembleSampler(
        points=points,
        settings=md_settings(config),
        length=sampling_length(config),
        store=run.store,
        seed=config.seed,
        sampling_dtype=config.sampling.dtype,
        accelerate=config.sampling.accelerate,
        min_effective=config.sampling.min_effective_frames,
        policy=Policy(
            threshold=config.sampling.n_eff_threshold,
            max_references=config.sampling.max_references,
            refresh=config.sampling.refresh,
            lend=config.sampling.lend,
        ),
    )
    return Trainer(
        potential=run.potential,
        losses=run.losses,
        settings=config.training,
        sampler=sampler,
        replay=_replay_buffer(run.config, run.replay),
        folder=run.folder,
        report=report,
    )


def _replay_buffer(config: Config, replay: ReplayData | None) -> ReplayBuffer[LabelledFrame] | None:
    section = config.replay
    if replay is None or section is None:
        return None
    return ReplayBuffer(replay.train, section.batch_size, config.seed, section.max_frames)


def _verdict(
    run: Prepared, initial: Potential, points: Mapping[EnsembleSource, StatePoint]
) -> dict[EnsembleSource, PhaseChange]:
    if not run.matched:
        return {}
    matched = {s: points[s] for loss in run.matched for s in loss.sources}
    return phase_changes(run.config, initial, run.potential, matched, run.store)


def _errors(run: Prepared, potential: Potential) -> HeldOutErrors | None:
    return held_out_errors(potential, run.replay.valid) if run.replay else None


def _delivered(run: Prepared) -> dict[str, Mapping[str, Measured]]:
    return {
        loss.name: loss.delivered(run.potential) for loss in run.losses if isinstance(loss, PotentialLoss)
    }


def _summary(
    run: Prepared,
    initial: Potential,
    trainer: Trainer,
    found: Sequence[Transition],
    changes: Mapping[EnsembleSource, PhaseChange],
    errors_before: HeldOutErrors | None,
    errors_after: HeldOutErrors | None,
) -> dict[str, Any]:
    updates = read_log(run.folder)
    return {
        "format": "mlip_refine summary 1",
        "name": run.config.name,
        "model_hash": run.potential.hash,
        "initial_model_hash": initial.hash,
        "seed": run.config.seed,
        "device": str(run.potential.device),
        "steps": trainer.step,
        "converged": trainer.converged,
        "transitions": [transition_json(t) for t in found],
        "phases": [_phase_json(s, c) for s, c in changes.items()],
        "replay": {"before": _errors_json(errors_before), "after": _errors_json(errors_after)},
        "measured": measured_json(updates, run.losses, _delivered(run)),
        "deviations": deviations_json(updates, run.losses),
        "packages": packages(),
    }


def transition_json(t: Transition) -> dict[str, Any]:
    """A transition as plain data: units in the names, standard errors as `_se`, refused numbers as null."""
    data: dict[str, Any] = {"name": t.name, "from": t.from_, "to": t.to, "n_atoms": t.n_atoms}
    data |= {"temperature_K": t.temperature_K, "pressure_GPa": t.pressure_GPa}
    data["target_mev_per_atom"] = t.target
    measured: dict[str, Measured | None] = {
        "delta_g_before_mev_per_atom": t.before,
        "delta_g_after_mev_per_atom": t.after,
        "delta_h_before_mev_per_atom": t.delta_h_before,
        "delta_h_after_mev_per_atom": t.delta_h_after,
        "transition_temperature_before_K": t.transition_before,
        "transition_temperature_after_K": t.transition_after,
    }
    for name, value in measured.items():
        data[name] = None if value is None else value.value
        data[f"{name}_se"] = None if value is None else value.se
    return data | {"notes": list(t.notes)}


def _phase_json(source: EnsembleSource, change: PhaseChange) -> dict[str, Any]:
    return {
        "phase": source.phase,
        "temperature_K": source.temperature,
        "pressure_GPa": source.pressure,
        "gibbs_change_ev": change.change.value,
        "gibbs_change_ev_se": change.change.se,
        "overlap": change.overlap,
        "cell_before_A": change.cell_before,
        "cell_after_A": change.cell_after,
    }


def _errors_json(errors: HeldOutErrors | None) -> dict[str, Any] | None:
    if errors is None:
        return None
    return {
        "energy_mae_mev_per_atom": errors.energy_mae_mev_per_atom,
        "forces_mae_mev_per_A": errors.forces_mae_mev_per_A,
        "stress_mae_gpa": errors.stress_mae_gpa,
        "n_frames": errors.n_frames,
    }
