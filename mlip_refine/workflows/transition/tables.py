"""Tables of `mlip-refine transition`, from its result."""

from rich.console import Console

from mlip_refine.report.tables import number, plain_table
from mlip_refine.workflows.transition.records import TransitionResult


def print_transition(console: Console, result: TransitionResult) -> None:
    """Print the boundary, the anchors, and what was refused or lost.

    Args:
        console: Console to print to.
        result: Result of a run.
    """
    file = result.file
    table = plain_table(f"{file.from_} to {file.to}, {file.convention}")
    for heading in ("P, GPa", "T, K", "dT/dP, K/GPa", "ΔS, meV/atom/K", "ΔH, meV/atom", "ΔV, Å³/atom"):
        table.add_column(heading, justify="right", overflow="fold")
    for point in file.boundary:
        values = (point.temperature.measured, point.slope, point.delta_s, point.delta_h, point.delta_v)
        table.add_row(f"{point.pressure_GPa:g}", *(number(value) for value in values))
    console.print()
    console.print(table)

    anchors = plain_table("absolute Gibbs energies")
    for heading in ("phase", "T, K", "P, GPa", "N", "G, meV/atom", "size term", "least overlap"):
        anchors.add_column(heading, justify="left" if heading == "phase" else "right", overflow="fold")
    for anchor in file.anchors:
        anchors.add_row(
            anchor.phase,
            f"{anchor.temperature_K:g}",
            f"{anchor.pressure_GPa:g}",
            f"{anchor.n_atoms}",
            number(anchor.gibbs),
            number(anchor.size_term),
            f"{anchor.overlap:.2f}",
        )
    console.print()
    console.print(anchors)

    if file.coexistence:
        boxes = plain_table("boxes of crystal and liquid")
        for heading in ("P, GPa", "start, K", "N", "T, K", "crystal share", "outcome"):
            boxes.add_column(heading, justify="left" if heading == "outcome" else "right", overflow="fold")
        for found in file.coexistence:
            for box in found.boxes:
                boxes.add_row(
                    f"{found.pressure_GPa:g}",
                    f"{box.start_K:g}",
                    f"{box.n_atoms}",
                    number(box.temperature),
                    number(box.crystal_share),
                    box.outcome,
                )
        console.print()
        console.print(boxes)

    notes = []
    for found in file.coexistence:
        temperature, gap = found.temperature, found.beyond_boundary
        line = f"coexistence at {found.pressure_GPa:g} GPa: {temperature.measured or temperature.refused}"
        notes.append(line + (f", {gap} beyond the boundary" if gap else ""))
    for point in file.boundary:
        if point.temperature.refused:
            notes.append(f"note, {point.pressure_GPa:g} GPa: {point.temperature.refused}")
        elif point.se_common_K:
            shared = f"{point.se_common_K:.1f} K of the error at {point.pressure_GPa:g} GPa"
            notes.append(f"note: {shared} comes from the anchors, which all pressures share")
    for closure in file.closures:
        low, high = (
            f"{t:g} K, {p:g} GPa" for t, p in zip(closure.temperatures_K, closure.pressures_GPa, strict=True)
        )
        difference = closure.difference
        sigmas = abs(difference.value) / difference.se if difference.se > 0 else float("inf")
        notes.append(f"closure  {closure.phase}, {low} to {high}: {difference}, {sigmas:.1f} σ")
    notes += [f"note, {line}" for line in file.lost]
    for line in (*notes, f"results  {result.folder}"):
        console.print(line, markup=False, soft_wrap=True)
