"""Which parts of a boundary are metastable, told from the other boundaries."""

from collections.abc import Sequence

from mlip_refine.workflows.phase_diagram.records import CurveRecord


def more_stable(curves: Sequence[CurveRecord], which: CurveRecord, pressure: float) -> str | None:
    """Return a third phase that is more stable than the two of a boundary, at a pressure, GPa.

    On the boundary both phases have one Gibbs energy, so that it is enough that the third is below one of
    them: it lies on the right side of its own boundary with that phase. ΔG is taken to change its sign once
    over temperature.

    Args:
        curves: All boundaries.
        which: The boundary.
        pressure: Pressure, within the range of that boundary.

    Returns:
        The phase; None where no other boundary says so, or none is known at that pressure.
    """
    temperature = which.curve().temperature(pressure)
    for other in curves:
        third = other.phases - which.phases
        if len(third) == 1 and (curve := other.curve()).covers(pressure):
            (phase,) = third
            above = temperature - curve.temperature(pressure)
            if (above > 0) if other.upper == phase else (above < 0):
                return phase
    return None
