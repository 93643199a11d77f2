"""Result files of a run, as typed records: `log.jsonl` and `summary.json`."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, TypeAdapter, ValidationError

from mlip_refine.errors import InputError
from mlip_refine.quantities import Measured, error_of
from mlip_refine.workflows.free_energy.records import CELLS, size_in_words
from mlip_refine.workflows.records import MeasuredField, Record, read_text, validated

FORMAT: Final = "mlip_refine summary 2"

VALIDATION: Final = "validation, loss"
"""Name of a loss on held-out data among the quantities that it measures."""


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
    diagnostics: Mapping[str, Mapping[str, MeasuredField]]
    n_eff: Mapping[str, float]
    resampled: tuple[str, ...]


def is_met(measured: Measured, target: Measured) -> bool:
    """Return whether a measured value meets a target.

    Its standard error must not exceed the uncertainty of the target, since noise is no success, and it must
    be off by no more than both of them combined.
    """
    off = abs(measured.value - target.value)
    return measured.se <= target.se and off <= math.hypot(measured.se, target.se)


class Transition(Record):
    """ΔG = G_to - G_from before and after, with the transition temperature that it implies.

    Attributes:
        name: Name of the loss.
        from_: Phase I.
        to: Phase II.
        n_atoms: Atoms of the cell of phase I.
        n_atoms_to: Atoms of the cell of phase II; `None` in files from a time when both had the same size.
        temperature_K: Temperature.
        pressure_GPa: Pressure.
        target: Wanted ΔG with its uncertainty, meV/atom.
        before: ΔG of the initial potential, meV/atom.
        after: ΔG of the refined potential, meV/atom.
        delta_h_before: ΔH of the initial potential, meV/atom; `None` where it was not recorded.
        delta_h_after: ΔH of the refined potential, meV/atom; `None` where it was not recorded.
        transition_before: Transition temperature of the initial potential, K; `None` where the statistics do
            not determine it: the notes say why.
        transition_after: The same of the refined potential.
        notes: Remarks on refused temperatures and stopped replicas.
        convention: What ΔG is of: cells of N atoms, or the thermodynamic limit.
    """

    name: str
    from_: str = Field(alias="from")
    to: str
    n_atoms: int
    n_atoms_to: int | None = None
    temperature_K: float  # noqa: N815 - the unit's own case
    pressure_GPa: float  # noqa: N815 - the unit's own case
    target: MeasuredField
    before: MeasuredField = Field(alias="delta_g_before")
    after: MeasuredField = Field(alias="delta_g_after")
    delta_h_before: MeasuredField | None
    delta_h_after: MeasuredField | None
    transition_before: MeasuredField | None = Field(alias="transition_temperature_before")
    transition_after: MeasuredField | None = Field(alias="transition_temperature_after")
    notes: tuple[str, ...]
    convention: str = CELLS

    @property
    def size(self) -> str:
        """The cells in words (see `size_in_words`)."""
        return size_in_words(self.convention, self.n_atoms, self.n_atoms_to or self.n_atoms)

    @property
    def met(self) -> bool | None:
        """Whether ΔG of the refined potential meets the target; `None` in files without its uncertainty."""
        return None if math.isnan(self.target.se) else is_met(self.after, self.target)

    @property
    def state(self) -> str:
        """Phases and conditions."""
        return f"{self.from_} → {self.to}, {self.temperature_K:g} K, {self.pressure_GPa:g} GPa"


class PhaseRecord(Record):
    """What the refinement changed for one phase at one state.

    Attributes:
        phase: Name of the phase.
        temperature_K: Temperature.
        pressure_GPa: Pressure.
        gibbs_change: G_θ - G_θ0 of the whole cell, eV.
        overlap: Overlap of the two ensembles, 1 if they are equal.
        cell_before_A: Cell under the initial potential, rows in Å.
        cell_after_A: Cell under the refined potential, rows in Å.
    """

    phase: str
    temperature_K: float  # noqa: N815 - the unit's own case
    pressure_GPa: float  # noqa: N815 - the unit's own case
    gibbs_change: MeasuredField
    overlap: float
    cell_before_A: list[list[float]]  # noqa: N815 - the unit's own case
    cell_after_A: list[list[float]]  # noqa: N815 - the unit's own case


class HeldOutRecord(Record):
    """Mean absolute errors of a potential on held-out frames; their own errors are not known.

    Attributes:
        energy: Error of the energy per atom, meV/atom; `None` without such labels, as for the others.
        forces: Error of force components, meV/Å.
        stress: Error of stress components, GPa.
        n_frames: Number of frames.
    """

    energy: MeasuredField | None = Field(alias="energy_mae")
    forces: MeasuredField | None = Field(alias="forces_mae")
    stress: MeasuredField | None = Field(alias="stress_mae")
    n_frames: int


class HeldOutChange(Record):
    """Errors on held-out frames before and after; `None` without such frames."""

    before: HeldOutRecord | None
    after: HeldOutRecord | None


class HeadDrift(Record):
    """How far a head moved that was not trained: root mean squares of changes.

    Attributes:
        energy_meV_per_atom: Change of the energy per atom.
        forces_meV_per_A: Change of force components.
        forces_before_meV_per_A: Force components before the training, to compare with.
        n_structures: Number of structures: held-out frames, training frames, or crystals of the losses.
    """

    energy_meV_per_atom: float  # noqa: N815 - the unit's own case
    forces_meV_per_A: float  # noqa: N815 - the unit's own case
    forces_before_meV_per_A: float  # noqa: N815 - the unit's own case
    n_structures: int


class Course(Record):
    """A quantity that a loss measured.

    Attributes:
        first: Value in the first update of the loss, if it had any.
        last: Value in its last update, if it had any: reweighted, from frames that chose the parameters.
        target: Target with its uncertainty, if there is one.
        delivered: Value of the potential that the run ended with, where the loss measures that.
        after: Value of that potential on frames that it drew itself, with new seeds, after training.
    """

    first: MeasuredField | None = None
    last: MeasuredField | None = None
    target: MeasuredField | None = None
    delivered: MeasuredField | None = None
    after: MeasuredField | None = None

    @property
    def end(self) -> Measured | None:
        """The value of the final potential, or where it was not measured, of the last update."""
        return self.after or self.delivered or self.last

    @property
    def change(self) -> float | None:
        """End over beginning minus one, of what is measured on the same data both times; `None` of others."""
        if self.delivered is None or self.first is None or not self.first.value > 0:
            return None
        return self.delivered.value / self.first.value - 1

    @property
    def deviations(self) -> tuple[float, float] | None:
        """Value at the beginning and at the end minus the target, over its uncertainty."""
        if self.target is None or self.first is None or self.end is None:
            return None
        first, end = ((m.value - self.target.value) / self.target.se for m in (self.first, self.end))
        return first, end

    @property
    def met(self) -> bool | None:
        """Whether the target is met by what was measured after training; `None` where that is not known."""
        return None if self.target is None or self.after is None else is_met(self.after, self.target)


class Deviation(Record):
    """Root mean square of all deviations of a loss from its targets, over their uncertainties.

    Attributes:
        first_sigma: Value in the first update of the loss.
        last_sigma: Value in its last update.
        after_sigma: Value after training, if its targets were measured then.
    """

    first_sigma: float
    last_sigma: float
    after_sigma: float | None = None


class Summary(Record):
    """The summary of a finished run.

    Attributes:
        format: Name and version of the format.
        name: Name of the run and of its model files.
        model_hash: Hash of the refined model.
        initial_model_hash: Hash of the initial model.
        head: Head that was trained; `None` in files of earlier versions.
        other_heads: Changes of the heads that were not trained.
        seed: Random seed of the run.
        device: Where it was computed.
        steps: Number of updates that were made.
        converged: Whether training ended because every target was within its tolerance.
        transitions: ΔG before and after.
        phases: Changes of the phases behind them.
        replay: Errors on held-out frames.
        measured: Quantities that losses measured, by loss, then name.
        deviations: Deviations of losses that have targets, by loss.
        notes: Remarks on what could not be measured.
        packages: Versions of what the numbers depend on.
        energy_shift_eV: What was added to the atomic energies, by element; `None` where it was not asked for.
        wall_time_s: Seconds, interruptions left out.
    """

    format: Literal["mlip_refine summary 2"] = FORMAT
    name: str
    model_hash: str
    initial_model_hash: str
    head: str | None = None
    other_heads: dict[str, HeadDrift] = {}  # noqa: RUF012 - pydantic copies it
    seed: int
    device: str
    steps: int
    converged: bool
    transitions: tuple[Transition, ...]
    phases: tuple[PhaseRecord, ...]
    replay: HeldOutChange
    measured: dict[str, dict[str, Course]]
    deviations: dict[str, Deviation]
    notes: tuple[str, ...] = ()
    packages: dict[str, str]
    energy_shift_eV: dict[str, float] | None  # noqa: N815 - the unit's own case
    wall_time_s: float

    @property
    def verdicts(self) -> dict[str, bool]:
        """Whether each target is met after training, by loss and quantity, as far as it was measured then."""
        found = {f"{loss}, {name}": c.met for loss, of in self.measured.items() for name, c in of.items()}
        found |= {f"{t.name}, delta_g": t.met for t in self.transitions}
        return {name: met for name, met in found.items() if met is not None}


def read_log(folder: Path) -> list[Update]:
    """Read `log.jsonl` of a run folder.

    Raises:
        InputError: If the file is missing, empty, or has a line that is no update.
    """
    path = Path(folder) / "log.jsonl"
    updates = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            updates.append(TypeAdapter(Update).validate_json(line))
        except ValidationError as error:
            raise InputError(
                "this line is no update of a run",
                where=f"{path}:{number}",
                found=error.errors()[0]["msg"],
                fix="A line that was cut off when a run was killed goes away with --resume.",
            ) from error
    if not updates:
        raise InputError("the log is empty", where=str(path), expected="one line per update")
    return updates


def read_summary(folder: Path) -> Summary:
    """Read `summary.json` of a run folder, also of earlier versions.

    Raises:
        InputError: If the file is missing or is no summary.
    """
    path = Path(folder) / "summary.json"
    try:
        data = json.loads(read_text(path))
        if data.get("format") != FORMAT:
            data = _from_format_1(data)
    except KeyError as error:
        raise InputError("the summary lacks a key", where=str(path), expected=f"key {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError("this is no summary of a run", where=str(path), found=str(error)) from error
    return validated(Summary, data, str(path), "summary of a run")


def _from_format_1(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a summary of the first format says: units in the names, errors as `_se`.

    Raises:
        KeyError: If a key is missing that every such summary has.
    """

    def measured(entry: Mapping[str, Any], key: str, unit: str) -> Measured | None:
        value = entry[key]
        return None if value is None else Measured(value, error_of(entry[f"{key}_se"]), unit)

    def held_out(errors: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if errors is None:
            return None
        stress = errors["stress_mae_gpa"]
        return {
            "energy_mae": Measured(errors["energy_mae_mev_per_atom"], math.nan, "meV/atom"),
            "forces_mae": Measured(errors["forces_mae_mev_per_A"], math.nan, "meV/Å"),
            "stress_mae": None if stress is None else Measured(stress, math.nan, "GPa"),
            "n_frames": errors["n_frames"],
        }

    transitions = []
    for entry in data["transitions"]:
        found = {
            key: entry[key] for key in ("name", "from", "to", "n_atoms", "temperature_K", "pressure_GPa")
        }
        found["target"] = Measured(entry["target_mev_per_atom"], math.nan, "meV/atom")
        for when in ("before", "after"):
            found[f"delta_g_{when}"] = measured(entry, f"delta_g_{when}_mev_per_atom", "meV/atom")
            enthalpy = f"delta_h_{when}_mev_per_atom"
            found[f"delta_h_{when}"] = measured(entry, enthalpy, "meV/atom") if enthalpy in entry else None
            temperature = f"transition_temperature_{when}"
            found[temperature] = measured(entry, f"{temperature}_K", "K")
        transitions.append(found | {"notes": entry["notes"]})
    phases = [
        {key: value for key, value in entry.items() if not key.startswith("gibbs_change")}
        | {"gibbs_change": measured(entry, "gibbs_change_ev", "eV")}
        for entry in data.get("phases", ())
    ]
    courses: dict[str, dict[str, Any]] = {}
    for loss, quantities in data.get("measured", {}).items():
        for name, entry in quantities.items():
            course: dict[str, Any] = {
                key: measured(entry, key, entry["unit"])
                for key in ("first", "last", "delivered")
                if key in entry
            }
            if "target" in entry:
                course["target"] = Measured(entry["target"], entry["target_uncertainty"], entry["unit"])
            courses.setdefault(loss, {})[name] = course
    return {
        **{key: data[key] for key in ("name", "steps", "converged", "wall_time_s")},
        **{key: data.get(key, "") for key in ("model_hash", "initial_model_hash", "device")},
        "seed": data.get("seed", 0),
        "transitions": transitions,
        "phases": phases,
        "replay": {when: held_out(data["replay"][when]) for when in ("before", "after")},
        "measured": courses,
        "deviations": data.get("deviations", {}),
        "packages": data.get("packages", {}),
        "energy_shift_eV": data.get("energy_shift_ev"),
    }
