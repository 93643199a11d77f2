"""Liquids made of crystals: what passes for one, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch import Tensor

from mlip_refine import testing
from mlip_refine.config import Config, config_from_dict
from mlip_refine.errors import InputError, SamplingError
from mlip_refine.losses import EnsembleSource
from mlip_refine.sampling import FrameStore, StatePoint, Trajectory
from mlip_refine.workflows import from_config, melt
from mlip_refine.workflows.checks import require_solids
from mlip_refine.workflows.melt import MeltSettings, bragg_peak, melted, require_liquid

INTERVAL = 50.0

LIQUID = EnsembleSource("liquid", 1000.0, 2.0)


def _config(**liquid: Any) -> Config:
    phases = {
        "bcc": {"prototype": "bcc", "element": "Ti", "n_atoms": 54, "a": 3.3},
        "small": {"prototype": "bcc", "element": "Ti", "n_atoms": 16, "a": 3.3},
        "liquid": {"melt": {"from": "bcc", "temperature": 3000}} | liquid,
    }
    return config_from_dict({"name": "x", "potential": {"model": "titanium-compact"}, "phases": phases})


def _trajectory(positions: Tensor, atoms: Atoms, cells: Tensor | None = None) -> Trajectory:
    """A trajectory of given positions `[replicas, n_frames, n_atoms, 3]`."""
    replicas, frames = positions.shape[:2]
    if cells is None:
        cells = torch.from_numpy(atoms.cell.array.copy()).expand(replicas, frames, 3, 3)
    zero = torch.zeros(replicas, frames, dtype=torch.float64)
    return Trajectory(
        StatePoint("liquid", atoms, 1000.0, identity="molten", replicas=replicas),
        positions,
        cells,
        zero,
        zero,
        torch.zeros(replicas, frames, 3, 3, dtype=torch.float64),
        zero,
        torch.ones(replicas, frames, dtype=torch.bool),
    )


@pytest.fixture
def walk(gaussian: Callable[..., Tensor]) -> Callable[..., Trajectory]:
    """A random walk of independent atoms, from random places or from crystal sites that it moves about."""

    def make(step: float, *, start: Atoms | None = None, noise: float = 0.0, replicas: int = 2) -> Trajectory:
        atoms = bulk("Ti", "bcc", a=3.3, cubic=True) * (3, 3, 3)
        cell = torch.from_numpy(atoms.cell.array.copy())
        places = torch.special.ndtr(gaussian(replicas, 1, len(atoms), 3)) @ cell
        if start is not None:
            atoms, places = start, torch.from_numpy(start.positions).expand(replicas, 1, -1, 3)
        n = len(atoms)
        moves = step * gaussian(replicas, 60, n, 3).cumsum(1) + noise * gaussian(replicas, 60, n, 3)
        return _trajectory(places + moves, atoms)

    return make


def test_a_liquid_passes(walk: Callable[..., Trajectory]) -> None:
    """Steps of 0.3 Å: 3 to 4 Å in 45 frames."""
    run = walk(0.3)
    assert bragg_peak(run) < 2
    require_liquid(run, INTERVAL)


def test_what_does_not_flow_is_no_liquid(walk: Callable[..., Trajectory]) -> None:
    with pytest.raises(SamplingError, match=r"not flow at 1000 K: in 2.25 ps its atoms moved by 0\.[0-4]"):
        require_liquid(walk(0.0, noise=0.3), INTERVAL)


@pytest.mark.parametrize("ovito", [True, False])
def test_a_crystal_is_no_liquid(
    walk: Callable[..., Trajectory], monkeypatch: pytest.MonkeyPatch, *, ovito: bool
) -> None:
    """Turned in its box and hot: by its Bragg peak, and by its neighbourhoods where OVITO is there."""
    if ovito:
        pytest.importorskip("ovito")
    monkeypatch.setattr(melt, "has_ovito", lambda: ovito)
    crystal = bulk("Ti", "bcc", a=3.3, cubic=True) * (3, 3, 3)
    crystal.positions = crystal.positions[:, [2, 0, 1]] + 0.4
    run = walk(0.02, start=crystal, noise=0.2)
    assert 5 < bragg_peak(run) < np.sqrt(54)
    with pytest.raises(SamplingError, match=r"froze at 1000 K, with a Bragg peak of [56]\.\d") as caught:
        require_liquid(run, INTERVAL)
    assert ("crystalline neighbourhoods" in str(caught.value)) == ovito


@pytest.mark.parametrize(("n_atoms", "limit"), [(32, 3.0), (54, 3.674), (128, 4.5), (1000, 4.5)])
def test_limits_of_bragg_peaks(n_atoms: int, limit: float) -> None:
    assert melt.bragg_limit(n_atoms) == pytest.approx(limit, abs=1e-3)


def test_one_frozen_replica_is_enough(walk: Callable[..., Trajectory]) -> None:
    crystal = bulk("Ti", "bcc", a=3.3, cubic=True) * (3, 3, 3)
    liquid, frozen = walk(0.3, replicas=1), walk(0.02, start=crystal, noise=0.2, replicas=1)
    both = _trajectory(torch.cat([liquid.positions, frozen.positions]), crystal)
    with pytest.raises(SamplingError, match="froze"):
        require_liquid(both, INTERVAL)


def test_a_breathing_cell_is_no_diffusion(gaussian: Callable[..., Tensor]) -> None:
    """Atoms far from the origin move with the cell; carried into the mean cell they stand still."""
    atoms = bulk("Ti", "bcc", a=3.3, cubic=True) * (3, 3, 3)
    scale = 1 + 0.05 * gaussian(1, 60, 1, 1)
    cell, places = (torch.from_numpy(np.array(x)) for x in (atoms.cell.array, atoms.positions + 40.0))
    run = _trajectory(places * scale, atoms, cell * scale)
    assert melt.diffusion_distance(run) < 1e-9


POTENTIAL = testing.LennardJones([18], 0.1, 2.6, 5.2)
"""Argon's mass, and a unit of time of 0.53 ps."""


