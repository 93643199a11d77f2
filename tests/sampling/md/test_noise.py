"""Noise by system and step, and what follows: a trajectory does not depend on what else is in the batch."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ase.build import bulk
from scipy import stats

from mlip_refine import testing
from mlip_refine.potential import Potential
from mlip_refine.sampling import MDSettings, MolecularDynamics, StatePoint
from mlip_refine.sampling.md.noise import BLOCK, NoiseStreams, stream_key

SIZES = (3, 5, 2)


def _streams(dtype: torch.dtype = torch.float64, names: str = "abc") -> NoiseStreams:
    keys = [stream_key(7, name, 0) for name in names]
    sizes = [SIZES["abc".index(name)] for name in names]
    return NoiseStreams(keys, sizes, dtype, torch.device("cpu"))


def test_keys_tell_systems_apart_and_are_always_the_same() -> None:
    kinds = itertools.product((0, 1, 12), ("a", "b", "a/1"), (0, 1, 11), (0, 1))
    keys = {stream_key(*kind) for kind in kinds}
    assert len(keys) == 3 * 3 * 3 * 2
    assert all(0 <= key < 2**64 for key in keys)
    assert stream_key(7, "hcp", 3) == 10174426535160830982


@pytest.mark.parametrize("key", [5, 2**53, 2**62 + 1, 2**63, 2**64 - 2])
def test_every_bit_of_a_key_counts(key: int) -> None:
    """Also of keys that signed numbers and floats do not hold."""
    one, two = (NoiseStreams([k], [4], torch.float64, torch.device("cpu")) for k in (key, key + 1))
    assert not torch.equal(one.at(0)[0], two.at(0)[0])
    assert not torch.equal(one.initial(0), two.initial(0))
    assert not torch.equal(one.initial(0).flatten(), one.at(0)[0].flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_of_a_system_depends_on_its_key_and_the_step_alone(dtype: torch.dtype) -> None:
    together, turned, alone = _streams(dtype), _streams(dtype, "cba"), _streams(dtype, "b")
    for step in (0, 1, BLOCK - 1, BLOCK, 5 * BLOCK + 3, 2):
        atoms, cells = together.at(step)
        assert atoms.dtype == cells.dtype == dtype
        assert torch.equal(atoms[3:8], alone.at(step)[0])
        assert torch.equal(atoms[3:8], turned.at(step)[0][2:7])
        assert torch.equal(cells[1], alone.at(step)[1][0])
        assert torch.equal(cells, turned.at(step)[1].flip(0))


def test_a_restart_changes_one_stream() -> None:
    streams, same = _streams(), _streams()
    streams.at(3), same.at(3)
    streams.restart(1, stream_key(7, "b", 0, 1))
    for step in (4, BLOCK + 4):
        changed = (streams.at(step)[0] != same.at(step)[0]).any(1)
        assert changed.tolist() == [False] * 3 + [True] * 5 + [False] * 2
        assert (streams.at(step)[1] != same.at(step)[1]).flatten(1).any(1).tolist() == [False, True, False]


@pytest.mark.statistical
def test_noise_is_normal_and_independent() -> None:
    """Kolmogorov-Smirnov, and no correlations of systems, steps, atoms and cells: eight comparisons."""
    streams, steps = NoiseStreams([1, 2], [20, 20], torch.float64, torch.device("cpu")), 40 * BLOCK
    drawn = [tuple(x.clone() for x in streams.at(step)) for step in range(steps)]
    atoms = torch.stack([a for a, _ in drawn]).flatten(1)
    cells = torch.stack([c for _, c in drawn])
    shears = cells[..., [0, 0, 1], [1, 2, 2]] * 2**0.5
    for normal in (atoms, cells[..., [0, 1, 2], [0, 1, 2]], shears):
        assert stats.kstest(normal.flatten().numpy(), "norm").pvalue > testing.FALSE_ALARM / 8
    assert torch.equal(cells, cells.mT)
    pairs = {
        "next step": (atoms[1:], atoms[:-1]),
        "next block": (atoms[BLOCK:], atoms[:-BLOCK]),
        "other system": (atoms[:, :60], atoms[:, 60:]),
        "next atom": (atoms[:, 3:], atoms[:, :-3]),
        "atom and cell": (atoms[:, :6], cells[:, 0].flatten(1)[:, :6]),
    }
    bound = testing.sigma_bound(8)
    for name, (one, two) in pairs.items():
        # Diagonal elements have variance 1, the others 1/2.
        z = (one * two).sum() / (one.square() * two.square()).sum().sqrt()
        assert abs(z) < bound, f"{name}: {z:.2f} sigma"


def _points() -> list[StatePoint]:
    """Several sizes, ensembles and temperatures."""
    small, large = (bulk("Ti", "hcp", a=2.93, c=4.65) * n for n in ((2, 2, 2), (3, 2, 2)))
    cubic = bulk("Ti", "bcc", a=3.25, cubic=True) * 2
    return [
        StatePoint("langevin", small, 800.0, replicas=2),
        StatePoint("chain", cubic, 900.0, thermostat="nose_hoover"),
        StatePoint("free", large, 700.0, 1.0, "npt", "hexagonal", replicas=2),
        StatePoint("sheared", cubic, 500.0, 0.0, "npt", "triclinic", timestep=3.0),
        StatePoint("kept", small, 600.0, ensemble="nve"),
    ]


def _final(potential: Any, points: list[StatePoint], steps: int) -> dict[tuple[str, int], list[torch.Tensor]]:
    """The last state of every system by name and replica."""
    dynamics = MolecularDynamics.prepare(
        potential, points, MDSettings(timestep=4.0, barostat_time=400.0), seed=9
    )
    dynamics.advance(steps)
    state, found, system = dynamics.state, {}, 0
    for point in points:
        for replica in range(point.replicas):
            atoms = state.system_idx == system
            found[point.name, replica] = [
                *(getattr(state, name)[atoms] for name in ("positions", "momenta", "forces")),
                *(getattr(state, name)[system] for name in ("cell", "strain_rate", "chain_velocities")),
            ]
            system += 1
    return found


@pytest.fixture(params=["float64", pytest.param("float32", marks=pytest.mark.slow), "analytic"])
def potential(request: pytest.FixtureRequest) -> Any:
    if request.param == "analytic":
        return testing.LennardJones([22], 0.3, 2.6, 5.0)
    return Potential.load("titanium-compact").frozen_copy(request.param)


def test_a_trajectory_is_the_same_in_every_batch(potential: Any) -> None:
    """Bit for bit: alone, in another order, and with the batch split in two."""
    points, steps = _points(), 25
    whole = _final(potential, points, steps)
    batches: dict[str, list[list[StatePoint]]] = {
        "reversed": [points[::-1]],
        "split": [points[:2], points[2:]],
        "alone": [[point] for point in points],
    }
    for how, parts in batches.items():
        found: dict[Any, Any] = {}
        for part in parts:
            found |= _final(potential, part, steps)
        assert found.keys() == whole.keys()
        different = [key for key in whole if not all(map(torch.equal, whole[key], found[key]))]
        assert not different, f"{how}: {different}"


def test_replicas_of_other_seeds_names_and_numbers_differ(open_guards: Callable[..., Any]) -> None:
    atoms = bulk("Ti", "hcp", a=2.93, c=4.65)
    points = [StatePoint(name, atoms, 500.0, replicas=2, identity="none") for name in "ab"]
    potential, settings = testing.LennardJones([22], 0.3, 2.6, 3.0), open_guards(timestep=4.0, friction=5.0)
    places = []
    for seed in (1, 2):
        dynamics = MolecularDynamics.prepare(potential, points, settings, seed)
        dynamics.advance(3)
        places += list(dynamics.state.positions.view(4, -1, 3))
    assert all(not torch.allclose(one, two) for one, two in itertools.combinations(places, 2))
