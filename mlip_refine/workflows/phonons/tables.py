"""Tables of `mlip-refine phonons`, from its result."""

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mlip_refine.report.crystals import lattice_in_words, other_phase
from mlip_refine.report.tables import plain_table
from mlip_refine.workflows.phonons.records import (
    QUANTITIES,
    PhononPoint,
    PhononResult,
    materials_of,
    mean_absolute_error,
)


def print_phonons(console: Console, result: PhononResult) -> None:
    """Print the properties of every crystal, the mean errors, and the reduction of these by training.

    Args:
        console: Console to print on.
        result: Result of the run.
    """
    console.print()
    table = plain_table()
    table.add_column("crystal", overflow="fold")
    table.add_column("cell")
    table.add_column("atoms", justify="right")
    for quantity in QUANTITIES:
        table.add_column(f"{quantity.symbol}\n{quantity.unit}", justify="right")
    table.add_column("error of ω\nTHz", justify="right")
    table.add_column("imaginary\n%", justify="right")
    for point in result.points:
        error = point.frequency_error_THz
        values = []
        for q in QUANTITIES:
            value = point.properties[q.key]
            difference = "" if point.reference is None else f" ({value - point.reference[q.key]:+.2f})"
            values.append(f"{value:.2f}{difference}")
        table.add_row(
            escape(f"{point.name} {point.formula}"),
            point.cell,
            str(point.n_primitive),
            *values,
            "-" if error is None else f"{error:.2f}",
            f"{100 * point.properties['imaginary']:.2g}",
        )
    console.print(table)
    for cell in result.cells:
        console.print()
        console.print(_errors_table(result, cell))
    lines = [line for point in result.points for line in _notes(point)]
    lines += [f"left out {name}: {reason}" for name, reason in result.left_out.items()]
    mesh = " x ".join(map(str, result.mesh))
    lines.append(
        f"S, F and C_V at {result.temperature_K:g} K per mole of primitive cells, mesh {mesh}; "
        "atoms: of a primitive cell; in parentheses: minus the reference"
    )
    for line in (*lines, f"results  {result.folder}"):
        console.print(line, markup=False, soft_wrap=True)


def _errors_table(result: PhononResult, cell: str) -> Table:
    points = result.compared(cell)
    table = plain_table()

    def counted(n: int) -> str:
        return "1 material" if n == 1 else f"{n} materials"

    def interval(value: float, low: float, high: float) -> list[str]:
        return [f"{100 * value:.0f} %", f"{100 * low:.0f} to {100 * high:.0f} %"]

    materials = counted(len(set(materials_of(points))))
    table.add_column(f"mean absolute errors, {cell} cells, {materials}", overflow="fold")
    table.add_column(result.name, justify="right")
    reduced = {} if result.baseline is None else result.baseline["cells"][cell]
    if result.baseline is not None:
        table.add_column(f"smaller by, {counted(reduced['materials'])} of both", justify="right")
        table.add_column("95 %", justify="right")
        table.caption = escape(reduced.get("refused", ""))
    of_quantities = reduced.get("of_quantities", {})
    for quantity in QUANTITIES:
        ends = interval(*of_quantities[quantity.key]) if of_quantities else []
        table.add_row(quantity.symbol, str(mean_absolute_error(points, quantity)), *ends)
    if of_quantities:
        table.add_row("mean of the four", "", *interval(*(reduced[key] for key in ("value", "low", "high"))))
    unstable = sum(p.properties["imaginary"] > 0 for p in points)
    table.add_row("with imaginary modes", f"{unstable} of {len(points)}")
    return table


def _notes(point: PhononPoint) -> Iterator[str]:
    """Yield lines about the crystal, force constants, Grüneisen parameters, expansion and conductivity."""
    name = f"{point.name} ({point.cell})"
    if point.lattice is not None:
        yield f"{name}: {point.lattice.space_group}, {lattice_in_words(point.lattice)}"
    if point.given and point.lattice and point.given.space_group != point.lattice.space_group:
        yield f"note, {name}: {other_phase(point.given, point.lattice.space_group)}"
    if point.method_difference is not None:
        yield (
            f"note, {name}: force constants by both methods agree to {point.method_difference:.1e} of the "
            "largest"
        )
    parameters = point.gruneisen or {}
    if parameters:
        lowest, highest = (parameters[key]["parameter"] for key in ("lowest", "highest"))
        of_modes = f"Grüneisen parameters of modes {lowest:.2f} to {highest:.2f}"
        means = zip(parameters["temperatures_K"], parameters["mean"], strict=True)
        known = [f"{mean:.2f} at {kelvin:g} K" for kelvin, mean in means if mean is not None]
        yield f"{name}: {of_modes}" + "".join(f", mean {mean}" for mean in known)
        if parameters.get("refused"):
            yield f"note, {name}: no mean Grüneisen parameter: {parameters['refused']}"
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
