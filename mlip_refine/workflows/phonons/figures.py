"""Figures of phonons as PNG, from result files: band structures, models against references, expansion."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mlip_refine.errors import InputError
from mlip_refine.quantities import IMAGINARY
from mlip_refine.report.figures import COLOURS, DASHES, GREY, LEGEND_ABOVE, save_figure
from mlip_refine.workflows.phonons.records import QUANTITIES, file_of_crystal, read_phonons_json

type Json = Mapping[str, Any]

AXES = {q.key: f"{q.title}, {q.unit}" for q in QUANTITIES}
"""Labels of the panels of the parity figure, in order."""

_GREEK = {"G": "Γ"}
_MARKERS = "osD^v"
_PANELS = {
    "volume_A3_per_atom": ("volume, Å³ per atom", 1.0),
    "expansion_per_K": ("thermal expansion, 10⁻⁶/K", 1e6),
    "heat_capacity_kB_per_atom": ("$C_P$, $k_B$ per atom", 1.0),
    "bulk_modulus_GPa": ("$B_T$, GPa", 1.0),
}


def draw_figures(folder: Path) -> list[Path]:
    """Draw the figures of a run folder of `mlip-refine phonons`.

    Args:
        folder: Run folder with `phonons.json` and `crystals`.

    Returns:
        The files: bands and densities of every crystal that has them, its expansion, and the errors where
        there are several references.

    Raises:
        InputError: A result file is missing or cannot be read, or a figure cannot be written.
    """
    result, drawn = read_phonons_json(folder), list[Path]()
    for point in result.points:
        place = point.name, point.cell
        file = file_of_crystal(folder / "crystals", *place, ".json")
        kept = json.loads(file.read_text(encoding="utf-8"))
        structures = kept["structures"]
        if structures is not None:
            title = f"{point.name} {point.formula}, {point.cell} cell"
            path = file_of_crystal(folder, *place, "-bands.png")
            drawn.append(draw_bands(path, structures["bands"], structures["densities"], title))
        if point.quasi_harmonic is not None:
            path = file_of_crystal(folder, *place, "-expansion.png")
            drawn.append(draw_expansion(path, {result.name: point.quasi_harmonic}))
    for cell in result.cells:
        points = result.compared(cell)
        if len(points) > 1:
            values = {
                q.key: {
                    "reference": [None if p.reference is None else p.reference[q.key] for p in points],
                    "models": {result.name: [p.properties[q.key] for p in points]},
                }
                for q in QUANTITIES
            }
            drawn.append(draw_parity(folder / f"parity-{cell}.png", values))
    return drawn


def draw_bands(
    path: Path, bands: Mapping[str, Json], densities: Mapping[str, Json] | None = None, title: str = ""
) -> Path:
    """Draw band structures over one another, and densities of states beside them.

    Args:
        path: Path of the PNG.
        bands: Plain data `Bands.as_json()` by name, all of one path. Of several, the first is the reference,
            broad and grey.
        densities: Plain data `DensityOfStates.as_json()` by the same names.
        title: Title over the figure.

    Raises:
        InputError: There are no bands, paths differ, or the figure cannot be written.
    """
    ticks = {tuple((place, label) for place, label in one["ticks"]) for one in bands.values()}
    if len(ticks) != 1:
        raise InputError(
            "band structures of one figure must have one path", found=f"{len(ticks)} paths", where=str(path)
        )
    figure = _figure(7.4, 4.2)
    ratios = [4, 1] if densities else [1]
    panels = figure.subplots(1, len(ratios), sharey=True, squeeze=False, width_ratios=ratios)[0]
    styles = dict(zip(bands, _styles(reference=len(bands) > 1), strict=False))
    for name, one in bands.items():
        lines = list(zip(one["distances_per_A"], one["frequencies_THz"], strict=True))
        for along, line in lines:
            panels[0].plot(along, line, **styles[name])
        # One entry of all its bands.
        panels[0].plot([], [], **styles[name], label=name)
    marks = ticks.pop()
    places = [place for place, _ in marks]
    labels = ["|".join(_GREEK.get(x, x) for x in label.split("|")) for _, label in marks]
    panels[0].set_xticks(places, labels)
    panels[0].set_xlim(places[0], places[-1])
    for place in places:
        panels[0].axvline(place, color=GREY, linewidth=0.5, zorder=0)
    panels[0].set_ylabel("frequency, THz")
    for name, data in (densities or {}).items():
        panels[1].plot(data["states_per_THz"], data["frequencies_THz"], **styles.get(name, {}))
    if densities:
        panels[1].set_xlabel("states, 1/THz")
        panels[1].set_xlim(left=0)
    lowest = min(float(np.min(line)) for one in bands.values() for line in one["frequencies_THz"])
    for axes in panels:
        # A line at zero, and a shade below it where there are imaginary modes.
        axes.axhline(0.0, color=GREY, linewidth=0.8, zorder=0)
        if lowest < IMAGINARY:
            shade = {"color": COLOURS[3], "alpha": 0.12, "linewidth": 0, "zorder": 0}
            axes.axhspan(1.1 * lowest, 0.0, **shade, label="imaginary")
            axes.set_ylim(bottom=1.1 * lowest)
        else:
            axes.set_ylim(bottom=0.0)
    panels[0].legend(**LEGEND_ABOVE, ncols=len(bands) + 1)
    if title:
        figure.suptitle(title, fontsize="medium", parse_math=False)  # a material may be called $x
    return save_figure(figure, path)


def draw_parity(path: Path, materials: Mapping[str, Json], quantities: Mapping[str, str] = AXES) -> Path:
    """Draw models against references over materials.

    Args:
        path: Path of the PNG.
        materials: By quantity `{"reference": [...], "models": {name: [...]}}`, a number or None for every
            material, models in the order before, after. Quantities that are missing are left out.
        quantities: Quantities of the panels, with the labels of their axes.

    Raises:
        InputError: There is no quantity, lists differ in length, or the figure cannot be written.
    """
    shown = [name for name in quantities if name in materials]
    if not shown:
        raise InputError("nothing to draw", where=str(path), expected=f"any of {', '.join(quantities)}")
    columns = min(2, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = _figure(4.0 * columns, 3.9 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, name in zip(panels, shown, strict=False):
        data, label = materials[name], quantities[name]
        reference = np.array(data["reference"], dtype=float)
        values = [reference, *(np.array(model, dtype=float) for model in data["models"].values())]
        seen = np.concatenate([one[np.isfinite(one)] for one in values])
        margin = 0.05 * float(np.ptp(seen)) or 0.05 * float(np.abs(seen).max()) or 1.0
        # Both axes from the lowest to the highest value of either.
        ends = float(seen.min()) - margin, float(seen.max()) + margin
        styles = zip(data["models"].items(), COLOURS, cycle(_MARKERS), strict=False)
        for (title, values), colour, marker in styles:
            model = np.array(values, dtype=float)
            if len(model) != len(reference):
                raise InputError(
                    f"{title} has not a value for every material: {label}",
                    found=len(model),
                    expected=str(len(reference)),
                )
            known = np.isfinite(model) & np.isfinite(reference)
            error = np.abs(model - reference)[known].mean() if known.any() else math.nan
            axes.plot(
                reference,
                model,
                marker,
                color=colour,
                markersize=3.5,
                alpha=0.6,
                markeredgewidth=0,
                label=f"{title}, mean error {error:.3g} ({known.sum()})",
            )
        axes.plot(ends, ends, color=GREY, linewidth=0.8, zorder=0, label="model = reference")
        axes.set(xlim=ends, ylim=ends, aspect="equal")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.set_xlabel(f"{label}: reference")
        axes.set_ylabel("model")
        axes.legend(**LEGEND_ABOVE)
    for axes in list(panels)[len(shown) :]:
        axes.remove()
    return save_figure(figure, path)


def draw_expansion(
    path: Path, models: Mapping[str, Json], measured: Mapping[str, Sequence[Sequence[float]]] | None = None
) -> Path:
    """Draw quasi-harmonic volume, expansion, heat capacity and bulk modulus over temperature.

    Args:
        path: Path of the PNG.
        models: Plain data `QuasiHarmonicResult.as_json()` by name.
        measured: Points (K, value) by the names of the fields of `QuasiHarmonicResult`, in their units.

    Raises:
        InputError: There is no model, or the figure cannot be written.
    """
    if not models:
        raise InputError("nothing to draw", where=str(path), expected="a model with its expansion")
    figure = _figure(8.0, 6.4)
    panels = list(figure.subplots(2, 2, sharex=True).flat)
    for (name, data), style in zip(models.items(), _styles(reference=False), strict=False):
        # Few temperatures are points; a line through them is no curve.
        marker = "o" if len(data["temperatures_K"]) < 10 else None
        for axes, (field, (_, factor)) in zip(panels, _PANELS.items(), strict=True):
            values = factor * np.array(data[field], dtype=float)
            axes.plot(data["temperatures_K"], values, label=name, marker=marker, markersize=3.5, **style)
    for axes, (field, (label, factor)) in zip(panels, _PANELS.items(), strict=True):
        points = np.array((measured or {}).get(field, []), dtype=float).reshape(-1, 2)
        if len(points):
            axes.plot(
                points[:, 0], factor * points[:, 1], "o", color="black", fillstyle="none", label="measured"
            )
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[2:]:
        axes.set_xlabel("temperature, K")
    panels[0].legend(**LEGEND_ABOVE, ncols=3)
    return save_figure(figure, path)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _styles(*, reference: bool = True) -> list[dict[str, Any]]:
    """Return styles of lines: the reference broad and grey, then colours that differ in their dashes, too."""
    first = [{"color": "#999999", "linewidth": 2.6, "linestyle": "-", "zorder": 1}] if reference else []
    pairs = zip(COLOURS, cycle(DASHES), strict=False)
    return first + [{"color": c, "linewidth": 1.2, "linestyle": d, "zorder": 2} for c, d in pairs]
