"""Ensembles of analytic potentials: effective size, chained free energies, refusals."""

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from ase import Atoms

from mlip_refine.errors import StatisticsError
from mlip_refine.quantities import GPA, KB
from mlip_refine.sampling import StatePoint, Trajectory
from mlip_refine.training.ensembles import Ensemble
from mlip_refine.training.resampling import needs_redraw

T, P, N = 500.0, 3.0, 4
KT = KB * T
SITES = np.array([[0.0, 0, 0], [2, 0, 0], [0, 2, 0], [0, 0, 2]])


@dataclass
class _Positions:
    """Stands for a structure: an analytic potential needs no neighbours."""

    positions: torch.Tensor
    cell: torch.Tensor


class _Builder:
    def frames(self, positions: torch.Tensor, cells: torch.Tensor, numbers: np.ndarray) -> list[_Positions]:
        return [_Positions(x, h) for x, h in zip(positions, cells, strict=True)]


@dataclass
class Wells:
    """U = offset + ½ k Σ|x - site|², the interface of a potential that an ensemble needs."""

    stiffness: float
    offset: float = 0.0
    graphs: _Builder = field(default_factory=_Builder)

    def energies(self, structures: list[_Positions]) -> torch.Tensor:
        x = torch.stack([s.positions for s in structures]) - torch.from_numpy(SITES)
        return self.offset + 0.5 * self.stiffness * x.square().sum((1, 2))

    def parameters(self) -> dict[str, torch.Tensor]:
        return {"stiffness": torch.tensor(self.stiffness), "offset": torch.tensor(self.offset)}

    def free_energy(self) -> float:
        """Configurational, up to a constant of the temperature."""
        return self.offset + 1.5 * N * KT * math.log(self.stiffness)


def _point(replicas: int) -> StatePoint:
    atoms = Atoms("Ti4", positions=SITES, cell=[4.0, 4, 4], pbc=True)
    return StatePoint("wells", atoms, T, P, replicas=replicas)


def _drawn(wells: Wells, seed: int, n_frames: int = 500, replicas: int = 4) -> Ensemble:
    """Exact draws in place of molecular dynamics."""
    generator = torch.Generator().manual_seed(seed)
    shape = (replicas, n_frames, N, 3)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    positions = torch.from_numpy(SITES) + noise * math.sqrt(KT / wells.stiffness)
    point = _point(replicas)
    zeros = torch.zeros(replicas, n_frames, dtype=torch.float64)
    trajectory = Trajectory(
        point=point,
        positions=positions,
        cells=torch.from_numpy(np.array(point.atoms.cell)).expand(replicas, n_frames, 3, 3).contiguous(),
        model_energy=zeros,
        bias_energy=zeros,
        stress=zeros[..., None, None].expand(replicas, n_frames, 3, 3),
        kept=torch.ones(replicas, n_frames, dtype=torch.bool),
    )
    return Ensemble.from_trajectory(wells, trajectory, f"seed-{seed}")


def test_enthalpy_is_that_of_the_equipartition_theorem():
    """⟨U⟩ + PV = offset + (3/2) N kT + PV from 2000 draws, within 3 sigma; the error is that of 12 modes."""
    ensemble = _drawn(Wells(2.0, offset=-7.0), seed=1)
    found = ensemble.enthalpy()
    assert abs(found.value - (-7.0 + 1.5 * N * KT + P * GPA * 64)) < 3 * found.se
    independent = 2000 / ensemble.inefficiency
    assert found.se == pytest.approx(KT * math.sqrt(1.5 * N / independent), rel=0.1)
    assert ensemble.independent == pytest.approx(independent)


def test_stopped_replicas_do_not_count():
    whole = _drawn(Wells(2.0), seed=2, n_frames=10)
    positions = torch.stack([s.positions for s in whole.structures]).view(4, 10, N, 3)
    kept = torch.tensor([True, False, True, True])
    zeros = torch.zeros(4, 10, dtype=torch.float64)
    trajectory = Trajectory(
        point=_point(4),
        positions=positions,
        cells=torch.eye(3, dtype=torch.float64).expand(4, 10, 3, 3) * 4,
        model_energy=zeros,
        bias_energy=zeros,
        stress=zeros[..., None, None].expand(4, 10, 3, 3),
        kept=kept[:, None].expand(4, 10),
        verdicts=("wells, replica 1, step 7: stopped",),
    )
    ensemble = Ensemble.from_trajectory(Wells(2.0), trajectory, "stage")
    assert len(ensemble.structures) == 30
    last, cells = ensemble.ends
    assert torch.equal(last, positions[kept][:, -1])
    assert cells.shape == (3, 3, 3)
    assert ensemble.verdicts == trajectory.verdicts


