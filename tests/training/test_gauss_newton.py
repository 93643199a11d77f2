"""Gauss-Newton: rows against gradients and finite differences, steps against dense algebra."""

import math
from types import SimpleNamespace

import pytest
import torch

from mlip_refine import testing
from mlip_refine.config import Training
from mlip_refine.errors import MlipRefineError
from mlip_refine.losses import FreeEnergyDifference
from mlip_refine.losses.options import FreeEnergyDifferenceOptions, ReplayOptions
from mlip_refine.losses.replay import Replay
from mlip_refine.potential import batching
from mlip_refine.quantities import Measured
from mlip_refine.testing import sigma_bound
from mlip_refine.training import gauss_newton, streaming, trust_region
from mlip_refine.training import replay as replay_gradient
from mlip_refine.training.gauss_newton import FLOOR, GaussNewton, QuadraticModel
from mlip_refine.training.replay import backpropagate_batch, batch_value, linearise_batch
from mlip_refine.training.streaming import (
    backpropagate,
    blank_rows,
    ensemble_losses,
    ensemble_rows,
    evaluate_losses,
    further_probes,
    potential_rows,
    probe_energies,
    scaled_residuals,
    wanted_probes,
)
from mlip_refine.training.trust_region import ProposedStep, Settled

TARGETS = [
    {"temperature": "600 K", "lattice": [2.95, 4.68], "constants": {"C11": 160, "C13": 70, "C44": 45}},
    {"temperature": "300 K", "lattice": [2.95, 4.68], "constants": {"C33": 180}},
]


@pytest.fixture
def drawn(titanium, hcp, bcc, make_ensemble):
    """A loss of two ensembles with several residuals each, and one of a free energy, with their frames."""
    node = {"type": "elastic_constants", "phase": "hcp", "pressure": 0, "targets": TARGETS, "weight": 0.7}
    elastic = testing.loss_of(node | {"born_every": 2}, hcp)
    options = {"from": "hcp", "to": "bcc", "temperature": 1155.0, "pressure": 5.0}
    checked = FreeEnergyDifferenceOptions.model_validate(options)
    stable = FreeEnergyDifference("g", 2.0, checked, Measured(-4.0, 0.2, "meV/atom"))
    crystals = {"hcp": hcp, "bcc": bcc}
    losses = [elastic, stable]
    return losses, {s: make_ensemble(s, crystals[s.phase], 5) for loss in losses for s in loss.sources}


def _probes(potential, losses, ensembles):
    wanted = wanted_probes(losses)
    return {
        s: {"energy": u, **further_probes(potential, ensembles[s].structures, wanted[s])}
        for s, u in probe_energies(potential, ensembles).items()
    }


def _gradient(potential):
    parameters = potential.trainable_parameters().values()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("chunk_atoms", [20, 900])
def test_rows_give_the_streamed_gradient(titanium, drawn, monkeypatch, chunk_atoms):
    """2 Σ s ∂s is ∂ of the weighted losses, to 1e-9; the squares add up to the losses."""
    losses, ensembles = drawn
    probes = _probes(titanium, losses, ensembles)
    results, adjoints = ensemble_losses(losses, ensembles, probes)
    for source, adjoint in adjoints.items():
        backpropagate(titanium, ensembles[source].structures, adjoint)
    wanted = _gradient(titanium)
    monkeypatch.setitem(batching.CHUNK_ATOMS, "cpu", chunk_atoms)
    same, (values, rows) = ensemble_rows(titanium, losses, ensembles, probes)
    assert float((2 * values @ rows - wanted).norm()) < 1e-9 * float(wanted.norm())
    assert len(rows) == len(values) == 9
    for loss, part in zip(losses, values.split([8, 1]), strict=True):
        total = loss.weight * float(results[loss.name].value.detach())
        assert float(part.square().sum()) == pytest.approx(total, rel=1e-12)
        assert same[loss.name].components == results[loss.name].components


