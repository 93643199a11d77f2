"""Figures of `mlip-refine md`, from its result files."""

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes

from mlip_refine.errors import InputError
from mlip_refine.report.figures import COLOURS, GREY, LEGEND_ABOVE, new_figure, open_frame, save_figure
from mlip_refine.workflows.md.records import MDPoint, read_dynamics, read_md

PANELS = ("energy", "volume", "pressure")
REPLICAS = COLOURS[:-1]
"""Colours of replicas; black is that of the mean."""

type Row = dict[str, str]
type Columns = dict[str, list[float]]


def write_figures(folder: Path) -> list[Path]:
    """Draw the figures of a finished run; see `write_md_figures` and `write_dynamics_figures`."""
    dynamics = write_dynamics_figures(folder) if (folder / "dynamics.json").exists() else []
    return write_md_figures(folder) + dynamics


def write_md_figures(folder: Path) -> list[Path]:
    """Draw energy, volume and pressure over time, a figure `POINT.png` for every state point.

    Args:
        folder: A finished run with `md.json` and `series.csv`.

    Returns:
        The files.

    Raises:
        InputError: A result file is missing or cannot be read, or a figure cannot be written.
    """
    folder = Path(folder)
    result, path = read_md(folder), folder / "series.csv"
    # Lines of the file by point and replica.
    courses: dict[str, dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                courses[row["point"]][int(row["replica"])].append(row)
    except (OSError, KeyError, ValueError) as error:
        raise InputError("the series cannot be read", where=str(path), found=str(error)) from error

    written = []
    for point in result.points:
        figure = new_figure(6.4, 5.6)
        panels = figure.subplots(len(PANELS), 1, sharex=True)
        for axes, name in zip(panels, PANELS, strict=True):
            _panel(axes, point, name, courses[point.name])
        panels[-1].set_xlabel("time, ps")
        panels[-1].set_xlim(left=0.0)
        title = f"{point.name}, {point.ensemble}, N = {point.n_atoms}"
        figure.suptitle(title, fontsize="medium", x=0.01, ha="left")
        _legend_of_panels(panels[0], point, len(courses[point.name]))
        written.append(save_figure(figure, folder / f"{point.name}.png"))
    return written


def _panel(axes: Axes, point: MDPoint, name: str, replicas: Mapping[int, Sequence[Row]]) -> None:
    """One quantity: a line per replica, the mean with its error, the equilibration shaded."""
    average = point.averages[name]
    axes.set_ylabel(f"{name}, {average.unit}")
    open_frame(axes)
    axes.axvspan(0.0, point.equilibration_ps, color=GREY, alpha=0.15, linewidth=0)
    axes.axvline(point.equilibration_ps, color=GREY, linewidth=1.0, linestyle="--")
    key = f"{name} ({average.unit})"
    for rows, colour in zip(replicas.values(), cycle(REPLICAS), strict=False):
        times = [float(row["time_ps"]) for row in rows]
        values = [float(row[key] or "nan") for row in rows]
        counts = [v if row["kept"] == "1" else float("nan") for v, row in zip(values, rows, strict=True)]
        axes.plot(times, values, color=GREY, linewidth=0.8, alpha=0.5)
        axes.plot(times, counts, color=colour, linewidth=1.0)
    if average.measured is not None:
        mean, se = average.measured.value, average.measured.se
        axes.axhline(mean, color="#000000", linewidth=1.0)
        axes.axhspan(mean - se, mean + se, color="#000000", alpha=0.2, linewidth=0)
        low, high = axes.get_ylim()
        if high - low < 1e-5 * abs(mean):
            # What the ensemble fixes differs by rounding alone.
            axes.set_ylim(mean - 0.01 * abs(mean), mean + 0.01 * abs(mean))
    axes.ticklabel_format(axis="y", useOffset=False)


def _legend_of_panels(axes: Axes, point: MDPoint, replicas: int) -> None:
    """Say above the panels what their lines and shades are."""
    for number, colour in enumerate(REPLICAS[:replicas][:3], 1):
        label = f"replica {number}" if replicas > 1 else "frames"
        label += ", ..." if number == 3 < replicas else ""
        axes.plot([], [], color=colour, linewidth=1.0, label=label)
    if point.frames_discarded:
        axes.plot([], [], color=GREY, linewidth=0.8, alpha=0.5, label="discarded")
    axes.plot([], [], color="#000000", linewidth=1.0, label="mean, ± one standard error")
    if point.equilibration_ps > 0:
        axes.fill_between([], [], color=GREY, alpha=0.15, linewidth=0, label="equilibration")
    axes.legend(**LEGEND_ABOVE, ncols=3)


def write_dynamics_figures(folder: Path) -> list[Path]:
    """Draw displacements, velocity correlation and spectrum of every point, `dynamics/POINT.png`.

    Args:
        folder: A finished run with `dynamics.json`.

    Returns:
        The files, without those of points that were refused.

    Raises:
        InputError: A result file is missing or cannot be read, or a figure cannot be written.
    """
    folder, written = Path(folder), []
    for name in (point.name for point in read_dynamics(folder) if point.blocks):
        times = _columns(folder / "dynamics" / f"{name}-times.csv")
        spectrum = _columns(folder / "dynamics" / f"{name}-spectrum.csv")
        figure = new_figure(6.4, 6.4)
        panels = figure.subplots(3, 1)
        displacements = [key for key in times if key.startswith("msd") and not key.endswith(" se")]
        _curves(panels[0], times, "time (ps)", displacements, "displacement², Å²")
        _curves(panels[1], times, "time (ps)", ["vacf"], "velocity correlation")
        _curves(panels[2], spectrum, "frequency (THz)", ["density (1/THz)"], "density of states, 1/THz")
        # To a fifth beyond the last hundredth of the highest peak: nothing is to be seen further on.
        frequency, density = spectrum["frequency (THz)"], spectrum["density (1/THz)"]
        seen = [f for f, d in zip(frequency, density, strict=True) if d > 0.01 * max(density)]
        panels[2].set_xlim(0.0, min(1.2 * seen[-1], frequency[-1]))
        figure.suptitle(f"{name}, bands of one standard error", fontsize="medium", x=0.01, ha="left")
        written.append(save_figure(figure, folder / "dynamics" / f"{name}.png"))
    return written


def _curves(axes: Axes, columns: Columns, across: str, keys: Sequence[str], label: str) -> None:
    """Curves with a band of one standard error."""
    x = columns[across]
    for key, colour in zip(keys, COLOURS, strict=False):
        y, errors = columns[key], columns[f"{key} se"]
        axes.plot(x, y, color=colour, linewidth=1.0, label=key)
        low, high = ([v + sign * e for v, e in zip(y, errors, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=colour, alpha=0.3, linewidth=0)
    axes.axhline(0.0, color=GREY, linewidth=0.5)
    axes.set(xlabel=across, ylabel=label, xlim=(x[0], x[-1]))
    open_frame(axes)
    axes.legend(**LEGEND_ABOVE, ncols=4)


def _columns(path: Path) -> Columns:
    """Columns of a CSV file by name."""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            head, *rows = csv.reader(stream)
        values = zip(*([float(cell) for cell in row] for row in rows), strict=True)
        return dict(zip(head, map(list, values), strict=True))
    except (OSError, ValueError) as error:
        raise InputError("the curves cannot be read", where=str(path), found=str(error)) from error
