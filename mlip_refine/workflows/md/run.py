"""Molecular dynamics for its own sake: every phase at every temperature and pressure, in one batch."""

import math
import time
from dataclasses import dataclass, replace
from itertools import batched
from pathlib import Path

import torch
from ase.io import write
from torch import Tensor

from mlip_refine.config import MD, Config
from mlip_refine.errors import InputError, SamplingError, bytes_in_words
from mlip_refine.files import written
from mlip_refine.losses import EnsembleSource
from mlip_refine.potential import Graphs, Potential, Work
from mlip_refine.potential.batching import bytes_of_memory
from mlip_refine.sampling import FrameStore, Length, MDSettings, StatePoint, Trajectory, sample
from mlip_refine.sampling.md.settings import with_time_scales
from mlip_refine.sampling.sampler import PhaseLostError, memory_of_frames
from mlip_refine.sampling.state_points import SERIES, Ensemble
from mlip_refine.workflows.base import Run
from mlip_refine.workflows.from_config import (
    crystal,
    identity,
    load_potential,
    md_settings,
    melt_settings,
    require_interacting,
    timestep,
    with_timestep,
)
from mlip_refine.workflows.md import chosen_states, required_section
from mlip_refine.workflows.md.averages import averages, write_series
from mlip_refine.workflows.md.dynamics import write_dynamics
from mlip_refine.workflows.md.records import MDPoint, MDResult, Speed
from mlip_refine.workflows.md.trajectories import STAGE, MDTrajectory
from mlip_refine.workflows.melt import MeltSettings, melted

FORCES_AT_A_TIME = 64
"""Frames of an export whose forces are computed together."""


@dataclass(frozen=True)
class RecordedLength(Length):
    """A length whose first frames are the equilibration.

    It ends with a segment, so that an interrupted equilibration is not begun anew.

    Attributes:
        skipped: Frames of the equilibration, among `frames`.
    """

    skipped: int = 0

    def segments(self) -> list[int]:
        """Frames of every segment."""
        parts = (self.skipped, self.frames - self.skipped)
        return [n for frames in parts if frames for n in Length(0.0, frames, self.segment).segments()]


@dataclass(frozen=True)
class Prepared:
    """Everything that a run starts from.

    Attributes:
        name: Name of the run.
        seed: Random seed.
        section: The section `md` of the config.
        min_effective: Least number of independent frames of an average.
        potential: The potential, frozen and as it samples.
        points: State points by name, each with its time step, friction and barostat time; liquids that are
            to be molten still as crystals.
        melts: How those are made, by the same names.
        phases: Phase of every state point, by its name.
        settings: How the points are integrated.
        timestep: Time step, fs.
        steps_per_frame: Time steps between two frames.
        length: Number of frames, with those of the equilibration.
        keep_frames: Whether the frames stay in the run folder.
    """

    name: str
    seed: int
    section: MD
    min_effective: float
    potential: Potential
    points: dict[str, StatePoint]
    melts: dict[str, MeltSettings]
    phases: dict[str, str]
    settings: MDSettings
    timestep: float
    steps_per_frame: int
    length: RecordedLength
    keep_frames: bool

    @property
    def interval(self) -> float:
        """Time between two frames, a whole number of steps, fs."""
        return self.steps_per_frame * self.timestep


def prepare(config: Config) -> Prepared:
    """Check the input, and turn the config into the state points and settings of a run.

    Raises:
        InputError: For bad input.
    """
    section, states = required_section(config), chosen_states(config)
    sources = [EnsembleSource(*state) for state in states]
    potential = load_potential(config).frozen_copy(config.sampling.dtype, config.sampling.accelerate)
    points = [_state_point(config, section, source, potential) for source in sources]
    config = with_timestep(config, potential, points)
    step = timestep(config)
    if section.interval < step:
        raise InputError(
            "frames cannot be closer than steps",
            where=config.where("md", "interval"),
            found=f"interval {section.interval:g} fs",
            expected=f"at least one time step ({step:g} fs)",
        )
    settings = md_settings(config, interval=section.interval)
    steps = max(1, round(section.interval / step))
    # Frames that cover the times; the small number forgives rounding.
    skipped, frames = (
        math.ceil(time / (steps * step) - 1e-6) for time in (section.equilibration, section.duration)
    )
    needed, memory = memory_of_frames(points, skipped + frames), bytes_of_memory()
    if needed > memory:
        raise InputError(
            "the frames do not fit into memory",
            where=config.where("md", "duration") or config.where("md"),
            found=f"{skipped + frames:,} frames, {bytes_in_words(needed)}",
            expected=f"at most {(skipped + frames) * memory // needed:,} frames on this machine",
            fix="Raise md.interval, or lower md.duration or md.replicas.",
        )
    segment = max(1, round(section.segment / section.interval))
    return Prepared(
        name=config.name,
        seed=config.seed,
        section=section,
        min_effective=config.sampling.min_effective_frames,
        potential=potential,
        points={point.name: point for point in with_time_scales(potential, points, settings)},
        melts={source.name: melt for source, melt in melt_settings(config, sources).items()},
        phases={source.name: source.phase for source in sources},
        settings=settings,
        timestep=step,
        steps_per_frame=steps,
        length=RecordedLength(0.0, skipped + frames, segment, skipped),
        keep_frames=config.output.keep_frames,
    )


