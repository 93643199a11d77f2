"""Diffusion, viscosity and spectra of `mlip-refine md`, and their file `dynamics.json`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from mlip_refine.errors import InputError
from mlip_refine.quantities import Measured

FORMAT = "mlip_refine dynamics 1"


@dataclass(frozen=True)
class Estimate:
    """A number with its error over blocks, or why there is none.

    Attributes:
        unit: Of value and error.
        value: With its standard error; `None` where it is refused.
        refused: Why there is no value; empty where there is one.
    """

    unit: str
    value: Measured | None
    refused: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain data; a refused value is null."""
        value = self.value
        return {
            "value": None if value is None else value.value,
            "se": None if value is None else value.se,
            "unit": self.unit,
            "refused": self.refused or None,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `as_json` wrote; `KeyError`, `TypeError` or `ValueError` if it did not."""
        unit, value = str(data["unit"]), data["value"]
        measured = None if value is None else Measured(float(value), float(data["se"]), unit)
        return cls(unit, measured, data["refused"] or "")


@dataclass(frozen=True)
class DynamicsPoint:
    """One state point.

    Attributes:
        name: Of the point in all files.
        interval_fs: Between frames.
        window_ps: Longest time of displacements and correlations.
        blocks: Stretches of trajectory whose scatter gives the errors.
        block_ps: Length of each.
        values: By quantity.
    """

    name: str
    interval_fs: float
    window_ps: float
    blocks: int
    block_ps: float
    values: Mapping[str, Estimate]

    def as_json(self) -> dict[str, Any]:
        """Plain data, units in the names."""
        return asdict(self) | {"values": {name: value.as_json() for name, value in self.values.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `as_json` wrote; `KeyError`, `TypeError` or `ValueError` if it did not."""
        values = {name: Estimate.from_json(entry) for name, entry in dict(data["values"]).items()}
        return cls(**dict(data) | {"values": values})


@dataclass(frozen=True)
class DynamicsResult:
    """What a run found about its dynamics.

    Attributes:
        folder: The run folder.
        name: Of the run.
        model_hash: Of the potential.
        points: Every state point.
    """

    folder: Path
    name: str
    model_hash: str
    points: tuple[DynamicsPoint, ...]

    def as_json(self) -> dict[str, Any]:
        """What `dynamics.json` holds."""
        points = [point.as_json() for point in self.points]
        return {"format": FORMAT, "name": self.name, "model_hash": self.model_hash, "points": points}


def read_dynamics(folder: Path) -> DynamicsResult:
    """Read `dynamics.json` of a run folder.

    Raises:
        InputError: The file is missing or was not written by `mlip-refine md`.
    """
    path = Path(folder) / "dynamics.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        points = tuple(DynamicsPoint.from_json(entry) for entry in data["points"])
        return DynamicsResult(Path(folder), str(data["name"]), str(data["model_hash"]), points)
    except FileNotFoundError as error:
        fix = "It is written by `mlip-refine md` with a section md.dynamics."
        raise InputError("the result file is missing", where=str(path), fix=fix) from error
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError("this is no result of md.dynamics", where=str(path), found=str(error)) from error
