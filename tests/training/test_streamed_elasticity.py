"""Streamed gradients of stresses and second derivatives, and losses on the potential itself."""

import numpy as np
import pytest
import torch

from mlip_refine import testing
from mlip_refine.crystals.elasticity import static_elasticity
from mlip_refine.errors import InputError
from mlip_refine.losses import EnsembleSource
from mlip_refine.losses.elastic import static as elastic_constants
from mlip_refine.quantities import GPA, VOIGT
from mlip_refine.training.streaming import (
    backpropagate,
    ensemble_losses,
    further_probes,
    probe_energies,
    wanted_probes,
)

CELL = (2.95, 4.68)
HOT = {"temperature": "600 K", "lattice": list(CELL), "constants": {"C11": 160, "C13": 70, "C44": 45}}
COLD = {**HOT, "temperature": "300 K"}


def _loss(crystal=None, potential=None, **options):
    node = {"type": "elastic_constants", "phase": "hcp", "pressure": 0, "targets": [HOT, COLD], **options}
    return testing.loss_of(node, crystal, potential)


@pytest.fixture(params=["fluctuation", pytest.param("deformation", marks=pytest.mark.slow)])
def reweighted(request, hcp, make_ensemble):
    """A loss with the ensembles that it asks for."""
    loss = _loss(hcp, method=request.param, born_every=2, kind="isothermal")
    ensembles = {}
    for source in loss.sources:
        atoms = hcp.copy()
        for (i, j), e in zip(VOIGT, source.strain or (0,) * 6, strict=True):
            strain = np.zeros((3, 3))
            strain[i, j] = strain[j, i] = e
            atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
        ensembles[source] = make_ensemble(source, atoms, 6)
    return loss, ensembles


def _probes(potential, loss, ensembles):
    wanted = wanted_probes([loss])
    return {
        s: {"energy": u, **further_probes(potential, ensembles[s].structures, wanted[s])}
        for s, u in probe_energies(potential, ensembles).items()
    }


def test_the_gradient_equals_finite_differences(titanium, reweighted):
    """Central differences along the largest component of four tensors, to 1e-4."""
    loss, ensembles = reweighted

    def value() -> float:
        return float(
            ensemble_losses([loss], ensembles, _probes(titanium, loss, ensembles))[0][loss.name].value
        )

    _, adjoints = ensemble_losses([loss], ensembles, _probes(titanium, loss, ensembles))
    for source, adjoint in adjoints.items():
        backpropagate(titanium, ensembles[source].structures, adjoint)
    parameters = titanium.trainable_parameters()
    gradients = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
    largest = sorted(gradients, key=lambda name: float(gradients[name].abs().max()))[-3:]
    for name in largest:
        flat, index = parameters[name].data.view(-1), int(gradients[name].abs().argmax())
        start, values = float(flat[index]), []
        step = 1e-5 * max(1.0, abs(start))
        for sign in (1, -1):
            flat[index] = start + sign * step
            values.append(value())
        flat[index] = start
        numeric = (values[0] - values[1]) / (2 * step)
        assert numeric == pytest.approx(float(gradients[name].view(-1)[index]), rel=1e-4), name


def test_only_frames_with_a_born_term_are_differentiated_twice(titanium, hcp, make_ensemble):
    loss = _loss(hcp, method="fluctuation", born_every=3)
    ensembles = {s: make_ensemble(s, hcp, 7) for s in loss.sources}
    probes = _probes(titanium, loss, ensembles)
    _, adjoints = ensemble_losses([loss], ensembles, probes)
    for source in loss.sources:
        assert probes[source]["born"].mask.tolist() == [1, 0, 0, 1, 0, 0, 1]
        assert adjoints[source]["born"].flatten(1).any(1).tolist() == [True, False, False] * 2 + [True]
        assert set(adjoints[source]) == {"energy", "stress", "born"}


def test_a_static_loss_is_exact_in_the_model(titanium, hcp):
    """Its gradient, with the relaxation of the crystal, equals finite differences to 1e-4."""
    loss = _loss(hcp, method="static", thermal=False)
    assert loss.sources == ()
    loss.evaluate(titanium).value.backward()
    parameters = titanium.trainable_parameters()
    name = max(
        (n for n, p in parameters.items() if p.grad is not None),
        key=lambda n: float(parameters[n].grad.abs().max()),
    )
    gradient = parameters[name].grad
    flat, index = parameters[name].data.view(-1), int(gradient.abs().argmax())
    start, values = float(flat[index]), []
    for sign in (1, -1):
        flat[index] = start + sign * 1e-5
        values.append(float(loss.evaluate(titanium).value.detach()))
    flat[index] = start
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(gradient.view(-1)[index]), rel=1e-4)


def test_a_cell_under_stress_is_told_by_what_strained_cells_show(titanium, hcp):
    """B33 from the stress of cells strained by ±1e-4 along c, to 0.01 GPa; C33 is another number."""
    hcp.set_cell(0.97 * hcp.cell.array, scale_atoms=True)
    target = {**COLD, "constants": {"C33": 180}}
    loss = _loss(hcp, method="static", thermal=False, targets=[target])
    found = loss.measure(titanium).diagnostics["C33 300 K"].value
    stress = []
    for strain in (1e-4, -1e-4):
        strained = hcp.copy()
        strained.set_cell(hcp.cell.array @ np.diag([1, 1, 1 + strain]), scale_atoms=True)
        stress.append(float(static_elasticity(titanium, strained).stress[2, 2]) / GPA)
    assert found == pytest.approx((stress[0] - stress[1]) / 2e-4, abs=0.01)
    crystal = static_elasticity(titanium, hcp)
    assert abs(found - float(crystal.constants[2, 2]) / GPA) > 3