def test_a_row_equals_finite_differences(titanium, drawn):
    """Of all residuals along a random direction, to 1e-4 of the largest."""
    losses, ensembles = drawn
    _, (_, rows) = ensemble_rows(titanium, losses, ensembles, _probes(titanium, losses, ensembles))
    generator = torch.Generator().manual_seed(3)
    named = titanium.trainable_parameters()
    direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in named.items()}
    start, step, ends = titanium.parameters(), 1e-6, []
    for sign in (1, -1):
        titanium.set_parameters(start | {n: start[n] + sign * step * d for n, d in direction.items()})
        _, results = evaluate_losses(losses, ensembles, _probes(titanium, losses, ensembles))
        ends.append(torch.cat([scaled_residuals(loss, results[loss.name]).detach() for loss in losses]))
    numeric = (ends[0] - ends[1]) / (2 * step)
    exact = rows @ torch.cat([d.flatten() for d in direction.values()])
    assert float((numeric - exact).abs().max()) < 1e-4 * float(exact.abs().max())


def test_rows_of_a_static_loss_give_its_gradient(titanium, hcp):
    node = {"type": "elastic_constants", "phase": "hcp", "method": "static", "thermal": False}
    loss = testing.loss_of(node | {"targets": TARGETS, "pressure": 0, "weight": 0.3}, hcp)
    result, (values, rows) = potential_rows(titanium, loss)
    loss.backpropagate(titanium)
    wanted = _gradient(titanium)
    assert float((2 * values @ rows - wanted).norm()) < 1e-9 * float(wanted.norm())
    assert float(result.value.detach()) * 0.3 == pytest.approx(float(values.square().sum()), rel=1e-12)


REPLAYS = (
    Replay("one", 0.7, ReplayOptions(energy_weight=30.0, stress_weight=200.0)),
    Replay("other", 2.0, ReplayOptions(energy_weight=5.0, forces_weight=0.0, stress_weight=0.0)),
)


def test_a_batch_is_linearised_with_its_own_gradient(titanium, frames):
    backpropagate_batch(titanium, REPLAYS, frames, 0.5)
    wanted = _gradient(titanium)
    results, gradient, rows = linearise_batch(
        titanium, REPLAYS, frames, 0.5, torch.Generator().manual_seed(1)
    )
    assert float((gradient - wanted).norm()) < 1e-9 * float(wanted.norm())
    assert len(rows) == replay_gradient.SIGNS * len(frames)
    total = 0.5 * sum(loss.weight * float(results[loss.name].value) for loss in REPLAYS)
    assert batch_value(titanium, REPLAYS, frames, 0.5) == pytest.approx(total, rel=1e-10)


@pytest.mark.statistical
def test_sampled_curvature_is_that_of_the_outputs(titanium, frames):
    """The mean of (row·δ)² over 40 draws is δᵀJᵀDJδ by finite differences of the outputs."""
    generator = torch.Generator().manual_seed(5)
    named = titanium.trainable_parameters()
    direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in named.items()}
    start, step = titanium.parameters(), 1e-6
    graphs = titanium.graphs.collate([f.structure for f in frames])
    outputs = []
    for sign in (1, -1):
        titanium.set_parameters(start | {n: start[n] + sign * step * d for n, d in direction.items()})
        found = titanium.evaluate(graphs, ("energy", "forces", "stress"))
        outputs.append({n: v.detach() for n, v in found.items()})
    titanium.set_parameters(start)
    change = {n: (v - outputs[1][n]) / (2 * step) for n, v in outputs[0].items()}
    atoms = torch.tensor([len(f.forces) for f in frames], dtype=torch.float64)
    with_stress = torch.tensor([f.stress is not None for f in frames])
    per_atom = (change["energy"] / atoms).square().mean()
    one = 30 * per_atom + 100 * change["forces"].square().mean()
    one = one + 200 * change["stress"][with_stress].square().mean()
    exact = 2 * 0.5 * float(0.7 * one + 2.0 * 5 * per_atom)
    flat = torch.cat([d.flatten() for d in direction.values()])
    signs, sampled = torch.Generator().manual_seed(7), []
    for _ in range(40):
        _, _, rows = linearise_batch(titanium, REPLAYS, frames, 0.5, signs)
        sampled.append(float((rows @ flat).square().sum()))
    values = torch.tensor(sampled)
    error = float(values.std()) / math.sqrt(len(values))
    assert error < 0.2 * exact
    assert abs(float(values.mean()) - exact) < sigma_bound(dof=39) * error


