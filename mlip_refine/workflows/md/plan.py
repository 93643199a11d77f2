"""What a run of `mlip-refine md` samples, for `--dry-run`."""

from dataclasses import replace

from mlip_refine.workflows.md.run import Prepared
from mlip_refine.workflows.md.trajectories import STAGE
from mlip_refine.workflows.plan import Plan, Stage, melt_stages


def plan(prepared: Prepared) -> Plan:
    """Return the runs that make the liquids, and the run itself."""
    points = tuple(prepared.points.values())
    settings = replace(prepared.settings, interval=prepared.interval, timestep=prepared.timestep)
    run = Stage(STAGE, points, settings, prepared.length)
    return Plan(prepared.potential, (*melt_stages(points, prepared.melts, settings), run))
