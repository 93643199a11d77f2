"""Systems that go wrong are set back by name and step, a few times; the others do not notice."""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch import Tensor

from mlip_refine import testing
from mlip_refine.errors import SamplingError
from mlip_refine.sampling import (
    GuardSettings,
    Length,
    MDSettings,
    MolecularDynamics,
    StatePoint,
    Trajectory,
    sample,
)
from mlip_refine.sampling.monitoring.guards import (
    PARTS,
    RollingAverage,
    SiteDisplacement,
    max_temperature_ratios,
)
from mlip_refine.sampling.monitoring.monitor import Failure

SERIES = ("positions", "cells", "model_energy", "bias_energy", "stress")


def _lose_positions(state: Any, mine: Tensor) -> None:
    state.positions[mine] = torch.nan


def _lose_one_momentum(state: Any, mine: Tensor) -> None:
    state.momenta[mine.nonzero()[0]] = torch.inf


def _heat(state: Any, mine: Tensor) -> None:
    state.momenta[mine] *= 4.0


def _displace(state: Any, mine: Tensor) -> None:
    """Swap two atoms: the crystal is whole, but two atoms have left their sites for good."""
    first, second = mine.nonzero().flatten()[[0, 1]].tolist()
    state.positions[[first, second]] = state.positions[[second, first]]


FAULTS = {
    "positions": (_lose_positions, "became non-finite"),
    "momentum": (_lose_one_momentum, "became non-finite"),
    "hot": (_heat, "it overheated"),
    "displaced": (_displace, "it left its lattice sites"),
}

# Where the fault happens, what had passed a whole average before (the averages fill at 48, 96 and 144), where
# a part of an average ends, and when frames are taken.
START, FAULT, SAFE, JUDGED, EVERY = 23, 125, 48, 12, 20


def _aluminium() -> Atoms:
    return bulk("Al", "fcc", a=4.0, cubic=True) * (2, 2, 2)


def _dynamics(ensemble: str, **options: Any) -> MolecularDynamics:
    """Two phases with two replicas each: system 2 is the second phase's first."""
    al = _aluminium()
    points = [
        StatePoint("cold", al, 300.0, ensemble=ensemble, replicas=2, identity="sites"),
        StatePoint("warm", al, 500.0, ensemble=ensemble, replicas=2, identity="sites"),
    ]
    settings = MDSettings(timestep=4.0, interval=4.0 * EVERY, barostat_time=800.0)
    potential = testing.LennardJones([13], 0.25, 2.56, 4.4)
    return MolecularDynamics.prepare(potential, points, settings, seed=3, **options)


@pytest.fixture(scope="module")
def healthy() -> dict[str, Any]:
    runs = {}
    for ensemble in ("nvt", "npt"):
        dynamics = _dynamics(ensemble)
        dynamics.advance(START)
        runs[ensemble] = dynamics.record(11)
    return runs


def test_a_healthy_batch_has_no_verdicts(healthy: dict[str, Any]) -> None:
    for runs in healthy.values():
        for run in runs.values():
            assert run.kept.all()
            assert run.verdicts == ()


def _require_untouched(runs: dict[str, Trajectory], undisturbed: dict[str, Trajectory]) -> None:
    """All systems but `warm`, replica 0, have the same bits."""
    for name in (*SERIES, "kept"):
        assert torch.equal(getattr(runs["cold"], name), getattr(undisturbed["cold"], name)), name
        assert torch.equal(getattr(runs["warm"], name)[1], getattr(undisturbed["warm"], name)[1]), name


