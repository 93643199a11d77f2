"""Observables as losses: exact answers after reweighting, gradients, and options that are refused."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ase.build import bulk

from mlip_refine import testing
from mlip_refine.errors import InputError
from mlip_refine.losses import EnsembleSource, Frames, ObservableLoss, ScalarOptions, Setting
from mlip_refine.losses.ensemble.observable_options import OBSERVABLES
from mlip_refine.losses.registry import BUILT_IN, LossType, loss_types
from mlip_refine.observables import Density, RadialDistribution, average
from mlip_refine.quantities import GPA, KB

T, P, EXCESS, N = 300.0, 0.1, 0.02, 20
KT = KB * T
CUBE = bulk("Po", "sc", a=3.0, cubic=True) * (2, 2, 2)


def _evaluate(loss: ObservableLoss, frames: Frames):
    return loss.evaluate({loss.source: frames})


def _check(result, label: str, exact: float, target: float, sigma: float) -> None:
    """The value is exact to its standard error, which is small; the loss is what it should be of it."""
    found = result.diagnostics[label]
    assert abs(found.value - exact) < testing.sigma_bound(3) * found.se < 0.12 * abs(exact)
    assert float(result.value) == pytest.approx(((found.value - target) / sigma) ** 2, rel=1e-9)
    assert result.deviation.value == pytest.approx(abs(found.value - target) / sigma, rel=1e-9)
    assert result.deviation.se == pytest.approx(found.se / sigma, rel=1e-9)
    assert result.tolerance == 1.0


_MEAN_LENGTH = math.exp(math.lgamma(N + 4 / 3) - math.lgamma(N + 1)) * (KT / ((P + EXCESS) * GPA)) ** (1 / 3)


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("kind", "label", "exact"),
    [
        ("volume", "volume", (N + 1) * KT / ((P + EXCESS) * GPA) / N),
        ("density", "density", 47.867 * 1.66053907 * (P + EXCESS) * GPA / KT),
        ("lattice", "a", _MEAN_LENGTH / 2),
        ("bulk_modulus", "K_T", P + EXCESS),
        ("thermal_expansion", "alpha", 1 / T),
        ("linear_expansion", "alpha_a", 1 / (3 * T)),
        ("heat_capacity", "heat_capacity", (N + 1) / N + 1.5),
        ("enthalpy", "enthalpy", (N + 1) * KT / N),
    ],
)
def test_the_ideal_gas_at_another_pressure_is_exact(made, gas, kind, label, exact):
    target, sigma = 1.1 * exact, 0.02 * exact
    loss = made(kind, CUBE, pressure=P, target=target, uncertainty=sigma)
    _check(_evaluate(loss, gas(0, 20_000, N, P, EXCESS)), label, exact, target, sigma)


def test_records_know_the_targets_by_the_names_of_what_is_measured(made, gas):
    """Of some outputs, in the unit of the observable; of a curve none."""
    loss = made("lattice", CUBE, pressure=P, target={"a": "0.3 nm"}, uncertainty="0.001 nm")
    found = _evaluate(loss, gas(0, 100, N, P, EXCESS)).diagnostics
    assert {name: (t.value, t.uncertainty, t.unit) for name, t in loss.targets.items()} == {
        "a": (pytest.approx(3.0), pytest.approx(0.01), found["a"].unit)
    }
    curve = {"largest": "4 Å", "bins": 4, "target": [0, 0, 1, 1], "uncertainty": 1}
    assert made("radial_distribution", CUBE, **curve).targets == {}


def _spring(frames_of, n: int = 20_000, k0: float = 1.0, k1: float = 1.1):
    """An atom in a well of stiffness k0, seen by a model with k1, whose stress is diag(x², y², z²)/10."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64) * math.sqrt(KT / k0)
    squares = x.square()
    cells = 5.0 * torch.eye(3, dtype=torch.float64).expand(n, 3, 3)
    probes = {"energy": 0.5 * k1 * squares.sum(1), "stress": torch.diag_embed(squares) / 10}
    return frames_of(probes, 0.5 * k0 * squares.sum(1), x[:, None], cells)


