"""Figures of `mlip-refine transition`, from its result file."""

from itertools import cycle
from pathlib import Path

from mlip_refine.report.figures import COLOURS, GREY, LEGEND_ABOVE, new_figure, open_frame, save_figure
from mlip_refine.workflows.transition.records import TransitionFile, read_transition


def write_figures(folder: Path) -> list[Path]:
    """Draw ΔG over temperature, the boundary and the boxes of crystal and liquid where there are any.

    Args:
        folder: A finished run with `transition.json`.

    Returns:
        The files.

    Raises:
        InputError: The result file is missing or cannot be read, or a figure cannot be written.
    """
    file = read_transition(folder)
    written = [_delta_g(file, folder / "delta_g.png")]
    if any(point.temperature.measured for point in file.boundary):
        written.append(_boundary(file, folder / "boundary.png"))
    if file.coexistence:
        written.append(_boxes(file, folder / "coexistence.png"))
    return written


def _delta_g(file: TransitionFile, path: Path) -> Path:
    """ΔG over temperature with a band of one standard error, a line for every pressure."""
    figure = new_figure()
    axes = figure.subplots()
    for i, point in enumerate(file.boundary):
        mine = [d for d in file.differences if d.pressure_GPa == point.pressure_GPa]
        colour, x = COLOURS[i % len(COLOURS)], [d.temperature_K for d in mine]
        y, se = [d.delta_g.value for d in mine], [d.delta_g.se for d in mine]
        axes.plot(x, y, color=colour, linewidth=1.2, label=f"{point.pressure_GPa:g} GPa")
        low, high = ([v + s * e for v, e in zip(y, se, strict=True)] for s in (-1, 1))
        axes.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)
        found = point.temperature.measured
        if found is not None:
            axes.errorbar([found.value], [0.0], xerr=[found.se], fmt="o", color=colour, markersize=4)
    axes.axhline(0.0, color=GREY, linewidth=0.8)
    axes.set(xlabel="temperature, K", ylabel=f"G({file.to}) - G({file.from_}), meV/atom")
    open_frame(axes)
    axes.legend(**LEGEND_ABOVE, ncols=4)
    return save_figure(figure, path)


def _boundary(file: TransitionFile, path: Path) -> Path:
    """Temperature over pressure, with errors and the slopes of Clausius and Clapeyron."""
    figure = new_figure()
    axes = figure.subplots()
    points = [(p, p.temperature.measured) for p in file.boundary]
    known = [(p, t) for p, t in points if t is not None]
    x, y = [p.pressure_GPa for p, _ in known], [t.value for _, t in known]
    axes.errorbar(
        x,
        y,
        yerr=[t.se for _, t in known],
        fmt="o-",
        color=COLOURS[0],
        linewidth=1.2,
        markersize=4,
        label=f"{file.from_} to {file.to}",
    )
    reach = 0.15 * (max(x) - min(x)) or 0.5
    for number, (point, t) in enumerate(known):
        if point.slope is not None:
            rise = point.slope.value * reach
            axes.plot(
                [point.pressure_GPa - reach, point.pressure_GPa + reach],
                [t.value - rise, t.value + rise],
                color=COLOURS[1],
                linewidth=1.0,
                label="ΔV/ΔS" if number == 0 else None,
            )
    axes.set(xlabel="pressure, GPa", ylabel="temperature, K")
    open_frame(axes)
    axes.legend(**LEGEND_ABOVE, ncols=2)
    return save_figure(figure, path)


def _boxes(file: TransitionFile, path: Path) -> Path:
    """Temperature and share of the crystal over time, a line for every box; what counts is drawn in full."""
    figure = new_figure(6.4, 5.6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    boxes = [(found, box) for found in file.coexistence for box in found.boxes]
    for (found, box), colour in zip(boxes, cycle(COLOURS), strict=False):
        label = f"{box.start_K:g} K, {found.pressure_GPa:g} GPa: {box.outcome}"
        for axes, values in ((upper, box.temperatures_K), (lower, box.crystal_shares)):
            axes.plot(box.times_ps, values, color=colour, linewidth=0.8, alpha=0.4)
            late = [(t, v) for t, v in zip(box.times_ps, values, strict=True) if t >= box.equilibration_ps]
            axes.plot(*zip(*late, strict=True), color=colour, linewidth=1.2, label=label)
    for found in file.coexistence:
        if found.temperature.measured is not None:
            upper.axhline(found.temperature.measured.value, color=GREY, linewidth=0.8, linestyle="--")
    upper.set_ylabel("temperature, K")
    lower.set(xlabel="time, ps", ylabel="share of the crystal", ylim=(0.0, 1.0))
    for axes in (upper, lower):
        open_frame(axes)
    upper.legend(**LEGEND_ABOVE, ncols=2)
    return save_figure(figure, path)
