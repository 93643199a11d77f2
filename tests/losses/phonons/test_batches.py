"""Batches of phonon losses by edges: what they hold, what they weigh, and what a resumed run sees."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ase.build import bulk
from torch import Tensor

from mlip_refine import testing
from mlip_refine.config import config_from_dict
from mlip_refine.data.phonons.reference import Displacement, PhononReference
from mlip_refine.errors import InputError
from mlip_refine.losses import LossSpec, PhononLoss, loss_specs
from mlip_refine.potential import Potential, Work

SALT = bulk("NaCl", "rocksalt", a=5.64)
SHELLS = {2.9: (2.5, 2.82)}
MULTIPLES = [(1, 1, 1), (2, 1, 1), (2, 1, 1), (2, 2, 1), (2, 2, 1), (3, 2, 1), (2, 2, 2), (3, 3, 2)]
"""Of two atoms, each with six neighbours: 12 to 216 edges."""

EDGES = [12 * int(np.prod(m)) for m in MULTIPLES]


@pytest.fixture(scope="module")
def salts(phonons_of) -> list[PhononReference]:
    """Rock salt of springs that are the stiffer the larger the cell, with three displacements each."""
    random, made = torch.Generator().manual_seed(1), []
    for place, multiples in enumerate(MULTIPLES):
        stiffness = {2.9: 1.5 + 0.1 * place}
        reference = phonons_of(SALT, multiples, lambda a, k=stiffness: testing.bond_springs(a, k))
        moves = (0.01 * torch.randn(3, reference.n_atoms, 3, generator=random).double()).unbind()
        displacements = tuple(Displacement(u, -stiffness[2.9] * u) for u in moves)
        made.append(replace(reference, name=str(place), displacements=displacements))
    return made


@pytest.fixture
def model(springs) -> Potential:
    return springs(SALT, SHELLS)


def build(kind: str, **options: Any) -> LossSpec:
    """The loss as a config describes it."""
    node = {"type": f"phonon_{kind}", "data": "unused", **options}
    (spec,) = loss_specs(
        config_from_dict({"name": "x", "potential": {"model": "m"}, "losses": [node]}).losses
    )
    return spec


def loss_of(references: Sequence[PhononReference], kind: str = "hvp", **options: Any) -> PhononLoss:
    spec = build(kind, **options)
    return spec.type.loss_class(spec.name, spec.weight, spec.options, references)


def epoch(loss: PhononLoss, potential: Potential) -> Iterator[int]:
    """Steps of the first epoch; the loss is at each while it is out."""
    left, step = len(loss.references), 0
    while left:
        loss.at(step)
        yield step
        left -= len(loss.chosen(potential).members)
        step += 1
    assert left == 0


def gradient(loss: PhononLoss, potential: Potential) -> tuple[float, Tensor]:
    value = loss.evaluate(potential).value
    (found,) = torch.autograd.grad(value, [potential.module.stiffness])
    return float(value.detach()), found


@pytest.mark.parametrize(
    ("kind", "options", "directions"),
    [
        ("hvp", {"probes": 3}, 3),
        ("hvp", {"probes": 9}, 6),
        ("hvp", {"probe": "rademacher", "probes": 4}, 4),
        ("hvp", {"probe": "full"}, None),
        ("hvp", {"backend": "displacements", "probes": 2}, 2),
        ("hvp", {"backend": "displacements", "probes": 5}, 3),
        ("frequencies", {}, None),
    ],
    ids=str,
)
def test_no_update_evaluates_more_edges_than_the_budget(salts, model, monkeypatch, kind, options, directions):
    """What goes to the model is counted, once for every direction, and every material comes once."""
    evaluated: list[int] = []
    in_chunks = Potential.in_chunks

    def counted(potential: Potential, work: Work, structures: Sequence[Any], evaluate: Any) -> Any:
        evaluated.append(sum(structure.n_edges for structure in structures))
        return in_chunks(potential, work, structures, evaluate)

    monkeypatch.setattr(Potential, "in_chunks", counted)
    counts = [directions or len(salt.irreducible()) for salt in salts]
    costs = [count * n for count, n in zip(counts, EDGES, strict=True)]
    budget = max(costs) - 1
    loss = loss_of(salts, kind, edge_budget=budget, **options)
    seen = []
    for step in epoch(loss, model):
        evaluated.clear()
        with torch.no_grad():
            loss.evaluate(model)
        members = loss.chosen(model).members
        expected = sum(costs[i] for i in members)
        # One-hot directions may be drawn twice and are evaluated once: there are fewer now and then.
        assert evaluated[0] <= expected
        assert evaluated[0] == expected or "probe" not in options
        assert expected <= budget or len(members) == 1
        seen.append((step, members))
    assert sorted(i for _, members in seen for i in members) == list(range(len(salts)))
    assert 2 < len(seen) < len(salts)
    assert [costs.index(max(costs))] in [members for _, members in seen]


@pytest.mark.parametrize("kind", ["hvp", "frequencies"])
def test_an_epoch_has_the_mean_of_all_materials(salts, model, kind):
    """Values and gradients of updates with one to several materials, averaged over the updates."""
    options = {"probe": "full"} if kind == "hvp" else {}
    whole, expected = gradient(loss_of(salts, kind, batch_size=len(salts), **options), model)
    loss, values, gradients, sizes = loss_of(salts, kind, edge_budget=450, **options), [], [], set()
    for _ in epoch(loss, model):
        value, found = gradient(loss, model)
        values.append(value)
        gradients.append(found)
        sizes.add(len(loss.chosen(model).members))
    assert len(sizes) > 1
    assert np.mean(values) == pytest.approx(whole, rel=1e-10)
    torch.testing.assert_close(torch.stack(gradients).mean(0), expected, rtol=1e-8, atol=0)


def test_batches_follow_from_seed_and_step_alone(salts, model):
    """A new process at any update."""
    first = loss_of(salts, edge_budget=250, seed=2)
    batches, values = [], []
    for step in range(12):
        first.at(step)
        batches.append(first.chosen(model))
        values.append(float(first.evaluate(model).value.detach()))
    resumed = loss_of(salts, edge_budget=250, seed=2)
    for step in (11, 4):
        resumed.at(step)
        assert resumed.chosen(model) == batches[step]
        assert float(resumed.evaluate(model).value.detach()) == values[step]
    assert len(set(values)) > 6


@pytest.mark.parametrize("multiple", [1, 4])
def test_edges_count_the_same_on_every_device(phonons_of, springs, multiple):
    """Three atoms with six neighbours: 18 edges, which are filled up to 20 on the CPU alone."""
    cube, shells = bulk("Fe", "sc", a=3.0), {3.1: (1.0, 3.0)}
    reference = phonons_of(cube, (3, 1, 1), lambda atoms: testing.bond_springs(atoms, {3.1: 1.0}))
    potential = springs(cube, shells)
    potential.graphs = replace(potential.graphs, edge_multiple=multiple)
    loss = loss_of([reference], probe="rademacher", probes=2)
    assert loss.structure(potential, 0).n_edges == {1: 18, 4: 20}[multiple]
    assert loss.edges(potential, 0) == 2 * 20


def test_other_materials_make_other_epochs(salts, model):
    assert loss_of(salts, edge_budget=250).chosen(model)
    assert sorted(loss_of(salts[:2], edge_budget=250).chosen(model).members) == [0, 1]


def test_a_budget_leaves_no_room_for_a_number():
    with pytest.raises(InputError, match=r"(?s)batch_size.*no batch_size: edge_budget settles how many"):
        build("hvp", edge_budget=1000, batch_size=4)
    with pytest.raises(InputError, match="edge_budget"):
        build("frequencies", edge_budget=0)
    assert build("hvp", edge_budget=None, batch_size=3).options.batch_size == 3


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({}, (Work.HESSIAN, Work.HESSIAN_GRADIENT)),
        ({"backend": "central"}, (Work.FORCES, Work.DIFFERENCE_GRADIENT)),
        ({"backend": "displacements"}, (Work.FORCES, Work.DIFFERENCE_GRADIENT)),
        ({"backend": "forces"}, (Work.FORCES, Work.FORCES_GRADIENT)),
    ],
    ids=str,
)
def test_backends_name_the_work_that_they_do(salts, model, monkeypatch, options, kinds):
    """What one kind was seen to need tells nothing of the chunks of another."""
    found: list[Work] = []
    run = type(model.chunker).run
    monkeypatch.setattr(
        type(model.chunker), "run", lambda self, work, *rest: found.append(work) or run(self, work, *rest)
    )
    loss = loss_of(salts[:2], **options)
    with torch.no_grad():
        loss.evaluate(model)
    loss.evaluate(model)
    assert tuple(found) == kinds
