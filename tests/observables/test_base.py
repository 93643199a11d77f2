import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mlip_refine.errors import InputError, StatisticsError
from mlip_refine.observables import Observable, Sample, average, measure
from mlip_refine.quantities import GPA, KB
from mlip_refine.testing import sigma_bound

KT = KB * 300.0


class Square(Observable):
    """Mean of x², unit variance for a spring of stiffness kT."""

    labels = ("x2",)
    unit = "Å²"

    def columns(self, sample: Sample) -> Tensor:
        return sample.positions[:, :, 0].square()


class Energy(Observable):
    labels = ("U",)
    unit = "eV"

    def columns(self, sample: Sample) -> Tensor:
        return sample.energy[:, None]


class Variance(Observable):
    """Mean and variance of x from the means of x and x²."""

    labels = ("mean", "variance")
    unit = ""

    def columns(self, sample: Sample) -> Tensor:
        x = sample.positions[:, 0, 0]
        return torch.stack([x, x.square()], dim=1)

    def derive(self, means: Tensor, sample: Sample) -> Tensor:
        return torch.stack([means[0], means[1] - means[0].square()])


def oscillator(make_sample, x: Tensor, stiffness: Tensor | float = KT) -> Sample:
    """Frames of one coordinate with the energy ½ k x²."""
    positions = torch.nn.functional.pad(x[:, None, None], (0, 2))
    return make_sample(positions=positions, probes={"energy": 0.5 * stiffness * x.square()})


def test_without_weights_an_average_is_the_plain_mean(make_sample, gaussian) -> None:
    x = gaussian(500)
    sample = oscillator(make_sample, x)
    mean, variance = average(Variance(), sample)
    torch.testing.assert_close(mean, x.mean())
    torch.testing.assert_close(variance, x.var(correction=0))
    weighted = average(Variance(), sample, torch.full((500,), 3.0, dtype=torch.float64))
    torch.testing.assert_close(weighted, torch.stack([mean, variance]))


@pytest.mark.statistical
def test_the_derivative_of_a_reweighted_mean_is_exact(make_sample, gaussian) -> None:
    """⟨x²⟩ = kT/k, so d⟨x²⟩/dk = -kT/k² = -1/kT at k = kT; 160,000 draws, within eight standard errors."""
    x = gaussian(160_000)
    k = torch.tensor(KT, dtype=torch.float64, requires_grad=True)
    sample = oscillator(make_sample, x, k)
    log_w = -(sample.energy - sample.energy.detach()) / KT
    value = average(Square(), sample, log_w)[0]
    (slope,) = torch.autograd.grad(value, k)
    assert float(value.detach()) == pytest.approx(1.0, abs=0.02)
    assert float(slope) * KT == pytest.approx(-1.0, abs=0.06)


def test_the_gradient_holds_the_covariance_and_the_explicit_part(make_sample, gaussian) -> None:
    """∂⟨U⟩ = ⟨∂U⟩ - β(⟨U ∂U⟩ - ⟨U⟩⟨∂U⟩), term by term on the same frames."""
    x = gaussian(200)
    k = torch.tensor(KT, dtype=torch.float64, requires_grad=True)
    sample = oscillator(make_sample, x, k)
    log_w = -(sample.energy - sample.energy.detach()) / KT
    (slope,) = torch.autograd.grad(average(Energy(), sample, log_w)[0], k)
    u, du = 0.5 * KT * x.square(), 0.5 * x.square()
    expected = du.mean() - ((u * du).mean() - u.mean() * du.mean()) / KT
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=0.0)


def test_finite_differences_agree_with_the_reweighted_derivative(make_sample, gaussian) -> None:
    x = gaussian(300)

    def at(k: Tensor) -> Tensor:
        sample = oscillator(make_sample, x, k)
        return average(Variance(), sample, -(sample.energy - 0.5 * KT * x.square()) / KT)

    k = torch.tensor(KT, dtype=torch.float64)
    step = 1e-4 * KT
    numeric = (at(k + step) - at(k - step)) / (2 * step)
    exact = torch.autograd.functional.jacobian(at, k)
    torch.testing.assert_close(exact, numeric, rtol=1e-6, atol=1e-6)


def test_the_error_of_a_mean_is_the_textbook_one(make_sample, gaussian) -> None:
    x = gaussian(1000)
    mean, _ = measure(Variance(), oscillator(make_sample, x), lambda _: 1.0)
    assert mean.value == pytest.approx(float(x.mean()))
    assert mean.se == pytest.approx(float(x.std()) / math.sqrt(1000))


