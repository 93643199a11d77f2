"""Free-energy matching on analytic ensembles: value, sign, error and gradient."""

import math

import numpy as np
import pytest
import torch

from mlip_refine import testing
from mlip_refine.errors import InputError, MlipRefineError
from mlip_refine.losses import Frames, FreeEnergyDifference
from mlip_refine.quantities import GPA, KB, MEV, Measured
from mlip_refine.testing import sigma_bound

T, P, N = 600.0, 2.0, 5
KT = KB * T
BETA = 1 / KT


def _loss(**options: object) -> FreeEnergyDifference:
    node = {"type": "free_energy_difference", "from": "one", "to": "two", "temperature": T, "pressure": P}
    loss = testing.loss_of(node | options)
    assert isinstance(loss, FreeEnergyDifference)
    return loss.with_initial(Measured(3.0, 0.1, "meV/atom"))


def _frames(energy: torch.Tensor, reference: torch.Tensor, n_atoms: int = N, **weights: object) -> Frames:
    """Cells with PV from 1 to 2 eV."""
    pv = torch.linspace(1.0, 2.0, len(energy), dtype=torch.float64)
    return Frames(
        probes={"energy": energy},
        positions=torch.zeros(len(energy), n_atoms, 3, dtype=torch.float64),
        cells=torch.diag_embed((pv / (P * GPA))[:, None] ** torch.tensor([1.0, 0.0, 0.0])),
        numbers=np.full(n_atoms, 22),
        masses=torch.ones(n_atoms, dtype=torch.float64),
        temperature=T,
        pressure=P,
        free_cell=True,
        log_q=-BETA * (reference + pv),
        **weights,
    )


