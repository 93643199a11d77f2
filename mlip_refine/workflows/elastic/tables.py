"""Tables of `mlip-refine elastic`, from its result."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from mlip_refine.quantities import Measured
from mlip_refine.workflows.elastic.records import ElasticPoint, ElasticResult, ThermalElasticPoint

AXES = ("xx", "yy", "zz", "yz", "xz", "xy")

ASYMMETRIC = 0.01
"""Size from which on components that symmetry forbids are reported, GPa."""


def print_result(console: Console, result: ElasticResult) -> None:
    """Print the constants at rest, and those at temperatures where there are any."""
    print_elastic(console, result)
    print_thermal_elastic(console, result.thermal)


def print_elastic(console: Console, result: ElasticResult) -> None:
    """Print the whole tensor of every point, the moduli of all, and notes on crystals that are not stable.

    Args:
        console: Console to print on.
        result: Result of the run.
    """
    for point in result.points:
        reduced = f" (of {point.n_atoms_given} given)" if point.n_atoms != point.n_atoms_given else ""
        atoms = "1 atom" if point.n_atoms == 1 else f"{point.n_atoms} atoms"
        constants = ", ".join(f"{name} {value:.1f}" for name, value in point.independent_GPa.items())
        size = f"{atoms}{reduced}, {point.volume_A3_per_atom:.3f} Å³/atom"
        heading = f"{point.name}: {point.space_group}, {size}\n{constants} GPa"
        table = _plain_table()
        for title in ("C, GPa", *AXES):
            table.add_column(title, justify="right")
        for title, row in zip(AXES, point.constants_GPa, strict=True):
            table.add_row(title, *(f"{round(value, 1) + 0.0:.1f}" for value in row))  # no -0.0
        console.print()
        console.print(heading, markup=False, soft_wrap=True)
        console.print(table)
    console.print()
    console.print(_moduli_table(result.points))
    for point in result.points:
        notes = []
        if point.stability_GPa[0] <= 0:
            notes.append(f"unstable, a strain has the stiffness {point.stability_GPa[0]:.1f} GPa")
        softest = point.softest_eV_per_A2
        if softest is not None and softest <= 0:
            notes.append(f"no minimum, its atoms have a curvature of {softest:.3g} eV/Å²")
        if point.asymmetry_GPa > ASYMMETRIC:
            notes.append(f"the symmetry {point.space_group} is broken by {point.asymmetry_GPa:.2g} GPa")
        for note in notes:
            console.print(f"note, {point.name}: {note}", markup=False, soft_wrap=True)
    console.print(f"results  {result.folder}", markup=False, soft_wrap=True)


def print_thermal_elastic(console: Console, points: Sequence[ThermalElasticPoint]) -> None:
    """Print a table for every phase and method: C, below it B with its moduli, and measured values."""
    for phase, kind, method in dict.fromkeys((p.phase, p.kind, p.method) for p in points):
        mine = [p for p in points if (p.phase, p.kind, p.method) == (phase, kind, method)]
        console.print(_thermal_table(f"{phase}: {kind} constants, GPa, by {method}", mine))
    for p in points:
        if p.refused:
            console.print(f"{p.name}, {p.method}: {p.refused}", markup=False, soft_wrap=True)


def _moduli_table(points: Sequence[ElasticPoint]) -> Table:
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
            stable = "" if not first else "yes" if point.stable else "no"
            name = point.name if first else ""
            table.add_row(name, average, k, g, e, f"{moduli.poisson:.3f}", stable)
    return table


def _thermal_table(title: str, points: Sequence[ThermalElasticPoint]) -> Table:
    columns = list(dict.fromkeys(c for p in points for c in (*p.constants, *p.moduli)))

    def cells(values: Mapping[str, Measured]) -> list[str]:
        return [_number(values[c]) if c in values else "" for c in columns]

    table = _plain_table(title)
    for heading in ("T, K", "", *columns, "P"):
        table.add_column(heading, justify="right", overflow="fold")
    for p in points:
        temperature = f"{p.temperature_K:g}"
        if p.refused or p.pressure is None:
            table.add_row(temperature, "refused")
            continue
        table.add_row(temperature, "C", *cells(p.constants), _number(p.pressure))
        table.add_row("", "B", *cells({**p.stress_strain, **p.moduli}))
        if p.targets:
            wanted = [f"{p.targets[c].value:.4g}" if c in p.targets else "" for c in columns]
            table.add_row("", "measured", *wanted, style="dim")
    return table


def _number(measured: Measured) -> str:
    return str(measured).removesuffix(measured.unit).strip()


def _plain_table(title: str | None = None) -> Table:
    return Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
