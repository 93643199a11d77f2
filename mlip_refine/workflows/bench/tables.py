"""The tables of a bench."""

from itertools import groupby

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mlip_refine.quantities import Measured
from mlip_refine.report.tables import number
from mlip_refine.workflows.bench.records import BenchResult, Comparison, Topic

_SIDES = {
    Topic.ENGINE: ("engine", "bare model", "time ratio"),
    Topic.ASE: ("engine", "ASE", "speed ratio"),
    Topic.GRADIENT: ("streamed", "ready batches", "time ratio"),
    Topic.MEMORY: ("many frames", "few frames", "memory ratio"),
}


def print_bench(console: Console, result: BenchResult) -> None:
    """Print the machine, a table per topic, and how many goals were met and missed.

    Args:
        console: Console to print to.
        result: Result of a bench.
    """
    machine, models = result.machine, {row.model: None for row in result.rows}
    load = "" if machine.load is None else f"; load average before the start {machine.load:g}"
    for line in (
        f"{machine.processor}, {machine.cores} cores, {machine.threads} threads{load}",
        f"device {machine.device}, {machine.dtype}",
        f"torch {machine.torch}, mace {machine.mace}, Python {machine.python}",
        "Medians of interleaved blocks; in parentheses the standard error of the last digits.",
        f"potential: {' and '.join(models)}",
    ):
        console.print(line, markup=False, soft_wrap=True)

    for topic, group in groupby(result.rows, key=lambda row: row.topic):
        rows = list(group)
        unit = next((row.outcome.ours.unit for row in rows if row.outcome), "")
        table = Table(
            title=f"{topic}, {unit}".rstrip(", "),
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            show_edge=False,
        )
        table.add_column("", overflow="fold")
        for title in (*_SIDES[topic], "goal", ""):
            table.add_column(title, justify="right", overflow="fold")
        for row in rows:
            table.add_row(*_cells(row, name_model=len(models) > 1))
        console.print()
        console.print(table)

    met = [row.met for row in result.rows]
    without = f", {met.count(None)} rows without numbers" if None in met else ""
    console.print()
    console.print(
        f"goals: {met.count(True)} met, {met.count(False)} missed{without}", markup=False, soft_wrap=True
    )


def _cells(row: Comparison, *, name_model: bool) -> tuple[str, ...]:
    label = escape(f"{row.model}: " if name_model else "") + row.workload
    if row.accelerate != "none":
        # What was asked for, and what really ran where that is something else.
        ran = row.outcome.ran if row.outcome else row.accelerate
        label += f", {row.accelerate}" + ("" if ran == row.accelerate else f" (ran: {ran})")
    if row.outcome is None:
        return (f"{label}: {escape(row.failure)}",)
    numbers = (row.outcome.ours, row.outcome.reference, row.outcome.ratio)
    return label, *map(_number, numbers), str(row.goal), "met" if row.met else "missed"


def _number(measured: Measured) -> str:
    """Return a value without its unit; one that was read once, or that never differed, has no error."""
    return number(measured) if measured.se > 0 else f"{measured.value:.4g}"