def _solid() -> StatePoint:
    atoms = bulk("Ar", "fcc", a=4.1, cubic=True) * (2, 2, 2)
    return StatePoint("liquid", atoms, 1300.0, 5.0, identity="molten", replicas=3)


@pytest.fixture(scope="module")
def settings(open_guards: Callable[..., Any]) -> Any:
    return open_guards(timestep=6.0, friction=6.0, barostat_time=500.0)


@pytest.mark.statistical
def test_lennard_jones_melts(settings: Any, tmp_path: Path) -> None:
    """Far above the melting temperature, in a few picoseconds; the second time it comes from the store."""
    point, store = _solid(), FrameStore(tmp_path, {})
    how = {"key": MeltSettings("fcc", 2500.0, 6000.0)}
    found = melted(POTENTIAL, {"key": point}, how, settings, seed=1, store=store)["key"]
    assert replace(found, atoms=point.atoms) == point
    assert 1.05 < found.atoms.cell.volume / point.atoms.cell.volume < 1.4
    sites = found.atoms.get_scaled_positions(wrap=False)
    assert ((sites >= 0) & (sites < 1)).all()
    run = _trajectory(torch.from_numpy(found.atoms.positions)[None, None], found.atoms)
    assert bragg_peak(run) < 4.2
    calls = POTENTIAL.calls
    again = melted(POTENTIAL, {"key": point}, how, settings, seed=1, store=store)["key"]
    assert POTENTIAL.calls == calls
    np.testing.assert_array_equal(again.atoms.positions, found.atoms.positions)


def test_a_crystal_that_outlives_the_heat_is_named(settings: Any) -> None:
    how = {"key": MeltSettings("fcc", 500.0, 600.0)}
    with pytest.raises(SamplingError, match=r"liquid: fcc did not melt in 0.6 ps at 500 K, it has a Bragg"):
        melted(POTENTIAL, {"key": _solid()}, how, settings, seed=1)


def test_nothing_to_melt(settings: Any) -> None:
    point = _solid()
    assert melted(POTENTIAL, {"key": point}, {}, settings, seed=1) == {"key": point}


def test_a_molten_phase_starts_as_its_crystal() -> None:
    config, gas = _config(), testing.IdealGas([22], 0.1)
    (point,) = from_config.state_points(config, [LIQUID], gas, 2).values()
    assert point.is_liquid
    np.testing.assert_array_equal(point.atoms.positions, from_config.crystal(config, "bcc").positions)
    how = from_config.melt_settings(config, [LIQUID, EnsembleSource("bcc", 1000.0, 2.0)])
    assert how == {LIQUID: MeltSettings("bcc", 3000.0, 6000.0)}


def test_without_ovito_a_melt_is_judged_when_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not while it runs; whoever asks for that is refused, and so is a liquid of a file."""

    def missing() -> None:
        raise InputError("no OVITO")

    monkeypatch.setattr(from_config, "has_ovito", lambda: False)
    monkeypatch.setattr(from_config, "require_ovito", missing)
    assert from_config.identity(_config(), "liquid") == "molten"
    assert from_config.identity(_config(identity="none"), "liquid") == "molten"
    with pytest.raises(InputError, match="no OVITO"):
        from_config.identity(_config(identity="liquid"), "liquid")
    monkeypatch.setattr(from_config, "has_ovito", lambda: True)
    monkeypatch.setattr(from_config, "require_ovito", lambda: None)
    assert from_config.identity(_config(), "liquid") == "liquid"


def test_too_small_for_a_liquid() -> None:
    config = _config(melt={"from": "small", "temperature": 3000})
    with pytest.raises(InputError, match=r"'liquid' has too few atoms(.|\n)*16 atoms of 'small'"):
        from_config.melt_settings(config, [LIQUID])


def test_what_only_crystals_have() -> None:
    with pytest.raises(InputError, match="'liquid' is a liquid: it has no phonons"):
        require_solids(_config(), ["liquid"], "phonons", "phonons")
    with pytest.raises(InputError, match="'liquid' is molten: it has no lattice constants"):
        from_config.crystal(_config(), "liquid", (3.3,))