def test_a_static_loss_is_backpropagated_cell_by_cell(titanium, hcp, monkeypatch):
    """The gradient of all cells at once, where that of one is complete before the next is evaluated."""
    loss = _loss(hcp, method="static", thermal=False)
    loss.weight = 0.3
    whole = loss.evaluate(titanium)
    (0.3 * whole.value).backward()
    parameters = titanium.trainable_parameters().values()
    wanted = [None if p.grad is None else p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    started = []

    def watched(*arguments, **options):
        started.append(any(p.grad is not None for p in parameters))
        return static_elasticity(*arguments, **options)

    monkeypatch.setattr(elastic_constants, "static_elasticity", watched)
    found = loss.backpropagate(titanium)
    assert started == [False, True]
    assert float(found.value) == pytest.approx(float(whole.value.detach()))
    assert found.diagnostics == whole.diagnostics
    for p, gradient in zip(parameters, wanted, strict=True):
        assert (p.grad is None) == (gradient is None)
        assert gradient is None or torch.allclose(p.grad, gradient, rtol=1e-9, atol=1e-12)


def test_a_static_loss_is_judged_without_graphs(titanium, hcp, monkeypatch):
    loss = _loss(hcp, method="static", thermal=False)
    asked = []

    def watched(*arguments, create_graph):
        asked.append(create_graph)
        return static_elasticity(*arguments, create_graph=create_graph)

    monkeypatch.setattr(elastic_constants, "static_elasticity", watched)
    found = loss.measure(titanium)
    assert asked == [False, False]
    assert not found.value.requires_grad
    assert float(found.value) == pytest.approx(float(loss.evaluate(titanium).value.detach()), rel=1e-9)


def test_single_precision_is_refused_before_anything_is_evaluated(titanium, hcp):
    _loss(hcp, titanium, method="static", thermal=False)
    with pytest.raises(InputError, match="double precision") as caught:
        _loss(hcp, titanium.frozen_copy("float32"), method="static", thermal=False)
    assert "potential.default_dtype: float64" in str(caught.value)


def test_what_temperature_adds_is_the_difference_to_the_crystal_at_rest(titanium, hcp, make_ensemble):
    """Right after a draw the static loss tells what the frames do, if it is not smoothed."""
    loss = _loss(hcp, method="static", born_every=1, smooth=False)
    frames = {}
    for source in loss.sources:
        ensemble = make_ensemble(source, hcp, 6)
        probes = further_probes(titanium, ensemble.structures, {"stress": 1, "born": 1})
        energy = probe_energies(titanium, {source: ensemble})[source]
        frames[source] = ensemble.frames({"energy": energy, **probes})
    loss.follow(titanium, frames)
    by_frames = _loss(hcp, method="fluctuation", born_every=1)
    expected = by_frames.evaluate(frames).diagnostics
    found = loss.evaluate(titanium).diagnostics
    assert set(found) == set(expected)
    for name, measured in expected.items():
        assert found[name].value == pytest.approx(measured.value, abs=1e-6)
        assert found[name].se == pytest.approx(measured.se)


def test_what_temperature_adds_vanishes_at_rest_when_smoothed(titanium, hcp, make_ensemble):
    """Three temperatures are fitted by αT + βT²: a value at 0 K would be no part of it."""
    targets = [{**HOT, "temperature": f"{t} K"} for t in (200, 400, 800)]
    loss = _loss(hcp, method="static", born_every=1, targets=targets)
    frames = {}
    for source in loss.sources:
        ensemble = make_ensemble(source, hcp, 6)
        probes = further_probes(titanium, ensemble.structures, {"stress": 1, "born": 1})
        frames[source] = ensemble.frames({"energy": ensemble.energies[0], **probes})
    loss.follow(titanium, frames)
    added = torch.stack([a.constants for a in loss._added.values()])
    t = torch.tensor([0.2, 0.4, 0.8]).double()
    design = torch.stack([t, t**2], 1)
    assert torch.allclose(design @ torch.linalg.lstsq(design, added).solution, added, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "deformation"}, "isothermal"),
        ({"targets": [HOT, HOT]}, "every temperature once"),
        ({"table": "titanium-hcp-elastic"}, "either targets, or a table"),
    ],
)
def test_options_that_do_not_go_together_are_refused(wrong, message):
    with pytest.raises(Exception, match=message):
        _loss(**wrong)


def test_a_constant_that_the_crystal_does_not_have_is_refused(hcp):
    with pytest.raises(Exception, match="C44"):
        _loss(hcp, targets=[{**HOT, "constants": {"C4": 50}}])


def test_targets_of_a_table_have_its_cells_and_uncertainties(hcp):
    loss = _loss(hcp, targets=[], table="titanium-hcp-elastic", temperatures=["323 K"])
    assert loss.sources == (EnsembleSource("hcp", 323.0, 0.0, (2.95125, 4.67942)),)
    assert loss.wanted[0].constants["C44"] == pytest.approx((46.2, 0.462))
