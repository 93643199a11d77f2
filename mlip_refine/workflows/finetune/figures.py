"""Figures of a run as PNG: ΔG, observables, effective sizes, replay."""

import math
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mlip_refine.quantities import Measured
from mlip_refine.report.figures import (
    COLOURS,
    DASHES,
    GREY,
    TARGET_LINE,
    new_figure,
    open_frame,
    save_figure,
)
from mlip_refine.workflows.finetune.records import Summary, Update, read_log, read_summary

RING: dict[str, Any] = {"marker": "o", "fillstyle": "none", "linestyle": "none"}
REPLAY_PARTS = ("energy", "forces", "stress")


def write_figures(folder: Path) -> list[Path]:
    """Draw what a run folder's `log.jsonl` and `summary.json` hold.

    Args:
        folder: A finished run.

    Returns:
        The files: `delta_g.png`, `observables.png`, `n_eff.png` and `replay.png`, without those that the run
        has no data for.

    Raises:
        InputError: If a result file is missing or cannot be read, or a figure cannot be written.
    """
    folder = Path(folder)
    log, summary = read_log(folder), read_summary(folder)
    drawn = {
        "delta_g.png": _delta_g(log, summary),
        "observables.png": observables_figure(log, summary),
        "n_eff.png": _n_eff(log),
        "replay.png": _replay(log),
    }
    return [save_figure(figure, folder / name) for name, figure in drawn.items() if figure is not None]


def _axes(y_label: str) -> tuple[Figure, Axes]:
    figure = new_figure()
    axes = figure.add_subplot()
    axes.set_xlabel("update")
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    open_frame(axes)
    return figure, axes


def _legend(axes: Axes, columns: int = 1) -> None:
    """Draw the legend above the axes, where it covers no data."""
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns, fontsize="small")


def _delta_g(log: Sequence[Update], summary: Summary) -> Figure | None:
    if not summary.transitions:
        return None
    figure, axes = _axes("ΔG, meV/atom")
    for target in {t.target.value for t in summary.transitions}:
        axes.axhline(target, color=GREY, zorder=1, **TARGET_LINE)
    margin = max(1.0, 0.09 * len(log))
    ends = (log[0].step - margin, log[-1].step + margin)
    for i, (transition, colour) in enumerate(zip(summary.transitions, cycle(COLOURS), strict=False)):
        offset = 0.25 * margin * (i - (len(summary.transitions) - 1) / 2)
        _course(axes, log, (transition.name, "delta_g"), colour, transition.state)
        values = (transition.before, transition.after)
        axes.errorbar(
            (ends[0] + offset, ends[1] + offset),
            _bounds(values, 0),
            yerr=[m.se for m in values],
            color=colour,
            fmt="D",
            markersize=5,
            capsize=3,
            zorder=3,
        )
    axes.plot([], [], color=GREY, **TARGET_LINE, label="target")
    axes.set_xlim(ends[0] - 0.6 * margin, ends[1] + 0.6 * margin)
    axes.margins(y=0.12)
    updates = [x for x in axes.get_xticks() if log[0].step <= x <= log[-1].step]
    axes.set_xticks([ends[0], *updates, ends[1]])
    axes.set_xticklabels(["before", *(f"{x:g}" for x in updates), "after"])
    _legend(axes, columns=2)
    return figure


def _course(
    axes: Axes, log: Sequence[Update], quantity: tuple[str, str], colour: str, label: str | None
) -> None:
    """Draw a quantity of a loss by update, with a band of one standard error."""
    loss, name = quantity
    measured = {u.step: u.diagnostics.get(loss, {}).get(name) for u in log}
    steps = [step for step, m in measured.items() if m is not None]
    values = [m for m in measured.values() if m is not None]
    axes.fill_between(steps, _bounds(values, -1), _bounds(values, 1), color=colour, alpha=0.2, linewidth=0)
    axes.plot(steps, _bounds(values, 0), color=colour, linewidth=1.6, label=label)


def _bounds(values: Sequence[Measured], sigma: int) -> list[float]:
    return [m.value + sigma * m.se for m in values]


def observables_figure(log: Sequence[Update], summary: Summary) -> Figure | None:
    """Draw what has a target, by update: a panel for each kind, which is the first word of a name.

    Every quantity stands with its target and the uncertainty of that. `None` without targets.
    """
    panels: dict[tuple[str, str], dict[str, Measured]] = {}
    for loss, courses in summary.measured.items():
        for name, course in courses.items():
            if course.target is not None:
                panels.setdefault((loss, name.split()[0]), {})[name] = course.target
    if not panels:
        return None
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(max(6.4, 3.4 * columns), max(4.0, 2.8 * rows))
    for i, ((loss, kind), targets) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, i)
        for (name, target), colour in zip(targets.items(), cycle(COLOURS), strict=False):
            _course(axes, log, (loss, name), colour, name.partition(" ")[2] or None)
            axes.axhline(target.value, color=colour, zorder=1, **TARGET_LINE)
            axes.axhspan(*_bounds([target], -1), *_bounds([target], 1), color=colour, alpha=0.08, linewidth=0)
        axes.set_title(f"{loss}: {kind}", fontsize="small")
        axes.set_xlabel("update")
        axes.set_ylabel(next(iter(targets.values())).unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        open_frame(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize="x-small", ncols=2)
    return figure


def _n_eff(log: Sequence[Update]) -> Figure | None:
    sources = sorted({name for update in log for name in update.n_eff})
    if not sources:
        return None
    anew = {source: {u.step for u in log if source in u.resampled} for source in sources}
    figure, axes = _axes("effective over stored frames, %")
    for source, (colour, dash) in zip(sources, _styles(), strict=False):
        seen = [(u.step, 100 * u.n_eff[source]) for u in log if source in u.n_eff]
        again = [(step, value) for step, value in seen if step in anew[source]]
        axes.plot(*_columns(seen), color=colour, linestyle=dash, linewidth=1.6, label=source)
        axes.plot(*_columns(again), color=colour, **RING)
    if any(update.resampled for update in log):
        axes.plot([], [], color=GREY, **RING, label="sampled anew")
    axes.set_ylim(0, 105)
    _legend(axes, columns=2)
    return figure


def _replay(log: Sequence[Update]) -> Figure | None:
    # A schedule may leave replay out of any update.
    names = list(dict.fromkeys(n for u in log for n in u.losses if n.rpartition(".")[2] in REPLAY_PARTS))
    if not names:
        return None
    figure, axes = _axes("weighted mean squared error of a batch")
    for name, (colour, dash) in zip(names, _styles(), strict=False):
        seen = [(u.step, u.losses[name]) for u in log if u.losses.get(name, 0.0) > 0.0]
        axes.plot(*_columns(seen), color=colour, linestyle=dash, linewidth=1.6, label=name)
    axes.set_yscale("log")
    _legend(axes, columns=3)
    return figure


def _styles() -> Iterator[tuple[str, str]]:
    """Return colours with dashes, without end."""
    return zip(cycle(COLOURS), cycle(DASHES), strict=False)


def _columns(pairs: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in pairs], [y if math.isfinite(y) else math.nan for _, y in pairs]