def test_a_step_is_that_of_dense_algebra():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(7, 40, generator=generator, dtype=torch.float64)
    rows[:, 3] = 0.0
    gradient = torch.randn(40, generator=generator, dtype=torch.float64)
    model = QuadraticModel(rows, gradient)
    diagonal = rows.square().sum(0)
    scale = (diagonal * diagonal.mean()).sqrt() + FLOOR * diagonal.mean()
    for damping in (1e-3, 1.0, 30.0):
        wanted = -torch.linalg.solve(rows.T @ rows + damping * torch.diag(scale), gradient)
        assert torch.allclose(model.step(damping), wanted, rtol=1e-8, atol=1e-10)
        change = float(gradient @ wanted + 0.5 * (rows @ wanted).square().sum())
        assert model.change(wanted) == pytest.approx(change, rel=1e-10)


def _linear(n: int = 30, k: int = 4) -> tuple[SimpleNamespace, torch.Tensor, torch.Tensor]:
    """Parameters, and k linear residuals A p - b of them."""
    generator = torch.Generator().manual_seed(2)
    named = {"p": torch.nn.Parameter(torch.randn(n, generator=generator, dtype=torch.float64))}

    def put(values):
        named["p"].data.copy_(values["p"])

    potential = SimpleNamespace(
        trainable_parameters=lambda: named,
        parameters=lambda: {"p": named["p"].detach().clone()},
        set_parameters=put,
    )
    shape = torch.randn(k, n, generator=generator, dtype=torch.float64)
    return potential, shape, torch.randn(k, generator=generator, dtype=torch.float64)


def _residuals(potential, shape, wanted):
    return shape @ potential.trainable_parameters()["p"].detach() - wanted


def _objective(potential, shape, wanted):
    return lambda: float(_residuals(potential, shape, wanted).square().sum())


class _Trial:
    """Steps that are judged by a function."""

    def __init__(self, objective, settle=lambda fewest: 1.0):
        self.objective, self.settle, self.refused = objective, settle, 0

    def refuse(self):
        self.refused += 1


def test_one_step_with_little_damping_meets_linear_targets():
    potential, shape, wanted = _linear()
    optimiser = GaussNewton(potential, Training(optimiser="gauss_newton", damping=1e-8), 0)
    optimiser._add_squares((_residuals(potential, shape, wanted), shape))
    objective = _objective(potential, shape, wanted)
    before = objective()
    norm = optimiser.step(_Trial(objective))
    assert norm > 1
    assert objective() < 1e-10 * before
    assert optimiser.damping == pytest.approx(1e-8 / gauss_newton.FACTOR)


def test_a_step_that_does_harm_is_made_shorter_until_it_helps():
    """Where the objective rises but for short steps, damping grows; where it always does, nothing moves."""
    potential, shape, wanted = _linear()
    start, objective = potential.parameters()["p"], _objective(potential, shape, wanted)

    def stiff() -> float:
        far = float((potential.parameters()["p"] - start).norm()) > 0.1
        return objective() + 1e6 * far

    optimiser = GaussNewton(potential, Training(optimiser="gauss_newton", damping=1e-2), 0)
    optimiser._add_squares((_residuals(potential, shape, wanted), shape))
    before = objective()
    optimiser.step(_Trial(stiff))
    assert 0 < float((potential.parameters()["p"] - start).norm()) <= 0.1
    assert objective() < before
    assert optimiser.damping > 1e-1
    here, damping = potential.parameters()["p"], optimiser.damping
    optimiser.zero_grad()
    optimiser._add_squares((_residuals(potential, shape, wanted), shape))
    trial = _Trial(lambda: math.nan)
    optimiser.step(trial)
    assert torch.equal(potential.parameters()["p"], here)
    assert trial.refused == 1
    assert optimiser.damping == pytest.approx(gauss_newton.FACTOR * damping)


def test_shortened_steps_are_damped_more():
    potential, shape, wanted = _linear()
    optimiser = GaussNewton(potential, Training(optimiser="gauss_newton", damping=1e-3), 0)
    optimiser._add_squares((_residuals(potential, shape, wanted), shape))
    start = potential.parameters()["p"]

    def settle(fewest: float) -> float:
        potential.set_parameters({"p": torch.lerp(start, potential.parameters()["p"], 0.3)})
        return 0.3

    optimiser.step(_Trial(_objective(potential, shape, wanted), settle))
    assert optimiser.damping == pytest.approx(1e-3 * gauss_newton.FACTOR)


