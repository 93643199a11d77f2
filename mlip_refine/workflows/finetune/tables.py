"""The table at the end of a run."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from mlip_refine.quantities import Measured
from mlip_refine.report.tables import number, plain_table
from mlip_refine.workflows.finetune.records import Course, Deviation, Summary, read_summary

MOST_ROWS = 6
"""Most quantities of a loss that are all shown."""

WORST = 3
"""Quantities shown of a loss that measures more: those furthest from their targets."""

if TYPE_CHECKING:
    from mlip_refine.workflows.finetune.run import FinetuneResult


def print_summary(console: Console, folder: Path) -> None:
    """Print what a run changed: ΔG, transition temperatures, observables and held-out errors.

    ΔG and held-out errors are values before and after. Of observables they are the value of the first update
    and that on new frames of the refined potential, with their deviations from the targets.

    Args:
        console: Console to print to.
        folder: A run folder with `summary.json`.

    Raises:
        InputError: If the summary is missing or cannot be read.
    """
    _print(console, read_summary(folder), Path(folder))


def print_result(console: Console, result: "FinetuneResult") -> None:
    """Print what a run changed (see `print_summary`)."""
    _print(console, result.summary, result.folder)


def _print(console: Console, summary: Summary, folder: Path) -> None:
    table = plain_table()
    table.add_column(summary.name, overflow="fold")
    for title in ("before", "after", "change"):
        table.add_column(title, justify="right", overflow="fold")
    for t in summary.transitions:
        # ΔG_after is ΔG_before plus an independent change, so the change has the smaller error.
        se = max(t.after.se**2 - t.before.se**2, 0.0) ** 0.5
        change = Measured(t.after.value - t.before.value, se, t.after.unit)
        target = f"  ΔG, meV/atom (target {t.target.value:g})"
        temperatures = (number(t.transition_before), number(t.transition_after))
        table.add_row(t.name, style="bold")
        table.add_row(f"  {t.state}, {t.size}")
        table.add_row(target, number(t.before), number(t.after), number(change))
        table.add_row("  transition temperature, K", *temperatures)
    known = {t.name for t in summary.transitions}
    observed = {loss: courses for loss, courses in summary.measured.items() if loss not in known}
    as_trained = {loss for loss, of in observed.items() if all(c.after is None for c in of.values())}
    for loss, courses in observed.items():
        table.add_row(f"{loss}, as trained" if loss in as_trained else loss, style="bold")
        for label, *values in _course_rows(courses, summary.deviations.get(loss)):
            table.add_row(f"  {label}", *values)
    before, after = summary.replay.before, summary.replay.after
    if before is not None and after is not None:
        table.add_row(f"held-out frames ({before.n_frames})", style="bold")
        for name in ("energy", "forces", "stress"):
            old, new = getattr(before, name), getattr(after, name)
            if old is not None and new is not None:
                share = f"{100 * (new.value / old.value - 1):+.1f} %" if old.value > 0 else ""
                table.add_row(f"  {name} MAE, {old.unit}", f"{old.value:.3g}", f"{new.value:.3g}", share)
    if summary.other_heads:
        table.add_row(f"forces of heads that were not trained (it was {summary.head})", style="bold")
        for head, drift in summary.other_heads.items():
            moved = 100 * drift.forces_meV_per_A / max(drift.forces_before_meV_per_A, 1e-9)
            label = f"  {head}, r.m.s. of forces and of their change, meV/Å"
            changed = f"{drift.forces_meV_per_A:.3g} ({moved:.2g} %)"
            table.add_row(label, f"{drift.forces_before_meV_per_A:.3g}", "", changed)
    console.print()
    console.print(table)

    lines = [f"note, {t.name}: {note}" for t in summary.transitions for note in t.notes]
    lines += [f"note: {note}" for note in summary.notes]
    lines += [
        f"note, {loss}: {name} = {course.after} does not decide about its target {course.target}; more "
        "sampling.frames or sampling.replicas would"
        for loss, courses in observed.items()
        for name, course in courses.items()
        if course.after and course.target and not course.after.se <= course.target.se
    ]
    if as_trained:
        lines.append(
            "as trained: values in the first and the last update of a loss, of the materials of that update; "
            "validation: of the same data before and after"
            if any(course.delivered for of in observed.values() for course in of.values())
            else "as trained: values in the first and the last update of a loss, not sampled afresh"
        )
    minutes, seconds = divmod(round(summary.wall_time_s), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours} h" if hours else "", f"{minutes} min" if hours or minutes else "", f"{seconds} s"]
    ended = "every target within its tolerance" if summary.converged else "all steps used"
    lines.append(f"updates    {summary.steps}, {ended}")
    if summary.verdicts:
        met = f"{sum(summary.verdicts.values())} of {len(summary.verdicts)} met"
        lines.append(f"targets    {met} on new frames of the refined potential")
    lines += [
        f"wall time  {' '.join(part for part in parts if part)}",
        f"model      {folder / f'{summary.name}.model'}",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _course_rows(courses: Mapping[str, Course], deviation: Deviation | None) -> Iterator[tuple[str, ...]]:
    """Return a row per quantity; for many, the r.m.s. of their deviations and the worst of them."""
    shown = list(courses)
    if len(courses) > MOST_ROWS:
        if deviation is not None:
            end = deviation.last_sigma if deviation.after_sigma is None else deviation.after_sigma
            yield "r.m.s. deviation, σ", f"{deviation.first_sigma:.3g}", f"{end:.3g}", ""
        shown = sorted(shown, key=lambda name: -abs((courses[name].deviations or (0.0, 0.0))[1]))[:WORST]
    for name in shown:
        course = courses[name]
        label = ", ".join(part for part in (name, course.end.unit if course.end else "") if part)
        target = "" if course.target is None else f" (target {number(course.target)})"
        change = "" if course.deviations is None else "{:+.1f} → {:+.1f} σ".format(*course.deviations)
        if course.target is None and course.change is not None:
            change = f"{100 * course.change:+.1f} %"
        yield f"{label}{target}", number(course.first), number(course.end), change
    if len(courses) > MOST_ROWS:
        yield f"{len(courses) - WORST} others are in summary.json", "", "", ""
