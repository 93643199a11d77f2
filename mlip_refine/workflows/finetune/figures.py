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
    LEGEND_ABOVE,
    TARGET_LINE,
    new_figure,
    open_frame,
    save_figure,
)
from mlip_refine.workflows.finetune.records import VALIDATION, Summary, Update, read_log, read_summary

RING: dict[str, Any] = {"marker": "o", "fillstyle": "none", "linestyle": "none"}
AFRESH: dict[str, Any] = {"marker": "D", "markersize": 5, "linestyle": "none"}
REPLAY_PARTS = ("energy", "forces", "stress")


def write_figures(folder: Path) -> list[Path]:
    """Draw what a run folder's `log.jsonl` and `summary.json` hold.

    Args:
        folder: A finished run.

    Returns:
        The files: `delta_g.png`, `observables.png`, `losses.png`, `n_eff.png` and `replay.png`, without those
        that the run has no data for.

    Raises:
        InputError: If a result file is missing or cannot be read, or a figure cannot be written.
    """
    folder = Path(folder)
    log, summary = read_log(folder), read_summary(folder)
    drawn = {
        "delta_g.png": delta_g_figure(log, summary),
        "observables.png": observables_figure(log, summary),
        "losses.png": losses_figure(log, summary),
        "n_eff.png": n_eff_figure(log),
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


def _legend(axes: Axes, columns: int = 1, title: str | None = None) -> None:
    """Draw the legend above the axes, where it covers no data."""
    axes.legend(**LEGEND_ABOVE, ncols=columns, title=title, title_fontsize="small", alignment="left")


def delta_g_figure(log: Sequence[Update], summary: Summary) -> Figure | None:
    """Draw ΔG of every transition by update, and before and after training; `None` without transitions."""
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
        _measured_afresh(axes, (ends[0] + offset, ends[1] + offset), values, colour)
    axes.plot([], [], color=GREY, **TARGET_LINE, label="target")
    axes.plot([], [], color=GREY, **AFRESH, label="measured afresh")
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


def _measured_afresh(axes: Axes, x: Sequence[float], values: Sequence[Measured], colour: str) -> None:
    """Draw values that were not reweighted, with bars of one standard error."""
    errors = [m.se if math.isfinite(m.se) else 0.0 for m in values]
    axes.errorbar(x, _bounds(values, 0), yerr=errors, color=colour, capsize=3, zorder=3, **AFRESH)


def _bounds(values: Sequence[Measured], sigma: int) -> list[float]:
    return [m.value + sigma * m.se for m in values]


def observables_figure(log: Sequence[Update], summary: Summary) -> Figure | None:
    """Draw what has a target, by update: a panel for each kind, which is the first word of a name.

    Every quantity stands with its target and the uncertainty of that, and with its value measured afresh
    after training. `None` without targets.
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
    figure = new_figure(max(6.4, 3.6 * columns), max(4.0, 3.3 * rows))
    for i, ((loss, kind), targets) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, i)
        for (name, target), colour in zip(targets.items(), cycle(COLOURS), strict=False):
            _course(axes, log, (loss, name), colour, name.partition(" ")[2] or kind)
            axes.axhline(target.value, color=colour, zorder=1, **TARGET_LINE)
            axes.axhspan(*_bounds([target], -1), *_bounds([target], 1), color=colour, alpha=0.08, linewidth=0)
            after = summary.measured[loss][name].after
            if after is not None:
                _measured_afresh(axes, [log[-1].step + 1], [after], colour)
        axes.set_xlabel("update")
        axes.set_ylabel(f"{kind}, {next(iter(targets.values())).unit}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        open_frame(axes)
        axes.plot([], [], color=GREY, **TARGET_LINE, label="target")
        if any(summary.measured[loss][name].after is not None for name in targets):
            axes.plot([], [], color=GREY, **AFRESH, label="measured afresh")
        _legend(axes, columns=2, title=f"{loss}: {kind}")
    return figure


def losses_figure(log: Sequence[Update], summary: Summary) -> Figure | None:
    """Draw losses without targets, such as those on phonons, by update: of the batch, and of the validation.

    The last point of a validation is that of the final potential. `None` without such losses.
    """
    without = {loss for loss, of in summary.measured.items() if all(c.target is None for c in of.values())}
    without -= {transition.name for transition in summary.transitions}
    names = [name for name in summary.measured if name in without and any(name in u.losses for u in log)]
    if not names:
        return None
    figure = new_figure(6.4, max(4.0, 3.0 * len(names)))
    for axes, name in zip(figure.subplots(len(names), 1, squeeze=False).flat, names, strict=True):
        batches = [(u.step, u.losses[name]) for u in log if u.losses.get(name, 0.0) > 0]
        whole = [
            (u.step, u.diagnostics[name][VALIDATION].value)
            for u in log
            if VALIDATION in u.diagnostics.get(name, {})
        ]
        course = summary.measured[name].get(VALIDATION)
        if course is not None and course.delivered is not None:
            whole.append((log[-1].step + 1, course.delivered.value))
        axes.plot(*_columns(batches), color=COLOURS[0], linewidth=1.2, label=f"{name}, batch")
        if whole:
            axes.plot(*_columns(whole), color=COLOURS[1], marker="o", linewidth=1.6, label="validation")
            axes.axhline(whole[0][1], color=GREY, label="before training", **TARGET_LINE)
        axes.set_yscale("log")
        axes.set_xlabel("update")
        axes.set_ylabel("loss")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        open_frame(axes)
        _legend(axes, columns=3)
    return figure


def n_eff_figure(log: Sequence[Update]) -> Figure | None:
    """Draw the effective over the stored frames of every source by update; `None` without sources."""
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
    # Frames of several references may count for more than those of the last.
    highest = max(100 * share for update in log for share in update.n_eff.values())
    axes.set_ylim(0, 1.05 * max(100.0, highest))
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
