"""The streamed gradient is the naive one, whatever the chunks, in the memory of one chunk."""

import subprocess
import sys

import pytest
import torch

from mlip_refine.errors import MlipRefineError
from mlip_refine.losses import EnsembleLoss, EnsembleSource, FreeEnergyDifference
from mlip_refine.losses.options import FreeEnergyDifferenceOptions
from mlip_refine.potential import Potential, Work, batching
from mlip_refine.quantities import Measured
from mlip_refine.training.streaming import backpropagate, ensemble_losses, probe_energies

STATE = {"temperature": 1155.0, "pressure": 5.0}


@pytest.fixture
def matched(titanium, hcp, bcc, make_ensemble):
    """Two losses that share a phase, and ensembles of a model that has moved since they were drawn."""
    losses = []
    for name, to, weight in (("first", "bcc", 1.0), ("second", "strained", 0.5)):
        options = FreeEnergyDifferenceOptions.model_validate({"from": "hcp", "to": to, **STATE})
        losses.append(FreeEnergyDifference(name, weight, options, Measured(-4.0, 0.2, "meV/atom")))
    strained = bcc.copy()
    strained.set_cell(strained.cell.array * [1.02, 1.0, 0.98], scale_atoms=True)
    crystals = {"hcp": hcp, "bcc": bcc, "strained": strained}
    sources = sorted({s for loss in losses for s in loss.sources})
    ensembles = {s: make_ensemble(s, crystals[s.phase], 4) for s in sources}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in titanium.trainable_parameters().values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.mul_(1 + 2e-4 * noise)
    return losses, ensembles


def _total(potential: Potential, losses: list[EnsembleLoss], ensembles, *, graph: bool) -> torch.Tensor:
    """The weighted sum of losses with one graph over all frames."""
    frames = {}
    with torch.set_grad_enabled(graph):
        for source, ensemble in ensembles.items():
            energy = potential.evaluate(potential.graphs.collate(ensemble.structures))["energy"]
            frames[source] = ensemble.frames({"energy": energy})
        return sum(loss.weight * loss.evaluate({s: frames[s] for s in loss.sources}).value for loss in losses)


def _energies(potential: Potential, ensembles) -> dict:
    return {s: {"energy": u} for s, u in probe_energies(potential, ensembles).items()}


def _streamed(potential: Potential, losses, ensembles) -> dict[str, torch.Tensor]:
    _, adjoints = ensemble_losses(losses, ensembles, _energies(potential, ensembles))
    for source, adjoint in adjoints.items():
        backpropagate(potential, ensembles[source].structures, adjoint)
    return {name: p.grad.clone() for name, p in potential.trainable_parameters().items()}


def _naive(potential: Potential, losses, ensembles) -> dict[str, torch.Tensor]:
    named = potential.trainable_parameters()
    total = _total(potential, losses, ensembles, graph=True)
    return dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))


def _norm(gradients: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([g.flatten() for g in gradients.values()]).norm())


@pytest.mark.parametrize("chunk_atoms", [1, 40, 900])
def test_equals_the_naive_gradient_for_any_chunks(titanium, matched, monkeypatch, chunk_atoms):
    losses, ensembles = matched
    naive = _naive(titanium, losses, ensembles)
    monkeypatch.setitem(batching.CHUNK_ATOMS, "cpu", chunk_atoms)
    streamed = _streamed(titanium, losses, ensembles)
    assert _norm(naive) > 1.0
    scale = _norm(naive)
    for name, gradient in naive.items():
        assert float((streamed[name] - gradient).norm()) < 1e-9 * max(float(gradient.norm()), 1e-3 * scale), (
            name
        )
    assert _norm({n: streamed[n] - naive[n] for n in naive}) < 1e-9 * scale


def test_equals_finite_differences(titanium, matched):
    """Central differences along the largest component of six tensors, to 1e-4."""
    losses, ensembles = matched
    gradients = _streamed(titanium, losses, ensembles)
    parameters = titanium.trainable_parameters()
    largest = sorted(gradients, key=lambda name: float(gradients[name].abs().max()))[-6:]
    for name in largest:
        flat, index = parameters[name].data.view(-1), int(gradients[name].abs().argmax())
        value, values = float(flat[index]), []
        step = 1e-5 * max(1.0, abs(value))
        for sign in (1, -1):
            flat[index] = value + sign * step
            values.append(float(_total(titanium, losses, ensembles, graph=False)))
        flat[index] = value
        numeric = (values[0] - values[1]) / (2 * step)
        assert numeric == pytest.approx(float(gradients[name].view(-1)[index]), rel=1e-4), name


def test_the_weight_of_a_loss_scales_its_gradient(titanium, matched):
    losses, ensembles = matched
    energies = _energies(titanium, ensembles)
    _, one = ensemble_losses(losses[:1], ensembles, energies)
    losses[0].weight = 3.0
    _, three = ensemble_losses(losses[:1], ensembles, energies)
    for source in losses[0].sources:
        assert torch.allclose(three[source]["energy"], 3 * one[source]["energy"], rtol=1e-12)
    unused = (set(ensembles) - set(losses[0].sources)).pop()
    assert isinstance(unused, EnsembleSource)
    assert not one[unused]["energy"].any()


