"""What `summary.json` says of a run: what the losses measured, and both evaluations."""

import math
from collections.abc import Mapping, Sequence

from mlip_refine.losses import EnsembleSource, Loss
from mlip_refine.losses.ensemble.observable import ObservableLoss
from mlip_refine.losses.ensemble.observable_options import DensityOptions, LatticeOptions, VolumeOptions
from mlip_refine.quantities import Measured
from mlip_refine.training.replay import HeldOutErrors
from mlip_refine.workflows.finetune.evaluation import PhaseChange
from mlip_refine.workflows.finetune.records import (
    VALIDATION,
    Course,
    Deviation,
    HeldOutRecord,
    PhaseRecord,
    Update,
)

WORSE = 0.01
"""Growth of a validation loss over its first value that is told as worse."""

_CELLS = (LatticeOptions, DensityOptions, VolumeOptions)
"""Options of losses on the mean cell of a phase."""


def courses(
    updates: Sequence[Update],
    losses: Sequence[Loss],
    delivered: Mapping[str, Mapping[str, Measured]],
    afresh: Mapping[str, Mapping[str, Measured]],
) -> dict[str, dict[str, Course]]:
    """Return what losses measured in their first and their last update, and after training.

    Args:
        updates: Updates of the run.
        losses: Losses of the run.
        delivered: What losses measure of the potential that the run ends with, by loss and quantity.
        afresh: What they measure of it on frames that it drew itself, by loss and quantity.

    Returns:
        By loss and quantity: the first and the last value beside the target, what was delivered, and the
        value measured afresh.
    """
    first: dict[tuple[str, str], Measured] = {}
    last: dict[tuple[str, str], Measured] = {}
    for update in updates:
        for loss, measured in update.diagnostics.items():
            for name, value in measured.items():
                first.setdefault((loss, name), value)
                last[loss, name] = value
    targets = {
        (loss.name, name): Measured(target.value, target.uncertainty, target.unit)
        for loss in losses
        for name, target in loss.targets.items()
    }
    ends = {(loss, name): value for loss, values in delivered.items() for name, value in values.items()}
    found: dict[str, dict[str, Course]] = {}
    after = {(loss, name): value for loss, values in afresh.items() for name, value in values.items()}
    for key in first | ends | after:
        course = Course(
            first=first.get(key),
            last=last.get(key),
            target=targets.get(key) if key in first or key in after else None,
            delivered=ends.get(key),
            after=after.get(key),
        )
        found.setdefault(key[0], {})[key[1]] = course
    return found


def deviations(
    updates: Sequence[Update], losses: Sequence[Loss], afresh: Mapping[str, Mapping[str, Measured]]
) -> dict[str, Deviation]:
    """Return root mean squares of all deviations of losses that have targets.

    In their first and last update, where the value of such a loss is the mean of the squares, and of what was
    measured after training, by loss and quantity.
    """
    found = {}
    for loss in losses:
        squares = [update.losses[loss.name] for update in updates if loss.name in update.losses]
        if loss.targets and squares:
            first, last = math.sqrt(squares[0]), math.sqrt(squares[-1])
            measured = afresh.get(loss.name, {})
            after = [t.deviation(measured[n]).value for n, t in loss.targets.items() if n in measured]
            rms = math.hypot(*after) / math.sqrt(len(after)) if after else None
            found[loss.name] = Deviation(first_sigma=first, last_sigma=last, after_sigma=rms)
    return found


def hints(losses: Sequence[Loss], measured: Mapping[str, Mapping[str, Course]]) -> list[str]:
    """Return what would do better where the cell of a phase has hardly moved towards its target.

    The gradient of a mean cell is a covariance of the cell and the energy, whose noise hides it in soft or
    small cells; the stress in the cell of the target is a plain mean.

    Args:
        losses: Losses of the run.
        measured: What they measured, by loss and quantity.
    """
    found = []
    for loss in losses:
        if isinstance(loss, ObservableLoss) and isinstance(loss.options, _CELLS):
            far = [c.deviations for c in measured.get(loss.name, {}).values() if c.deviations]
            if any(abs(end) > max(1.0, 0.5 * abs(first)) for first, end in far):
                found.append(
                    f"{loss.name}: the cell has moved by less than half of its way. A loss of type stress, "
                    "with the target as its lattice and no stress as its target, needs fewer frames: see "
                    "mlip-refine guide losses"
                )
    return found