@pytest.mark.statistical
def test_errors_of_derived_values_cover_correlated_series(make_sample, gaussian, replicas) -> None:
    """AR(1) of ρ = 0.8: over 400 series the scatter of mean and variance is what `measure` says, to 20 %."""
    noise, rho = gaussian(400, 2, 1000), 0.8
    x = noise.clone()
    for t in range(1, 1000):
        x[..., t] = rho * x[..., t - 1] + math.sqrt(1 - rho**2) * noise[..., t]
    found = [measure(Variance(), oscillator(make_sample, s.reshape(-1)), replicas(2)) for s in x]
    for j, exact in enumerate((0.0, 1.0)):
        values = torch.tensor([f[j].value for f in found])
        errors = torch.tensor([f[j].se for f in found])
        assert float(values.std() / errors.square().mean().sqrt()) == pytest.approx(1.0, abs=0.2)
        inside = ((values - exact).abs() < errors).double().mean()
        assert 0.55 < float(inside) < 0.8


@pytest.mark.statistical
def test_errors_of_reweighted_values_cover_the_truth(make_sample, gaussian) -> None:
    """Frames of k, averages at 1.3 k: ⟨x²⟩ = 1/1.3. The scatter over 600 draws is what `measure` says."""
    found = []
    for x in gaussian(600, 400):
        sample = oscillator(make_sample, x)
        found.append(measure(Square(), sample, lambda _: 1.0, -0.15 * x.square())[0])
    values, errors = torch.tensor([(f.value, f.se) for f in found]).T
    assert float(values.mean()) == pytest.approx(
        1 / 1.3, abs=sigma_bound(2) * float(values.std()) / math.sqrt(600) + 2e-3
    )
    assert float(values.std() / errors.square().mean().sqrt()) == pytest.approx(1.0, abs=0.15)


def test_one_frame_has_a_value_and_no_error(make_sample, gaussian) -> None:
    (value,) = measure(Square(), oscillator(make_sample, gaussian(1)), lambda _: 1.0)
    assert math.isfinite(value.value)
    assert math.isinf(value.se)


def test_no_frames_are_refused(make_sample) -> None:
    sample = make_sample(positions=torch.zeros(0, 1, 3, dtype=torch.float64), n=0, cells=torch.zeros(0, 3, 3))
    with pytest.raises(StatisticsError, match="no samples"):
        average(Square(), sample)


def test_a_frame_that_is_not_finite_is_named(make_sample, gaussian) -> None:
    x = gaussian(10)
    x[7] = torch.nan
    with pytest.raises(StatisticsError, match=r"index \[7, 0\]"):
        average(Square(), oscillator(make_sample, x))


def test_derived_quantities_of_a_sample(make_sample) -> None:
    """Enthalpy with the pressure of the state, stress with the kinetic part of an ideal gas."""
    cells = torch.diag_embed(torch.tensor([[2.0, 3.0, 4.0], [2.0, 3.0, 5.0]], dtype=torch.float64))
    probes = {"energy": torch.tensor([1.0, 2.0]), "stress": torch.zeros(2, 3, 3)}
    sample = make_sample(cells=cells, probes=probes, pressure=5.0)
    assert sample.volumes.tolist() == pytest.approx([24.0, 30.0])
    assert sample.enthalpy.tolist() == pytest.approx([1 + 120 * GPA, 2 + 150 * GPA])
    assert sample.total_stress.dtype is torch.float64
    torch.testing.assert_close(
        sample.total_stress[1], -KT / 30.0 * torch.eye(3, dtype=torch.float64), rtol=1e-12, atol=1e-15
    )


def test_missing_probes_and_wrong_ensembles_are_input_errors(make_sample) -> None:
    sample = make_sample(n=2)
    with pytest.raises(InputError, match="needs the probe 'stress'"):
        sample.probe("stress")
    with pytest.raises(InputError, match="found a fixed cell, expected npt"):
        sample.require_free_cell("the bulk modulus")
    sample.require_fixed_cell("C_v")


@pytest.mark.parametrize("given", [{"cells": torch.zeros(3, 3, 3)}, {"probes": {"energy": torch.zeros(1)}}])
def test_frames_that_do_not_fit_together_are_refused(
    make_sample: Callable[..., Sample], given: dict[str, object]
) -> None:
    with pytest.raises(InputError, match="differ in number"):
        make_sample(n=2, positions=torch.zeros(2, 1, 3, dtype=torch.float64), **given)
