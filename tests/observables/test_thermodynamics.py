"""Fluctuation formulas on ensembles whose answers are known: the ideal gas and harmonic crystals."""

import pytest
import torch
from torch import Tensor

from mlip_refine.errors import InputError
from mlip_refine.observables import average, measure
from mlip_refine.observables.cell import Density, Lattice, Pressure, Stress
from mlip_refine.observables.thermodynamics import (
    BulkModulus,
    Enthalpy,
    HeatCapacityP,
    HeatCapacityV,
    LinearExpansion,
    ThermalExpansion,
)
from mlip_refine.quantities import GPA, KB
from mlip_refine.testing import sigma_bound

T, P, N = 300.0, 0.1, 20
KT = KB * T


@pytest.fixture
def gas(make_sample, gaussian):
    """Ideal gas of N atoms in NPT: volumes of the density V^N exp(-βPV), so ⟨V⟩ = (N + 1) kT/P."""

    def draw(n: int):
        waits = -torch.special.ndtr(gaussian(n, N + 1)).log().sum(1)
        volumes = waits * KT / (P * GPA)
        eye = torch.eye(3, dtype=torch.float64)
        return make_sample(
            positions=torch.zeros(n, N, 3, dtype=torch.float64),
            cells=volumes[:, None, None] ** (1 / 3) * eye,
            probes={"energy": torch.zeros(n), "stress": torch.zeros(n, 3, 3)},
            temperature=T,
            pressure=P,
            free_cell=True,
        )

    return draw


def check(observable, sample, *exact: float, tolerance: float) -> None:
    """Values agree with the truth to their errors, and the errors are small enough to tell."""
    for found, value in zip(measure(observable, sample, lambda _: 1.0), exact, strict=True):
        assert abs(found.value - value) < sigma_bound(5) * found.se, (found, value)
        assert found.se < tolerance * abs(value)


@pytest.mark.statistical
def test_ideal_gas_at_constant_pressure(gas) -> None:
    """⟨V⟩ = (N+1) kT/P, var V = (N+1)(kT/P)²: K_T = P, α = 1/T, C_P = (N+1)/N + 3/2, ⟨N kT/V⟩ = P."""
    sample = gas(20_000)
    check(BulkModulus(), sample, P, tolerance=0.02)
    check(ThermalExpansion(), sample, 1 / T, tolerance=0.02)
    check(HeatCapacityP(), sample, (N + 1) / N + 1.5, tolerance=0.02)
    check(Pressure(), sample, P, tolerance=0.01)
    check(Enthalpy(), sample, (N + 1) * KT / N, tolerance=0.01)


@pytest.mark.statistical
def test_mean_density_of_the_ideal_gas(gas) -> None:
    """⟨1/V⟩ = P/(N kT) for the density V^N exp(-βPV)."""
    sample = gas(20_000)
    exact = N * 47.867 * 1.66053907 * P * GPA / (N * KT)
    check(Density(), sample, exact, tolerance=0.01)


@pytest.mark.statistical
def test_linear_expansion_of_the_ideal_gas(gas) -> None:
    """d ln⟨V^⅓⟩/dT = 1/(3T), for both constants of a cubic box with either ratio."""
    observable = LinearExpansion(Lattice({"a": (2, 2, None), "c": (None, None, 3)}))
    assert observable.labels == ("alpha_a", "alpha_c")
    check(observable, gas(20_000), 1 / (3 * T), 1 / (3 * T), tolerance=0.02)


def harmonic(make_sample, modes: Tensor, offset: float = 0.0):
    """A crystal of unit springs: U = ½ kT Σ z² over its modes."""
    energy = offset + 0.5 * KT * modes.square().sum(1)
    atoms = (modes.shape[1] + 3) // 3
    positions = torch.zeros(len(modes), atoms, 3, dtype=torch.float64)
    return make_sample(positions=positions, probes={"energy": energy}, temperature=T)


@pytest.mark.statistical
@pytest.mark.parametrize("offset", [0.0, -3.0e6])
def test_harmonic_crystal_has_three_k_per_atom(make_sample, gaussian, offset: float) -> None:
    """var U = (3N-3)/2 (kT)²: C_V = 3/2 (N-1)/N + 3/2, also with all electrons in the energy."""
    sample = harmonic(make_sample, gaussian(10_000, 3 * N - 3), offset)
    exact = 1.5 * (N - 1) / N + 1.5
    check(HeatCapacityV(), sample, exact, tolerance=0.02)
    joule = average(HeatCapacityV("J/mol/K"), sample) / average(HeatCapacityV(), sample)
    assert float(joule) == pytest.approx(8.31446, abs=1e-5)


def test_a_fluctuation_has_the_derivative_of_reweighting(make_sample, gaussian) -> None:
    """Central differences of C_V in a parameter of U agree with autograd through weights and energies."""
    modes = gaussian(200, 9)
    reference = 0.5 * KT * modes.square().sum(1)

    def at(k: Tensor) -> Tensor:
        energy = reference + 0.1 * KT * k * modes[:, :3].pow(4).sum(1)
        sample = make_sample(positions=torch.zeros(200, 4, 3), probes={"energy": energy}, temperature=T)
        return average(HeatCapacityV(), sample, -(energy - reference) / KT)

    k, step = torch.tensor(0.3, dtype=torch.float64), 1e-4
    numeric = (at(k + step) - at(k - step)) / (2 * step)
    exact = torch.autograd.functional.jacobian(at, k)
    torch.testing.assert_close(exact, numeric, rtol=1e-6, atol=1e-9)


def test_stress_is_in_voigt_order_and_tensile_positive(make_sample) -> None:
    """A configurational stress in every component, and the kinetic part -N kT/V in the first three."""
    tensor = torch.tensor([[[1.0, 6.0, 5.0], [6.0, 2.0, 4.0], [5.0, 4.0, 3.0]]])
    sample = make_sample(probes={"stress": tensor * GPA}, temperature=T)
    kinetic = KT / 1000 / GPA
    found = average(Stress(), sample).tolist()
    assert found == pytest.approx([1 - kinetic, 2 - kinetic, 3 - kinetic, 4, 5, 6], rel=1e-6)
    assert float(average(Pressure(), sample)) == pytest.approx(kinetic - 2.0, rel=1e-6)


def test_ensembles_that_do_not_tell_are_refused(make_sample, gas) -> None:
    fixed, free = make_sample(n=3, probes={"energy": torch.zeros(3)}), gas(3)
    for observable in (BulkModulus(), ThermalExpansion(), HeatCapacityP()):
        with pytest.raises(InputError, match="expected npt"):
            average(observable, fixed)
    with pytest.raises(InputError, match="expected nvt"):
        average(HeatCapacityV(), free)
    with pytest.raises(InputError, match="k_B, J/mol/K"):
        HeatCapacityV("cal/mol/K")


def test_fluctuations_that_vanish_have_no_error(make_sample) -> None:
    """Equal frames: C_V is the kinetic 3/2, exactly."""
    sample = make_sample(probes={"energy": torch.full((5,), -2.0)})
    (found,) = measure(HeatCapacityV(), sample, lambda _: 1.0)
    assert found.value == pytest.approx(1.5)
    assert found.se == 0.0
