"""Tables of `mlip-refine elastic`, from its result."""

from collections.abc import Mapping, Sequence

from rich.console import Console

from mlip_refine.quantities import Measured
from mlip_refine.report.crystals import lattice_in_words, other_phase
from mlip_refine.report.tables import number, plain_table
from mlip_refine.workflows.elastic.records import ElasticResult, ThermalElasticPoint

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
        heading = f"{point.name}: {point.space_group}, {size}\n"
        if point.lattice is not None:
            heading += f"{lattice_in_words(point.lattice)}\n"
        heading += f"{constants} GPa"
        table = plain_table()
        for title in ("C, GPa", *AXES):
            table.add_column(title, justify="right")
        for title, row in zip(AXES, point.constants_GPa, strict=True):
            table.add_row(title, *(f"{round(value, 1) + 0.0:.1f}" for value in row))  # no -0.0
        console.print()
        console.print(heading, markup=False, soft_wrap=True)
        console.print(table)
    console.print()
    table = plain_table()
    for title in ("moduli", "average"):
        table.add_column(title, overflow="fold")
    for title in ("K\nGPa", "G\nGPa", "E\nGPa", "ν"):
        table.add_column(title, justify="right")
    table.add_column("stable")
    for point in result.points:
        # The name and the stability stand beside the first average only.
        ends = point.name, "yes" if point.stable else "no"
        for average, moduli in point.moduli.items():
            k, g, e = (f"{value:.1f}" for value in (moduli.bulk_GPa, moduli.shear_GPa, moduli.young_GPa))
            table.add_row(ends[0], average, k, g, e, f"{moduli.poisson:.3f}", ends[1])
            ends = "", ""
    console.print(table)
    for point in result.points:
        notes = []
        if point.given is not None and point.given.space_group != point.space_group:
            notes.append(other_phase(point.given, point.space_group))
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
        columns = list(dict.fromkeys(c for p in mine for c in (*p.constants, *p.moduli)))
        table = plain_table(f"{phase}: {kind} constants, GPa, by {method}")
        for heading in ("T, K", "", *columns, "P"):
            table.add_column(heading, justify="right", overflow="fold")
        for p in mine:
            temperature = f"{p.temperature_K:g}"
            if p.refused or p.pressure is None:
                table.add_row(temperature, "refused")
                continue
            c, b = p.constants, {**p.stress_strain, **p.moduli}
            table.add_row(temperature, "C", *_cells(c, columns), number(p.pressure))
            table.add_row("", "B", *_cells(b, columns))
            if p.targets:
                wanted = [f"{p.targets[name].value:.4g}" if name in p.targets else "" for name in columns]
                table.add_row("", "measured", *wanted, style="dim")
        console.print(table)
    for p in points:
        if p.refused:
            console.print(f"{p.name}, {p.method}: {p.refused}", markup=False, soft_wrap=True)


def _cells(values: Mapping[str, Measured], columns: Sequence[str]) -> list[str]:
    return [number(values[name]) if name in values else "" for name in columns]