def run(prepared: Prepared, run: Run) -> MDResult:
    """Melt what is to be molten, sample every state point and average.

    A point that lost all its replicas has no averages and says why; it does not take the others along.

    Raises:
        SamplingError: If a crystal does not melt, or no point has a frame that counts.
    """
    points = melted(
        prepared.potential,
        prepared.points,
        prepared.melts,
        prepared.settings,
        seed=prepared.seed,
        store=run.store,
    )
    prepared = replace(prepared, points=points)
    section, skipped, interval = prepared.section, prepared.length.skipped, prepared.interval
    trajectories, speed = _timed(prepared, run.store)
    records, frames = [], dict[str, MDTrajectory]()
    for name, trajectory in trajectories.items():
        point = trajectory.point
        cut = {field: getattr(trajectory, field)[:, skipped:] for field in (*SERIES, "kept")}
        production = replace(trajectory, **cut)
        frames[name] = MDTrajectory(
            point=point,
            n_frames=production.n_kept,
            skipped=skipped,
            interval=interval,
            store=run.store,
            segments=len(prepared.length.segments()),
            held=None if prepared.keep_frames else trajectory,
        )
        records.append(
            MDPoint(
                name=name,
                phase=prepared.phases[name],
                n_atoms=trajectory.n_atoms,
                temperature_K=point.temperature,
                pressure_GPa=point.pressure,
                ensemble=point.ensemble,
                thermostat=point.thermostat,
                cell_freedom=point.freedom,
                identity=point.identity,
                timestep_fs=prepared.timestep,
                interval_fs=interval,
                friction_per_ps=point.friction if point.langevin else None,
                barostat_time_fs=point.barostat_time if point.freedom != "fixed" else None,
                replicas=section.replicas,
                steps=prepared.length.frames * prepared.steps_per_frame,
                equilibration_ps=skipped * interval / 1e3,
                frames_kept=production.n_kept,
                frames_discarded=production.kept.numel() - production.n_kept,
                averages=averages(production, prepared.min_effective),
                verdicts=trajectory.verdicts,
            )
        )

    if not any(trajectory.n_kept for trajectory in trajectories.values()):
        verdicts = "; ".join(trajectory.verdicts[-1] for trajectory in trajectories.values())
        raise SamplingError(f"no replica of any state point survived: {verdicts}")
    write_series(run.folder / "series.csv", trajectories, interval)
    if section.export:
        for name, trajectory in trajectories.items():
            # What is in memory need not be read from the store.
            held = replace(frames[name], held=trajectory)
            write_frames(run.folder / "extxyz" / f"{name}.extxyz", held, prepared.potential)
    dynamics = None
    if section.dynamics is not None:
        folder = run.folder / "dynamics"
        dynamics = write_dynamics(folder, trajectories, skipped, interval, section.dynamics)
    potential = prepared.potential
    return MDResult(
        run.folder,
        prepared.name,
        potential.hash,
        tuple(records),
        speed,
        dynamics,
        trajectories=frames,
        head=potential.head,
    )


def _state_point(config: Config, section: MD, source: EnsembleSource, potential: Potential) -> StatePoint:
    atoms = crystal(config, source.phase)
    require_interacting(potential, atoms, config.where("phases", source.phase))
    freedom = section.cell or config.phases[source.phase].cell_freedom
    fixed: dict[str, Ensemble] = {"npt": "nvt", "nph": "nve"}
    ensemble: Ensemble = section.ensemble
    return StatePoint(
        name=source.name,
        atoms=atoms,
        temperature=source.temperature,
        pressure=source.pressure,
        ensemble=fixed.get(ensemble, ensemble) if freedom == "fixed" else ensemble,
        cell_freedom=freedom,
        replicas=section.replicas,
        thermostat=section.thermostat,
        identity=identity(config, source.phase, section.identity),
    )


def _timed(prepared: Prepared, store: FrameStore) -> tuple[dict[str, Trajectory], Speed | None]:
    """Sample the frames that are not there yet, and measure how fast that was."""
    points, steps, started = list(prepared.points.values()), list[int](), time.monotonic()
    try:
        trajectories = sample(
            prepared.potential,
            points,
            prepared.settings,
            prepared.length,
            seed=prepared.seed,
            stage=STAGE,
            store=store,
            taken=steps.append,
        )
    except PhaseLostError as error:
        # A point that lost all its replicas does not take the others along.
        trajectories = error.trajectories
    if not steps:
        return trajectories, None
    seconds = time.monotonic() - started
    atoms = sum(len(p.atoms) * p.replicas for p in points)
    speed = Speed(
        steps=steps[0],
        seconds=seconds,
        atom_steps_per_s=steps[0] * atoms / seconds,
        device=str(prepared.potential.device),
    )
    return trajectories, speed


def write_frames(path: Path, trajectory: MDTrajectory, potential: Potential) -> None:
    """Write the frames that count, with the labels that replay reads, made by a potential.

    They are `REF_energy` (eV), `REF_forces` (eV/Å) and `REF_stress` (eV/Å³, tensile positive).

    Args:
        path: Path of the file; it appears whole or not at all.
        trajectory: Frames of a state point.
        potential: The potential that drew them.
    """

    def forces(_: slice, graphs: Graphs) -> Tensor:
        return potential.evaluate(graphs, ("forces",))["forces"].detach().cpu()

    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as partial, partial.open("w", encoding="utf-8") as stream:
        for some in batched(trajectory, FORCES_AT_A_TIME):
            structures = [potential.graphs.from_atoms(atoms) for atoms in some]
            found = torch.cat(list(potential.in_chunks(Work.FORCES, structures, forces)))
            for atoms, mine in zip(some, found.split([len(atoms) for atoms in some]), strict=True):
                atoms.info["REF_energy"] = atoms.get_potential_energy()
                atoms.info["REF_stress"] = atoms.get_stress(voigt=False)
                atoms.arrays["REF_forces"] = mine.double().numpy()
                atoms.calc = None
                write(stream, atoms, format="extxyz")