@pytest.mark.statistical
def test_a_spring_of_another_stiffness_is_exact(made, frames_of):
    """⟨x²⟩ = kT/k1, ⟨U⟩ = 3/2 kT and C_V = 3/2 + 3/2 k_B."""
    frames = _spring(frames_of)
    configuration, kinetic = KT / 1.1 / 10 / GPA, KT / 125 / GPA
    exact = kinetic - configuration
    _check(_evaluate(made("pressure", target=1.0, uncertainty=0.1), frames), "pressure", exact, 1.0, 0.1)
    loss = made("stress", target={"yy": 1.0}, uncertainty=0.1)
    result = _evaluate(loss, frames)
    assert set(result.diagnostics) == {"yy"}
    _check(result, "yy", -exact, 1.0, 0.1)
    loss = made("heat_capacity", target=3.1, uncertainty=0.1)
    _check(_evaluate(loss, frames), "heat_capacity", 3.0, 3.1, 0.1)


def test_pressure_and_stress_follow_the_state_by_default(made, frames_of):
    pressure = made("pressure", pressure="5 GPa", uncertainty="1 kbar")
    frames = _spring(frames_of, 50)
    found = _evaluate(pressure, frames)
    assert float(found.value) == pytest.approx(((found.diagnostics["pressure"].value - 5.0) / 0.1) ** 2)
    stress = _evaluate(made("stress", pressure=5, uncertainty=0.5), frames)
    z = [(m.value + (5.0 if label[0] == label[1] else 0.0)) / 0.5 for label, m in stress.diagnostics.items()]
    assert len(z) == 6
    assert float(stress.value) == pytest.approx(sum(x * x for x in z) / 6)


