"""Tables of `mlip-refine phonons`, from its result."""

import json
from collections.abc import Iterator
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mlip_refine.workflows.phonons.figures import draw_bands, draw_expansion, draw_parity
from mlip_refine.workflows.phonons.records import (
    QUANTITIES,
    PhononPoint,
    PhononResult,
    file_of_crystal,
    materials_of,
    mean_absolute_error,
    read_phonons_json,
)


def print_phonons(console: Console, result: PhononResult) -> None:
    """Print what every crystal has, the mean errors, and by how much they became smaller.

    Args:
        console: Of rich.
        result: What was found.
    """
    console.print()
    console.print(_points(result))
    for cell in result.cells:
        console.print()
        console.print(_errors(result, cell))
    for line in _below(result):
        console.print(line, markup=False, soft_wrap=True)


def write_phonon_figures(folder: Path) -> list[Path]:
    """Draw what a folder of `mlip-refine phonons` holds.

    Args:
        folder: With `phonons.json` and `crystals`.

    Returns:
        The files: bands and densities of every crystal that has them, its expansion, and `parity.png` where
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
    return drawn + [_parity(folder, result, cell) for cell in result.cells if len(result.compared(cell)) > 1]


def _parity(folder: Path, result: PhononResult, cell: str) -> Path:
    points = result.compared(cell)
    values = {
        q.key: {
            "reference": [None if p.reference is None else p.reference[q.key] for p in points],
            "models": {result.name: [p.properties[q.key] for p in points]},
        }
        for q in QUANTITIES
    }
    return draw_parity(folder / f"parity-{cell}.png", values)


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")


def _points(result: PhononResult) -> Table:
    table = _table()
    table.add_column("crystal", overflow="fold")
    table.add_column("cell")
    for quantity in QUANTITIES:
        table.add_column(f"{quantity.symbol}\n{quantity.unit}", justify="right")
    table.add_column("error of ω\nTHz", justify="right")
    table.add_column("imaginary\n%", justify="right")
    for point in result.points:
        error = point.frequency_error_THz
        table.add_row(
            escape(f"{point.name} {point.formula}"),
            point.cell,
            *(_beside_reference(point, q.key) for q in QUANTITIES),
            "-" if error is None else f"{error:.2f}",
            f"{100 * point.properties['imaginary']:.2g}",
        )
    return table


def _beside_reference(point: PhononPoint, key: str) -> str:
    value = point.properties[key]
    if point.reference is None:
        return f"{value:.2f}"
    return f"{value:.2f} ({value - point.reference[key]:+.2f})"


def _errors(result: PhononResult, cell: str) -> Table:
    points = result.compared(cell)
    table = _table()
    materials = _counted(len(set(materials_of(points))))
    table.add_column(f"mean absolute errors, {cell} cells, {materials}", overflow="fold")
    table.add_column(result.name, justify="right")
    reduced = {} if result.baseline is None else result.baseline["cells"][cell]
    if result.baseline is not None:
        table.add_column(f"smaller by, {_counted(reduced['materials'])} of both", justify="right")
        table.add_column("95 %", justify="right")
        table.caption = escape(reduced.get("refused", ""))
    of_quantities = reduced.get("of_quantities", {})
    for quantity in QUANTITIES:
        ends = _interval(*of_quantities[quantity.key]) if of_quantities else []
        table.add_row(quantity.symbol, str(mean_absolute_error(points, quantity)), *ends)
    if of_quantities:
        table.add_row("mean of the four", "", *_interval(*(reduced[key] for key in ("value", "low", "high"))))
    unstable = sum(p.properties["imaginary"] > 0 for p in points)
    table.add_row("with imaginary modes", f"{unstable} of {len(points)}")
    return table


def _counted(n: int) -> str:
    return "1 material" if n == 1 else f"{n} materials"


def _interval(value: float, low: float, high: float) -> list[str]:
    return [f"{100 * value:.0f} %", f"{100 * low:.0f} to {100 * high:.0f} %"]


def _further(point: PhononPoint) -> Iterator[str]:
    """Lines about Grüneisen parameters, expansion and conduction of heat."""
    name = f"{point.name} ({point.cell})"
    parameters = point.gruneisen or {}
    for kelvin, mean in zip(*(parameters.get(key, []) for key in ("temperatures_K", "mean")), strict=True):
        lowest, highest = (parameters[key]["parameter"] for key in ("lowest", "highest"))
        of_modes = f"{lowest:.2f} to {highest:.2f}"
        yield f"{name}: mean Grüneisen parameter {mean:.2f} at {kelvin:g} K, of modes {of_modes}"
    expansion = point.quasi_harmonic or {}
    for kelvin, volume, alpha in zip(
        *(expansion.get(key, []) for key in ("temperatures_K", "volume_A3_per_atom", "expansion_per_K")),
        strict=True,
    ):
        yield f"{name}: {volume:.3f} Å³/atom at {kelvin:g} K, expansion {1e6 * alpha:.1f} 10⁻⁶/K"
    conductivity = point.conductivity or {}
    for kelvin, mean in zip(
        *(conductivity.get(key, []) for key in ("temperatures_K", "mean_W_m_K")), strict=True
    ):
        yield f"{name}: lattice thermal conductivity {mean:.3g} W/(m K) at {kelvin:g} K"
    for what, reason in point.refused.items():
        yield f"note, {name}: no {what.replace('_', '-')}: {reason}"


def _below(result: PhononResult) -> Iterator[str]:
    for point in result.points:
        if point.method_difference is not None:
            yield (
                f"note, {point.name} ({point.cell}): force constants by both methods agree to "
                f"{point.method_difference:.1e} of the largest"
            )
        yield from _further(point)
    for name, reason in result.left_out.items():
        yield f"left out {name}: {reason}"
    yield (
        f"per primitive cell; {result.temperature_K:g} K, mesh {' x '.join(map(str, result.mesh))}; in "
        "parentheses: minus the reference"
    )
    yield f"results  {result.folder}"
