"""Tables of `mlip-refine elastic`, from its result."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from mlip_refine.workflows.elastic.records import ElasticPoint, ElasticResult
from mlip_refine.workflows.elastic.thermal_records import print_thermal_elastic

AXES = ("xx", "yy", "zz", "yz", "xz", "xy")

ASYMMETRIC = 0.01
"""Components that symmetry forbids, in GPa, from which on they are told."""


def print_result(console: Console, result: ElasticResult) -> None:
    """Print the constants at rest, and those at temperatures where there are any."""
    print_elastic(console, result)
    print_thermal_elastic(console, result.thermal)


def print_elastic(console: Console, result: ElasticResult) -> None:
    """Print the whole tensor of every point, the moduli of all, and what is wrong with a crystal.

    Args:
        console: Of rich.
        result: What was found.
    """
    for point in result.points:
        console.print()
        console.print(_heading(point), markup=False, soft_wrap=True)
        console.print(_tensor(point))
    console.print()
    console.print(_moduli(result.points))
    for line in _below(result):
        console.print(line, markup=False, soft_wrap=True)


def _heading(point: ElasticPoint) -> str:
    reduced = f" (of {point.n_atoms_given} given)" if point.n_atoms != point.n_atoms_given else ""
    atoms = "1 atom" if point.n_atoms == 1 else f"{point.n_atoms} atoms"
    constants = ", ".join(f"{name} {value:.1f}" for name, value in point.independent_GPa.items())
    size = f"{atoms}{reduced}, {point.volume_A3_per_atom:.3f} Å³/atom"
    return f"{point.name}: {point.space_group}, {size}\n{constants} GPa"


def _plain_table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")


def _tensor(point: ElasticPoint) -> Table:
    table = _plain_table()
    for title in ("C, GPa", *AXES):
        table.add_column(title, justify="right")
    for title, row in zip(AXES, point.constants_GPa, strict=True):
        table.add_row(title, *(f"{round(value, 1) + 0.0:.1f}" for value in row))  # no -0.0
    return table


def _moduli(points: Sequence[ElasticPoint]) -> Table:
    table = _plain_table()
    for title in ("moduli", "average"):
        table.add_column(title, overflow="fold")
    for title in ("K\nGPa", "G\nGPa", "E\nGPa", "ν"):
        table.add_column(title, justify="right")
    table.add_column("stable")
    for point in points:
        for average, moduli in point.moduli.items():
            first = average == next(iter(point.moduli))
            k, g, e = (f"{value:.1f}" for value in (moduli.bulk_GPa, moduli.shear_GPa, moduli.young_GPa))
            stable = ("yes" if point.stable else "no") * first
            table.add_row(point.name * first, average, k, g, e, f"{moduli.poisson:.3f}", stable)
    return table


def _below(result: ElasticResult) -> Iterator[str]:
    for point in result.points:
        if point.stability_GPa[0] <= 0:
            yield f"note, {point.name}: unstable, a strain has the stiffness {point.stability_GPa[0]:.1f} GPa"
        softest = point.softest_eV_per_A2
        if softest is not None and softest <= 0:
            yield f"note, {point.name}: no minimum, its atoms have a curvature of {softest:.3g} eV/Å²"
        if point.asymmetry_GPa > ASYMMETRIC:
            yield (
                f"note, {point.name}: the symmetry {point.space_group} is broken by "
                f"{point.asymmetry_GPa:.2g} GPa"
            )
    yield f"results  {result.folder}"
