"""The ladder of the Uhlenbeck-Ford fluid against virial series, published free energies and exact limits."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.units import _amu, _e, _hplanck, kB

from mlip_refine.errors import SamplingError, StatisticsError
from mlip_refine.quantities import KB
from mlip_refine.sampling import (
    FrameStore,
    MolecularDynamics,
    NoPotential,
    StatePoint,
    Trajectory,
    UhlenbeckFord,
)
from mlip_refine.testing import sigma_bound
from mlip_refine.workflows.free_energy.uhlenbeck_ford import (
    FluidFreeEnergy,
    FluidSettings,
    ideal_gas_free_energy,
    require_fluid,
    spaced_strengths,
    uhlenbeck_ford_free_energy,
)

TEMPERATURE = 1941.0
KT = KB * TEMPERATURE
SIGMA = 1.45


def _cell(n_atoms: int, x: float, symbols: list[str] | None = None) -> Atoms:
    volume = 0.5 * n_atoms * (math.pi * SIGMA**2) ** 1.5 / x
    return Atoms(
        symbols or ["Ti"] * n_atoms,
        np.zeros((n_atoms, 3)),
        cell=volume ** (1 / 3) * np.eye(3),
        pbc=True,
    )


def _excess(n_atoms: int, x: float, p: float, settings: FluidSettings, seed: int = 1) -> FluidFreeEnergy:
    fluid = UhlenbeckFord.of_one_length(n_atoms, SIGMA, KT, p)
    return uhlenbeck_ford_free_energy(fluid, _cell(n_atoms, x), settings, seed=seed)


def test_the_ideal_gas_is_that_of_sackur_and_tetrode() -> None:
    atoms = Atoms(["Ar"] * 200 + ["Ne"] * 100, cell=np.eye(3) * 80, pbc=True)
    exact = 0.0
    for mass, count in ((atoms.get_masses()[0], 200), (atoms.get_masses()[-1], 100)):
        wavelength = _hplanck / math.sqrt(2 * math.pi * mass * _amu * kB * _e * 500.0)
        per_volume = 512000e-30 / wavelength**3
        exact += kB * 500.0 * sum(math.log(k / per_volume) for k in range(1, count + 1))
    assert ideal_gas_free_energy(atoms, 500.0) == pytest.approx(exact, rel=1e-6)


@pytest.mark.statistical
def test_a_weak_fluid_has_the_free_energy_of_its_virial_series() -> None:
    """βF_ex/N = x + B₃ x²/2 + B₄ x³/3 (Paula Leite 2016, p = 1), and ½ ln S₀ of a cell of N atoms."""
    x, n = 0.3, 32
    found = _excess(
        n, x, 1.0, FluidSettings(step=0.04, steps=2000, equilibration=300, pilot=200, interval=10)
    )
    series = x + 0.256600119639834 * x**2 / 2 - 0.125459957055045 * x**3 / 3
    compressibility = 1 + 2 * x + 3 * 0.256600119639834 * x**2 - 4 * 0.125459957055045 * x**3
    exact = series - 0.5 * math.log(compressibility) / n
    assert found.packing == pytest.approx(x, rel=1e-12)
    # B₅ x⁴ / 4 and what the cell adds beyond 1/N are below 0.001.
    assert abs(found.reduced_excess.value - exact) < sigma_bound() * found.reduced_excess.se + 0.001
    assert found.reduced_excess.se < 0.03 * exact
    assert found.strengths[0] == 0.0
    assert found.strengths[-1] == 1.0
    assert found.sums[0] > found.sums[-1]
    assert found.closest[0] < found.closest[-1]


def test_two_species_of_one_length_are_one_species_and_its_mixing() -> None:
    n, x, settings = 16, 0.3, FluidSettings(step=0.04, steps=300, equilibration=100, pilot=100, interval=10)
    lengths = torch.full((2, 2), SIGMA, dtype=torch.float64)
    one = UhlenbeckFord.of_one_length(n, SIGMA, KT, 2.0)
    two = UhlenbeckFord(torch.arange(n) % 4 // 3, lengths, KT, 2.0)
    pure = _cell(n, x)
    mixed = _cell(n, x, ["Ti", "Ti", "Ti", "V"] * 4)
    mixed.set_masses(pure.get_masses())
    alone, both = (
        uhlenbeck_ford_free_energy(fluid, atoms, settings, seed=3)
        for fluid, atoms in ((one, pure), (two, mixed))
    )
    assert both.excess == alone.excess
    mixing = -KT * math.log(math.comb(16, 4))
    assert both.free_energy.value - alone.free_energy.value == pytest.approx(mixing, rel=1e-9)


def test_a_ladder_is_found_again_and_another_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, settings = 8, FluidSettings(step=0.04, steps=300, equilibration=50, pilot=50, interval=10)
    store, atoms = FrameStore(tmp_path, {}), _cell(8, 0.3)
    fluid = UhlenbeckFord.of_one_length(n, SIGMA, KT, 2.0)
    prepared, prepare = [], MolecularDynamics.prepare

    def counted(*arguments: Any, **options: Any) -> MolecularDynamics:
        prepared.append(1)
        return prepare(*arguments, **options)

    def evaluated(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was evaluated")

    monkeypatch.setattr(MolecularDynamics, "prepare", counted)
    monkeypatch.setattr(NoPotential, "evaluate", evaluated)
    first = uhlenbeck_ford_free_energy(fluid, atoms, settings, seed=1, store=store)
    assert len(prepared) == 2
    again = uhlenbeck_ford_free_energy(fluid, atoms, settings, seed=1, store=store)
    assert again == first
    assert len(prepared) == 2
    for other in (
        UhlenbeckFord.of_one_length(n, 1.01 * SIGMA, KT, 2.0),
        UhlenbeckFord.of_one_length(n, SIGMA, KT, 2.1),
    ):
        prepared.clear()
        uhlenbeck_ford_free_energy(other, atoms, settings, seed=1, store=store)
        assert len(prepared) == 2


def test_windows_have_equal_distances() -> None:
    """√var S = c / (p + a): the length is c ln((p + a) / a), and its parts are a geometric series."""
    c, a = 6.0, 0.3
    pilot = [0.0, *np.geomspace(0.1, 100, 12)]
    found, whole = spaced_strengths(pilot, [c / (p + a) for p in pilot], gap=2.0)
    length = c * math.log((100 + a) / a)
    assert whole == pytest.approx(length, rel=1e-3)
    assert len(found) == math.ceil(length / 2) + 1
    assert (found[0], found[-1]) == (0.0, 100.0)
    ratios = [(upper + a) / (lower + a) for lower, upper in pairwise(found)]
    assert ratios == pytest.approx([math.exp(length / c / (len(found) - 1))] * len(ratios), rel=1e-3)


@pytest.mark.statistical
def test_a_ladder_is_as_long_as_its_error_needs() -> None:
    """The pilot knows the inefficiency to about a third, and with it the error."""
    settings = FluidSettings(step=0.04, error=0.012, equilibration=200, interval=15, pilot=400)
    found = _excess(16, 0.3, 2.0, settings, seed=7).reduced_excess
    assert 0.5 * settings.error < found.se < 2 * settings.error


def test_windows_too_far_apart_are_refused_by_name() -> None:
    settings = FluidSettings(step=0.04, steps=300, equilibration=100, pilot=100, interval=10, gap=60.0)
    with pytest.raises(StatisticsError, match=r"between p = 0 and p = 40: the states overlap by"):
        _excess(32, 0.3, 40.0, settings)


def test_a_cell_of_other_atoms_is_refused() -> None:
    fluid = UhlenbeckFord.of_one_length(8, SIGMA, KT, 2.0)
    with pytest.raises(SamplingError, match="a fluid of 8 atoms in a cell of 9"):
        uhlenbeck_ford_free_energy(fluid, _cell(9, 0.3), seed=1)


def _frames(step: float, jump: float, seed: int) -> Trajectory:
    """Atoms that vibrate about a crystal or about random places, and walk by `step` between frames."""
    rng = np.random.default_rng(seed)
    atoms = bulk("Ti", "bcc", a=3.3, cubic=True) * 4
    places = atoms.positions + jump * rng.normal(size=(128, 3))
    walk = step * rng.normal(size=(60, 128, 3)).cumsum(0)
    noise = 0.15 * rng.normal(size=(60, 128, 3))
    positions = torch.from_numpy(places + walk + noise)[None]
    cells = torch.from_numpy(atoms.cell.array.copy()).expand(1, 60, 3, 3)
    zero, kept = torch.zeros(1, 60, dtype=torch.float64), torch.ones(1, 60).bool()
    point = StatePoint("w", atoms, TEMPERATURE)
    return Trajectory(point, positions, cells, zero, zero, torch.zeros_like(cells), zero, kept)


@pytest.mark.parametrize(
    ("step", "jump", "message"),
    [
        (0.0, 0.0, r"p = 86.2 and x = 0.425 froze, with a Bragg peak of \d"),
        (0.0, 2.0, r"p = 86.2 and x = 0.425 does not flow: its atoms moved by 0.\d\d distances"),
    ],
)
def test_crystals_and_glasses_are_refused(step: float, jump: float, message: str) -> None:
    fluid = UhlenbeckFord.of_one_length(128, 1.4, KT, 100.0)
    with pytest.raises(SamplingError, match=message):
        require_fluid(_frames(step, jump, 5), fluid, 86.2)


def test_a_fluid_passes() -> None:
    require_fluid(_frames(0.4, 2.0, 6), UhlenbeckFord.of_one_length(128, 1.4, KT, 100.0), 86.2)


@pytest.mark.slow
@pytest.mark.statistical
@pytest.mark.parametrize(
    ("p", "x", "published", "inverse_s0"),
    [(25.0, 0.3, 2.81227, 11.1), (50.0, 0.3, 4.29321, 19.7), (100.0, 0.3, 6.60757, 36.0)],
)
def test_free_energies_are_the_published_ones(
    p: float, x: float, published: float, inverse_s0: float
) -> None:
    """βF_ex/N of the supplement of Paula Leite et al. (2016), of endless cells: -½ ln(1/S₀)/N is left to add.

    1/S₀ = 1 + 2x f' + x² f'' is from differences of the published numbers; it is good to a fifth, which
    changes the result by 0.001.
    """
    n = 64
    found = _excess(n, x, p, FluidSettings(steps=6000)).reduced_excess
    exact = published - 0.5 * math.log(inverse_s0) / n
    assert found.se < 0.02
    assert abs(found.value - exact) < sigma_bound() * found.se + 0.002


@pytest.mark.slow
@pytest.mark.statistical
def test_longer_steps_and_cutoffs_make_no_difference() -> None:
    """Time steps of 0.02 and 0.06 τ, and a sampled range that is the whole one or not."""
    n, x, p = 48, 0.4, 60.0
    short = _excess(n, x, p, FluidSettings(steps=12000, step=0.02, interval=30), seed=1).excess
    long = _excess(n, x, p, FluidSettings(steps=6000, step=0.06, interval=10), seed=2).excess
    fluid = UhlenbeckFord.of_one_length(n, SIGMA, KT, p)
    cut = uhlenbeck_ford_free_energy(
        replace(fluid, cutoff=3.0), _cell(n, x), FluidSettings(steps=6000), seed=3
    )
    assert abs(short.value - long.value) < sigma_bound(2) * (short - long).se
    # A range of 3σ leaves out pairs of p ∫ s dr, in kT per atom.
    r = np.linspace(3.0, 5.0, 2001)
    density = 2 * x / math.pi**1.5
    s = -np.log1p(-np.exp(-(r**2)))
    outside = 2 * math.pi * density * float(np.trapezoid(r**2 * s, r))
    inside = 4 / 3 * math.pi * 27 * density / 2 * float(s[0])
    expected = p * n * KT * (outside + inside)
    difference = short - cut.excess
    assert abs(difference.value - expected) < sigma_bound(2) * difference.se + 0.1 * expected
