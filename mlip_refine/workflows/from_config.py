"""From a config to what workflows work with: potential, crystals, state points, and settings of each part.

Below the workflows nobody sees a config: they get what these functions make of it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast

import numpy as np
from ase import Atoms
from matscipy.neighbours import neighbour_list

from mlip_refine.config import Config, Phase, PotentialSection
from mlip_refine.config.sections.phases import Prototype
from mlip_refine.data import ReplayBuffer, build_phase, load_structure, read_frames
from mlip_refine.errors import InputError, MlipRefineError
from mlip_refine.losses import EnsembleSource, Loss, LossSpec, Setting
from mlip_refine.potential import Potential
from mlip_refine.quantities import VOIGT
from mlip_refine.sampling import (
    GuardSettings,
    Length,
    MDSettings,
    StatePoint,
    suitable_timestep,
)
from mlip_refine.sampling.monitoring.phase_identity import has_ovito, require_ovito
from mlip_refine.sampling.state_points import Identity
from mlip_refine.training.replay import LabelledFrame, labelled_by
from mlip_refine.training.tracker import EnsembleSampler, Policy
from mlip_refine.workflows.checks import require_phase
from mlip_refine.workflows.finetune.evaluation import EvaluationSettings
from mlip_refine.workflows.free_energy.cells import CellSettings
from mlip_refine.workflows.free_energy.differences import FreeEnergySettings
from mlip_refine.workflows.free_energy.frenkel_ladd import LadderSettings
from mlip_refine.workflows.free_energy.liquid_path import LiquidPathSettings
from mlip_refine.workflows.free_energy.uhlenbeck_ford import FluidSettings
from mlip_refine.workflows.melt import LEAST_ATOMS, Melting, MeltSettings

CLOSEST = 0.4
"""Atoms nearer than this, Å, are on one place; the bond of H₂ is 0.74 Å."""

SMALLEST, LARGEST = 0.5, 1e5
"""Volumes per atom beyond which there is no crystal, Å³: half that of hydrogen at 500 GPa, and a thin gas."""


def load_potential(
    model: Config | str | Path,
    *,
    head: str | None = None,
    device: str | None = None,
    default_dtype: Literal["float32", "float64"] | None = None,
    freeze: Sequence[str] | None = None,
    trust_pickle: bool | None = None,
) -> Potential:
    """Load a potential by its name or file, or the one that a config names.

    Arguments that are not given are those of the config, or else the defaults of the section `potential`.

    Args:
        model: Embedded name, path of a `.model` or `.safetensors` file, name of a foundation model, or a
            config.
        head: Head of a multi-head model.
        device: `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`.
        default_dtype: `float32` or `float64`.
        freeze: Glob patterns of names of parameters that are not trained.
        trust_pickle: Whether the file may run any code.

    Raises:
        InputError: If it cannot be loaded safely (see `Potential.load`).
    """
    config = model if isinstance(model, Config) else None
    section = PotentialSection.model_construct(model=str(model)) if config is None else config.potential
    given = {"head": head, "default_dtype": default_dtype, "freeze": freeze, "trust_pickle": trust_pickle}
    given = {name: value for name, value in given.items() if value is not None}
    section = section.model_copy(update=given)
    try:
        return Potential.load(
            section.model,
            base=None if config is None else config.base,
            head=section.head,
            default_dtype=section.default_dtype,
            device=device or ("auto" if config is None else config.device),
            freeze=section.freeze,
            trust_pickle=section.trust_pickle,
        )
    except InputError as error:
        # What the config says has a line.
        if config is not None and error.where in {"model", "head", "freeze"} - set(given):
            error.where = config.where("potential", error.where) or f"potential.{error.where}"
        raise


def crystal(config: Config, name: str, lattice: tuple[float, ...] = ()) -> Atoms:
    """Return the ideal crystal of a phase, in its starting cell or with lattice constants (a,) or (a, c), Å.

    Of a phase that is to be molten this is the crystal that melts.

    Raises:
        InputError: If lattice constants are given for a phase that is read from a file, or c for a cubic one;
            or if atoms are on one place, or too far apart for any crystal.
    """
    atoms, where = _built(config, name, lattice), config.where("phases", name)
    volume = abs(atoms.cell.volume) / len(atoms)
    if not SMALLEST < volume < LARGEST:
        raise _no_crystal(atoms, where, f"{volume:.3g} Å³ per atom")
    distances = neighbour_list("d", atoms, CLOSEST)
    if len(distances):
        raise _no_crystal(atoms, where, f"two atoms {distances.min():.3g} Å apart")
    return atoms


def _built(config: Config, name: str, lattice: tuple[float, ...]) -> Atoms:
    """Build the crystal of a phase, or read it."""
    phase: Phase = config.phases[name]
    if phase.melt is not None:
        if lattice:
            raise InputError(
                f"the phase {name!r} is molten: it has no lattice constants to choose",
                where=config.where("phases", name),
                found=f"lattice {list(lattice)}",
            )
        return _built(config, phase.melt.from_, ())
    if phase.file is not None:
        if lattice:
            raise InputError(
                f"the phase {name!r} is read from a file: it has no lattice constants to choose",
                where=config.where("phases", name),
                found=f"lattice {list(lattice)}",
                fix="Give a phase with a file for every cell.",
            )
        return load_structure(config.resolve(phase.file), phase.supercell, phase.format)
    if len(lattice) > 1 and phase.prototype != "hcp":
        raise InputError(
            f"the phase {name!r} is cubic: it has no second lattice constant",
            where=config.where("phases", name),
            found=f"{phase.prototype} with the lattice {list(lattice)}, in Å",
            expected="[a]",
            fix="Are these the lattice constants of another phase?",
        )
    a, c = (*lattice, None)[:2] if lattice else phase.lattice
    return build_phase(cast("Prototype", phase.prototype), str(phase.element), int(phase.n_atoms or 0), a, c)


def require_interacting(potential: Potential, atoms: Atoms, where: str | None) -> None:
    """Refuse a crystal that is none for the model, before anything is computed with it.

    Args:
        potential: Potential with its elements and cutoff.
        atoms: The crystal in its starting cell.
        where: Place of the phase in the config.

    Raises:
        InputError: Elements that the model does not know, or atoms of which none is within the cutoff of
            another.
    """
    potential.graphs.species(atoms.numbers)
    # An ideal gas has a short cutoff because nothing interacts.
    cutoff = max(potential.graphs.cutoff, 4.0)
    if not len(neighbour_list("i", atoms, cutoff)):
        raise _no_crystal(atoms, where, f"no neighbour within {cutoff:g} Å, the cutoff of the model")


def _no_crystal(atoms: Atoms, where: str | None, found: str) -> InputError:
    return InputError(
        "the atoms of a phase are too far apart, or too close, for a crystal",
        where=where,
        found=f"{found}; cell {atoms.cell.cellpar().round(3).tolist()} of {len(atoms)} atoms",
        fix="Check lattice constants and their units.",
    )


def identity(config: Config, name: str, given: Identity | None = None) -> Identity:
    """Return what makes a system a phase: what is given, or what the phase says.

    A molten phase is judged by its Bragg peaks and its diffusion when it is made; it is not judged while it
    runs where OVITO is missing and nobody asked for it, and where its identity is none.

    Raises:
        InputError: If it cannot be judged on this machine.
    """
    phase = config.phases[name]
    found = given or phase.identity
    if phase.melt is not None:
        asked = given is not None or "identity" in phase.model_fields_set
        if found in ("structure", "sites"):
            raise InputError(
                f"the phase {name!r} is molten", found=f"identity {found}", expected="liquid or none"
            )
        if found == "none" or not (asked or has_ovito()):
            return "molten"
    if found == "liquid":
        require_ovito()
    return found


def melt_settings(config: Config, sources: Iterable[EnsembleSource]) -> dict[EnsembleSource, MeltSettings]:
    """Return how the liquids among sources are made of crystals.

    Raises:
        InputError: For a crystal with too few atoms for its melt to be told from it.
    """
    found = {}
    for source in sources:
        melt = config.phases[source.phase].melt
        if melt is None:
            continue
        n_atoms = len(crystal(config, source.phase))
        if n_atoms < LEAST_ATOMS:
            raise InputError(
                f"the phase {source.phase!r} has too few atoms for a liquid",
                where=config.where("phases", melt.from_),
                found=f"{n_atoms} atoms of {melt.from_!r}",
                expected=f"at least {LEAST_ATOMS}",
            )
        found[source] = MeltSettings(melt.from_, melt.temperature, melt.duration)
    return found


def melting(config: Config, sources: Iterable[EnsembleSource]) -> Melting:
    """Return what is molten among sources, and how it is sampled meanwhile.

    Raises:
        InputError: For a crystal with too few atoms for its melt to be told from it.
    """
    section = config.sampling
    melts = melt_settings(config, sources)
    return Melting(melts, md_settings(config), config.seed, section.dtype, section.accelerate)


def state_points(
    config: Config, sources: Iterable[EnsembleSource], potential: Potential, replicas: int
) -> dict[EnsembleSource, StatePoint]:
    """Return a state point per source, in the starting cell of its phase.

    Raises:
        InputError: For a phase that the config does not have, elements that the model does not know, or
            two states of one name.
    """
    points: dict[EnsembleSource, StatePoint] = {}
    named: dict[str, EnsembleSource] = {}
    for source in sources:
        require_phase(config, source.phase, "a loss", config.where("losses"))
        atoms = crystal(config, source.phase, source.lattice)
        if source.strain:
            deformation = np.eye(3)
            for (i, j), component in zip(VOIGT, source.strain, strict=True):
                deformation[i, j] = deformation[j, i] = component + (i == j)
            atoms.set_cell(atoms.cell.array @ deformation, scale_atoms=True)
        freedom = "fixed" if source.fixed else config.phases[source.phase].cell_freedom
        require_interacting(potential, atoms, config.where("phases", source.phase))
        # Frames are kept by the name of their state.
        if named.setdefault(source.name, source) != source:
            raise InputError(
                f"two states have the name {source.name}",
                where=config.where("losses"),
                found=f"{named[source.name]} and {source}",
                fix="Give both the same cell, or cells that differ.",
            )
        points[source] = StatePoint(
            name=source.name,
            atoms=atoms,
            temperature=source.temperature,
            pressure=source.pressure,
            ensemble="nvt" if freedom == "fixed" else config.sampling.ensemble,
            cell_freedom=freedom,
            replicas=replicas,
            thermostat=config.sampling.thermostat,
            identity=identity(config, source.phase),
        )
    return points


def with_timestep(config: Config, potential: Potential, points: Iterable[StatePoint]) -> Config:
    """Return the config with a time step: its own, or one that suits the stiffest of its crystals.

    All phases have the same step, so that its effect on their free energies is the same.
    """
    if config.sampling.timestep is not None:
        return config
    step = suitable_timestep(potential, [p.atoms for p in points])
    return config.model_copy(update={"sampling": config.sampling.model_copy(update={"timestep": step})})


def timestep(config: Config) -> float:
    """Return the time step of a config that has one, fs (see `with_timestep`)."""
    if config.sampling.timestep is None:
        raise MlipRefineError("this config has no time step yet: give sampling.timestep")
    return config.sampling.timestep


def md_settings(
    config: Config, *, friction: float | None = None, interval: float | None = None
) -> MDSettings:
    """Return integrator settings; a workflow may have its own friction (1/ps) and frame interval (fs)."""
    section = config.sampling
    guards = section.guards
    return MDSettings(
        timestep=section.timestep,
        friction=section.friction if friction is None else friction,
        interval=section.interval if interval is None else interval,
        barostat_time=section.barostat_time,
        guards=GuardSettings(**guards.model_dump()),
    )


def sampling_length(config: Config) -> Length:
    """Return how long `sampling` draws frames."""
    return Length(config.sampling.equilibration, config.sampling.frames)


def ensemble_sampling(config: Config) -> partial[EnsembleSampler]:
    """Return how a training draws ensembles, by the section `sampling`; points and store are missing."""
    section = config.sampling
    return partial(
        EnsembleSampler,
        settings=md_settings(config),
        length=sampling_length(config),
        seed=config.seed,
        sampling_dtype=section.dtype,
        accelerate=section.accelerate,
        min_effective=section.min_effective_frames,
        policy=Policy(
            threshold=section.n_eff_threshold,
            max_references=section.max_references,
            refresh=section.refresh,
            lend=section.lend,
        ),
    )


def free_energy_settings(config: Config) -> FreeEnergySettings:
    """Return how free-energy differences are computed, by the sections `free_energy` and `sampling`."""
    section, sampling = config.free_energy, config.sampling
    frames, fit = (max(1, round(t / section.interval)) for t in (section.production, section.fit))
    # A segment is kept when it is complete: at most a picosecond or so is lost when a run is stopped.
    segment = max(1, round(1000.0 / section.interval))
    return FreeEnergySettings(
        replicas=section.replicas,
        cells=_cell_settings(config, sampling.cell_iterations),
        md=md_settings(config, friction=section.friction, interval=section.interval),
        ladder=LadderSettings(
            reference=section.reference,
            windows=section.windows,
            fit=Length(section.equilibration, fit, segment),
            ladder=Length(section.equilibration, frames, segment),
        ),
        liquid=LiquidPathSettings(
            strength=section.liquid.strength,
            sigma=section.liquid.sigma,
            windows=section.liquid.windows,
            fit=Length(section.equilibration, fit, segment),
            ladder=Length(section.equilibration, frames, segment),
            fluid=FluidSettings(steps=section.liquid.fluid_steps),
        ),
        liquid_cells=Length(
            section.equilibration, max(1, round(section.liquid.cell / section.interval)), segment
        ),
        timestep=timestep(config),
        seed=config.seed,
        dtype=sampling.dtype,
        accelerate=sampling.accelerate,
        max_error=section.max_error,
        finite_size=section.finite_size,
        record=section.model_dump() | {"seed": config.seed, "dtype": sampling.dtype},
    )


def evaluation_settings(config: Config) -> EvaluationSettings:
    """Return how both potentials are sampled after training, by the sections `evaluation` and `sampling`."""
    section = config.evaluation
    return EvaluationSettings(
        replicas=section.replicas,
        md=md_settings(config, interval=section.interval),
        length=Length(section.equilibration, section.frames),
        cells=_cell_settings(config, section.cell_iterations),
        seed=config.seed + section.seed_offset,
        dtype=config.sampling.dtype,
        accelerate=config.sampling.accelerate,
    )


def _cell_settings(config: Config, iterations: int) -> CellSettings:
    """Return how the cell of a phase is searched: the first third of each run equilibrates."""
    total = config.sampling.cell_equilibration
    interval = max(timestep(config), min(40.0, total / 10))
    length = Length(total / 3, max(1, round(2 * total / 3 / interval)))
    return CellSettings(md_settings(config, interval=interval), length, iterations)


@dataclass(frozen=True)
class ReplayData:
    """Labelled frames of a run.

    Attributes:
        buffer: Frames to train on.
        valid: Frames to measure errors on.
    """

    buffer: ReplayBuffer[LabelledFrame]
    valid: list[LabelledFrame]


def load_replay(config: Config, potential: Potential) -> ReplayData | None:
    """Read the replay frames, if the config names any.

    Raises:
        InputError: For a file, frame or label that cannot be used.
    """
    section = config.replay
    if section is None or section.train is None or section.valid is None:
        return None
    keys = (section.energy_key, section.forces_key, section.stress_key, section.virials_key)
    train, valid = (
        [
            LabelledFrame.from_frame(potential, frame)
            for frame in read_frames(
                [config.resolve(p) for p in paths],
                *(keys if section.from_ == "labels" else (None,) * len(keys)),
                elements=set(potential.graphs.atomic_numbers),
                head=potential.head,
            )
        ]
        for paths in (section.train, section.valid)
    )
    if section.from_ == "model":
        train, valid = (labelled_by(potential, frames) for frames in (train, valid))
    return ReplayData(ReplayBuffer(train, section.batch_size, config.seed, section.max_frames), valid)


def bind_losses(
    config: Config, specs: Iterable[LossSpec], potential: Potential, *, trained: bool = True
) -> tuple[list[Loss], dict[EnsembleSource, StatePoint]]:
    """Bind losses to the phases and files of a config.

    Args:
        config: Phases, sampling and paths.
        specs: What the config says about the losses.
        potential: The potential, which knows some elements.
        trained: Whether the potential is trained; losses then refuse one that they cannot be evaluated on.

    Returns:
        The losses, and a state point for every source of theirs and every crystal that they asked for.

    Raises:
        InputError: For a file, a phase or a potential that a loss cannot use.
    """
    points: dict[EnsembleSource, StatePoint] = {}

    def point(source: EnsembleSource) -> StatePoint:
        if source not in points:
            points.update(state_points(config, [source], potential, config.sampling.replicas))
        return points[source]

    setting = Setting(
        crystal=lambda source: point(source).atoms,
        cell_moves=lambda source: point(source).freedom != "fixed",
        resolve=config.resolve,
        potential=potential if trained else None,
        replay_functional=None if config.replay is None else config.replay.functional,
    )
    losses = [spec.bind(setting) for spec in specs]
    sources = sorted({s for loss in losses for s in loss.sources} | set(points))
    return losses, state_points(config, sources, potential, config.sampling.replicas)