@pytest.mark.parametrize("ensemble", ["nvt", "npt"])
@pytest.mark.parametrize("kind", FAULTS)
def test_one_bad_system_of_four_is_set_back_alone(
    healthy: dict[str, Any], inject: Callable[..., None], ensemble: str, kind: str
) -> None:
    fault, reason = FAULTS[kind]
    failures: list[Failure] = []
    dynamics = _dynamics(ensemble, on_failure=failures.append)
    dynamics.advance(START)
    inject(dynamics, fault, 2, [FAULT])
    runs = dynamics.record(11)
    (failure,) = failures
    found = failure.step
    assert (failure.point, failure.replica) == ("warm", 0)
    assert FAULT < found <= FAULT + {"displaced": 100, "hot": JUDGED}.get(kind, 2)
    # Two swapped atoms of 32 are not yet seen in the average that ends at 144.
    safe = 96 if kind == "displaced" else SAFE
    line = f"warm, replica 0, step {found}: set back to step {safe} (restart 1 of 3), {failure.reason}"
    assert runs["warm"].verdicts == (line,)
    assert reason in failure.reason
    frames = [START + EVERY * (i + 1) for i in range(11)]
    assert runs["warm"].kept[0].tolist() == [step <= safe or step > found for step in frames]
    for name in SERIES:
        before = getattr(runs["warm"], name)[0, :2]
        assert torch.equal(before, getattr(healthy[ensemble]["warm"], name)[0, :2])
        assert torch.isfinite(getattr(runs["warm"], name)[runs["warm"].kept]).all()
    assert not torch.equal(runs["warm"].positions[0, -1], healthy[ensemble]["warm"].positions[0, -1])
    _require_untouched(runs, healthy[ensemble])


