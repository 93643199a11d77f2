"""Phonon frequencies as a loss: exact on balls and springs, gradients of differences, chunks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from ase.build import bulk
from torch import Tensor

from mlip_refine import testing
from mlip_refine.config import config_from_dict
from mlip_refine.data.phonons.reference import PhononReference
from mlip_refine.errors import InputError
from mlip_refine.losses import PhononFrequencies, loss_specs
from mlip_refine.potential import Potential, batching

STENCIL = {2: -1 / 12, 1: 2 / 3, -1: -2 / 3, -2: 1 / 12}
SALT, TITANIUM = bulk("NaCl", "rocksalt", a=5.64), bulk("Ti", "hcp", a=2.93, c=4.65)


def loss_of(*references: PhononReference, **options: Any) -> PhononFrequencies:
    """Return the loss as a config builds it."""
    node = {"type": "phonon_frequencies", "data": "unused", **options}
    config = config_from_dict({"name": "x", "potential": {"model": "m"}, "losses": [node]})
    (spec,) = loss_specs(config.losses)
    return PhononFrequencies(spec.name, spec.weight, spec.options, references)


@pytest.fixture(scope="module")
def salt(phonons_of) -> PhononReference:
    return phonons_of(SALT, (2, 2, 2), lambda atoms: testing.bond_springs(atoms, {2.9: 2.5}))


@pytest.fixture(scope="module")
def hcp(phonons_of) -> PhononReference:
    return phonons_of(TITANIUM, (2, 2, 2), lambda atoms: testing.bond_springs(atoms, {3.1: 2.4, 4.3: 0.5}))


@pytest.fixture(scope="module")
def titanium() -> Potential:
    """Titanium in float64; tests must leave it as it is."""
    return Potential.load("titanium-compact")


def gradients(loss: PhononFrequencies, potential: Potential) -> tuple[float, list[Tensor]]:
    value = loss.evaluate(potential).value
    parameters = list(potential.trainable_parameters().values())
    found = torch.autograd.grad(value, parameters, materialize_grads=True, allow_unused=True)
    return float(value.detach()), list(found)


def mean_square(squares: Tensor) -> float:
    """Mean squared frequency, THz², of eigenvalues in eV/Å²/amu: the mean of 15.633² λ."""
    return 15.63330**2 * float(squares.mean())


@pytest.mark.parametrize("mesh", [None, (3, 3, 3)])
def test_springs_that_are_all_too_stiff(salt, springs, mesh):
    """ω_θ = √1.21 ω: a loss of 0.1² ⟨ω²⟩, whose derivative in ln k is 0.1 · 1.1 ⟨ω²⟩; ⟨ω²⟩ = 2K⟨1/m⟩."""
    potential = springs(SALT, {2.9: (1.21 * 2.5, 2.82)})
    value, (gradient,) = gradients(loss_of(salt, mesh=mesh, floor=0.02), potential)
    mean = mean_square(2 * 2.5 / torch.from_numpy(SALT.get_masses()))
    assert value == pytest.approx(0.01 * mean, rel=1e-5)
    assert float(gradient[0]) * 1.21 * 2.5 == pytest.approx(0.11 * mean, rel=1e-5)


def test_no_deviation_from_its_own_reference(salt, springs):
    result = loss_of(salt).evaluate(springs(SALT, {2.9: (2.5, 2.82)}))
    assert float(result.value.detach()) < 1e-16
    assert result.diagnostics["mean absolute error"].unit == "THz"
    assert result.diagnostics["mean absolute error"].value < 1e-6
    assert result.deviation is None


@pytest.mark.parametrize("options", [{}, {"error": "huber", "mesh": (2, 3, 1)}, {"error": "l1"}], ids=str)
def test_gradients_are_those_of_differences(hcp, titanium, options):
    """Along a random change of all parameters, relative to their size; acoustic modes at Γ among them."""
    potential, loss = Potential.from_module(titanium.module), loss_of(hcp, **options)
    random, start = torch.Generator().manual_seed(6), potential.parameters()
    change = {
        name: p.std().nan_to_num(1.0) * torch.randn(p.shape, generator=random).double()
        for name, p in start.items()
    }
    _, found = gradients(loss, potential)
    pairs = zip(potential.trainable_parameters(), found, strict=True)
    slope = sum(float((change[name] * gradient).sum()) for name, gradient in pairs)
    h, difference = 1e-5, 0.0
    for steps, weight in STENCIL.items():
        with potential.holding({n: p + steps * h * change[n] for n, p in start.items()}), torch.no_grad():
            difference += weight / h * float(loss.evaluate(potential).value)
    assert slope == pytest.approx(difference, rel=1e-4)


def test_chunks_and_double_precision_give_the_same(hcp, titanium, monkeypatch):
    single = Potential.load("titanium-compact", default_dtype="float32")
    whole, one = gradients(loss_of(hcp), titanium)
    fine, double = gradients(loss_of(hcp, precision="float64"), single)
    monkeypatch.setitem(batching.CHUNK_ATOMS, "cpu", 16)
    parts, many = gradients(loss_of(hcp), titanium)
    assert parts == pytest.approx(whole, rel=1e-12)
    assert fine == pytest.approx(whole, rel=1e-12)
    for a, b, c in zip(one, many, double, strict=True):
        assert (b - a).norm() <= 1e-9 * a.norm()
        assert (c - a).norm() <= 1e-6 * a.norm()


def test_unstable_modes_count_below_zero(salt, springs):
    """A spring that pushes: the model's frequencies are minus those of the reference."""
    potential = springs(SALT, {2.9: (-2.5, 2.82)})
    result = loss_of(salt, error="l1").evaluate(potential)
    stable = loss_of(salt, error="l1").evaluate(springs(SALT, {2.9: (1e-12, 2.82)}))
    assert float(result.value.detach()) == pytest.approx(2 * float(stable.value.detach()), rel=1e-6)


def test_force_constants_are_needed(salt):
    with pytest.raises(InputError, match="has displacements but no force constants"):
        loss_of(replace(salt, force_constants=None))
    with pytest.raises(InputError, match="floor"):
        loss_of(salt, floor=0.0)
