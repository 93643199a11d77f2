"""Every family of MACE models: as MACE evaluates it, with derivatives, and saved so that it opens again."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from mace.calculators import MACECalculator

from mlip_refine.potential import Potential

PROBES = ("energy", "forces", "stress")
FAMILIES = (
    *("residual", "all-residual", "density", "nonlinear", "three-layers", "scalars"),
    *(
        "soft-even",
        "gaussian-attention",
        "one-layer",
        "no-gate",
        "plain",
        "pseudoscalars",
        "mh-1",
        "keep-last",
    ),
)

pytestmark = pytest.mark.slow


def _values(potential: Potential, atoms: Atoms) -> list[np.ndarray]:
    found = potential.evaluate(potential.graphs.collate([potential.graphs.from_atoms(atoms)]), PROBES)
    return [found[name].detach().numpy().squeeze() for name in PROBES]


def _of_mace(path: Path, head: str, atoms: Atoms) -> list[np.ndarray]:
    atoms = atoms.copy()
    atoms.calc = MACECalculator(model_paths=str(path), device="cpu", default_dtype="float64", head=head)
    return [np.array(atoms.get_potential_energy()), atoms.get_forces(), atoms.get_stress(voigt=False)]


def _require(kind: str, build: Callable[..., torch.nn.Module]) -> torch.nn.Module:
    try:
        return build(kind)
    except KeyError:
        pytest.skip("needs a newer mace")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_evaluated_and_saved_as_mace_does(family, build, frames, tmp_path):
    path = tmp_path / "family.model"
    torch.save(_require(family, build), path)
    heads = [str(h) for h in torch.load(path, weights_only=False).heads]
    for head in heads:
        potential = Potential.load(str(path), head=head)
        for mine, theirs in zip(_values(potential, frames[0]), _of_mace(path, head, frames[0]), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-8)

    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in potential.trainable_parameters().values():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=random, dtype=torch.float64))
    model, tensors = potential.save(tmp_path, "saved")
    for head in heads:
        expected = _of_mace(model, head, frames[1])
        for file in (model, tensors):
            again = Potential.load(str(file), head=head)
            assert again.heads == heads
            assert again.hash == potential.hash
            for mine, theirs in zip(_values(again, frames[1]), expected, strict=True):
                np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_derivatives_of_a_family_are_those_of_the_bare_module(family, build, batch, frames):
    module = _require(family, build)
    potential = Potential.from_module(module)
    graphs = potential.graphs.collate([potential.graphs.from_atoms(frames[0])])
    random = torch.Generator().manual_seed(2)
    v, r = (torch.randn(len(frames[0]), 3, generator=random, dtype=torch.float64) for _ in range(2))
    second = potential.hessian_product(graphs, v, create_graph=True).positions
    parameters = potential.trainable_parameters()
    mine = torch.autograd.grad((second * r).sum(), list(parameters.values()), allow_unused=True)

    inputs = batch(module, [frames[0]], module.heads.index(potential.head))
    forces = module(inputs, training=True, compute_force=True)["forces"]
    (product,) = torch.autograd.grad(-(forces * v).sum(), inputs["positions"], create_graph=True)
    bare = dict(module.named_parameters())
    names = [name.replace(".original", "") for name in parameters]
    theirs = torch.autograd.grad((product * r).sum(), [bare[name] for name in names], allow_unused=True)
    torch.testing.assert_close(second.detach(), product.detach(), rtol=1e-9, atol=1e-9)
    largest = max(float(t.abs().max()) for t in theirs if t is not None)
    for one, other in zip(mine, theirs, strict=True):
        zero = torch.zeros(1, dtype=torch.float64)
        difference = (zero if one is None else one) - (zero if other is None else other)
        assert float(difference.abs().max()) <= 1e-9 * largest