def _pair(seed: int, n: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference energies, and energies of the current model some kT/3 away."""
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(n, generator=generator, dtype=torch.float64)
    return reference, reference + 0.3 * KT * torch.randn(n, generator=generator, dtype=torch.float64)


def test_gradient_is_that_of_the_dynamic_targets():
    """Fuchs and Zavadlav: F*_I = ΔF^II + ΔG_θ0 and F*_II = ΔF^I - ΔG_θ0, held without gradient.

    Each of the two terms moves one phase only; together they have exactly the gradient of (ΔG_θ)².
    """
    loss = _loss(uncertainty=0.3)
    (ref_one, now_one), (ref_two, now_two) = _pair(0), _pair(1, 30)
    leaves = [x.clone().requires_grad_() for x in (now_one, now_two)]
    frames = {
        loss.phase_from: _frames(leaves[0], ref_one, shift=Measured(0.02, 0.0, "eV")),
        loss.phase_to: _frames(leaves[1], ref_two, shift=Measured(-0.01, 0.0, "eV")),
    }
    ours = torch.autograd.grad(loss.evaluate(frames).value, leaves)

    def change(now: torch.Tensor, reference: torch.Tensor, shift: float) -> torch.Tensor:
        return shift - KT * torch.log(torch.exp(-BETA * (now - reference)).mean())

    df_one, df_two = change(leaves[0], ref_one, 0.02), change(leaves[1], ref_two, -0.01)
    delta_g0 = 3.0 * MEV * N
    wanted_one, wanted_two = (df_two + delta_g0).detach(), (df_one - delta_g0).detach()
    targets = (df_one - wanted_one).square() + (df_two - wanted_two).square()
    theirs = torch.autograd.grad(targets / (0.3 * MEV * N) ** 2, leaves)
    for a, b in zip(ours, theirs, strict=True):
        assert float(b.abs().max()) > 0
        assert torch.allclose(a, b, rtol=1e-11, atol=0)


def test_value_sign_and_target():
    """A constant c added to phase two raises ΔG = G_two - G_one by c, exactly and without error."""
    loss = _loss(target=1.5, uncertainty=0.5)
    reference, _ = _pair(2)
    result = loss.evaluate(
        {
            loss.phase_from: _frames(reference - 0.4 * MEV * N, reference),
            loss.phase_to: _frames(reference + 2.0 * MEV * N, reference),
        }
    )
    assert result.diagnostics["delta_g"].value == pytest.approx(3.0 + 2.4, abs=1e-9)
    assert result.diagnostics["delta_g"].se == pytest.approx(0.1, abs=1e-9)
    assert float(result.value) == pytest.approx(((5.4 - 1.5) / 0.5) ** 2, rel=1e-9)
    assert result.deviation is not None
    assert result.deviation.value == pytest.approx(3.9, abs=1e-9)
    assert result.components == {loss.name: pytest.approx(float(result.value))}


@pytest.mark.statistical
def test_gaussians_give_the_exact_difference():
    """A well of stiffness k0 → k1 in phase two: ΔF = (3/2) kT ln(k1/k0), from 20000 draws."""
    loss = _loss()
    k0, k1 = 2.0, 2.3
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(20000, 3, generator=generator, dtype=torch.float64) * math.sqrt(KT / k0)
    squares = 0.5 * x.square().sum(-1)
    result = loss.evaluate(
        {
            loss.phase_from: _frames(k0 * squares, k0 * squares),
            loss.phase_to: _frames(k1 * squares, k0 * squares),
        }
    )
    found, exact = result.diagnostics["delta_g"], 3.0 + 1.5 * KT * math.log(k1 / k0) / (MEV * N)
    sampled = math.sqrt(found.se**2 - 0.1**2)
    assert abs(found.value - exact) < sigma_bound() * sampled < 0.1 * abs(exact - 3.0)


@pytest.mark.statistical
def test_errors_of_anchor_shifts_and_samples_add_in_quadrature():
    loss = _loss()
    reference, now = _pair(4)
    shift = Measured(0.0, 0.2 * MEV * N, "eV")
    still = {loss.phase_from: _frames(reference, reference), loss.phase_to: _frames(reference, reference)}
    moved = {
        loss.phase_from: _frames(reference, reference, shift=shift),
        loss.phase_to: _frames(now, reference),
    }
    weights = torch.exp(-BETA * (now - reference))
    sampled = KT * float(weights.std() / weights.mean()) / math.sqrt(len(now)) / (MEV * N)
    assert loss.evaluate(still).diagnostics["delta_g"].se == pytest.approx(0.1)
    expected = math.sqrt(0.1**2 + 0.2**2 + sampled**2)
    assert loss.evaluate(moved).diagnostics["delta_g"].se == pytest.approx(expected, rel=0.03)
    correlated = moved | {loss.phase_to: _frames(now, reference, inefficiency=4.0)}
    expected = math.sqrt(0.1**2 + 0.2**2 + 4 * sampled**2)
    assert loss.evaluate(correlated).diagnostics["delta_g"].se == pytest.approx(expected, rel=0.1)


def test_entropy_from_enthalpies():
    """ΔS = (ΔH - ΔG)/T, with both errors."""
    loss = _loss()
    reference, _ = _pair(5)
    enthalpies = Measured(0.0, 0.5 * MEV * N, "eV"), Measured(63.0 * MEV * N, 1.2 * MEV * N, "eV")
    frames = {
        source: _frames(reference, reference, mean_enthalpy=h)
        for source, h in zip(loss.sources, enthalpies, strict=True)
    }
    entropy = loss.evaluate(frames).diagnostics["delta_s"]
    assert entropy.value == pytest.approx(60.0 / T)
    assert entropy.se == pytest.approx(math.sqrt(0.5**2 + 1.2**2 + 0.1**2) / T)
    assert entropy.unit == "meV/atom/K"
    bare = {source: _frames(reference, reference) for source in loss.sources}
    assert "delta_s" not in loss.evaluate(bare).diagnostics


def test_cells_of_unequal_size_change_per_atom():
    """Both energies move by a constant: 2 meV per each of 5 atoms, 6 of 8; ΔH is per atom, too."""
    loss = _loss()
    (reference_one, _), (reference_two, _) = _pair(6), _pair(7)
    frames = {
        loss.phase_from: _frames(
            reference_one + 2 * MEV * 5,
            reference_one,
            shift=Measured(0.0, 0.3 * MEV * 5, "eV"),
            mean_enthalpy=Measured(10 * MEV * 5, 0.0, "eV"),
        ),
        loss.phase_to: _frames(
            reference_two + 6 * MEV * 8,
            reference_two,
            n_atoms=8,
            shift=Measured(0.0, 0.4 * MEV * 8, "eV"),
            mean_enthalpy=Measured(73 * MEV * 8, 0.0, "eV"),
        ),
    }
    found = loss.evaluate(frames).diagnostics
    assert found["delta_g"].value == pytest.approx(3.0 + 4.0)
    assert found["delta_g"].se == pytest.approx(math.sqrt(0.1**2 + 0.3**2 + 0.4**2))
    assert found["delta_s"].value == pytest.approx((63.0 - 7.0) / T)


def test_a_phase_is_not_compared_with_itself():
    with pytest.raises(InputError, match=r"found .*one.*expected another phase"):
        _loss(to="one")


def test_needs_the_initial_difference():
    loss = _loss()
    loss._initial = None
    with pytest.raises(MlipRefineError, match="no initial free-energy difference"):
        _ = loss.initial


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -5}, "temperature"),
        ({"uncertainty": 0}, "uncertainty"),
        ({"temperatur": 5}, "Did you mean 'temperature'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        _loss(**options)