def test_state_survives():
    potential, *_ = _linear()
    one, two = (GaussNewton(potential, Training(optimiser="gauss_newton"), seed) for seed in (0, 1))
    one.damping = 0.37
    torch.rand(3, generator=one._signs)
    two.load_state_dict(one.state_dict())
    assert two.damping == 0.37
    assert torch.equal(torch.rand(4, generator=two._signs), torch.rand(4, generator=one._signs))


def test_refusals(monkeypatch):
    potential, shape, wanted = _linear()
    optimiser = GaussNewton(potential, Training(optimiser="gauss_newton"), 0)
    optimiser._add_squares((_residuals(potential, shape, wanted) * math.inf, shape))
    before = potential.parameters()["p"]
    with pytest.raises(MlipRefineError, match="not finite"):
        optimiser.step(_Trial(lambda: 0.0))
    assert torch.equal(potential.parameters()["p"], before)
    monkeypatch.setattr(streaming, "LARGEST", 1e-8)
    sized = SimpleNamespace(trainable_parameters=potential.trainable_parameters, dtype=torch.float64)
    with pytest.raises(MlipRefineError, match=r"make replay\.batch_size smaller"):
        blank_rows(sized, 7)
    with pytest.raises(MlipRefineError, match="frozen"):
        GaussNewton(SimpleNamespace(trainable_parameters=dict), Training(optimiser="gauss_newton"), 0)
    unsquared = SimpleNamespace(name="pft", weight=1.0)
    with pytest.raises(MlipRefineError, match="'pft' gave no residuals"):
        scaled_residuals(unsquared, SimpleNamespace(residuals=None))
    off = SimpleNamespace(residuals=torch.ones(3), value=torch.tensor(1.1))
    with pytest.raises(MlipRefineError, match=r"is 1\.1, but the mean square of its residuals 1"):
        scaled_residuals(unsquared, off)


def test_a_refused_step_samples_anew_what_was_too_poor(monkeypatch):
    """Sources that were exhausted at any length of the step; energies are those before it."""
    ends = iter([Settled(0.01, {"a": 1}, ("a",)), Settled(0.02, {"a": 2}, ("b",))])
    region = SimpleNamespace(settle=lambda *_: next(ends))
    monkeypatch.setattr(trust_region, "TrustRegion", lambda _: region)
    ensembles, energies = {"a": 0, "b": 0, "c": 0}, {"a": 5}
    step = ProposedStep(None, {}, ensembles, energies, {"a": 0.51}, 0.5, lambda _: 0.0)
    assert (step.settle(), step.settle()) == (0.01, 0.02)
    step.refuse()
    assert step.end == Settled(0.0, {"a": 5}, ("a", "b"))


@pytest.mark.parametrize(
    ("limited", "fewest", "thresholds"),
    [(True, 0.05, [0.5]), (True, 0.0, [0.5]), (False, 0.05, [0.05]), (False, 0.0, [])],
)
def test_frames_must_tell_what_a_step_did(monkeypatch, limited, fewest, thresholds):
    """Gauss-Newton keeps some frames also without a trust region, AdamW does not look."""
    asked = []

    def region(threshold):
        asked.append(threshold)
        return SimpleNamespace(settle=lambda *_: Settled(0.4, {}, ()))

    monkeypatch.setattr(trust_region, "TrustRegion", region)
    step = ProposedStep(None, {}, {}, {}, {"a": 1.0}, 0.5 if limited else 0.0, lambda _: 0.0)
    assert step.settle(fewest) == (0.4 if thresholds else 1.0)
    assert asked == thresholds


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"optimiser": "gauss_newton", "learning_rate": 2e-3}, "learning_rate"),
        ({"optimiser": "gauss_newton", "ema_decay": 0.5}, "ema_decay"),
        ({"optimiser": "gauss_newton", "schedule": "alternate"}, "schedule"),
        ({"damping": 0.1}, "damping"),
    ],
)
def test_options_of_the_other_optimiser_are_refused(given, key):
    with pytest.raises(ValueError, match=key):
        Training.model_validate(given)
