"""Table and figures of `md.dynamics`, from its result files alone."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from mlip_refine.errors import InputError
from mlip_refine.report.figures import COLOURS, GREY, save_figure
from mlip_refine.report.tables import number
from mlip_refine.workflows.md.dynamics_records import DynamicsResult, Estimate, read_dynamics

type Columns = dict[str, list[float]]


def print_dynamics(console: Console, result: DynamicsResult) -> None:
    """Print diffusion, viscosity and temperature of every point, and what was refused.

    Args:
        console: Of rich.
        result: What was found.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("dynamics", overflow="fold")
    for heading in ("blocks", "quantity", "value", "unit"):
        table.add_column(heading, justify="left" if heading == "quantity" else "right", overflow="fold")
    for point in result.points:
        lines = [(name.replace("_", " "), e) for name, e in point.values.items() if e.value is not None]
        for i, (name, estimate) in enumerate(lines):
            head = (point.name, f"{point.blocks} × {point.block_ps:.3g} ps") if i == 0 else ("", "")
            table.add_row(*head, name, *_scaled(estimate))
    console.print()
    console.print(table)
    for line in _refusals(result):
        console.print(line, markup=False, soft_wrap=True)


def _scaled(estimate: Estimate) -> tuple[str, str]:
    """Value with its error, and unit; diffusion coefficients are of the order of 10⁻⁹ m²/s."""
    value = estimate.value
    if value is not None and estimate.unit == "m²/s":
        return number(value.scaled(1e9, "1e-9 m²/s")), "10⁻⁹ m²/s"
    if value is not None and value.se == 0:
        return f"{value.value:.6g}", estimate.unit
    return number(value), estimate.unit


def _refusals(result: DynamicsResult) -> Iterator[str]:
    for point in result.points:
        for name, estimate in point.values.items():
            if estimate.refused:
                yield f"note, {point.name}: no {name.replace('_', ' ')}: {estimate.refused}"


def write_dynamics_figures(folder: Path) -> list[Path]:
    """Draw displacements, velocity correlation and spectrum of every point, `dynamics/POINT.png`.

    Args:
        folder: A finished run with `dynamics.json`.

    Returns:
        The files, without those of points that were refused.

    Raises:
        InputError: A result file is missing or cannot be read, or a figure cannot be written.
    """
    folder = Path(folder)
    names = [point.name for point in read_dynamics(folder).points if point.blocks]
    return [_draw(folder / "dynamics", name) for name in names]


def _draw(folder: Path, name: str) -> Path:
    times, spectrum = (_read(folder / f"{name}-{kind}.csv") for kind in ("times", "spectrum"))
    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, 1)
    _panel(
        panels[0],
        times,
        "time (ps)",
        [key for key in times if key.startswith("msd") and not key.endswith(" se")],
    )
    _panel(panels[1], times, "time (ps)", ["vacf"])
    _panel(panels[2], spectrum, "frequency (THz)", ["density (1/THz)"])
    panels[2].set_xlim(0.0, _end(spectrum["frequency (THz)"], spectrum["density (1/THz)"]))
    panels[0].set_title(name, fontsize="medium", loc="left")
    path = folder / f"{name}.png"
    return save_figure(figure, path)


def _end(frequency: Sequence[float], density: Sequence[float]) -> float:
    """Where nothing more is to be seen: a fifth beyond the last hundredth of the highest peak."""
    seen = [f for f, d in zip(frequency, density, strict=True) if d > 0.01 * max(density)]
    return min(1.2 * seen[-1], frequency[-1])


def _panel(axes: Axes, columns: Columns, across: str, keys: Sequence[str]) -> None:
    """Curves with a band of one standard error."""
    x = columns[across]
    for key, colour in zip(keys, COLOURS, strict=False):
        y, errors = columns[key], columns[f"{key} se"]
        axes.plot(x, y, color=colour, linewidth=1.0, label=key)
        low, high = ([v + sign * e for v, e in zip(y, errors, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=colour, alpha=0.3, linewidth=0)
    axes.axhline(0.0, color=GREY, linewidth=0.5)
    axes.set(xlabel=across, xlim=(x[0], x[-1]))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")


def _read(path: Path) -> Columns:
    """Columns of a CSV file by name."""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            head, *rows = csv.reader(stream)
        values = zip(*([float(cell) for cell in row] for row in rows), strict=True)
        return dict(zip(head, map(list, values), strict=True))
    except (OSError, ValueError) as error:
        raise InputError("the curves cannot be read", where=str(path), found=str(error)) from error
