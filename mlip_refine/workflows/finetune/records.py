"""The result files of a run folder, read and checked: `log.jsonl` and `summary.json`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from mlip_refine.errors import InputError
from mlip_refine.quantities import Measured, error_of


@dataclass(frozen=True)
class Update:
    """One line of the log.

    Attributes:
        step: Number of the update, from 0.
        losses: Weighted total and named components.
        diagnostics: Measured quantities by loss, then name.
        n_eff: Effective over stored frames by source, 0 to 1.
        resampled: Sources that were sampled anew before the update.
    """

    step: int
    losses: Mapping[str, float]
    diagnostics: Mapping[str, Mapping[str, Measured]]
    n_eff: Mapping[str, float]
    resampled: Sequence[str]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `StepReport.as_json` wrote; `KeyError`, `TypeError` or `ValueError` if it did not."""
        diagnostics = {
            loss: {
                name: Measured(float(m["value"]), error_of(m["se"]), str(m["unit"]))
                for name, m in measured.items()
            }
            for loss, measured in dict(data["diagnostics"]).items()
        }
        return cls(
            step=int(data["step"]),
            losses={name: float(value) for name, value in dict(data["losses"]).items()},
            diagnostics=diagnostics,
            n_eff={name: float(value) for name, value in dict(data["n_eff"]).items()},
            resampled=tuple(str(name) for name in data["resampled"]),
        )


@dataclass(frozen=True)
class TransitionRecord:
    """One transition of the summary: ΔG = G_to - G_from in meV/atom, temperatures in K.

    A temperature is `None` where the statistics did not carry it; the notes say why.
    """

    name: str
    from_: str
    to: str
    n_atoms: int
    temperature: float
    pressure: float
    target: float
    before: Measured
    after: Measured
    transition_before: Measured | None
    transition_after: Measured | None
    notes: tuple[str, ...]

    @property
    def state(self) -> str:
        """Phases and conditions."""
        return f"{self.from_} → {self.to}, {self.temperature:g} K, {self.pressure:g} GPa"

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read an entry of `transitions`; `KeyError`, `TypeError` or `ValueError` if it is none."""
        return cls(
            name=str(data["name"]),
            from_=str(data["from"]),
            to=str(data["to"]),
            n_atoms=int(data["n_atoms"]),
            temperature=float(data["temperature_K"]),
            pressure=float(data["pressure_GPa"]),
            target=float(data["target_mev_per_atom"]),
            before=_measured(data, "delta_g_before_mev_per_atom", "meV/atom"),
            after=_measured(data, "delta_g_after_mev_per_atom", "meV/atom"),
            transition_before=_measured_or_none(data, "transition_temperature_before_K", "K"),
            transition_after=_measured_or_none(data, "transition_temperature_after_K", "K"),
            notes=tuple(str(note) for note in data["notes"]),
        )


@dataclass(frozen=True)
class Quantity:
    """What a loss measured, as it was trained: reweighted, not sampled afresh.

    Attributes:
        first: In its first update.
        last: In its last one.
        target: With its uncertainty as error; `None` without one.
    """

    first: Measured
    last: Measured
    target: Measured | None

    @property
    def deviations(self) -> tuple[float, float] | None:
        """First and last value minus the target, in its uncertainties."""
        if self.target is None:
            return None
        first, last = ((m.value - self.target.value) / self.target.se for m in (self.first, self.last))
        return first, last

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read an entry of `measured`; `KeyError`, `TypeError` or `ValueError` if it is none."""
        unit, target = str(data["unit"]), None
        if "target" in data:
            target = Measured(float(data["target"]), float(data["target_uncertainty"]), unit)
        return cls(_measured(data, "first", unit), _measured(data, "last", unit), target)


@dataclass(frozen=True)
class Summary:
    """The summary of a finished run.

    Attributes:
        name: Of the run, and of its model files.
        steps: Updates that were made.
        converged: Whether every target was met before the steps were used up.
        transitions: ΔG before and after.
        errors_before: Held-out errors of the initial model by name (the unit is in it); empty without replay.
        errors_after: The same of the refined model.
        wall_time: Seconds.
        measured: Quantities by loss, then name.
        deviations: Root mean squares of all deviations of a loss in its first and last update, σ, by loss.
    """

    name: str
    steps: int
    converged: bool
    transitions: tuple[TransitionRecord, ...]
    errors_before: Mapping[str, float]
    errors_after: Mapping[str, float]
    wall_time: float
    measured: Mapping[str, Mapping[str, Quantity]]
    deviations: Mapping[str, tuple[float, float]]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read a summary; `KeyError`, `TypeError` or `ValueError` if it is none."""
        return cls(
            name=str(data["name"]),
            steps=int(data["steps"]),
            converged=bool(data["converged"]),
            transitions=tuple(TransitionRecord.from_json(entry) for entry in data["transitions"]),
            errors_before=_errors(data["replay"]["before"]),
            errors_after=_errors(data["replay"]["after"]),
            wall_time=float(data["wall_time_s"]),
            # Runs of earlier versions have none.
            measured={loss: _quantities(found) for loss, found in data.get("measured", {}).items()},
            deviations={
                loss: (float(d["first_sigma"]), float(d["last_sigma"]))
                for loss, d in data.get("deviations", {}).items()
            },
        )


def read_log(folder: Path) -> list[Update]:
    """Read `log.jsonl` of a run folder.

    Raises:
        InputError: The file is missing, empty, or has a line that is no update.
    """
    path = Path(folder) / "log.jsonl"
    updates = [_update(line, f"{path}:{i}") for i, line in enumerate(_text(path).splitlines(), start=1)]
    if not updates:
        raise InputError("the log is empty", where=str(path), expected="one line per update")
    return updates


def read_summary(folder: Path) -> Summary:
    """Read `summary.json` of a run folder.

    Raises:
        InputError: The file is missing or is no summary.
    """
    path = Path(folder) / "summary.json"
    try:
        return Summary.from_json(json.loads(_text(path)))
    except KeyError as error:
        raise InputError("the summary lacks a key", where=str(path), expected=f"key {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError("this is no summary of a run", where=str(path), found=str(error)) from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(
            "the result file is missing",
            where=str(path),
            fix="Is the run finished? Go on with it by --resume.",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("the result file cannot be read", where=str(path), found=str(error)) from error


def _update(line: str, where: str) -> Update:
    try:
        return Update.from_json(json.loads(line))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            "this line is no update of a run",
            where=where,
            found=str(error),
            fix="A line that was cut off when a run was killed goes away with --resume.",
        ) from error


def _as_measured(data: Mapping[str, Any]) -> Measured:
    return Measured(float(data["value"]), error_of(data["se"]), str(data["unit"]))


def _measured(data: Mapping[str, Any], key: str, unit: str) -> Measured:
    return Measured(float(data[key]), error_of(data[f"{key}_se"]), unit)


def _measured_or_none(data: Mapping[str, Any], key: str, unit: str) -> Measured | None:
    return None if data[key] is None else _measured(data, key, unit)


def _quantities(data: Mapping[str, Any]) -> dict[str, Quantity]:
    return {name: Quantity.from_json(entry) for name, entry in data.items()}


def _errors(data: Mapping[str, Any] | None) -> dict[str, float]:
    """Held-out errors by name; what was not measured (stress without labels) is left out."""
    return {key: float(value) for key, value in (data or {}).items() if value is not None}
