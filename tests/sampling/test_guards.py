"""Systems that go wrong are stopped by name and step; the others do not notice."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ase.build import bulk

from mlip_refine.errors import SamplingError
from mlip_refine.sampling import GuardSettings, Length, MDSettings, MolecularDynamics, StatePoint, sample

Fault = Callable[[MolecularDynamics, torch.Tensor], None]


def _lose_positions(dynamics: MolecularDynamics, mine: torch.Tensor) -> None:
    dynamics.state.positions[mine] = torch.nan


def _lose_one_momentum(dynamics: MolecularDynamics, mine: torch.Tensor) -> None:
    dynamics.state.momenta[mine.nonzero()[0]] = torch.inf


def _heat(dynamics: MolecularDynamics, mine: torch.Tensor) -> None:
    dynamics.state.momenta[mine] *= 3.0


def _displace(dynamics: MolecularDynamics, mine: torch.Tensor) -> None:
    """Swap two atoms: the crystal is whole, but two atoms have left their sites for good."""
    first, second = mine.nonzero().flatten()[[0, 1]].tolist()
    dynamics.state.positions[[first, second]] = dynamics.state.positions[[second, first]]


FAULTS = {
    "positions": (_lose_positions, "became non-finite"),
    "momentum": (_lose_one_momentum, "became non-finite"),
    "hot": (_heat, "it overheated"),
    "displaced": (_displace, "it left its lattice sites"),
}


def _dynamics(analytic: SimpleNamespace, ensemble: str) -> MolecularDynamics:
    """Two phases with two replicas each: system 2 is the second phase's first."""
    al = bulk("Al", "fcc", a=4.0, cubic=True) * (2, 2, 2)
    points = [
        StatePoint("cold", al, 300.0, ensemble=ensemble, replicas=2),
        StatePoint("warm", al, 500.0, ensemble=ensemble, replicas=2),
    ]
    guards = GuardSettings(max_temperature_ratio=3.0, max_displacement=0.2, check_interval=5)
    settings = MDSettings(timestep=4.0, interval=80.0, barostat_time=800.0, guards=guards)
    return MolecularDynamics(analytic.LennardJones([13], 0.25, 2.56, 4.4), points, settings, seed=3)


def _run(analytic: SimpleNamespace, ensemble: str, fault: Fault | None) -> tuple[MolecularDynamics, Any]:
    dynamics = _dynamics(analytic, ensemble)
    dynamics.advance(23)
    if fault:
        fault(dynamics, dynamics.state.system_idx == 2)
    return dynamics, dynamics.record(4)


@pytest.fixture(scope="module")
def healthy(analytic: SimpleNamespace) -> dict[str, Any]:
    return {ensemble: _run(analytic, ensemble, None)[1] for ensemble in ("nvt", "npt")}


@pytest.mark.parametrize("ensemble", ["nvt", "npt"])
@pytest.mark.parametrize("kind", FAULTS)
def test_one_bad_system_of_four_is_stopped_alone(
    analytic: SimpleNamespace, healthy: dict[str, Any], ensemble: str, kind: str
) -> None:
    fault, reason = FAULTS[kind]
    dynamics, runs = _run(analytic, ensemble, fault)
    (verdict,) = runs["warm"].verdicts
    assert verdict.startswith("warm, replica 0, step ")
    assert reason in verdict
    step = int(verdict.split("step ")[1].split(":")[0])
    assert 23 < step <= 23 + (5 if kind in ("positions", "momentum", "hot") else 100)
    assert runs["warm"].kept.tolist() == [False, True]
    assert runs["cold"].kept.all()
    assert not runs["cold"].verdicts
    good, same = runs["warm"].good(), healthy[ensemble]["warm"]
    for name in ("positions", "cells", "model_energy", "stress"):
        assert torch.isfinite(getattr(good, name)).all()
        pairs = [(getattr(good, name)[0], getattr(same, name)[1])]
        pairs.append((getattr(runs["cold"], name), getattr(healthy[ensemble]["cold"], name)))
        for found, undisturbed in pairs:
            torch.testing.assert_close(found, undisturbed, rtol=0, atol=1e-11)
    assert torch.isfinite(dynamics.state.positions).all()


def test_a_healthy_batch_has_no_verdicts(healthy: dict[str, Any]) -> None:
    for runs in healthy.values():
        for run in runs.values():
            assert run.kept.all()
            assert run.verdicts == ()


def test_no_survivor_ends_the_sampling(analytic: SimpleNamespace) -> None:
    al = bulk("Al", "fcc", a=4.0, cubic=True) * (2, 2, 2)
    guards = GuardSettings(max_temperature_ratio=1.01, check_interval=1)
    settings = MDSettings(timestep=4.0, interval=40.0, guards=guards)
    points = [StatePoint("doomed", al, 400.0, replicas=2)]
    with pytest.raises(SamplingError, match=r"no replica of doomed.*replica 0, step \d+: stopped.*replica 1"):
        sample(
            analytic.LennardJones([13], 0.25, 2.56, 4.4),
            points,
            settings,
            Length(400.0, 2),
            seed=1,
            stage="doom",
        )


def test_drift_of_the_whole_crystal_is_not_a_departure(analytic: SimpleNamespace) -> None:
    dynamics = _dynamics(analytic, "nvt")
    dynamics.state.positions += 17.3
    runs = dynamics.record(6)
    assert all(run.kept.all() for run in runs.values())


def test_an_unstable_barostat_stops_systems_and_not_the_batch(analytic: SimpleNamespace) -> None:
    """A cell mass far too small for the time step: the cells blow up or collapse."""
    al = bulk("Al", "fcc", a=4.0, cubic=True) * (2, 2, 2)
    points = [StatePoint("wild", al, 300.0, ensemble="npt", replicas=2)]
    settings = MDSettings(timestep=4.0, interval=80.0, barostat_time=60.0)
    dynamics = MolecularDynamics(analytic.LennardJones([13], 0.25, 2.56, 4.4), points, settings, seed=3)
    runs = dynamics.record(3)
    assert not runs["wild"].kept.any()
    assert all("stopped" in verdict for verdict in runs["wild"].verdicts)
