"""The evaluation: free-energy changes across cells, transition temperatures, and their errors."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from ase import Atoms

from mlip_refine.errors import StatisticsError
from mlip_refine.losses import FreeEnergyDifference
from mlip_refine.losses.options import FreeEnergyDifferenceOptions
from mlip_refine.quantities import GPA, KB, MEV, Measured
from mlip_refine.sampling import StatePoint, Trajectory
from mlip_refine.testing import sigma_bound
from mlip_refine.workflows.finetune.evaluation import PhaseChange, phase_change, transition
from mlip_refine.workflows.free_energy.records import CELLS as OF_CELLS
from mlip_refine.workflows.free_energy.records import LIMIT

T, P, N = 600.0, 5.0, 6
KT = KB * T
SCALED = np.random.default_rng(0).random((N, 3))


@dataclass
class _Structure:
    positions: torch.Tensor
    cell: torch.Tensor


class _Builder:
    def frames(self, positions: torch.Tensor, cells: torch.Tensor, numbers: np.ndarray) -> list[_Structure]:
        return [_Structure(x, h) for x, h in zip(positions, cells, strict=True)]


@dataclass
class Crystal:
    """Atoms tied to lattice sites that follow the cell: U = offset + bulk (V/V0 - 1)² + ½ k Σ|x - s h|²."""

    stiffness: float
    offset: float
    bulk: float = 3.0
    graphs: _Builder = field(default_factory=_Builder)

    def energies(self, structures: list[_Structure]) -> torch.Tensor:
        x, h = torch.stack([s.positions for s in structures]), torch.stack([s.cell for s in structures])
        u = x - torch.from_numpy(SCALED) @ h
        volume = torch.linalg.det(h)
        static = self.offset + self.bulk * (volume / 400 - 1) ** 2
        return static + 0.5 * self.stiffness * u.square().sum((1, 2))

    def gibbs(self, cell: np.ndarray) -> float:
        """F + PV, up to a constant of the temperature: the sites hold each atom, wherever they are."""
        volume = float(np.linalg.det(cell))
        static = self.offset + self.bulk * (volume / 400 - 1) ** 2
        return static + 1.5 * N * KT * math.log(self.stiffness) + P * GPA * volume


def _run(crystal: Crystal, cell: np.ndarray, seed: int, frames: int = 600, replicas: int = 3) -> Trajectory:
    """Exact draws."""
    atoms = Atoms(f"Ti{N}", scaled_positions=SCALED, cell=cell, pbc=True)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(replicas, frames, N, 3, generator=generator, dtype=torch.float64)
    series = torch.zeros(replicas, frames, dtype=torch.float64)
    return Trajectory(
        point=StatePoint("crystal", atoms, T, P, replicas=replicas),
        positions=torch.from_numpy(SCALED @ cell) + noise * math.sqrt(KT / crystal.stiffness),
        cells=torch.from_numpy(cell).expand(replicas, frames, 3, 3),
        model_energy=series,
        bias_energy=series,
        stress=series[..., None, None].expand(replicas, frames, 3, 3),
        kinetic_energy=series,
        kept=torch.ones(replicas, frames, dtype=torch.bool),
    )


CELL_0 = np.array([[8.0, 0, 0], [-1.5, 7.2, 0], [0, 0, 7.0]])
CELLS = {
    "the same": CELL_0,
    "isotropic": CELL_0 * 1.01,
    "two axes": CELL_0 * [0.99, 0.99, 1.03],
    "sheared": CELL_0 @ np.array([[1.0, 0.02, 0], [0.02, 1.01, 0], [0, 0, 0.98]]),
}


@pytest.mark.statistical
@pytest.mark.parametrize("name", CELLS)
def test_change_between_two_cells_is_exact(name):
    """G_θ(h1) - G_θ0(h0) from 1800 draws each, to an error below 2 meV of the whole cell."""
    before, after = Crystal(1.8, 0.1), Crystal(2.1, 0.15)
    run0, run1 = _run(before, CELL_0, 1), _run(after, CELLS[name], 2)
    found = phase_change(before, after, run0, run1)
    exact = after.gibbs(CELLS[name]) - before.gibbs(CELL_0)
    assert 0 < found.change.se < 2e-3
    assert abs(found.change.value - exact) < sigma_bound() * found.change.se
    assert np.allclose(found.cell_after, CELLS[name])
    assert 0.5 < found.overlap <= 1.0


def test_the_jacobian_counts():
    """An ideal gas in a cell 3 % larger: ΔF = -N kT ln(V1/V0), without any statistics."""

    class IdealGas(Crystal):
        def energies(self, structures: list[_Structure]) -> torch.Tensor:
            return torch.zeros(len(structures), dtype=torch.float64)

    gas, larger = IdealGas(1.0, 0.0), CELL_0 * 1.03 ** (1 / 3)
    found = phase_change(gas, gas, _run(gas, CELL_0, 1, 10), _run(gas, larger, 2, 10))
    volume = float(np.linalg.det(CELL_0))
    exact = -N * KT * math.log(1.03) + P * GPA * 0.03 * volume
    assert found.change.value == pytest.approx(exact, abs=1e-12)


@pytest.mark.statistical
def test_enthalpies_of_both_ends():
    """⟨U⟩ + PV with equipartition."""
    before, after = Crystal(1.8, 0.1), Crystal(2.1, 0.15)
    larger = CELL_0 * 1.01
    found = phase_change(before, after, _run(before, CELL_0, 3), _run(after, larger, 4))
    for enthalpy, crystal, cell in (
        (found.enthalpy_before, before, CELL_0),
        (found.enthalpy_after, after, larger),
    ):
        exact = crystal.gibbs(cell) - 1.5 * N * KT * math.log(crystal.stiffness) + 1.5 * N * KT
        assert abs(enthalpy.value - exact) < sigma_bound(2) * enthalpy.se


def test_potentials_without_overlap_are_refused():
    before, after = Crystal(1.0, 0.0), Crystal(12.0, 0.0)
    with pytest.raises(StatisticsError, match="crystal: the states overlap by"):
        phase_change(before, after, _run(before, CELL_0, 1, 50), _run(after, CELL_0, 2, 50))


def _phase_change(change: float, before: float, after: float, verdicts: tuple[str, ...] = ()) -> PhaseChange:
    """In meV/atom of a cell of N atoms; errors 0.1, 0.2 and 0.3."""
    factor = MEV * N
    parts = [
        Measured(v * factor, se * factor, "eV") for v, se in ((change, 0.1), (before, 0.2), (after, 0.3))
    ]
    return PhaseChange(*parts, 0.9, CELL_0.tolist(), CELL_0.tolist(), verdicts)


def test_transition_adds_the_changes_to_the_anchor():
    options = {"from": "hcp", "to": "bcc", "temperature": 1005.0, "pressure": 5.0, "target": 0.5}
    loss = FreeEnergyDifference("x", 1.0, FreeEnergyDifferenceOptions.model_validate(options))
    loss = loss.with_initial(Measured(-9.0, 0.25, "meV/atom"))
    changes = {
        loss.phase_from: _phase_change(2.0, 0.0, 1.0, ("hcp stopped",)),
        loss.phase_to: _phase_change(10.5, 30.0, 45.0),
    }
    found = transition(loss, changes, (N, N), OF_CELLS)
    assert found.after.value == pytest.approx(-9.0 + 10.5 - 2.0)
    assert found.after.se == pytest.approx(math.sqrt(0.25**2 + 2 * 0.1**2))
    assert found.delta_h_before.value == pytest.approx(30.0)
    assert found.delta_h_after.se == pytest.approx(0.3 * math.sqrt(2))
    assert found.transition_after.value == pytest.approx(1005.0 - 0.5 * 1005.0 / 44.5)
    assert found.notes == ("hcp stopped",)
    assert found.size == f"N = {N}"
    data = found.as_json()
    assert (data["from"], data["to"], data["n_atoms"], data["convention"]) == ("hcp", "bcc", N, OF_CELLS)
    assert data["delta_g_after"]["value"] == pytest.approx(-0.5)
    assert data["transition_temperature_before"]["value"] == pytest.approx(1005.0 - 9.0 * 1005.0 / 39.0)


def test_a_transition_in_the_limit_is_per_atom_of_each_cell():
    """The second cell has twice the atoms: 10.5 meV/atom of N are 5.25 of 2 N."""
    options = {"from": "hcp", "to": "bcc", "temperature": 1005.0, "target": 0.5}
    loss = FreeEnergyDifference("x", 1.0, FreeEnergyDifferenceOptions.model_validate(options))
    loss = loss.with_initial(Measured(-9.0, 0.0, "meV/atom"))
    changes = {loss.phase_from: _phase_change(2.0, 1.0, 1.0), loss.phase_to: _phase_change(10.5, 30.0, 44.0)}
    found = transition(loss, changes, (N, 2 * N), LIMIT)
    assert found.after.value == pytest.approx(-9.0 + 5.25 - 2.0)
    assert found.after.se == pytest.approx(math.hypot(0.1, 0.05))
    assert (found.delta_h_before.value, found.delta_h_after.value) == pytest.approx((14.0, 21.0))
    assert (found.n_atoms, found.n_atoms_to, found.convention) == (N, 2 * N, LIMIT)
    assert found.size == f"N → ∞ (from {N} and {2 * N})"
