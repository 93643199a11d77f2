"""Tables of `mlip-refine phase-diagram`, from its result."""

from rich.console import Console

from mlip_refine.report.tables import number, plain_table
from mlip_refine.workflows.phase_diagram.records import PhaseDiagramFile, PhaseDiagramResult

MISMATCH = 3.0
"""From how many standard errors on three boundaries are said not to meet."""


def print_phase_diagram(console: Console, result: PhaseDiagramResult) -> None:
    """Print the boundaries, triple points, deviations from experiment, and remarks.

    Args:
        console: Console to print to.
        result: Result of a run.
    """
    file = result.file
    table = plain_table(f"boundaries, {file.convention}")
    for heading in ("boundary", "P, GPa", "T, K", "common part", "dT/dP, K/GPa", "more stable"):
        words = heading in ("boundary", "more stable")
        table.add_column(heading, justify="left" if words else "right", overflow="fold")
    for curve in file.boundaries:
        for i, point in enumerate(curve.interpolated):
            table.add_row(
                "" if i else curve.title,
                f"{point.pressure_GPa:.4g}",
                number(point.temperature),
                f"{point.se_common_K:.1f}",
                number(point.slope),
                point.more_stable or "",
            )
    console.print()
    console.print(table)
    if file.triple_points:
        meeting = plain_table("triple points")
        for heading in ("phases", "P, GPa", "T, K", "boundaries", "mismatch, σ"):
            meeting.add_column(heading, justify="left" if heading == "phases" else "right", overflow="fold")
        for triple in file.triple_points:
            off = "" if triple.mismatch_sigma is None else f"{triple.mismatch_sigma:.1f}"
            numbers = (number(triple.pressure), number(triple.temperature), f"{triple.boundaries}", off)
            meeting.add_row(", ".join(triple.phases), *numbers)
        console.print()
        console.print(meeting)
    _print_experiment(console, file)
    notes = [f"note, {note}" for note in file.notes]
    notes += [
        f"note: the three boundaries of {', '.join(point.phases)} do not meet in one point "
        f"({point.mismatch_sigma:.1f} σ): at least one of them is off by more than its error"
        for point in file.triple_points
        if point.mismatch_sigma is not None and point.mismatch_sigma > MISMATCH
    ]
    for line in (*notes, f"results  {result.folder}"):
        console.print(line, markup=False, soft_wrap=True)


def _print_experiment(console: Console, file: PhaseDiagramFile) -> None:
    """Print the deviations from what was measured."""
    if not file.experiment:
        return
    table = plain_table("less experiment")
    for heading in ("boundary", "column", "P, GPa", "measured, K", "deviation, K", "RMS, K"):
        words = heading in ("boundary", "column")
        table.add_column(heading, justify="left" if words else "right", overflow="fold")
    for column in file.experiment:
        rms = "" if column.rms_K is None else f"{column.rms_K:.1f}"
        for i, point in enumerate(column.points):
            names = ("", "") if i else (f"{column.from_} to {column.to}", column.column)
            measured = f"{point.temperature.value:.1f}"
            state = (f"{point.pressure_GPa:.4g}", measured, number(point.deviation))
            table.add_row(*names, *state, "" if i else rms)
    console.print()
    console.print(table)
