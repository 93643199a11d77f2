"""Tables of `mlip-refine md`, from its result."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from mlip_refine.report.tables import number
from mlip_refine.workflows.md.records import Average, DynamicsPoint, MDPoint, MDResult
from mlip_refine.workflows.records import Estimate

TABLES = {
    "state point": ("energy", "enthalpy", "pressure"),
    "cell": ("volume", "density", "a", "b", "c"),
    "angles": ("alpha", "beta", "gamma"),
}


def print_md(console: Console, result: MDResult) -> None:
    """Print averages, cells and what was refused or went wrong, after the dynamics where they were asked for.

    Args:
        console: Console to print to.
        result: Result of a run.
    """
    if result.dynamics is not None:
        print_dynamics(console, result.dynamics)
    for title, names in TABLES.items():
        # Angles are shown where a cell may change them.
        points = [p for p in result.points if title != "angles" or any(_varies(p, name) for name in names)]
        if points:
            console.print()
            console.print(_table(title, names, points))
    for line in _notes(result):
        console.print(line, markup=False, soft_wrap=True)


def print_dynamics(console: Console, points: Sequence[DynamicsPoint]) -> None:
    """Print diffusion and viscosity of every point, and why others were refused."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("dynamics", overflow="fold")
    for heading in ("blocks", "quantity", "value", "unit"):
        table.add_column(heading, justify="left" if heading == "quantity" else "right", overflow="fold")
    for point in points:
        known = [(name.replace("_", " "), e) for name, e in point.values.items() if e.measured is not None]
        for i, (name, estimate) in enumerate(known):
            head = (point.name, f"{point.blocks} × {point.block_ps:.3g} ps") if i == 0 else ("", "")
            table.add_row(*head, name, *_scaled(estimate))
    console.print()
    console.print(table)
    for point in points:
        for name, estimate in point.values.items():
            if estimate.refused:
                line = f"note, {point.name}: no {name.replace('_', ' ')}: {estimate.refused}"
                console.print(line, markup=False, soft_wrap=True)


def _scaled(estimate: Estimate) -> tuple[str, str]:
    """Return value with error, and unit; diffusion coefficients are of the order of 10⁻⁹ m²/s."""
    value = estimate.measured
    if value is not None and estimate.unit == "m²/s":
        return number(value.scaled(1e9, "1e-9 m²/s")), "10⁻⁹ m²/s"
    if value is not None and value.se == 0:
        return f"{value.value:.6g}", estimate.unit
    return number(value), estimate.unit


def _varies(point: MDPoint, name: str) -> bool:
    return point.averages[name].se != 0


def _table(title: str, names: Sequence[str], points: Sequence[MDPoint]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    table.add_column(title, overflow="fold")
    with_state = title == "state point"
    for name in ("ensemble", "frames") * with_state:
        table.add_column(name, justify="right")
    for name in names:
        table.add_column(f"{name}\n{points[0].averages[name].unit}", justify="right", overflow="fold")
    for point in points:
        frames = f"{point.frames_kept}/{point.frames_kept + point.frames_discarded}"
        state = (point.ensemble, frames) * with_state
        table.add_row(point.name, *state, *(_cell(point.averages[name]) for name in names))
    return table


def _cell(average: Average) -> str:
    """A number with its error; one that the ensemble fixes has none."""
    if average.se == 0:
        return f"{average.value:.6g}"
    return number(average.measured)


def _notes(result: MDResult) -> Iterator[str]:
    for point in result.points:
        refused = {name: average for name, average in point.averages.items() if average.refused}
        if refused:
            worst = min(refused.values(), key=lambda average: average.independent_frames or 0.0)
            yield f"note, {point.name}: no {', '.join(refused)}: {worst.refused}"
        yield from (f"note, {verdict}" for verdict in point.verdicts)
    if result.speed is not None:
        speed = result.speed
        yield (
            f"speed    {speed.atom_steps_per_s:.3g} atom·steps/s on {speed.device}, "
            f"{speed.steps} steps in {speed.seconds:.0f} s"
        )
    yield f"results  {result.folder}"
