"""Melting of the Lennard-Jones model that is truncated and shifted at 2.5 σ, against published coexistence.

Its fcc crystal and its liquid coexist at T* = 0.8 and P* = 2.185 (Pedersen, J. Chem. Phys. 139, 104102,
2013), with ΔS = 1.396 k per atom. Free energies of both, with h²/(2πm kT) = σ² and to a few thousandths of ε,
are from an independent Monte Carlo calculation of the same route with 256 atoms.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ase.build import bulk
from ase.units import _amu, _e

from mlip_refine import testing
from mlip_refine.quantities import GPA, HBAR, KB, Measured
from mlip_refine.sampling import FrameStore, Length, StatePoint
from mlip_refine.workflows.free_energy.cells import CellSettings, equilibrate_cells, liquid_cells
from mlip_refine.workflows.free_energy.frenkel_ladd import (
    AbsoluteFreeEnergy,
    LadderSettings,
    absolute_free_energies,
)
from mlip_refine.workflows.free_energy.liquid_path import LiquidPathSettings, liquid_free_energies
from mlip_refine.workflows.free_energy.uhlenbeck_ford import FluidSettings
from mlip_refine.workflows.melt import MeltSettings, melted

EPSILON, SIGMA, MASS = 119.8 * KB, 3.405, 39.948
T, P = 0.8, 2.185
ENTROPY = 1.396
"""ΔS of melting, k per atom."""

TAU = SIGMA * math.sqrt(MASS * _amu * 1e10 / _e / EPSILON)
"""Unit of time, fs: 2.16 ps."""

N = 108


class Phase(NamedTuple):
    """Reduced numbers of one phase per atom: density, F of its cell, G in both conventions."""

    density: float
    free: Measured
    cells: Measured
    limit: Measured


def _reduced(found: AbsoluteFreeEnergy) -> Phase:
    n, volume = len(found.point.atoms), found.point.atoms.cell.volume
    # The thermal wavelength is taken for σ.
    kt = EPSILON * T
    wavelength = math.sqrt(2 * math.pi * HBAR**2 / (MASS * _amu * 1e10 / _e * kt))
    scale = 1 / (n * EPSILON)
    shift = Measured(-3 * T * math.log(wavelength / SIGMA), 0.0, "ε")
    cells = found.gibbs.scaled(scale, "ε") + shift
    assert found.size_term is not None
    limit = cells - Measured(found.size_term * scale, found.size_term_se * scale, "ε")
    work = Measured(P * volume / n / SIGMA**3, 0.0, "ε")
    return Phase(n / volume * SIGMA**3, cells - work, cells, limit)


@pytest.fixture(scope="module")
def phases(open_guards: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Phase]:
    """Both phases by the whole route, from the crystal on."""
    store = FrameStore(Path(tmp_path_factory.mktemp("lennard-jones")), {})
    potential = testing.LennardJonesTS()
    atoms = bulk("Ar", "fcc", a=SIGMA * (4 / 0.973) ** (1 / 3), cubic=True) * (3, 3, 3)
    assert len(atoms) == N
    state = T * EPSILON / KB, P * EPSILON / SIGMA**3 / GPA
    crystal = StatePoint("crystal", atoms, *state, identity="sites", replicas=2)
    md = open_guards(timestep=0.005 * TAU, friction=1e3 / TAU, interval=0.1 * TAU, barostat_time=TAU)
    search = CellSettings(md, Length(5 * TAU, 300), 3)
    cell = equilibrate_cells(potential, [crystal], search, seed=1, stage="cells", store=store)["crystal"]
    ladder = LadderSettings("harmonic", 6, Length(5 * TAU, 1000), Length(5 * TAU, 600))
    solid = absolute_free_energies(potential, [cell], md, ladder, seed=2, store=store, limit={"crystal"})

    liquid = replace(crystal, name="liquid", identity="molten")
    how = {"liquid": MeltSettings("crystal", 2 * state[0], 20 * TAU)}
    start = melted(potential, {"liquid": liquid}, how, md, seed=3, store=store)["liquid"]
    length = Length(10 * TAU, 700)
    start = replace(start, replicas=4)
    molten = liquid_cells(potential, [start], md, length, seed=4, stage="npt", store=store)
    settings = LiquidPathSettings(
        100.0, {}, None, Length(5 * TAU, 200), Length(5 * TAU, 700), FluidSettings(steps=20_000)
    )
    (fluid,) = molten.values()
    cell_of_liquid = replace(fluid, point=replace(fluid.point, replicas=1))
    found = liquid_free_energies(potential, [cell_of_liquid], md, settings, seed=5, store=store)
    return {"crystal": _reduced(solid["crystal"]), "liquid": _reduced(found["liquid"])}


@pytest.mark.slow
@pytest.mark.statistical
def test_pieces_are_those_of_an_independent_calculation(phases: dict[str, Phase]) -> None:
    """Helmholtz energies, carried to the published densities by F' = P/ρ²; 0.005 ε are left for sizes."""
    crystal, liquid = phases["crystal"], phases["liquid"]
    # A residual part of -2.2698(10) - 0.0012 in the limit, and the ideal gas.
    ideal = T * (math.log(0.8802) - 1)
    for phase, density, exact in ((crystal, 0.9731, -2.9300), (liquid, 0.8802, -2.2698 - 0.0012 + ideal)):
        assert phase.density == pytest.approx(density, abs=0.012)
        in_limit = phase.free.value + phase.limit.value - phase.cells.value
        carried = in_limit + P / density**2 * (density - phase.density)
        assert abs(carried - exact) < testing.sigma_bound(2) * phase.limit.se + 0.005
        assert phase.limit.se < 0.01


@pytest.mark.slow
@pytest.mark.statistical
def test_melting_temperature_needs_the_size_terms(phases: dict[str, Phase]) -> None:
    """Within 1 % of the published coexistence, beside statistics; per cell of 108 atoms it is 4.5 % off.

    The independent calculation is 0.4 % below it with 256 atoms.
    """
    crystal, liquid = phases["crystal"], phases["liquid"]
    limit, cells = (getattr(liquid, kind) - getattr(crystal, kind) for kind in ("limit", "cells"))
    bound = 0.01 + testing.sigma_bound(2) * limit.se / ENTROPY / T
    assert abs(limit.value) / ENTROPY / T < bound
    assert cells.value / ENTROPY / T > bound
    assert bound < 0.03
