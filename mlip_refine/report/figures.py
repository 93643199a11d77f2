"""Style of the figures of all verbs, drawn without pyplot's global state."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mlip_refine.errors import InputError
from mlip_refine.files import written

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours that every kind of colour vision can tell apart (Okabe and Ito 2008)."""

DASHES = ("-", "--", "-.", ":")
GREY = "#555555"
TARGET_LINE: dict[str, Any] = {"linewidth": 1.0, "linestyle": (0, (6, 4))}
"""Style of a line at a target."""

LEGEND_ABOVE: dict[str, Any] = {
    "frameon": False,
    "loc": "lower left",
    "bbox_to_anchor": (0.0, 1.0),
    "fontsize": "small",
}
"""Place of a legend above the axes, where it never covers data."""


def new_figure(width: float = 6.4, height: float = 4.0) -> Figure:
    """Return an empty figure of a size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def open_frame(axes: Axes) -> None:
    """Hide the upper and the right border of axes."""
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, and return its path.

    Raises:
        InputError: If it cannot be written.
        StorageError: If there is no room for it.
    """
    try:
        with written(path) as partial:
            figure.savefig(partial, dpi=200, format="png")
    except OSError as error:
        raise InputError("the figure cannot be written", where=str(path), found=str(error)) from error
    return path
