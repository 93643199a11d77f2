"""Crystal and liquid of the truncated and shifted Lennard-Jones model in one box, from both sides of melting.

They coexist at T* = 0.8 and P* = 2.185 (Pedersen, J. Chem. Phys. 139, 104102, 2013).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ase.build import bulk

from mlip_refine import testing
from mlip_refine.quantities import GPA, KB
from mlip_refine.sampling import FrameStore, StatePoint
from mlip_refine.workflows.transition.coexistence import CoexistenceSettings, coexistence_runs, combined

EPSILON, SIGMA = 119.8 * KB, 3.405
UNIT_T, UNIT_P = EPSILON / KB, EPSILON / SIGMA**3 / GPA


@pytest.mark.slow
@pytest.mark.statistical
def test_boxes_come_to_the_melting_temperature(open_guards: Callable[..., Any], tmp_path: Path) -> None:
    """The box that starts 4 % above cools by melting, the one 3 % below is heated by freezing."""
    atoms = bulk("Ar", "fcc", a=SIGMA * (4 / 0.9731) ** (1 / 3), cubic=True) * (4, 4, 4)
    crystal = StatePoint("fcc", atoms, UNIT_T, 2.185 * UNIT_P, "npt", identity="none")
    md = open_guards(timestep=10.0, friction=1.0, interval=50.0, barostat_time=2000.0)
    settings = CoexistenceSettings(
        n_atoms=864,
        starts=(0.775 * UNIT_T, 0.83 * UNIT_T),
        pressures=(crystal.pressure,),
        heat=1.6 * UNIT_T,
        preparation=10_000.0,
        duration=50_000.0,
        md=md,
        seed=1,
    )
    runs = coexistence_runs(testing.LennardJonesTS(), crystal, settings, FrameStore(tmp_path, {}))
    found, note = combined(runs)
    assert found is not None, note
    assert abs(found.value / UNIT_T - 0.8) < 0.02 * 0.8
    assert found.se < 0.01 * found.value
    for run in runs:
        # A box that lost a phase is a vote for its side; the others are at the melting temperature.
        t = run.temperature.value / UNIT_T
        assert run.outcome in ("coexists", "drifts", "molten", "frozen")
        assert {"molten": t > 0.784, "frozen": t < 0.816}.get(run.outcome, abs(t - 0.8) < 0.024)
