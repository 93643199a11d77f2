"""Free energies of liquids: the fluid that is chosen, windows, closure with the ideal gas, and refusals."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch import Tensor

from mlip_refine import testing
from mlip_refine.errors import InputError, SamplingError, StatisticsError
from mlip_refine.quantities import KB, MEV, Measured
from mlip_refine.sampling import FrameStore, Length, StatePoint, Trajectory
from mlip_refine.workflows.free_energy import liquid_path
from mlip_refine.workflows.free_energy.cells import LiquidCell
from mlip_refine.workflows.free_energy.finite_size import liquid_size_term
from mlip_refine.workflows.free_energy.liquid_path import (
    FACTORS,
    LARGEST_PACKING,
    LENGTH_PER_GAP,
    LiquidPathSettings,
    find_fluids,
    first_peak,
    fluid_lengths,
    liquid_free_energies,
    spaced_windows,
)
from mlip_refine.workflows.free_energy.records import CELLS, LIMIT
from mlip_refine.workflows.free_energy.uhlenbeck_ford import FluidSettings, ideal_gas_free_energy


def _length(windows: tuple[float, ...], speed: Callable[[Tensor], Tensor]) -> list[float]:
    """∫ speed dλ over every gap."""
    fine = [torch.linspace(a, b, 400, dtype=torch.float64) for a, b in pairwise(windows)]
    return [float(torch.trapezoid(speed(x), x)) for x in fine]


@pytest.mark.parametrize(
    ("v0", "v1", "q"), [(200.0, 200.0, 1.0), (50.0, 800.0, 3.0), (900.0, 100.0, 0.5), (100.0, 5000.0, 12.0)]
)
def test_windows_divide_the_length_evenly(v0: float, v1: float, q: float) -> None:
    """The variance v0 + (v1 - v0) λ^q is told by its ends and its integral."""
    windows = spaced_windows((v0, v1), v0 + (v1 - v0) / (q + 1), None)
    parts = _length(windows, lambda x: (v0 + (v1 - v0) * x**q).sqrt())
    assert windows[0] == 0.0
    assert windows[-1] == 1.0
    assert max(parts) <= LENGTH_PER_GAP * 1.001
    assert parts == pytest.approx([sum(parts) / len(parts)] * len(parts), rel=2e-3)
    assert len(windows) == 1 + math.ceil(sum(parts) / LENGTH_PER_GAP)


def test_windows_as_many_as_asked_for() -> None:
    assert spaced_windows((10.0, 10.0), 10.0, 5) == pytest.approx((0.0, 0.25, 0.5, 0.75, 1.0))
    with pytest.raises(StatisticsError, match="the path to the Uhlenbeck-Ford fluid needs 501 windows"):
        spaced_windows((1e6, 1e6), 1e6, None)
    assert len(spaced_windows((1e6, 1e6), 1e6, 7)) == 7


def test_the_first_peak_lies_between_shells() -> None:
    radii = torch.linspace(0.01, 5, 300, dtype=torch.float64)
    density = 1.5 * torch.exp(-(((radii - 2.8437) / 0.3) ** 2)) + torch.exp(-(((radii - 4.5) / 0.5) ** 2))
    assert first_peak(radii, density) == pytest.approx(2.8437, abs=2e-3)


def _run(atoms: Atoms, positions: Tensor, temperature: float = 1000.0) -> Trajectory:
    frames = len(positions)
    zero = torch.zeros(1, frames, dtype=torch.float64)
    cells = torch.from_numpy(atoms.cell.array.copy()).expand(1, frames, 3, 3)
    return Trajectory(
        StatePoint("liquid", atoms, temperature, identity="molten"),
        positions[None],
        cells,
        zero,
        zero,
        torch.zeros(1, frames, 3, 3, dtype=torch.float64),
        zero,
        torch.ones(1, frames, dtype=torch.bool),
    )


@pytest.fixture
def salt(gaussian: Callable[..., Tensor]) -> Trajectory:
    """Hot rock salt: unlike neighbours at 2.82 Å, like ones at 3.99 Å."""
    atoms = bulk("NaCl", "rocksalt", a=5.64, cubic=True) * (2, 2, 2)
    return _run(atoms, torch.from_numpy(atoms.positions) + 0.1 * gaussian(40, len(atoms), 3))


def test_lengths_follow_the_first_peaks_of_every_pair(salt: Trajectory) -> None:
    species, lengths, symbols = fluid_lengths(salt, {})
    assert symbols == ["Na", "Cl"]
    assert species.tolist() == [["Na", "Cl"].index(s) for s in salt.point.atoms.get_chemical_symbols()]
    torch.testing.assert_close(lengths, lengths.T)
    assert float(lengths[0, 1]) == pytest.approx(0.51 * 2.82, rel=0.02)
    assert float(lengths[0, 0]) == pytest.approx(0.51 * 3.99, rel=0.02)


def test_lengths_are_given_by_pair(salt: Trajectory) -> None:
    _, lengths, _ = fluid_lengths(salt, {"Cl-Na": 1.2, "*": 2.0})
    assert lengths.tolist() == [[2.0, 1.2], [1.2, 2.0]]
    with pytest.raises(InputError, match=r"no length for Na-Na; found Cl-Na(.|\n)*or '\*' for all others"):
        fluid_lengths(salt, {"Cl-Na": 1.2})
    with pytest.raises(
        InputError, match="names a pair of elements that the liquid does not have; found Ti-O"
    ):
        fluid_lengths(salt, {"*": 1.2, "Ti-O": 1.0})


N, TEMPERATURE = 32, 1000.0

SHORT = FluidSettings(steps=450, equilibration=100, interval=15, pilot=150)


def _gas(sizes: tuple[int, int] = (N, 0)) -> StatePoint:
    """An ideal gas in a cell of 10 Å."""
    atoms = Atoms(f"Ar{sizes[0]}He{sizes[1]}" if sizes[1] else f"Ar{N}", cell=[10.0] * 3, pbc=True)
    atoms.set_scaled_positions(np.random.default_rng(3).random((len(atoms), 3)))
    return StatePoint("gas", atoms, TEMPERATURE, 2.0, identity="molten", replicas=4)


def _settings(strength: float, sigma: dict[str, float], windows: int | None) -> LiquidPathSettings:
    length = Length(200.0, 30)
    return LiquidPathSettings(strength, sigma, windows, length, length, SHORT)


@pytest.mark.statistical
def test_an_ideal_gas_comes_back_from_the_fluid(open_guards: Callable[..., Any], tmp_path: Path) -> None:
    """Down the ladder of the fluid and up the path: F_id of 24 + 8 atoms, to hundredths of kT per atom."""
    gas, point = testing.IdealGas([2, 18], 0.1), _gas((24, 8))
    md = open_guards(timestep=4.0, friction=10.0, interval=40.0)
    cell = LiquidCell(point, Measured(1000.0, 1.0, "Å³"), Measured(0.9, 0.1, "1"))
    settings, store = _settings(2.0, {"*": 1.9, "He-He": 1.2}, 6), FrameStore(tmp_path, {})
    found = liquid_free_energies(gas, [cell], md, settings, seed=5, store=store)["gas"]
    kt, ideal = KB * TEMPERATURE, ideal_gas_free_energy(point.atoms, TEMPERATURE)
    excess = found.fluid.excess
    # The fluid is far from the gas, and the path leads back.
    assert excess.value > 10 * kt
    error = found.gibbs.se / kt
    assert error < 0.04 * N
    assert abs(found.gibbs.value - point.pv - ideal) / kt < testing.sigma_bound() * error
    assert found.reference == pytest.approx(ideal + excess.value)
    assert len(found.path.lambdas) == len(found.path.closest) == 6
    assert found.path.sigma == [[1.2, 1.9], [1.9, 1.9]]
    # Pairs come closer in the gas than in the fluid.
    assert found.path.closest[-1] > found.path.closest_in_liquid
    term = liquid_size_term([8, 24], cell.s0)
    assert found.size_term == pytest.approx(kt * term.value)
    assert found.size_term_se == pytest.approx(kt * 0.5 * 0.1 / 0.9)
    limit, cells = found.per_atom(LIMIT), found.per_atom(CELLS)
    assert cells.value - limit.value == pytest.approx(kt * term.value / MEV / N)
    assert limit.se == pytest.approx(math.hypot(cells.se, found.size_term_se / MEV / N))
    again = liquid_free_energies(gas, [cell], md, settings, seed=5, store=store)["gas"]
    assert again.gibbs == found.gibbs


def test_the_pilot_takes_the_shortest_path(
    open_guards: Callable[..., Any],
    gaussian: Callable[..., Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To a gas the smallest σ is nearest; the largest ones are left out before anything is sampled."""
    gas, point = testing.IdealGas([18], 0.1), _gas()
    md = open_guards(timestep=4.0, friction=10.0, interval=40.0)
    run = _run(point.atoms, 10 * torch.special.ndtr(gaussian(40, N, 3)))
    # The highest point of the g(r) of a gas is anywhere.
    monkeypatch.setattr(liquid_path, "first_peak", lambda *_: 3.0)
    store = FrameStore(tmp_path, {})
    fluids = find_fluids(
        gas,
        [replace(point, name="liquid")],
        {"liquid": run},
        md,
        _settings(3.0, {}, 4),
        seed=1,
        stage="p",
        store=store,
    )
    _, lengths, _ = fluid_lengths(run, {})
    chosen = fluids["liquid"]
    assert float(chosen.bias.sigma[0, 0]) == pytest.approx(FACTORS[0] * float(lengths[0, 0]))
    assert chosen.dissipation > 0
    assert chosen.packing < LARGEST_PACKING
    assert chosen.start[0].shape == (4, N, 3)
    assert len(chosen.lambdas) == 4


