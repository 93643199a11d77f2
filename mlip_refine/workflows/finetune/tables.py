"""The table at the end of a run."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from mlip_refine.quantities import Measured
from mlip_refine.workflows.finetune.records import Quantity, Summary, TransitionRecord, read_summary
from mlip_refine.workflows.finetune.steps import number

HELD_OUT = {
    "energy_mae_mev_per_atom": "energy MAE, meV/atom",
    "forces_mae_mev_per_A": "forces MAE, meV/Å",
    "stress_mae_gpa": "stress MAE, GPa",
}
"""Held-out errors of a summary, as the table names them."""

MOST_ROWS = 6
"""Of a loss; of one that measures more, the worst are shown."""

WORST = 3
"""Rows of a loss that measures more."""

type Row = tuple[str, str, str, str]


def print_summary(console: Console, folder: Path) -> None:
    """Print what a run changed: ΔG, transition temperatures, observables and held-out errors.

    Of ΔG and held-out errors these are values before and after; of observables, which are not sampled
    afresh, those of the first and the last update, with their deviations from the targets.

    Args:
        console: Of rich.
        folder: A run folder with `summary.json`.

    Raises:
        InputError: The summary is missing or cannot be read.
    """
    summary = read_summary(folder)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    table.add_column(summary.name, overflow="fold")
    for title in ("before", "after", "change"):
        table.add_column(title, justify="right", overflow="fold")
    for transition in summary.transitions:
        _add(table, transition.name, _transition_rows(transition))
    for loss, quantities in _further(summary).items():
        _add(table, f"{loss}, as trained", _quantity_rows(quantities, summary.deviations.get(loss)))
    errors = list(_error_rows(summary))
    if errors:
        _add(table, f"held-out frames ({summary.errors_before.get('n_frames', 0):.0f})", iter(errors))
    console.print()
    console.print(table)
    for line in _below(summary, Path(folder)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _add(table: Table, title: str, rows: Iterator[Row]) -> None:
    table.add_row(title, "", "", "", style="bold")
    for row in rows:
        table.add_row(f"  {row[0]}", *row[1:])


def _transition_rows(t: TransitionRecord) -> Iterator[Row]:
    yield f"{t.state}, N = {t.n_atoms}", "", "", ""
    yield f"ΔG, meV/atom (target {t.target:g})", number(t.before), number(t.after), number(_change(t))
    yield "transition temperature, K", number(t.transition_before), number(t.transition_after), ""


def _change(t: TransitionRecord) -> Measured:
    """ΔG_after is ΔG_before plus an independent change, so the change has the smaller error."""
    variance = t.after.se**2 - t.before.se**2
    return Measured(t.after.value - t.before.value, max(variance, 0.0) ** 0.5, t.after.unit)


def _further(summary: Summary) -> dict[str, Mapping[str, Quantity]]:
    """What losses measured that are no transitions."""
    known = {t.name for t in summary.transitions}
    return {loss: found for loss, found in summary.measured.items() if loss not in known}


def _quantity_rows(
    quantities: Mapping[str, Quantity], deviations: tuple[float, float] | None
) -> Iterator[Row]:
    """All quantities; of many the r.m.s. of their deviations and the worst."""
    if len(quantities) <= MOST_ROWS:
        yield from (_quantity_row(name, q) for name, q in quantities.items())
        return
    if deviations is not None:
        yield "r.m.s. deviation, σ", f"{deviations[0]:.3g}", f"{deviations[1]:.3g}", ""
    worst = sorted(quantities, key=lambda name: -abs((quantities[name].deviations or (0.0, 0.0))[1]))
    yield from (_quantity_row(name, quantities[name]) for name in worst[:WORST])
    yield f"{len(quantities) - WORST} others are in summary.json", "", "", ""


def _quantity_row(name: str, q: Quantity) -> Row:
    label = ", ".join(part for part in (name, q.last.unit) if part)
    target = "" if q.target is None else f" (target {number(q.target)})"
    change = "" if q.deviations is None else "{:+.1f} → {:+.1f} σ".format(*q.deviations)
    return f"{label}{target}", number(q.first), number(q.last), change


def _error_rows(summary: Summary) -> Iterator[Row]:
    for key, label in HELD_OUT.items():
        if key in summary.errors_before and key in summary.errors_after:
            before, after = summary.errors_before[key], summary.errors_after[key]
            change = f"{100 * (after / before - 1):+.1f} %" if before > 0 else ""
            yield label, f"{before:.3g}", f"{after:.3g}", change


def _below(summary: Summary, folder: Path) -> Iterator[str]:
    for transition in summary.transitions:
        for note in transition.notes:
            yield f"note, {transition.name}: {note}"
    if _further(summary):
        yield "as trained: what the first and the last update of a loss saw, not sampled afresh"
    end = "every target met" if summary.converged else "all steps used"
    yield f"updates    {summary.steps}, {end}"
    yield f"wall time  {_duration(summary.wall_time)}"
    yield f"model      {folder / f'{summary.name}.model'}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours} h" if hours else "", f"{minutes} min" if hours or minutes else "", f"{rest} s"]
    return " ".join(part for part in parts if part)