@pytest.mark.parametrize("kind", ["positions", "hot"])
def test_a_numerical_fault_is_retried_with_half_the_time_step(inject: Callable[..., None], kind: str) -> None:
    dynamics = _dynamics("nvt")
    first = dynamics.integrator.timestep.clone()
    inject(dynamics, FAULTS[kind][0], 2, [30])
    dynamics.record(3)
    halved = torch.tensor([1.0, 1.0, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(dynamics.integrator.timestep, first * halved)


def test_a_departure_keeps_the_time_step(inject: Callable[..., None]) -> None:
    dynamics = _dynamics("nvt")
    first = dynamics.integrator.timestep.clone()
    inject(dynamics, _displace, 2, [30])
    runs = dynamics.record(7)
    assert "left its lattice sites" in runs["warm"].verdicts[0]
    assert torch.equal(dynamics.integrator.timestep, first)


def test_restarts_are_bounded_and_healthy_frames_stay(
    healthy: dict[str, Any], inject: Callable[..., None]
) -> None:
    failures: list[Failure] = []
    dynamics = _dynamics("nvt", on_failure=failures.append)
    dynamics.advance(START)
    inject(dynamics, _lose_positions, 2, range(FAULT, 1000, 5))
    runs = dynamics.record(11)
    verdicts = runs["warm"].verdicts
    assert len(failures) == len(verdicts) == 4
    for i, verdict in enumerate(verdicts[:3], start=1):
        assert f"set back to step {SAFE} (restart {i} of 3)" in verdict
    step = failures[-1].step
    assert verdicts[3] == f"warm, replica 0, step {step}: stopped after 3 restarts, {failures[-1].reason}"
    frames = [START + EVERY * (i + 1) for i in range(11)]
    assert runs["warm"].kept[0].tolist() == [frame <= SAFE for frame in frames]
    _require_untouched(runs, healthy["nvt"])
    later = dynamics.record(2)
    assert later["warm"].kept.tolist() == [[False, False], [True, True]]
    assert later["warm"].verdicts == ()


def test_no_restarts_at_all_can_be_asked_for(inject: Callable[..., None]) -> None:
    points = [StatePoint("al", _aluminium(), 300.0, replicas=2)]
    settings = MDSettings(timestep=4.0, interval=40.0, guards=GuardSettings(restarts=0))
    dynamics = MolecularDynamics.prepare(
        testing.LennardJones([13], 0.25, 2.56, 4.4), points, settings, seed=3
    )
    inject(dynamics, _lose_positions, 1, [25])
    run = dynamics.record(4)["al"]
    assert run.kept.tolist() == [[True] * 4, [False] * 4]
    (verdict,) = run.verdicts
    assert verdict.startswith("al, replica 1, step 26: stopped, ")


RARE = (125, 300, 475, 650, 825)


def _patient(forgiving_time: float) -> MolecularDynamics:
    guards = GuardSettings(forgiving_time=forgiving_time)
    points = [StatePoint("al", _aluminium(), 300.0, replicas=2)]
    settings = MDSettings(timestep=4.0, interval=4.0 * EVERY, guards=guards)
    return MolecularDynamics.prepare(testing.LennardJones([13], 0.25, 2.56, 4.4), points, settings, seed=3)


@pytest.mark.parametrize(("forgiving_time", "forgiven"), [(400.0, True), (800.0, False)])
def test_rare_faults_do_not_end_a_long_run(
    inject: Callable[..., None], forgiving_time: float, forgiven: bool
) -> None:
    """Faults every 700 fs: one restart is forgiven in between, or they add up."""
    dynamics = _patient(forgiving_time)
    first = dynamics.integrator.timestep.clone()
    inject(dynamics, _lose_positions, 1, RARE)
    run = dynamics.record(45)["al"]
    assert len(run.verdicts) == (5 if forgiven else 4)
    assert bool(run.kept[1, -1]) is forgiven
    if forgiven:
        assert all("(restart 1 of 3)" in line for line in run.verdicts)
        assert float(dynamics.integrator.timestep[1] / first[1]) == 0.5


def test_what_is_forgiven_survives_an_interruption(inject: Callable[..., None]) -> None:
    whole, first, second = (_patient(400.0) for _ in range(3))
    for dynamics in (whole, first, second):
        inject(dynamics, _lose_positions, 1, RARE)
    runs = [whole.record(10)["al"], whole.record(18)["al"]]
    first.record(10)
    second.restore(first.snapshot())
    again = second.record(18)["al"]
    assert again.verdicts == runs[1].verdicts
    assert len(again.verdicts) == 2
    assert all("(restart 1 of 3)" in line for line in again.verdicts)
    for name in (*SERIES, "kept"):
        assert torch.equal(getattr(again, name), getattr(runs[1], name)), name


@pytest.mark.statistical
def test_a_restarted_system_has_new_noise_and_still_the_right_temperature(
    inject: Callable[..., None],
) -> None:
    """Restarts draw momenta of the Maxwell distribution, different ones each time."""
    dynamics = _dynamics("nvt")
    draw, momenta = dynamics.integrator.draw_momenta, []

    def drawn(systems: list[int]) -> None:
        draw(systems)
        momenta.append(dynamics.state.momenta[dynamics.state.system_idx == 2].clone())

    dynamics.integrator.draw_momenta = drawn  # type: ignore[method-assign]
    inject(dynamics, _lose_positions, 2, [30, 40, 50])
    dynamics.record(4)
    assert len(momenta) == 3
    assert not torch.equal(momenta[0], momenta[1])
    mass = dynamics.state.masses[-1]
    dof, kt = 3 * 3 * 31, dynamics.integrator.settings.kt[2]
    chi = sum((p.square().sum() / mass / kt).item() for p in momenta)
    low, high = testing.chi_squared_bounds(dof)
    assert low < chi < high


def test_no_survivor_ends_the_sampling() -> None:
    """A time step that no halving saves."""
    points = [StatePoint("doomed", _aluminium(), 400.0, replicas=2)]
    settings = MDSettings(timestep=800.0, interval=800.0, guards=GuardSettings(restarts=1))
    message = r"no replica of doomed.*replica 0, step \d+: stopped after 1 restarts.*replica 1"
    with pytest.raises(SamplingError, match=message):
        sample(
            testing.LennardJones([13], 0.25, 2.56, 4.4),
            points,
            settings,
            Length(8000.0, 2),
            seed=1,
            stage="doom",
        )


def test_drift_of_the_whole_crystal_is_not_a_departure() -> None:
    dynamics = _dynamics("nvt")
    dynamics.state.positions += 17.3
    runs = dynamics.record(6)
    assert all(run.kept.all() for run in runs.values())


def test_an_identity_of_none_lets_atoms_go(inject: Callable[..., None]) -> None:
    points = [StatePoint("al", _aluminium(), 300.0, identity="none")]
    settings = MDSettings(timestep=4.0, interval=80.0)
    dynamics = MolecularDynamics.prepare(
        testing.LennardJones([13], 0.25, 2.56, 4.4), points, settings, seed=3
    )
    inject(dynamics, _displace, 0, [30])
    assert dynamics.record(5)["al"].verdicts == ()


def _held_at(places: Tensor) -> Callable[[Any, Tensor], None]:
    def hold(state: Any, mine: Tensor) -> None:
        state.positions[mine], state.momenta[mine] = places, 0.0

    return hold


@pytest.mark.skipif(find_spec("ovito") is None, reason="OVITO is not installed")
def test_a_liquid_beside_crystals_of_one_batch(inject: Callable[..., None]) -> None:
    """One crystal melts, one liquid crystallises: both are found, and their other replicas are not."""
    potential = testing.LennardJones([13], 0.25, 2.56, 4.4)
    solid = bulk("Al", "fcc", a=4.1, cubic=True) * (2, 2, 2)
    melting = StatePoint("melting", solid, 8000.0, identity="none", timestep=2.0, friction=20.0)
    melted = sample(potential, [melting], MDSettings(interval=400.0), Length(0.0, 1), seed=1, stage="melt")
    positions, _ = melted["melting"].last()
    liquid = solid.copy()
    liquid.positions = positions[0].numpy()
    points = [
        StatePoint("crystal", solid, 300.0, replicas=2),
        StatePoint("liquid", liquid, 6000.0, replicas=2, identity="liquid"),
    ]
    guards = GuardSettings(max_temperature_ratio=100.0)
    settings = MDSettings(timestep=4.0, interval=80.0, friction=20.0, guards=guards)
    dynamics = MolecularDynamics.prepare(potential, points, settings, seed=3)
    inject(dynamics, _held_at(positions[0]), 0, range(100, 156))
    inject(dynamics, _held_at(torch.tensor(solid.positions)), 2, range(100, 192))
    runs = dynamics.record(12)
    (melted_line,), (frozen_line,) = runs["crystal"].verdicts, runs["liquid"].verdicts
    assert melted_line.startswith("crystal, replica 0")
    assert "32 of 32 atoms are no longer fcc (other 32)" in melted_line
    assert frozen_line.startswith("liquid, replica 0, step 192: set back to step 48")
    assert "32 of 32 atoms have crystallised (fcc 32)" in frozen_line
    for run in runs.values():
        assert run.kept[1].all()
        assert run.kept[0, -1]
        assert not run.kept[0].all()


def test_a_time_step_too_long_is_healed_by_halving() -> None:
    """The fastest vibration of this crystal allows 40 fs at most; the other system keeps its own step."""
    points = [StatePoint("wild", _aluminium(), 300.0, timestep=64.0), StatePoint("calm", _aluminium(), 300.0)]
    settings = MDSettings(timestep=8.0, interval=160.0)
    dynamics = MolecularDynamics.prepare(
        testing.LennardJones([13], 0.25, 2.56, 4.4), points, settings, seed=3
    )
    runs = dynamics.record(10)
    assert runs["wild"].verdicts
    assert runs["wild"].kept[0, -1]
    assert runs["calm"].verdicts == ()
    assert dynamics.integrator.timestep[0] <= 0.5 * 64.0 / 8.0 * dynamics.integrator.timestep[1]


def test_an_unstable_barostat_sets_systems_back_and_not_the_batch() -> None:
    """A cell mass far too small for the time step: the cell blows up or collapses."""
    wild = StatePoint("wild", _aluminium(), 300.0, ensemble="npt", barostat_time=4.0, timestep=8.0)
    calm = replace(wild, name="calm", barostat_time=800.0)
    settings = MDSettings(timestep=8.0, interval=80.0)
    potential = testing.LennardJones([13], 0.25, 2.56, 4.4)
    runs = MolecularDynamics.prepare(potential, [wild, calm], settings, seed=3).record(4)
    alone = MolecularDynamics.prepare(potential, [calm], settings, seed=3).record(4)
    assert runs["wild"].verdicts
    for name in (*SERIES, "kept"):
        assert torch.equal(getattr(runs["calm"], name), getattr(alone["calm"], name)), name


def test_the_dump_shows_how_it_went_wrong(inject: Callable[..., None]) -> None:
    """The last good state, the averages since, and the state that failed."""
    failures: list[Failure] = []
    dynamics = _dynamics("npt", on_failure=failures.append)
    inject(dynamics, _lose_positions, 2, [60])
    dynamics.record(5)
    frames = failures[0].frames
    assert len(frames) == 2 + PARTS
    assert all((f.numbers == 13).all() and len(f) == 32 for f in frames)
    ends = torch.tensor(frames[-1].positions)
    assert torch.isnan(ends).any()
    site = torch.tensor(dynamics.points[1].atoms.positions)
    for frame in frames[1:-1]:
        moved = (torch.tensor(frame.positions) - site).square().sum(1).mean().sqrt()
        assert 0 < moved < 0.4


def test_small_systems_may_fluctuate() -> None:
    settings, dof = GuardSettings(max_temperature_ratio=2.0), torch.tensor([0.0, 2.0, 32.0, 1e4])
    assert max_temperature_ratios(settings, dof).tolist() == pytest.approx([1 + 8 * 2**0.5, 9.0, 3.0, 2.0])


def test_rolling_average_is_that_of_the_last_parts() -> None:
    """Two systems; positions grow linearly, so that the average is known; a set back system starts anew."""
    index = torch.tensor([0, 0, 1])
    average = RollingAverage(index, 2, steps=40)
    cell = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1) * 2.0
    at = torch.ones(3, 3, dtype=torch.float64)
    done = [step for step in range(1, 101) if average.add(at * step, cell)]
    assert done == list(range(10, 101, 10))
    assert average.ready.all()
    sampled = [s for s in range(61, 101) if s % 2 == 0]
    expected = sum(sampled) / len(sampled) / 2.0
    torch.testing.assert_close(average.mean(), torch.full((3, 3), expected, dtype=torch.float64))
    average.reset(1)
    assert average.ready.tolist() == [True, False]


def test_displacement_follows_cells_and_not_drifts() -> None:
    sites = torch.rand(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    masses = torch.tensor([1.0, 3.0, 1.0, 1.0], dtype=torch.float64)
    displacement = SiteDisplacement(sites, masses, torch.tensor([0, 0, 1, 1]))
    cell = torch.tensor([[5.0, 0.2, 0.0], [0.0, 4.0, 0.1], [0.3, 0.0, 6.0]], dtype=torch.float64)
    cells = torch.stack([cell, cell.flip(0)])
    assert displacement(sites + 0.3, cells).max() < 1e-12
    moved = torch.zeros(4, 3, dtype=torch.float64)
    moved[0, 0] = 0.1
    # The centre of mass goes along by a quarter: 3/4 and 1/4 of the step remain.
    step = 0.1 * cell[0].norm().item()
    exact = step * ((0.75**2 + 0.25**2) / 2) ** 0.5
    found = displacement(sites + moved, cells)
    assert found.tolist() == pytest.approx([exact, 0.0], abs=1e-12)
