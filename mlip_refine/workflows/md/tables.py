"""Tables of `mlip-refine md`, from its result."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from mlip_refine.quantities import Measured
from mlip_refine.report.tables import number, plain_table
from mlip_refine.workflows.md.records import DynamicsPoint, MDPoint, MDResult

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
        points = result.points
        if title == "angles":
            # They are shown where a cell may change them.
            points = tuple(p for p in points if any(p.averages[name].se != 0 for name in names))
        if points:
            console.print()
            console.print(_table(title, names, points))

    notes = []
    for point in result.points:
        refused = {name: average for name, average in point.averages.items() if average.refused}
        if refused:
            worst = min(refused.values(), key=lambda average: average.independent_frames or 0.0)
            notes.append(f"note, {point.name}: no {', '.join(refused)}: {worst.refused}")
        notes += [f"note, {verdict}" for verdict in point.verdicts]
    if result.speed is not None:
        speed = result.speed
        notes.append(
            f"speed    {speed.atom_steps_per_s:.3g} atom·steps/s on {speed.device}, "
            f"{speed.steps} steps in {speed.seconds:.0f} s"
        )
    for line in (*notes, f"results  {result.folder}"):
        console.print(line, markup=False, soft_wrap=True)


def print_dynamics(console: Console, points: Sequence[DynamicsPoint]) -> None:
    """Print diffusion and viscosity of every point, and why others were refused."""
    table = plain_table()
    table.add_column("dynamics", overflow="fold")
    for heading in ("blocks", "quantity", "value", "unit"):
        table.add_column(heading, justify="left" if heading == "quantity" else "right", overflow="fold")
    for point in points:
        head = (point.name, f"{point.blocks} × {point.block_ps:.3g} ps")
        for name, estimate in point.values.items():
            value, unit = estimate.measured, estimate.unit
            if value is None:
                continue
            shown = _cell(value)
            if unit == "m²/s":
                # Diffusion coefficients are of the order of 10⁻⁹ m²/s.
                shown, unit = number(value.scaled(1e9, "1e-9 m²/s")), "10⁻⁹ m²/s"
            table.add_row(*head, name.replace("_", " "), shown, unit)
            head = ("", "")
    console.print()
    console.print(table)
    for point in points:
        for name, estimate in point.values.items():
            if estimate.refused:
                line = f"note, {point.name}: no {name.replace('_', ' ')}: {estimate.refused}"
                console.print(line, markup=False, soft_wrap=True)


def _table(title: str, names: Sequence[str], points: Sequence[MDPoint]) -> Table:
    table = plain_table()
    table.add_column(title, overflow="fold")
    with_state = title == "state point"
    for name in ("ensemble", "frames") * with_state:
        table.add_column(name, justify="right")
    for name in names:
        table.add_column(f"{name}\n{points[0].averages[name].unit}", justify="right", overflow="fold")
    for point in points:
        frames = f"{point.frames_kept}/{point.frames_kept + point.frames_discarded}"
        state = (point.ensemble, frames) * with_state
        table.add_row(point.name, *state, *(_cell(point.averages[name].measured) for name in names))
    return table


def _cell(measured: Measured | None) -> str:
    """A number with its error; one that the ensemble fixes has none."""
    if measured is not None and measured.se == 0:
        return f"{measured.value:.6g}"
    return number(measured)