def _largest_graph(potential: Potential, ensembles, losses) -> int:
    """Most bytes that autograd held at once for the backward passes of a streamed gradient."""
    held: dict[int, int] = {}
    most = 0

    class Saved:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal most
            self.tensor = tensor
            held[id(self)] = tensor.numel() * tensor.element_size()
            most = max(most, sum(held.values()))

        def __del__(self) -> None:
            held.pop(id(self), None)

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        _streamed(potential, losses, ensembles)
    return most


def test_holds_the_graph_of_one_chunk_only(titanium, hcp, bcc, make_ensemble, matched, monkeypatch):
    losses = matched[0][:1]
    monkeypatch.setitem(batching.CHUNK_ATOMS, "cpu", 32)
    crystals = {"hcp": hcp, "bcc": bcc}
    held = []
    for n_frames in (2, 12):
        ensembles = {s: make_ensemble(s, crystals[s.phase], n_frames) for s in losses[0].sources}
        held.append(_largest_graph(titanium, ensembles, losses))
    assert held[0] > 1e6
    assert held[1] < 1.1 * held[0]


@pytest.mark.parametrize("backward", [False, True])
def test_a_chunk_that_runs_out_of_memory_is_counted_once(titanium, matched, cramped, capsys, backward):
    """Backward it fails after nearly all gradients of the chunk are known."""
    losses, ensembles = matched
    whole = _streamed(titanium, losses, ensembles)
    for parameter in titanium.trainable_parameters().values():
        parameter.grad = None
    limited = cramped(40, backward=backward)
    halved = _streamed(titanium, losses, ensembles)
    kinds = (Work.GRADIENT,) if backward else (Work.ENERGY, Work.GRADIENT)
    assert len(capsys.readouterr().err.splitlines()) == len(kinds)
    assert max(limited.sizes) > 40
    assert all(titanium.chunker.limit(work).atoms <= 40 for work in kinds)
    scale = _norm(whole)
    assert _norm({n: halved[n] - whole[n] for n in whole}) < 1e-12 * scale
    limited.sizes.clear()
    source, ensemble = next(iter(ensembles.items()))
    backpropagate(titanium, ensemble.structures, {"energy": torch.ones(4)})
    assert max(limited.sizes) <= 40, source
    assert capsys.readouterr().err == ""


def test_frames_without_an_adjoint_cost_nothing(titanium, matched, cramped):
    _, ensembles = matched
    ensemble, seen = next(iter(ensembles.values())), cramped(1000, backward=False)
    backpropagate(titanium, ensemble.structures, {"energy": torch.tensor([0.0, 1.0, 0.0, 0.0])})
    assert seen.sizes == [16]
    backpropagate(titanium, ensemble.structures, {"energy": torch.zeros(4)})
    assert seen.sizes == [16]


def test_a_single_frame_that_does_not_fit_is_named(titanium, matched, cramped):
    cramped(10, backward=True)
    ensemble = next(iter(matched[1].values()))
    with pytest.raises(MlipRefineError, match=r"gradients of a single system of 16 atoms with \d+ edges"):
        backpropagate(titanium, ensemble.structures, {"energy": torch.ones(4)})
    assert all(p.grad is None for p in titanium.trainable_parameters().values())


MEMORY = """
import sys
import numpy as np, torch
from ase.build import bulk
from mlip_refine.potential import Potential
from mlip_refine.training.streaming import backpropagate
from mlip_refine.workflows.bench.gradient import peak_memory
torch.set_num_threads(1)
potential = Potential.load("titanium-compact", default_dtype="float64")
atoms = bulk("Ti", "hcp", a=2.95, c=4.68).repeat((3, 3, 3))
noise = np.random.default_rng(0).normal(0, 0.1, (int(sys.argv[1]), len(atoms), 3))
cells = torch.from_numpy(np.array(atoms.cell)).expand(len(noise), 3, 3)
structures = potential.graphs.frames(torch.from_numpy(atoms.positions + noise), cells, atoms.numbers)
backpropagate(potential, structures[:32], {"energy": torch.ones(32)})
before = peak_memory(potential.device)
backpropagate(potential, structures, {"energy": torch.ones(len(structures))})
print(peak_memory(potential.device) - before)
"""


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_frames():
    """50 and 200 frames of 54 atoms: the same to 80 MiB, where one graph would take 0.6 and 2.5 GB."""
    grown = []
    for n in (50, 200):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", MEMORY, str(n)], capture_output=True, text=True, check=True
        )
        grown.append(float(done.stdout.split()[-1]))
    assert abs(grown[1] - grown[0]) < 80 * 2**20
