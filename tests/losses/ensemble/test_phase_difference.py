"""Differences of phases against gases and wells with exact answers."""

import math

import pytest
import torch
from ase import Atoms

from mlip_refine.errors import InputError
from mlip_refine.quantities import GPA, KB, MEV
from mlip_refine.testing import sigma_bound

T, P, N = 300.0, 0.1, 20
KT = KB * T
BETWEEN = {"from": "one", "to": "two", "pressure": P}


@pytest.mark.statistical
def test_the_volume_difference_of_two_gases_is_exact(made, gas):
    """Models that press with c: ⟨V⟩ = (N + 1) kT/(P + c), for phases of different size."""
    loss = made("volume_difference", **BETWEEN, target=-4.0, uncertainty=0.5)
    excess, sizes = (-0.01, 0.02), (N, 2 * N)
    frames = {s: gas(i, 20_000, sizes[i], P, excess[i]) for i, s in enumerate(loss.sources)}
    result = loss.evaluate(frames)
    volumes = [(n + 1) / n * KT / ((P + c) * GPA) for n, c in zip(sizes, excess, strict=True)]
    found = result.diagnostics["delta_v"]
    assert found.unit == "Å³/atom"
    assert abs(found.value - (volumes[1] - volumes[0])) < sigma_bound() * found.se < 2.0
    assert float(result.value) == pytest.approx(((found.value + 4) / 0.5) ** 2)
    assert result.deviation.value == pytest.approx((found.value + 4) / 0.5)
    assert (result.deviation.se, result.tolerance) == (pytest.approx(found.se / 0.5), 1.0)


@pytest.mark.statistical
def test_the_enthalpy_difference_of_two_gases_is_that_of_their_models(made, gas):
    """⟨U + PV⟩ = (N + 1) kT whatever the model: only the number of atoms and an offset count."""
    loss = made("enthalpy_difference", **BETWEEN, target="0.04 eV/atom", uncertainty="1 meV/atom")
    one, two = (gas(i, 20_000, N, P, c) for i, c in enumerate((0.01, -0.01)))
    two.probes["energy"].add_(0.04 * N)
    result = loss.evaluate(dict(zip(loss.sources, (one, two), strict=True)))
    found = result.diagnostics["delta_h"]
    assert found.unit == "meV/atom"
    assert abs(found.value - 40.0) < sigma_bound() * found.se < 1.0
    assert float(result.value) == pytest.approx((found.value - 40.0) ** 2, abs=1e-9)


def _well(frames_of, x: torch.Tensor, k: torch.Tensor, k0: float, offset: float = 0.0):
    """Draws of a well of stiffness k0, seen by a model with k."""
    n = len(x)
    energy = offset + 0.5 * k * x.square().sum(1)
    cells = 5.0 * torch.eye(3, dtype=torch.float64).expand(n, 3, 3)
    return frames_of({"energy": energy}, 0.5 * k0 * x.square().sum(1), x[:, None], cells, pressure=2.0)


def test_gradient_and_error(made, frames_of):
    """By finite differences in the stiffness of a well, and errors that add in quadrature."""
    loss = made("enthalpy_difference", **BETWEEN, target=-30, uncertainty=2)
    generator = torch.Generator().manual_seed(4)
    draws = [torch.randn(60, 3, generator=generator, dtype=torch.float64) * math.sqrt(KT) for _ in range(2)]

    def result(k: torch.Tensor):
        frames = (_well(frames_of, draws[0], k, 1.0), _well(frames_of, draws[1], 1 / k, 1.0, offset=-0.05))
        return loss.evaluate(dict(zip(loss.sources, frames, strict=True)))

    k = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(result(k).value, k)
    numeric = float(result(k.detach() + 1e-5).value - result(k.detach() - 1e-5).value) / 2e-5
    assert abs(numeric) > 1e-2
    assert float(gradient) == pytest.approx(numeric, rel=1e-6)
    one = torch.tensor(1.0, dtype=torch.float64)
    expected = math.hypot(*(float(0.5 * x.square().sum(1).std()) / math.sqrt(60) for x in draws)) / MEV
    assert result(one).diagnostics["delta_h"].se == pytest.approx(expected, rel=1e-6)


def test_a_fixed_cell_has_no_volume_to_match(made, frames_of):
    loss = made("volume_difference", **BETWEEN, target=1, uncertainty=1)
    frames = _well(frames_of, torch.zeros(3, 3).double(), torch.tensor(1.0), 1.0)
    with pytest.raises(InputError, match="'volume_difference' follows from frames whose cell moves"):
        loss.evaluate(dict.fromkeys(loss.sources, frames))


def test_records_know_the_target_by_the_name_of_what_is_measured(made):
    loss = made("enthalpy_difference", **BETWEEN, target="40 meV/atom", uncertainty="2 meV/atom")
    target = loss.targets["delta_h"]
    assert (target.value, target.uncertainty, target.unit) == (40.0, 2.0, "meV/atom")


def test_phases_of_different_composition_are_refused(made):
    crystals = {"one": Atoms("Ti2O4"), "two": Atoms("Ti3O5")}
    with pytest.raises(InputError, match="different composition; found O2Ti and O5Ti3"):
        made("enthalpy_difference", crystals, **BETWEEN, target=1, uncertainty=1)
    made("enthalpy_difference", {**crystals, "two": Atoms("O2Ti")}, **BETWEEN, target=1, uncertainty=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"uncertainty": 1}, "missing key 'target'"),
        ({"target": 1, "uncertainty": -1}, "uncertainty"),
        ({"target": "1 Å³/atom", "uncertainty": 1}, "unit 'Å³/atom' is not one"),
        (
            {"target": 1, "uncertainty": 1, "to": "one"},
            "found .*one.*expected another phase",
        ),
        ({"target": 1, "uncertainty": 1, "form": "one"}, "unknown key 'form'.*Did you mean 'from'"),
    ],
)
def test_wrong_options_are_refused(made, options, message):
    with pytest.raises(InputError, match=message):
        made("enthalpy_difference", **(BETWEEN | options))