@pytest.mark.statistical
def test_angles_of_a_box_are_tilted_exactly(made, frames_of):
    """Gaussian γ of width s, pulled by U = kT c γ: its mean moves by -c s²."""
    s, c, n = 2.0, 0.2, 5_000
    gamma = 90 + s * torch.randn(n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    cells = 4.0 * torch.eye(3, dtype=torch.float64).repeat(n, 1, 1)
    cells[:, 1, 0], cells[:, 1, 1] = 4 * gamma.deg2rad().cos(), 4 * gamma.deg2rad().sin()
    zero = torch.zeros(n, dtype=torch.float64)
    frames = frames_of({"energy": KT * c * gamma}, zero, torch.zeros(n, 1, 3).double(), cells, free_cell=True)
    target, uncertainty = {"gamma": 91.0, "alpha": "90 deg"}, {"gamma": 0.5, "alpha": 1}
    loss = made("cell_angles", target=target, uncertainty=uncertainty)
    result = _evaluate(loss, frames)
    found = result.diagnostics["gamma"]
    assert abs(found.value - (90 - c * s * s)) < testing.sigma_bound() * found.se < 0.5
    assert float(result.value) == pytest.approx(((found.value - 91) / 0.5) ** 2 / 2)


def test_a_curve_is_reweighted_between_two_distances(made, frames_of):
    """Frames of distance 2.25 Å and 3.25 Å whose weights are 1 : e."""
    n = 40
    positions = torch.zeros(n, 2, 3, dtype=torch.float64)
    positions[: n // 2, 1, 0], positions[n // 2 :, 1, 0] = 2.25, 3.25
    energy = torch.where(positions[:, 1, 0] < 3, 0.0, -KT)
    cells = 20.0 * torch.eye(3, dtype=torch.float64).expand(n, 3, 3)
    frames = frames_of({"energy": energy}, torch.zeros(n).double(), positions, cells)

    def shell(middle: float) -> float:
        return 2 * 8000 / (2 * 2) / (4 / 3 * math.pi * ((middle + 0.25) ** 3 - (middle - 0.25) ** 3))

    near, far = shell(2.25) / (1 + math.e), shell(3.25) * math.e / (1 + math.e)
    target = [0.0, 0, 0, 0, near, 0, far + 3, 0]
    loss = made("radial_distribution", largest=4.0, bins=8, target=target, uncertainty=2.0)
    result = _evaluate(loss, frames)
    assert float(result.value) == pytest.approx((3 / 2) ** 2 / 8)
    assert set(result.diagnostics) == {"rms", "largest"}
    assert result.diagnostics["largest"].value == pytest.approx(-1.5)
    assert result.diagnostics["rms"].value == pytest.approx(1.5 / math.sqrt(8))
    # Two states of 20 frames: var = w_1² w_2² (1/20 + 1/20), times n/(n-1)-like terms of a ratio estimator.
    w = math.e / (1 + math.e)
    expected = shell(3.25) * w * (1 - w) * math.sqrt(1 / 20 + 1 / 20) / 2
    assert result.diagnostics["largest"].se == pytest.approx(expected, rel=0.05)


def test_columns_of_a_curve_are_found_once(made, frames_of, monkeypatch):
    calls = []
    columns = RadialDistribution.columns
    monkeypatch.setattr(RadialDistribution, "columns", lambda *a: (calls.append(1), columns(*a))[1])
    loss = made("radial_distribution", largest=4.0, bins=2, target=[1.0, 1.0], uncertainty=1.0)
    zero = torch.zeros(3, dtype=torch.float64)
    cells = 5.0 * torch.eye(3, dtype=torch.float64).expand(3, 3, 3)
    values = []
    for scale in (1.0, 2.0):
        positions = scale * torch.rand(3, 2, 3, generator=torch.Generator().manual_seed(0)).double()
        frames = frames_of({"energy": zero}, zero, positions, cells)
        values += [float(_evaluate(loss, frames).value) for _ in range(3)]
    assert len(calls) == 2
    assert len(set(values[:3])) == len(set(values[3:])) == 1


@pytest.mark.parametrize("kept", [True, False])
def test_columns_that_are_kept_make_no_curve(frames_of, kept):
    """Two words of the options: one spares time, the other decides what results say."""

    class Options(ScalarOptions):
        dimension = OBSERVABLES["density"].dimension
        kind = Density
        labels = ("density",)
        columns_kept = kept

    options = Options(phase="one", temperature=300.0, target=4.0, uncertainty=1.0)
    setting = Setting(crystal=lambda _: ARGON, cell_moves=lambda _: True, resolve=Path)
    loss = ObservableLoss.bind("density", 1.0, options, setting)
    zero = torch.zeros(3, dtype=torch.float64)
    cells = 5.0 * torch.eye(3, dtype=torch.float64).expand(3, 3, 3)
    result = _evaluate(loss, frames_of({"energy": zero}, zero, torch.zeros(3, 1, 3).double(), cells))
    assert set(result.diagnostics) == set(loss.targets) == {"density"}
    assert isinstance(loss.observable, Density) is not kept


ARGON = bulk("Ar", "fcc", a=5.3, cubic=True) * (2, 2, 2)
# Options with units, lists and labels; an observable that is not here has those of `_options_of`.
GIVEN = {
    "angular_distribution": {"distance": 4.5, "bins": 6, "target": [0.005] * 6, "uncertainty": 0.002},
    "bulk_modulus": {"target": 1.0, "uncertainty": 0.3},
    "cell_angles": {"target": [90.0, 91.0, 90.0], "uncertainty": 0.5},
    "density": {"target": 1.7, "uncertainty": 0.02},
    "enthalpy": {"target": -0.05, "uncertainty": 0.01},
    "heat_capacity": {"target": "25 J/mol/K", "uncertainty": "1 J/mol/K"},
    "lattice": {"target": {"a": 5.25}, "uncertainty": 0.01},
    "linear_expansion": {"target": 1e-4, "uncertainty": 2e-5},
    "pressure": {"target": 0.1, "uncertainty": 0.05},
    "radial_distribution": {"largest": 7.0, "bins": 7, "target": [1.0] * 7, "uncertainty": 0.3},
    "stress": {"uncertainty": [0.1] * 6},
    "structure_factor": {
        "smallest": "0.5 /Å",
        "largest": "25 /nm",
        "bins": 3,
        "target": [1.0] * 3,
        "uncertainty": 0.5,
    },
    "thermal_expansion": {"target": "300 ppm/K", "uncertainty": "50 ppm/K"},
    "volume": {"target": 37.0, "uncertainty": 0.3},
}


def test_every_observable_is_a_loss_of_its_name():
    assert set(GIVEN) <= set(OBSERVABLES) < set(loss_types())
    assert all(loss_types()[name].options is OBSERVABLES[name] for name in OBSERVABLES)


@pytest.mark.parametrize("kind", sorted(k for k, v in OBSERVABLES.items() if issubclass(v, ScalarOptions)))
def test_labels_that_are_listed_without_torch_are_those_of_the_observable(kind):
    """An orthorhombic crystal has all lattice constants."""
    box = bulk("Ti", "sc", a=3.0)
    box.set_cell([3.0, 3.2, 3.5], scale_atoms=True)
    options = OBSERVABLES[kind](phase="one", temperature=300.0, target=1.0, uncertainty=1.0)
    assert options.observable(box, None).labels == options.labels


@pytest.fixture(scope="module")
def argon(frames_of) -> Callable[..., Frames]:
    """Rattled and strained crystals of argon, drawn with ε = 10 meV, seen by another ε."""
    generator = torch.Generator().manual_seed(3)
    n, sites = 10, torch.from_numpy(ARGON.positions)
    noise = [0.15 * torch.randn(n, len(ARGON), 3, generator=generator, dtype=torch.float64)]
    tilts = 0.02 * torch.randn(n, 3, 3, generator=generator, dtype=torch.float64)
    strain = torch.eye(3, dtype=torch.float64) + (tilts + tilts.mT) / 2
    cells = torch.from_numpy(ARGON.cell.array).expand(n, 3, 3)
    seen = {False: (sites + noise[0], cells), True: ((sites + noise[0]) @ strain, cells @ strain)}
    graphs = {}

    def at(epsilon: torch.Tensor, *, free_cell: bool) -> Frames:
        positions, box = seen[free_cell]
        reference = testing.LennardJones(ARGON.numbers, 0.01, 3.4, 5.2)
        if free_cell not in graphs:
            structures = reference.graphs.frames(positions, box, ARGON.numbers)
            graphs[free_cell] = reference.graphs.collate(structures)
        old = reference.evaluate(graphs[free_cell])["energy"]
        model = testing.LennardJones(ARGON.numbers, epsilon, 3.4, 5.2)
        probes = model.evaluate(graphs[free_cell], ("energy", "stress"))
        # Reweighted as if at ten times the temperature, so that all frames count.
        options = {"temperature": 3000.0, "free_cell": free_cell, "numbers": ARGON.numbers}
        return frames_of(probes, old, positions, box, **options)

    return at


def _options_of(argon: Callable[..., Frames], kind: str) -> dict[str, Any]:
    """Targets for every value of an observable, a tenth beside what the frames of argon have."""
    options = OBSERVABLES[kind](phase="one", temperature=300.0, target=1.0, uncertainty=1.0)
    observable = options.observable(ARGON, None)
    frames = argon(torch.tensor(0.011).double(), free_cell=options.cell == "free")
    values = average(observable, frames, -frames.work)
    beside = values + 0.1 * values.abs().max()
    return {
        "target": dict(zip(observable.labels, beside.tolist(), strict=True)),
        "uncertainty": 0.05 * float(values.abs().max()),
    }


# Both ways to state targets, where the frames alone can tell; by themselves for observables that are new.
EXAMPLES = [(kind, True) for kind in sorted(GIVEN)] + [
    (kind, False)
    for kind, options in sorted(OBSERVABLES.items())
    if issubclass(options, ScalarOptions) or kind not in GIVEN
]


@pytest.mark.parametrize(("kind", "given"), EXAMPLES)
def test_the_gradient_equals_finite_differences(made, argon, kind, given):
    """In ε of a Lennard-Jones crystal, through the weights and through energies and stresses, to 1e-5."""
    loss = made(kind, ARGON, **(GIVEN[kind] if given else _options_of(argon, kind)))
    free_cell = loss.options.cell == "free"

    def value(epsilon: torch.Tensor) -> torch.Tensor:
        return _evaluate(loss, argon(epsilon, free_cell=free_cell)).value

    epsilon = torch.tensor(0.011, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(value(epsilon), epsilon)
    with torch.no_grad():
        numeric = (value(epsilon + 1e-7) - value(epsilon - 1e-7)) / 2e-7
    assert abs(float(gradient)) > 0.1
    assert float(numeric) == pytest.approx(float(gradient), rel=1e-5)


def test_sources_are_shared_with_other_losses(made):
    loss = made("pressure", pressure=2, lattice=["2.95 Å", 4.68], uncertainty=1)
    assert loss.sources == (EnsembleSource("one", 300.0, 2.0, (2.95, 4.68)),)
    assert loss.probes == {"energy", "stress"}
    assert made("volume", target=17, uncertainty=1).probes == {"energy"}


@pytest.mark.parametrize("kind", sorted(k for k, options in OBSERVABLES.items() if options.cell != "any"))
def test_a_cell_that_does_not_tell_is_refused(made, argon, kind):
    loss = made(kind, ARGON, **(GIVEN.get(kind) or _options_of(argon, kind)))
    wrong = argon(torch.tensor(0.01).double(), free_cell=loss.options.cell != "free")
    with pytest.raises(InputError, match=f"the target of loss '{kind}' follows from frames"):
        _evaluate(loss, wrong)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("pressure", {"uncertainty": 1, "presure": 5}, "unknown key 'presure'.*Did you mean 'pressure'"),
        ("pressure", {"uncertainty": "1 GPA"}, "uncertainty cannot be used.*unit 'GPA'.*Did you mean 'GPa'"),
        ("pressure", {"uncertainty": 0}, "a pressure above 0 GPa"),
        ("pressure", {}, "expected the uncertainty of the target \\(GPa\\)"),
        ("density", {"uncertainty": 1}, "expected a target \\(g/cm³\\), or a table"),
        ("density", {"target": {}, "uncertainty": 1}, "expected a target"),
        (
            "density",
            {"target": True, "uncertainty": 1},
            "target cannot be used; found true, expected a density",
        ),
        ("density", {"target": 4.5, "table": "x"}, "a target or a table, not both"),
        ("density", {"target": 4.5, "uncertainty": 1, "columns": {"density": "d"}}, "a table that has these"),
        ("density", {"target": 4.5, "uncertainty": 1, "lattice": [3]}, "unknown key 'lattice'"),
        ("stress", {"target": {"xx": 0, "yyy": 0}, "uncertainty": 1}, "no 'yyy' to have a target.*mean 'yy'"),
        (
            "stress",
            {"target": [0, 0, 0], "uncertainty": 1},
            "found 3 values, expected 6 .xx, yy, zz, yz, xz, xy",
        ),
        ("stress", {"target": 0, "uncertainty": 1}, "target does not fit; found 1 value, expected 6"),
        ("stress", {"target": {"xx": 0, "yy": 0}, "uncertainty": {"xx": 1}}, "no uncertainty of yy"),
        ("lattice", {"target": 3, "uncertainty": 1, "ratios": {"a": [1, None]}}, "ratios.a"),
        ("lattice", {"target": {"c": 3}, "uncertainty": 1}, "no 'c' to have a target; expected some of a"),
        ("angular_distribution", {"target": [1], "uncertainty": 1}, "missing key 'distance'"),
        ("radial_distribution", {"target": [1], "uncertainty": 1}, r"160 \(g\(0.025\), .*, g\(7.975\)\)"),
        ("radial_distribution", {"target": [1], "uncertainty": 1, "within": [1, 2]}, "a table beside it"),
        ("structure_factor", {"target": [1], "uncertainty": 1}, "where the shells begin and end"),
        ("volumes", {}, "unknown loss 'volumes'.*Did you mean 'volume'"),
    ],
)
def test_wrong_options_are_refused_once(made, kind, options, message):
    with pytest.raises(InputError, match=message) as caught:
        made(kind, CUBE, **options)
    assert "\n" not in str(caught.value)


class OwnOptions(ScalarOptions):
    """Options of an observable of another package."""

    dimension = OBSERVABLES["density"].dimension
    kind = Density


class OwnLoss(ObservableLoss):
    """It needs nothing but options."""

    Options = OwnOptions


def test_an_observable_of_another_package_is_a_loss(made, gas, monkeypatch):
    monkeypatch.setattr("collections.OwnLoss", OwnLoss, raising=False)
    monkeypatch.setitem(BUILT_IN, "own", LossType(OwnOptions, "collections:OwnLoss", "its own"))
    frames = gas(1, 100, N, P, EXCESS)
    result = _evaluate(made("own", pressure=P, target=1.0, uncertainty=0.1), frames)
    expected = float(average(Density(), frames, -frames.work)[0])
    assert result.diagnostics["density"].value == pytest.approx(expected)
