"""Cells at a set pressure: of analytic crystals, static and warm."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from scipy.optimize import minimize

from mlip_refine import testing
from mlip_refine.errors import SamplingError
from mlip_refine.quantities import GPA, KB
from mlip_refine.sampling import FrameStore, Length, StatePoint, sample
from mlip_refine.statistics import statistical_inefficiency
from mlip_refine.workflows.free_energy.cells import (
    CellSettings,
    equilibrate_cells,
    liquid_cells,
    varied_strains,
)


@pytest.fixture
def potential() -> Any:
    """Lennard-Jones with second neighbours and more inside the cutoff, so that hcp is not ideal."""
    return testing.LennardJones([13, 22], 0.25, 2.56, 5.0)


def _hcp(a: float = 2.80, c: float = 4.70) -> Atoms:
    return bulk("Ti", "hcp", a=a, c=c) * (3, 3, 2)


def _fcc(a: float = 4.0) -> Atoms:
    return bulk("Al", "fcc", a=a, cubic=True) * (2, 2, 2)


def _best_cell(potential: Any, atoms: Atoms, groups: list[list[int]], pressure: float) -> np.ndarray:
    """The cell of least static enthalpy, by another road: a simplex over the strains."""

    def enthalpy(strain: np.ndarray) -> float:
        stretch = np.ones(3)
        for axes, value in zip(groups, strain, strict=True):
            stretch[axes] += value
        strained = atoms.copy()
        strained.set_cell(np.array(atoms.cell) * stretch, scale_atoms=True)
        energy = potential.energies([potential.graphs.from_atoms(strained)]).item()
        return float(energy + pressure * GPA * strained.cell.volume)

    options = {"xatol": 1e-7, "fatol": 1e-12}
    best = minimize(enthalpy, np.zeros(len(groups)), method="Nelder-Mead", options=options).x
    stretch = np.ones(3)
    for axes, value in zip(groups, best, strict=True):
        stretch[axes] += value
    return np.array(atoms.cell) * stretch


def _groups(point: StatePoint) -> list[list[int]]:
    """The axes that strain together."""
    diagonals = varied_strains(point).diagonal(dim1=1, dim2=2)
    return [diagonal.nonzero().flatten().tolist() for diagonal in diagonals if diagonal.any()]


@pytest.mark.parametrize("pressure", [0.0, 6.0])
def test_cold_crystals_get_the_cell_of_least_enthalpy(
    potential: Any, open_guards: Callable[..., Any], pressure: float
) -> None:
    """At 0.1 K the thermal expansion is of order 1e-6: the strain agrees to 1e-5."""
    points = [
        StatePoint("fcc", _fcc(), 0.1, pressure),
        StatePoint("hcp", _hcp(), 0.1, pressure, cell_freedom="anisotropic"),
        StatePoint("kept", _fcc(4.1), 0.1, pressure, cell_freedom="fixed"),
    ]
    settings = open_guards(timestep=4.0, friction=10.0, interval=8.0)
    found = equilibrate_cells(
        potential, points, CellSettings(settings, Length(20.0, 5), 7), seed=1, stage="cold"
    )
    assert list(found) == ["fcc", "hcp", "kept"]
    for point in points[:2]:
        exact = _best_cell(potential, point.atoms, _groups(point), pressure)
        np.testing.assert_allclose(np.array(found[point.name].atoms.cell), exact, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(np.array(found["kept"].atoms.cell), np.array(points[2].atoms.cell))
    for point in found.values():
        before = next(p for p in points if p.name == point.name)
        np.testing.assert_allclose(
            point.atoms.get_scaled_positions(wrap=False),
            before.atoms.get_scaled_positions(wrap=False),
            atol=1e-12,
        )


@pytest.mark.statistical
def test_warm_crystals_get_the_cell_with_the_set_pressure(
    potential: Any, open_guards: Callable[..., Any], tmp_path: Path
) -> None:
    """A fresh run in the found cell has the set pressure, per axis.

    Sigma holds the error of that run and 0.1 GPa of the last run of the search, which is as short.
    """
    points = [
        StatePoint("fcc", _fcc(), 300.0, 2.0, replicas=4),
        StatePoint("hcp", _hcp(), 300.0, 0.0, cell_freedom="anisotropic", replicas=4),
    ]
    settings = open_guards(timestep=4.0, friction=8.0, interval=24.0)
    search = CellSettings(settings, Length(300.0, 30), 4)
    store = FrameStore(tmp_path, {})
    found = equilibrate_cells(potential, points, search, seed=2, stage="warm", store=store)
    fcc, hcp = (np.array(found[name].atoms.cell) for name in ("fcc", "hcp"))
    np.testing.assert_allclose(fcc, np.eye(3) * fcc[0, 0], atol=1e-12)
    start = np.array(points[1].atoms.cell)
    stretch = hcp[[0, 1, 2], [0, 1, 2]] / start[[0, 1, 2], [0, 1, 2]]
    assert stretch[0] == pytest.approx(stretch[1], rel=1e-12)
    assert abs(stretch[2] - stretch[0]) > 1e-3
    fresh = [replace(p, replicas=4) for p in found.values()]
    runs = sample(potential, fresh, settings, Length(500.0, 40), seed=99, stage="check")
    for name, run in runs.items():
        volume = found[name].atoms.cell.volume
        kinetic = run.n_atoms * KB * 300.0 / volume
        diagonal = torch.diagonal(run.stress, dim1=-2, dim2=-1) - kinetic + run.point.pressure * GPA
        for axes in _groups(run.point):
            series = diagonal[..., axes].mean(-1)
            se = series.std().item() * math.sqrt(statistical_inefficiency(series) / series.numel())
            assert abs(series.mean().item()) < testing.sigma_bound(3) * math.hypot(se, 0.1 * GPA)
            assert se / GPA < 0.1
    calls = potential.calls
    again = equilibrate_cells(potential, points, search, seed=2, stage="warm", store=store)
    assert potential.calls - calls == 2 * (1 + 2)  # the static tangents: two strains per free direction
    np.testing.assert_array_equal(np.array(again["hcp"].atoms.cell), hcp)


@pytest.mark.parametrize(
    ("atoms", "freedom", "wanted"),
    [
        (_fcc(), "isotropic", [[0, 1, 2]]),
        (_hcp(), "isotropic", [[0, 1, 2]]),
        (_hcp(), "hexagonal", [[0, 1], [2]]),
        (_fcc(), "hexagonal", [[0, 1], [2]]),
        (_hcp(), "triclinic", [[0], [1], [2]]),
        (_hcp(), "anisotropic", [[0, 1], [2]]),
        (Atoms("Ti", cell=[3, 3, 4], pbc=True), "anisotropic", [[0, 1], [2]]),
        (Atoms("Ti", cell=[3, 3.5, 4], pbc=True), "anisotropic", [[0], [1], [2]]),
    ],
)
def test_strains_keep_the_symmetry_of_the_lattice(
    atoms: Atoms, freedom: Any, wanted: list[list[int]]
) -> None:
    assert _groups(StatePoint("p", atoms, 300.0, cell_freedom=freedom)) == wanted


def test_a_triclinic_cell_relaxes_lengths_and_angles(potential: Any, open_guards: Callable[..., Any]) -> None:
    """A sheared fcc crystal at 3 GPa and 0.1 K: the stress is the pressure alone, the angles are right."""
    sheared = _fcc()
    sheared.set_cell(
        np.array(sheared.cell) @ [[1, 0.01, 0], [0.01, 1, -0.01], [0, -0.01, 1]], scale_atoms=True
    )
    point = StatePoint("fcc", sheared, 0.1, 3.0, cell_freedom="triclinic")
    settings = open_guards(timestep=4.0, friction=10.0, interval=8.0)
    found = equilibrate_cells(
        potential, [point], CellSettings(settings, Length(20.0, 5), 8), seed=1, stage="triclinic"
    )["fcc"]
    graphs = potential.graphs.collate([potential.graphs.from_atoms(found.atoms)])
    stress = potential.evaluate(graphs, ["stress"])["stress"][0] / GPA
    np.testing.assert_allclose(stress, -3.0 * np.eye(3), atol=5e-3)
    np.testing.assert_allclose(found.atoms.cell.angles(), 90.0, atol=1e-2)


def test_no_iterations_change_nothing(potential: Any, open_guards: Callable[..., Any]) -> None:
    point = StatePoint("fcc", _fcc(), 300.0, ensemble="npt")
    settings = open_guards(timestep=4.0)
    found = equilibrate_cells(
        potential, [point], CellSettings(settings, Length(0.0, 1), 0), seed=1, stage="none"
    )
    assert found["fcc"].ensemble == "nvt"
    np.testing.assert_array_equal(np.array(found["fcc"].atoms.cell), np.array(point.atoms.cell))


def _gas(name: str, replicas: int = 32) -> StatePoint:
    """Twenty atoms of an ideal gas in a cell that is too large: ⟨V⟩ = (N + 1) kT/P."""
    atoms = Atoms("Al20", cell=[8.0] * 3, pbc=True)
    atoms.set_scaled_positions(np.random.default_rng(1).random((20, 3)))
    return StatePoint(name, atoms, 1000.0, 5.0, identity="molten", replicas=replicas)


@pytest.mark.statistical
def test_a_liquid_gets_its_mean_cell(open_guards: Callable[..., Any]) -> None:
    """An ideal gas: ⟨V⟩ = (N + 1) kT/P, and S(0) = N var(V)/⟨V⟩² = N/(N + 1)."""
    point, gas = _gas("gas"), testing.IdealGas([13], 0.1)
    settings = open_guards(timestep=5.0, friction=10.0, interval=50.0, barostat_time=200.0)
    found = liquid_cells(gas, [point], settings, Length(1500.0, 150), seed=1, stage="gas")["gas"]
    volume = 21 * KB * 1000.0 / (5.0 * GPA)
    assert found.volume.se < 0.02 * volume
    assert abs(found.volume.value - volume) < testing.sigma_bound(2) * found.volume.se
    assert found.s0.se < 0.1
    assert abs(found.s0.value - 20 / 21) < testing.sigma_bound(2) * found.s0.se
    settled = found.point
    assert (settled.ensemble, settled.identity, settled.replicas) == ("nvt", "molten", 32)
    np.testing.assert_allclose(settled.atoms.cell.array, np.eye(3) * found.volume.value ** (1 / 3), atol=1e-9)
    inside = settled.atoms.get_scaled_positions(wrap=False)
    assert ((inside >= 0) & (inside < 1)).all()


def test_liquids_and_crystals_find_their_cells_together(
    potential: Any, open_guards: Callable[..., Any]
) -> None:
    """Crystals by Newton's method as without the liquid, which has its own run; fixed cells stay."""
    crystal = StatePoint("fcc", _fcc(), 0.1, 2.0)
    kept = replace(_gas("kept", 1), cell_freedom="fixed")
    settings = open_guards(timestep=4.0, friction=10.0, interval=8.0, barostat_time=100.0)
    search = CellSettings(settings, Length(20.0, 5), 4)
    alone = equilibrate_cells(potential, [crystal], search, seed=1, stage="a")
    liquid = replace(crystal, name="liquid", temperature=300.0, identity="molten", replicas=4)
    found = equilibrate_cells(potential, [liquid, kept, crystal], search, seed=1, stage="a")
    assert list(found) == ["liquid", "kept", "fcc"]
    np.testing.assert_array_equal(found["fcc"].atoms.cell.array, alone["fcc"].atoms.cell.array)
    np.testing.assert_array_equal(found["kept"].atoms.cell.array, kept.atoms.cell.array)
    assert found["liquid"].ensemble == "nvt"
    assert found["liquid"].atoms.cell.volume > 1.005 * alone["fcc"].atoms.cell.volume


def test_the_volume_of_a_liquid_has_to_be_known(open_guards: Callable[..., Any]) -> None:
    settings = open_guards(timestep=5.0, friction=10.0, interval=20.0, barostat_time=200.0)
    gas = testing.IdealGas([13], 0.1)
    with pytest.raises(SamplingError, match=r"the volume of gas is not known well enough: .*raise cell_eq"):
        liquid_cells(gas, [_gas("gas", 1)], settings, Length(20.0, 5), seed=1, stage="gas")
