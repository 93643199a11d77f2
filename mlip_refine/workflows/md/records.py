"""What `mlip-refine md` found, and its file `md.json`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from mlip_refine.errors import InputError
from mlip_refine.quantities import Measured
from mlip_refine.workflows.md.dynamics_records import DynamicsResult

FORMAT = "mlip_refine md 1"


@dataclass(frozen=True)
class Average:
    """The mean of a quantity over the frames that count.

    Attributes:
        unit: Of value and error.
        mean: With its standard error from the statistical inefficiency; `None` where it is refused.
        independent_frames: Frames over the statistical inefficiency; `None` for what the ensemble fixes.
        refused: Why there is no mean; empty where there is one.
    """

    unit: str
    mean: Measured | None
    independent_frames: float | None
    refused: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain data; a refused value is null."""
        mean = self.mean
        return {
            "value": None if mean is None else mean.value,
            "se": None if mean is None else mean.se,
            "unit": self.unit,
            "independent_frames": self.independent_frames,
            "refused": self.refused or None,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `as_json` wrote; `KeyError`, `TypeError` or `ValueError` if it did not."""
        unit, value, n = str(data["unit"]), data["value"], data["independent_frames"]
        mean = None if value is None else Measured(float(value), float(data["se"]), unit)
        return cls(unit, mean, None if n is None else float(n), data["refused"] or "")


@dataclass(frozen=True)
class MDPoint:
    """One state point.

    Attributes:
        name: Of the point in all files.
        phase: Of the config.
        n_atoms: Per cell.
        temperature_K: Held in nvt and npt, that of the start in nve and nph.
        pressure_GPa: Held in npt and nph.
        ensemble: `nvt`, `npt`, `nve` or `nph`.
        thermostat: Of nvt.
        cell_freedom: What the cell may do.
        identity: What made a system its phase.
        timestep_fs: Of the integrator.
        interval_fs: Between two frames.
        friction_per_ps: Of the Langevin thermostat; `None` without one.
        barostat_time_fs: Period of volume oscillations; `None` with a fixed cell.
        replicas: Independent copies.
        steps: Of each replica, the equilibration included.
        equilibration_ps: What was left out of the averages.
        frames_kept: Frames after the equilibration that count, of all replicas.
        frames_discarded: Those with a verdict against them.
        averages: By quantity; energy and enthalpy without the kinetic part, lengths and angles of the cell.
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
    averages: Mapping[str, Average]
    verdicts: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data, units in the names."""
        plain = asdict(self) | {"verdicts": list(self.verdicts)}
        return plain | {"averages": {name: average.as_json() for name, average in self.averages.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `as_json` wrote; `KeyError`, `TypeError` or `ValueError` if it did not."""
        averages = {name: Average.from_json(entry) for name, entry in dict(data["averages"]).items()}
        return cls(**dict(data) | {"averages": averages, "verdicts": tuple(data["verdicts"])})


@dataclass(frozen=True)
class Speed:
    """How fast a run sampled; not part of `md.json`, which is the same after an interruption.

    Attributes:
        steps: Taken by the last call that took any, of every system.
        seconds: Wall time of these steps with their set-up.
        atom_steps_per_s: Steps times atoms of all systems over the time.
        device: Where.
    """

    steps: int
    seconds: float
    atom_steps_per_s: float
    device: str


@dataclass(frozen=True)
class MDResult:
    """What a run found.

    Attributes:
        folder: The run folder.
        name: Of the run.
        model_hash: Of the potential.
        points: Every state point.
        speed: Of this call; `None` where all frames were there already.
        dynamics: Content of `dynamics.json`; `None` without `md.dynamics`.
    """

    folder: Path
    name: str
    model_hash: str
    points: tuple[MDPoint, ...]
    speed: Speed | None = None
    dynamics: DynamicsResult | None = None

    def __getitem__(self, name: str) -> MDPoint:
        """Return the state point of a name such as ``hcp-300K-0GPa``."""
        return {point.name: point for point in self.points}[name]

    def to_json(self) -> dict[str, Any]:
        """Return the content of `md.json`, with that of `dynamics.json` as `dynamics`."""
        return self.as_json() | ({} if self.dynamics is None else {"dynamics": self.dynamics.as_json()})

    def files(self) -> dict[str, Any]:
        """Return the JSON files of the run folder by name."""
        found: dict[str, Any] = {"md.json": self.as_json()}
        if self.speed is not None:
            found["speed.json"] = asdict(self.speed)
        if self.dynamics is not None:
            found["dynamics.json"] = self.dynamics.as_json()
        return found

    def as_json(self) -> dict[str, Any]:
        """Return the content of `md.json`."""
        points = [point.as_json() for point in self.points]
        return {"format": FORMAT, "name": self.name, "model_hash": self.model_hash, "points": points}


def read_md(folder: Path) -> MDResult:
    """Read `md.json` of a run folder.

    Raises:
        InputError: The file is missing or was not written by `mlip-refine md`.
    """
    path = Path(folder) / "md.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        points = tuple(MDPoint.from_json(entry) for entry in data["points"])
        return MDResult(Path(folder), str(data["name"]), str(data["model_hash"]), points)
    except FileNotFoundError as error:
        fix = "Is the run finished? Go on with it by --resume."
        raise InputError("the result file is missing", where=str(path), fix=fix) from error
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError("this is no result of md", where=str(path), found=str(error)) from error
