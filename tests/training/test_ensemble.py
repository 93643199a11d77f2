"""Ensembles of analytic potentials: enthalpy, effective size, what a loss sees, refusals."""

import math
from dataclasses import replace

import pytest
import torch

from mlip_refine.errors import StatisticsError
from mlip_refine.quantities import GPA, KB
from mlip_refine.testing import sigma_bound
from mlip_refine.training.ensemble import Ensemble

T, P = 500.0, 3.0
KT = KB * T


@pytest.mark.statistical
def test_enthalpy_is_that_of_the_equipartition_theorem(wells):
    """⟨U⟩ + PV = offset + (3/2) N kT + PV from 2000 draws; the error is that of 12 modes."""
    ensemble = wells(2.0, offset=-7.0).draw(seed=1)
    found = ensemble.enthalpy(ensemble.energies[0])
    assert abs(found.value - (-7.0 + 0.5 * wells.modes * KT + P * GPA * 64)) < sigma_bound() * found.se
    independent = 2000 / ensemble.references[0].inefficiency
    assert found.se == pytest.approx(KT * math.sqrt(0.5 * wells.modes / independent), rel=0.1)
    assert ensemble.independent == pytest.approx(independent)


@pytest.mark.statistical
def test_enthalpy_is_that_of_the_current_model(wells):
    """Frames of k = 2, enthalpy of k = 2.3 with another offset."""
    ensemble, current = wells(2.0).draw(seed=1), wells(2.3, offset=0.5)
    found = ensemble.enthalpy(current.energies(ensemble.structures))
    assert abs(found.value - (0.5 + 0.5 * wells.modes * KT + P * GPA * 64)) < sigma_bound() * found.se


def test_stopped_replicas_do_not_count(wells):
    trajectory = wells(2.0).trajectory(seed=2, n_frames=10)
    alive = torch.tensor([True, False, True, True])
    stopped = replace(
        trajectory,
        kept=alive[:, None].expand(4, 10),
        verdicts=("wells, replica 1, step 7: stopped",),
    )
    drawn = Ensemble.from_trajectory(wells(2.0), stopped, "stage", {})
    assert len(drawn) == drawn.latest.n_frames == 30
    last, cells = drawn.latest.ends
    assert torch.equal(last, trajectory.positions[alive][:, -1])
    assert cells.shape == (3, 3, 3)
    assert drawn.latest.verdicts == stopped.verdicts


@pytest.mark.statistical
def test_effective_size_of_two_gaussians(wells):
    """n_eff/n = ⟨w⟩²/⟨w²⟩ = [k1²/(k0 (2 k1 - k0))]^(-d/2), d = 12, in the limit; 20000 draws, 5 %."""
    before, after = wells(2.0), wells(2.2)
    ensemble = before.draw(seed=3, n_frames=5000)
    k0, k1 = before.stiffness, after.stiffness
    exact = (k1**2 / (k0 * (2 * k1 - k0))) ** -6
    assert 0.5 < exact < 0.96
    assert ensemble.n_eff(after.energies(ensemble.structures)) == pytest.approx(exact, rel=0.05)
    assert ensemble.n_eff(ensemble.energies[0]) == pytest.approx(1.0)


def test_too_few_independent_frames_are_refused(wells):
    drawn = wells(2.0).draw(4, n_frames=10, inefficiency=8.0)
    drawn.require_frames(5.0)
    with pytest.raises(StatisticsError) as caught:
        drawn.require_frames(10.0)
    assert "the ensemble wells-500K rests on 5 independent samples, fewer than 10" in str(caught.value)
    assert "about 80 frames in place of 40" in str(caught.value)


def test_frames_of_one_draw_are_plain_reweighting(wells):
    """work = β(U_θ - U_ref) whatever the pressure, for PV cancels at equal cells."""
    ensemble = wells(2.0).draw(seed=5, n_frames=5)
    energy = wells(2.5).energies(ensemble.structures)
    frames = ensemble.frames({"energy": energy})
    assert torch.allclose(frames.work, (energy - ensemble.energies[0]) / KT, atol=1e-12)
    assert frames.n_atoms == wells.modes / 3
    assert frames.inefficiency == pytest.approx(ensemble.references[0].inefficiency)
    assert frames.shift.value == 0.0
    assert frames.mean_enthalpy == ensemble.enthalpy(energy)