def validation_notes(measured: Mapping[str, Mapping[str, Course]], updates: Sequence[Update]) -> list[str]:
    """Return a sentence for every loss whose validation got worse.

    It is measured on the same data at the beginning and at the end, so that every change is one of the model.

    Args:
        measured: Quantities that losses measured, by loss, then name.
        updates: Updates of the run.
    """
    notes = []
    for loss, courses in measured.items():
        course = courses.get(VALIDATION, Course())
        if course.first is None or course.delivered is None or not (course.change or 0.0) > WORSE:
            continue
        values = {
            u.step: u.diagnostics[loss][VALIDATION].value
            for u in updates
            if VALIDATION in u.diagnostics.get(loss, {})
        }
        best = min(values, key=lambda step: values[step])
        change = f"{course.first.value:.3g} → {course.delivered.value:.3g}"
        lowest = f"{values[best]:.3g} at update {best}"
        notes.append(
            f"{loss}: the validation got worse, loss {change} (lowest: {lowest}); a smaller "
            "training.learning_rate, fewer steps, more materials or replay may help"
        )
    return notes


def phase_record(source: EnsembleSource, change: PhaseChange) -> PhaseRecord:
    """Return what a summary keeps of the change of a phase."""
    return PhaseRecord(
        phase=source.phase,
        temperature_K=source.temperature,
        pressure_GPa=source.pressure,
        gibbs_change=change.change,
        overlap=change.overlap,
        cell_before_A=change.cell_before,
        cell_after_A=change.cell_after,
    )


def held_out_record(errors: HeldOutErrors | None) -> HeldOutRecord | None:
    """Return what a summary keeps of the errors on held-out frames."""
    if errors is None:
        return None
    measured = {
        "energy": (errors.energy_mae_mev_per_atom, "meV/atom"),
        "forces": (errors.forces_mae_mev_per_A, "meV/Å"),
        "stress": (errors.stress_mae_gpa, "GPa"),
    }
    return HeldOutRecord(
        **{k: None if x is None else Measured(x, math.nan, unit) for k, (x, unit) in measured.items()},
        n_frames=errors.n_frames,
    )


def delivery_notes(delivered: int, steps: int) -> list[str]:
    """Return a remark if the parameters are not those of the last update."""
    if delivered == steps:
        return []
    which = f"those after update {delivered} of {steps}" if delivered else "the initial ones"
    return [
        f"the parameters are {which}: of those that were looked at, the last whose held-out errors had grown "
        "by no more than training.held_out_growth, or those whose errors had grown least"
    ]


def held_out_notes(before: HeldOutErrors | None, after: HeldOutErrors | None) -> list[str]:
    """Return a remark if errors on held-out frames grew by more than a tenth, and what to change."""
    if before is None or after is None:
        return []
    # Errors below which a growth means nothing: meV/atom, meV/Å, GPa.
    least = {"energy_mae_mev_per_atom": 1.0, "forces_mae_mev_per_A": 5.0, "stress_mae_gpa": 0.02}
    grown = []
    for field, smallest in least.items():
        old, new = getattr(before, field), getattr(after, field)
        if old is not None and new > max(1.1 * old, smallest):
            share = f" by {100 * (new / old - 1):.0f} %" if old > 0.1 * smallest else f" from 0 to {new:.2g}"
            grown.append(f"{field.partition('_')[0]}{share}")
    if not grown:
        return []
    return [
        f"held-out errors grew by more than 10 %: {', '.join(grown)}. Give replay more weight "
        "(losses: weight), lower training.learning_rate, or add frames like those that got worse"
    ]
