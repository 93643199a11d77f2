"""Tables and figures of `mlip-refine md`, from its result files alone."""

import csv
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
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
from mlip_refine.workflows.md.dynamics_tables import print_dynamics, write_dynamics_figures
from mlip_refine.workflows.md.records import Average, MDPoint, MDResult, read_md

PANELS = ("energy", "volume", "pressure")
TABLES = {
    "state point": ("energy", "enthalpy", "pressure"),
    "cell": ("volume", "density", "a", "b", "c"),
    "angles": ("alpha", "beta", "gamma"),
}

type Courses = Mapping[str, Mapping[int, Sequence[Mapping[str, str]]]]


def print_result(console: Console, result: MDResult) -> None:
    """Print the averages of every state point, and before them the dynamics where they were asked for."""
    if result.dynamics is not None:
        print_dynamics(console, result.dynamics)
    print_md(console, result)


def write_figures(folder: Path) -> list[Path]:
    """Draw the figures of a finished run; see `write_md_figures` and `write_dynamics_figures`."""
    dynamics = write_dynamics_figures(folder) if (folder / "dynamics.json").exists() else []
    return write_md_figures(folder) + dynamics


def print_md(console: Console, result: MDResult) -> None:
    """Print the averages of every state point, the cells, and what was refused or went wrong.

    Args:
        console: Of rich.
        result: What was found.
    """
    for title, names in TABLES.items():
        # Angles are told where a cell may change them.
        points = [p for p in result.points if title != "angles" or any(_varies(p, name) for name in names)]
        if points:
            console.print()
            console.print(_table(title, names, points))
    for line in _below(result):
        console.print(line, markup=False, soft_wrap=True)


def _varies(point: MDPoint, name: str) -> bool:
    mean = point.averages[name].mean
    return mean is None or mean.se > 0


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
    if average.mean is not None and average.mean.se == 0:
        return f"{average.mean.value:.6g}"
    return number(average.mean)


def _below(result: MDResult) -> Iterator[str]:
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


def write_md_figures(folder: Path) -> list[Path]:
    """Draw energy, volume and pressure over time, a figure `POINT.png` for every state point.

    Args:
        folder: A finished run with `md.json` and `series.csv`.

    Returns:
        The files.

    Raises:
        InputError: A result file is missing or cannot be read, or a figure cannot be written.
    """
    result, courses = read_md(folder), _courses(Path(folder) / "series.csv")
    return [_draw(point, courses, Path(folder) / f"{point.name}.png") for point in result.points]


def _courses(path: Path) -> Courses:
    """Lines of the CSV file by point and replica."""
    found: dict[str, dict[int, list[Mapping[str, str]]]] = defaultdict(lambda: defaultdict(list))
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                found[row["point"]][int(row["replica"])].append(row)
    except (OSError, KeyError, ValueError) as error:
        raise InputError("the series cannot be read", where=str(path), found=str(error)) from error
    return found


def _draw(point: MDPoint, courses: Courses, path: Path) -> Path:
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(PANELS), 1, sharex=True)
    for axes, name in zip(panels, PANELS, strict=True):
        _panel(axes, point, name, courses[point.name])
    panels[-1].set_xlabel("time, ps")
    panels[-1].set_xlim(left=0.0)
    panels[0].set_title(f"{point.name}, {point.ensemble}, N = {point.n_atoms}", fontsize="medium", loc="left")
    return save_figure(figure, path)


def _panel(
    axes: Axes, point: MDPoint, name: str, replicas: Mapping[int, Sequence[Mapping[str, str]]]
) -> None:
    """One quantity: a line per replica, the mean with its error, the equilibration shaded."""
    average = point.averages[name]
    axes.set_ylabel(f"{name}, {average.unit}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.axvspan(0.0, point.equilibration_ps, color=GREY, alpha=0.15, linewidth=0)
    axes.axvline(point.equilibration_ps, color=GREY, linewidth=1.0, linestyle="--")
    key = f"{name} ({average.unit})"
    for rows, colour in zip(replicas.values(), cycle(COLOURS), strict=False):
        times = [float(row["time_ps"]) for row in rows]
        values = [float(row[key] or "nan") for row in rows]
        counts = [v if row["kept"] == "1" else float("nan") for v, row in zip(values, rows, strict=True)]
        axes.plot(times, values, color=GREY, linewidth=0.8, alpha=0.5)
        axes.plot(times, counts, color=colour, linewidth=1.0)
    if average.mean is not None:
        mean, se = average.mean.value, average.mean.se
        axes.axhline(mean, color="#000000", linewidth=1.0)
        axes.axhspan(mean - se, mean + se, color="#000000", alpha=0.2, linewidth=0)
