"""From a config to what the workflows work with: potential, crystals, state points, settings."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import numpy as np
from ase import Atoms

from mlip_refine.config import Config, Phase
from mlip_refine.data import build_phase, load_structure, read_frames
from mlip_refine.data.structures import Prototype
from mlip_refine.errors import InputError, MlipRefineError, nearest
from mlip_refine.losses import EnsembleSource
from mlip_refine.potential import Potential
from mlip_refine.quantities import VOIGT
from mlip_refine.sampling import GuardSettings, Length, MDSettings, StatePoint, suitable_timestep
from mlip_refine.sampling.monitoring.phase_identity import require_ovito
from mlip_refine.sampling.state_points import Identity
from mlip_refine.training.replay_batches import LabelledFrame


def load_potential(config: Config) -> Potential:
    """The potential that the config names.

    Raises:
        InputError: If it cannot be loaded safely (see `Potential.load`).
    """
    section = config.potential
    return Potential.load(
        section.model,
        base=config.base,
        head=section.head,
        default_dtype=section.default_dtype,
        device=config.device,
        freeze=section.freeze,
        trust_pickle=section.trust_pickle,
    )


def crystal(config: Config, name: str, lattice: tuple[float, ...] = ()) -> Atoms:
    """The ideal crystal of a phase, in its starting cell or with lattice constants (a,) or (a, c), Å.

    Raises:
        InputError: If lattice constants are given for a phase that is read from a file, or c for a cubic one.
    """
    phase: Phase = config.phases[name]
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


def require_phase(config: Config, name: str, who: str, where: str | None) -> None:
    """Refuse the name of a phase that the config does not have.

    Args:
        config: With its phases.
        name: Of the phase.
        who: Names it, such as "a loss".
        where: Its place in the config.

    Raises:
        InputError: With the nearest known name.
    """
    if name not in config.phases:
        word = nearest(name, config.phases)
        raise InputError(
            f"{who} names the phase {name!r}, which is not among phases",
            where=where,
            expected=f"one of {', '.join(config.phases) or '(none)'}",
            fix=f"Did you mean {word!r}?" if word else None,
        )


def identity(config: Config, name: str, given: Identity | None = None) -> Identity:
    """What makes a system a phase: what is given, or what the phase says.

    Raises:
        InputError: If it cannot be judged here.
    """
    found = given or config.phases[name].identity
    if found == "liquid":
        require_ovito()
    return found


def state_points(
    config: Config, sources: Iterable[EnsembleSource], potential: Potential, replicas: int
) -> dict[EnsembleSource, StatePoint]:
    """A state point per source, in the starting cell of its phase.

    Raises:
        InputError: For a phase that the config does not have, elements that the model does not know, or
            states that can hardly be told apart.
    """
    points: dict[EnsembleSource, StatePoint] = {}
    for source in sources:
        require_phase(config, source.phase, "a loss", config.where("losses"))
        atoms = _in_cell(config, source)
        freedom = "fixed" if source.fixed else config.phases[source.phase].cell_freedom
        potential.graphs.species(atoms.numbers)
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
    _require_names(config, points)
    return points


def _require_names(config: Config, sources: Iterable[EnsembleSource]) -> None:
    """Refuse states of one name: frames are kept by it."""
    known: dict[str, EnsembleSource] = {}
    for source in sources:
        if known.setdefault(source.name, source) != source:
            raise InputError(
                f"two states have the name {source.name}",
                where=config.where("losses"),
                found=f"{known[source.name]} and {source}",
                fix="Give both the same cell, or cells that differ.",
            )


def _in_cell(config: Config, source: EnsembleSource) -> Atoms:
    """The ideal crystal of a source in the cell that it prescribes, or in that of its phase."""
    atoms = crystal(config, source.phase, source.lattice)
    if source.strain:
        deformation = np.eye(3)
        for (i, j), component in zip(VOIGT, source.strain, strict=True):
            deformation[i, j] = deformation[j, i] = component + (i == j)
        atoms.set_cell(atoms.cell.array @ deformation, scale_atoms=True)
    return atoms


def with_timestep(config: Config, potential: Potential, points: Iterable[StatePoint]) -> Config:
    """The config with a time step: its own, or the one that suits the stiffest of its crystals.

    One step for all phases, so that what the step does to their free energies is the same.
    """
    if config.sampling.timestep is not None:
        return config
    step = suitable_timestep(potential, [p.atoms for p in points])
    return config.model_copy(update={"sampling": config.sampling.model_copy(update={"timestep": step})})


def timestep(config: Config) -> float:
    """Time step of a config that has one, fs (see `with_timestep`)."""
    if config.sampling.timestep is None:
        raise MlipRefineError("this config has no time step yet: give sampling.timestep")
    return config.sampling.timestep


def md_settings(
    config: Config, *, friction: float | None = None, interval: float | None = None
) -> MDSettings:
    """Integrator settings; a workflow may have its own friction (1/ps) and frame interval (fs)."""
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
    """How long `sampling` draws frames."""
    return Length(config.sampling.equilibration, config.sampling.frames)


@dataclass(frozen=True)
class ReplayData:
    """Labelled frames to train on and to measure errors on."""

    train: list[LabelledFrame]
    valid: list[LabelledFrame]


def load_replay(config: Config, potential: Potential) -> ReplayData | None:
    """Read the replay frames, if the config has any.

    Raises:
        InputError: For a file, frame or label that cannot be used.
    """
    section = config.replay
    if section is None:
        return None
    sets = []
    for paths in (section.train, section.valid):
        frames = read_frames(
            [config.resolve(p) for p in paths],
            section.energy_key,
            section.forces_key,
            section.stress_key,
            elements=set(potential.graphs.atomic_numbers),
        )
        sets.append([LabelledFrame.from_frame(potential, f) for f in frames])
    return ReplayData(*sets)
