"""Results of `mlip-refine md` and their files, `md.json`, `dynamics.json` and `speed.json`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from mlip_refine.errors import InputError
from mlip_refine.workflows.records import Estimate, Record, read_record

if TYPE_CHECKING:
    from mlip_refine.workflows.md.trajectories import MDTrajectory

FORMAT: Final = "mlip_refine md 1"
DYNAMICS_FORMAT: Final = "mlip_refine dynamics 1"


class Average(Estimate):
    """Mean of a quantity over the frames that count.

    Attributes:
        independent_frames: Number of frames over their statistical inefficiency; `None` for what the ensemble
            fixes.
    """

    independent_frames: float | None


class MDPoint(Record):
    """One state point.

    Attributes:
        name: Name of the point in all files.
        phase: Name of the phase in the config.
        n_atoms: Atoms per cell.
        temperature_K: Temperature that is held in nvt and npt, that of the start in nve and nph.
        pressure_GPa: Pressure that is held in npt and nph.
        ensemble: `nvt`, `npt`, `nve` or `nph`.
        thermostat: Thermostat of nvt.
        cell_freedom: What the cell may do.
        identity: What made a system its phase.
        timestep_fs: Time step of the integrator.
        interval_fs: Time between two frames.
        friction_per_ps: Friction of the Langevin thermostat; `None` without one.
        barostat_time_fs: Period of volume oscillations; `None` with a fixed cell.
        replicas: Number of independent copies.
        steps: Steps of each replica, the equilibration included.
        equilibration_ps: Time that was left out of the averages.
        frames_kept: Frames of all replicas after the equilibration that count.
        frames_discarded: Frames after the equilibration with a verdict against them.
        averages: Averages by quantity; energy and enthalpy are without the kinetic part.
        verdicts: What happened to systems, one line each.
    """

    name: str
    phase: str
    n_atoms: int
    temperature_K: float  # noqa: N815 - the unit's own case
    pressure_GPa: float  # noqa: N815 - the unit's own case
    ensemble: str
    thermostat: str
    cell_freedom: str
    identity: str
    timestep_fs: float
    interval_fs: float
    friction_per_ps: float | None
    barostat_time_fs: float | None
    replicas: int
    steps: int
    equilibration_ps: float
    frames_kept: int
    frames_discarded: int
    averages: dict[str, Average]
    verdicts: tuple[str, ...]


class Speed(Record):
    """How fast a run sampled; not part of `md.json`, which is the same after an interruption.

    Attributes:
        steps: Steps of every system in the last call that took any.
        seconds: Wall time of these steps with their set-up.
        atom_steps_per_s: Steps times atoms of all systems over the time.
        device: Device of the potential.
    """

    steps: int
    seconds: float
    atom_steps_per_s: float
    device: str


class DynamicsPoint(Record):
    """Diffusion, viscosity and spectrum of one state point.

    Attributes:
        name: Name of the point in all files.
        interval_fs: Time between frames.
        window_ps: Longest time of displacements and correlations.
        blocks: Number of stretches of trajectory whose scatter gives the errors.
        block_ps: Length of each.
        values: Estimates by quantity.
    """

    name: str
    interval_fs: float
    window_ps: float
    blocks: int
    block_ps: float
    values: dict[str, Estimate]


class MDFile(Record):
    """Content of `md.json`."""

    format: Literal["mlip_refine md 1"] = FORMAT
    name: str
    model_hash: str
    head: str | None = None
    points: tuple[MDPoint, ...]


class DynamicsFile(Record):
    """Content of `dynamics.json`."""

    format: Literal["mlip_refine dynamics 1"] = DYNAMICS_FORMAT
    name: str
    model_hash: str
    head: str | None = None
    points: tuple[DynamicsPoint, ...]


@dataclass(frozen=True)
class MDResult:
    """Result of a run.

    Attributes:
        folder: The run folder.
        name: Name of the run.
        model_hash: Hash of the potential.
        points: Every state point.
        speed: Speed of this call; `None` where all frames were there already.
        dynamics: Diffusion, viscosity and spectrum of every point; `None` without `md.dynamics`.
        trajectories: Frames of every state point by its name; empty for a result that was read from its files
            (`md(config, resume=True)` returns a finished run with its frames).
        head: Head of the model that was evaluated; `None` in files of earlier versions.
    """

    folder: Path
    name: str
    model_hash: str
    points: tuple[MDPoint, ...]
    speed: Speed | None = None
    dynamics: tuple[DynamicsPoint, ...] | None = None
    trajectories: "Mapping[str, MDTrajectory]" = field(default_factory=dict, repr=False, compare=False)
    head: str | None = None

    def __getitem__(self, name: str) -> MDPoint:
        """Return the state point of a name such as ``hcp-300K-0GPa``."""
        return {point.name: point for point in self.points}[name]

    def to_json(self) -> dict[str, Any]:
        """Return the content of all files, by file name."""
        return self.files()

    def files(self) -> dict[str, Any]:
        """Return the JSON files of the run folder by name."""
        run = {"name": self.name, "model_hash": self.model_hash, "head": self.head}
        found = {"md.json": MDFile(**run, points=self.points).as_json()}
        if self.speed is not None:
            found["speed.json"] = self.speed.as_json()
        if self.dynamics is not None:
            found["dynamics.json"] = DynamicsFile(**run, points=self.dynamics).as_json()
        return found


def read_md(folder: Path) -> MDResult:
    """Read `md.json` of a run folder.

    Raises:
        InputError: The file is missing or was not written by `mlip-refine md`.
    """
    data = read_record(Path(folder) / "md.json", MDFile, "result of md")
    return MDResult(Path(folder), data.name, data.model_hash, data.points, head=data.head)


def read_dynamics(folder: Path) -> tuple[DynamicsPoint, ...]:
    """Read `dynamics.json` of a run folder.

    Raises:
        InputError: The file is missing or was not written by `mlip-refine md`.
    """
    path = Path(folder) / "dynamics.json"
    if not path.exists():
        fix = "It is written by `mlip-refine md` with a section md.dynamics."
        raise InputError("the result file is missing", where=str(path), fix=fix)
    return read_record(path, DynamicsFile, "result of md.dynamics").points