def test_effective_size_of_two_gaussians():
    """n_eff/n = ⟨w⟩²/⟨w²⟩ = [k1²/(k0 (2 k1 - k0))]^(-d/2), d = 12, in the limit; 20000 draws, 5 %."""
    before, after = Wells(2.0), Wells(2.2)
    ensemble = _drawn(before, seed=3, n_frames=5000)
    k0, k1 = before.stiffness, after.stiffness
    exact = (k1**2 / (k0 * (2 * k1 - k0))) ** -6
    assert 0.5 < exact < 0.96
    energy = after.energies(ensemble.structures)
    assert ensemble.n_eff(energy) / 20000 == pytest.approx(exact, rel=0.05)
    assert ensemble.n_eff(ensemble.energy) == pytest.approx(20000)
    assert needs_redraw(ensemble, energy, exact + 0.05)
    assert not needs_redraw(ensemble, energy, exact - 0.05)


def test_chain_of_references_is_the_exact_free_energy():
    """k 2.0 → 2.3 → 2.7 with an offset: ΔF = offset + (3/2) N kT ln(k1/k0), within 3 sigma."""
    chain = [Wells(2.0), Wells(2.3, 0.01), Wells(2.7, -0.02)]
    current = _drawn(chain[0], seed=10)
    for seed, (old, new) in enumerate(pairwise(chain), start=11):
        fresh = _drawn(new, seed=seed)
        here, there = new.energies(current.structures), old.energies(fresh.structures)
        current = current.continued_by(fresh, here, there)
    exact = chain[-1].free_energy() - chain[0].free_energy()
    assert 0 < current.shift.se < 0.02 * exact
    assert abs(current.shift.value - exact) < 3 * current.shift.se
    assert current.shift.unit == "eV"
    assert current.stage == "seed-12"


def test_error_of_a_chain_is_honest():
    """Over 60 repeats of one link, the spread equals the stated error within 25 % (2.7 sigma)."""
    old, new = Wells(2.0), Wells(2.4)
    exact = new.free_energy() - old.free_energy()
    deviations, errors = [], []
    for seed in range(60):
        first, second = _drawn(old, 2 * seed, 100), _drawn(new, 2 * seed + 1, 100)
        first, second = (replace(e, inefficiency=1.0) for e in (first, second))
        link = first.continued_by(second, new.energies(first.structures), old.energies(second.structures))
        deviations.append(link.shift.value - exact)
        errors.append(link.shift.se)
    assert np.sqrt(np.mean(np.square(deviations))) == pytest.approx(np.mean(errors), rel=0.25)
    assert abs(np.mean(deviations)) < 3 * np.mean(errors) / math.sqrt(60)


def test_a_chain_without_overlap_is_refused():
    old, new = Wells(2.0), Wells(20.0)
    first, second = _drawn(old, 1, 50), _drawn(new, 2, 50)
    with pytest.raises(StatisticsError, match="the chain of references of wells: the states overlap by"):
        first.continued_by(second, new.energies(first.structures), old.energies(second.structures))


def test_too_few_independent_frames_are_refused():
    ensemble = replace(_drawn(Wells(2.0), 4, n_frames=10), inefficiency=8.0)
    ensemble.require_frames(5.0)
    with pytest.raises(StatisticsError) as caught:
        ensemble.require_frames(10.0)
    assert "the ensemble wells rests on 5 independent samples, fewer than 10" in str(caught.value)
    assert "about 80 frames in place of 40" in str(caught.value)


def test_frames_carry_what_reweighting_needs():
    """work = β(U_θ - U_ref) whatever the pressure: PV cancels at equal cells."""
    ensemble = _drawn(Wells(2.0), seed=5, n_frames=5)
    energy = Wells(2.5).energies(ensemble.structures)
    frames = ensemble.frames(energy)
    assert torch.allclose(frames.work, (energy - ensemble.energy) / KT, atol=1e-12)
    assert frames.n_atoms == N
    assert frames.inefficiency == ensemble.inefficiency
    assert frames.enthalpy == ensemble.enthalpy()
