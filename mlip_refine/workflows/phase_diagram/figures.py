"""Figure of `mlip-refine phase-diagram`, from its result file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from mlip_refine.report.figures import COLOURS, GREY, LEGEND_ABOVE, new_figure, open_frame, save_figure
from mlip_refine.workflows.phase_diagram.records import (
    CurveRecord,
    ExperimentRecord,
    PhaseDiagramFile,
    read_phase_diagram,
)
from mlip_refine.workflows.phase_diagram.stability import more_stable

FINE = 201
"""Pressures of a drawn boundary."""

OTHERS = (COLOURS[1], COLOURS[2], COLOURS[3], COLOURS[5])
"""Colours of other potentials."""

MARKERS = ("s", "D", "v", "^", "P", "X")


def write_figures(folder: Path) -> list[Path]:
    """Draw the diagram: bands of one standard error, experiment and other potentials.

    Args:
        folder: A finished run with `phase_diagram.json`.

    Returns:
        The files.

    Raises:
        InputError: The result file is missing or cannot be read, or the figure cannot be written.
    """
    file = read_phase_diagram(folder)
    figure = new_figure(6.4, 5.0)
    axes = figure.subplots()
    for i, other in enumerate(file.others):
        for n, curve in enumerate(other.boundaries):
            label = other.name if n == 0 else None
            _draw(axes, other.boundaries, curve, OTHERS[i % len(OTHERS)], label)
    for n, curve in enumerate(file.boundaries):
        _draw(axes, file.boundaries, curve, COLOURS[0], file.name if n == 0 else None, solid=True)
        _name(axes, curve)
    _experiment(axes, file.experiment)
    _triple_points(axes, file)
    axes.set(xlabel="pressure, GPa", ylabel="temperature, K")
    # Errors of the pressure of a triple point may be larger than the diagram.
    low, high = _pressures(file)
    edge = 0.05 * (high - low) or 0.5
    axes.set_xlim(low - edge, high + edge)
    open_frame(axes)
    axes.legend(**LEGEND_ABOVE, ncols=2)
    return [save_figure(figure, folder / "phase_diagram.png")]


def _pressures(file: PhaseDiagramFile) -> tuple[float, float]:
    """Return the lowest and the highest pressure of what is drawn, GPa."""
    curves = [*file.boundaries, *(curve for other in file.others for curve in other.boundaries)]
    found = [point.pressure_GPa for curve in curves for point in curve.sampled]
    found += [point.pressure_GPa for column in file.experiment for point in column.points]
    return min(found), max(found)


def _draw(
    axes: Axes,
    curves: Sequence[CurveRecord],
    which: CurveRecord,
    colour: str,
    label: str | None,
    *,
    solid: bool = False,
) -> None:
    """Draw a boundary, dashed where a third phase is more stable, with its band and its sampled points."""
    curve = which.curve()
    fine = np.linspace(curve.pressures[0], curve.pressures[-1], FINE if len(curve.pressures) > 1 else 1)
    states = [state for state in (curve.at(float(p)) for p in fine) if state is not None]
    t = np.array([state.temperature.value for state in states])
    se = np.array([state.temperature.se for state in states])
    stable = np.array([more_stable(curves, which, float(p)) is None for p in fine])
    axes.fill_between(fine, t - se, t + se, color=colour, alpha=0.25 if solid else 0.15, linewidth=0)
    width = 1.6 if solid else 1.0
    # Each part reaches to the first point of the other, so that no gap is left between them.
    for mine, style in ((stable, "-"), (~stable, (0, (4, 3)))):
        near = mine | np.append(mine[1:], False) if style == "-" else mine
        axes.plot(fine, np.where(near, t, np.nan), color=colour, linewidth=width, linestyle=style)
    axes.errorbar(
        curve.pressures,
        [point.temperature.value for point in curve.points],
        yerr=[point.temperature.se for point in curve.points],
        fmt="o",
        color=colour,
        markersize=4,
        linewidth=1.0,
        markerfacecolor=colour if solid else "white",
        label=label,
    )


def _name(axes: Axes, which: CurveRecord) -> None:
    """Write the names of both phases beside the middle of their boundary, each on its side."""
    curve = which.curve()
    middle = (curve.pressures[0] + curve.pressures[-1]) / 2
    lower = which.from_ if which.upper == which.to else which.to
    style: dict[str, Any] = {"ha": "center", "fontsize": "small", "color": GREY}
    for name, (offset, side) in ((which.upper, (16, "bottom")), (lower, (-16, "top"))):
        place = (middle, curve.temperature(middle)), (0, offset)
        axes.annotate(name, *place, textcoords="offset points", va=side, **style)


def _experiment(axes: Axes, columns: Sequence[ExperimentRecord]) -> None:
    """Draw what was measured."""
    for i, column in enumerate(columns):
        errors = [0.0 if np.isnan(point.temperature.se) else point.temperature.se for point in column.points]
        axes.errorbar(
            [point.pressure_GPa for point in column.points],
            [point.temperature.value for point in column.points],
            yerr=errors if any(errors) else None,
            fmt=MARKERS[i % len(MARKERS)],
            color=COLOURS[-1],
            markerfacecolor="none",
            markersize=5,
            linewidth=1.0,
            label=column.column,
        )


def _triple_points(axes: Axes, file: PhaseDiagramFile) -> None:
    """Draw the triple points with the errors of both coordinates."""
    for n, point in enumerate(file.triple_points):
        axes.errorbar(
            [point.pressure.value],
            [point.temperature.value],
            xerr=[point.pressure.se],
            yerr=[point.temperature.se],
            fmt="*",
            color=COLOURS[4],
            markersize=11,
            zorder=4,
            linewidth=1.0,
            label="triple point" if n == 0 else None,
        )