@pytest.mark.parametrize(
    ("strength", "sigma", "error", "message"),
    [
        (100.0, 4.0, InputError, r"too dense: it would freeze; found Ar-Ar 4 Å, a reduced density of 5.\d+"),
        (1000.0, 2.2, SamplingError, "freezes at a strength of 1000 with every length that was tried"),
    ],
)
def test_a_fluid_that_is_a_crystal_is_refused(
    open_guards: Callable[..., Any], strength: float, sigma: float, error: type[Exception], message: str
) -> None:
    atoms = bulk("Ar", "fcc", a=(4000 / N) ** (1 / 3), cubic=True) * (2, 2, 2)
    point = StatePoint("liquid", atoms, TEMPERATURE, identity="molten")
    run = _run(atoms, torch.from_numpy(atoms.positions)[None].repeat(4, 1, 1))
    md = open_guards(timestep=4.0, friction=10.0, interval=40.0)
    gas = testing.IdealGas([18], 0.1)
    settings = replace(_settings(strength, {"*": sigma}, None), fit=Length(100.0, 10))
    with pytest.raises(error, match=message):
        find_fluids(gas, [point], {"liquid": run}, md, settings, seed=1, stage="p")


@pytest.mark.statistical
def test_a_gap_that_does_not_overlap_is_named(open_guards: Callable[..., Any]) -> None:
    gas = testing.IdealGas([18], 0.1)
    md = open_guards(timestep=4.0, friction=10.0, interval=40.0)
    cell = LiquidCell(_gas(), Measured(1000.0, 1.0, "Å³"), Measured(0.9, 0.1, "1"))
    message = (
        r"the path of gas between λ = 0 and 1 \(free_energy.liquid.windows is 2; atoms come as close as "
        r"0.\d+ Å there, 0.\d+ Å in the liquid: a greater strength"
    )
    with pytest.raises(StatisticsError, match=message):
        liquid_free_energies(gas, [cell], md, _settings(50.0, {"*": 1.8}, 2), seed=5)
