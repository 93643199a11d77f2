"""The kernels are what they stand for, in value and in every derivative that is used."""

import copy

import pytest
import torch
from ase import Atoms

from mlip_refine.potential.acceleration.kernels import (
    DenseConvolution,
    SlotCache,
    has_kernels,
    install_kernels,
    is_scalar_convolution,
    remove_kernels,
)

REPLACED = {"residual": 3, "density": 5, "nonlinear": 3, "three-layers": 4, "scalars": 3}


def _pair(build, kind: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    stock = build(kind)
    fast = copy.deepcopy(stock)
    assert install_kernels(fast) == REPLACED[kind]
    return stock, fast


def _close(first: torch.Tensor, second: torch.Tensor, tolerance: float = 1e-12) -> bool:
    scale = max(1.0, float(first.abs().max())) if first.numel() else 1.0
    return bool((first - second).abs().max() <= tolerance * scale) if first.numel() else True


@pytest.mark.parametrize("kind", REPLACED)
def test_energy_forces_stress_and_their_parameter_gradients(kind, build, batch, frames):
    results = []
    for module in _pair(build, kind):
        output = module(batch(module, frames), training=True, compute_stress=True)
        loss = output["forces"].square().sum() + output["stress"].square().sum() + output["energy"].sum()
        parameters = [p for p in module.parameters() if p.requires_grad and p.numel()]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        results.append((output["energy"], output["forces"], output["stress"], *gradients))
    for stock, fast in zip(*results, strict=True):
        assert (stock is None) == (fast is None)
        assert stock is None or _close(stock, fast)


def test_hessian_column_and_its_parameter_gradient(build, batch, frames):
    columns = []
    for module in _pair(build, "residual"):
        graph = batch(module, frames)
        forces = module(graph, training=True)["forces"]
        direction = torch.linspace(-1, 1, forces.numel(), dtype=forces.dtype).view_as(forces)
        column = torch.autograd.grad(-(forces * direction).sum(), graph["positions"], create_graph=True)[0]
        weight = module.interactions[0].linear_up.weight
        columns.append((column, torch.autograd.grad(column.square().sum(), weight)[0]))
    for stock, fast in zip(*columns, strict=True):
        assert _close(stock, fast)


def test_order_of_edges_does_not_matter(build, batch, frames):
    stock, fast = _pair(build, "residual")
    graph = batch(stock, frames)
    order = torch.randperm(graph["edge_index"].shape[1], generator=torch.Generator().manual_seed(0))
    shuffled = dict(graph)
    for key in ("shifts", "unit_shifts"):
        shuffled[key] = graph[key][order]
    shuffled["edge_index"] = graph["edge_index"][:, order]
    assert _close(stock(graph)["forces"], fast(shuffled)["forces"])


@pytest.mark.parametrize("spread", [3.0, 50.0])
def test_lone_atoms_and_empty_neighbour_lists(spread, build, batch):
    positions = [[0, 0, 0], [spread, 0, 0], [0, 20, 0], [0, 0, 25], [20, 20, 20]]
    atoms = Atoms("Ti5", positions=positions, cell=[100, 100, 100], pbc=True)
    for stock, fast in [_pair(build, "residual")]:
        outputs = [module(batch(module, [atoms]), compute_stress=True) for module in (stock, fast)]
    for key in ("energy", "forces", "stress"):
        assert _close(outputs[0][key], outputs[1][key])
    assert torch.isfinite(outputs[1]["forces"]).all()


def test_slots_are_found_once_per_edge_list_and_never_stale():
    cache = SlotCache()
    edges = torch.tensor([[0, 1, 2, 0], [1, 1, 0, 2]])
    slots = cache.find(edges, 3)
    assert slots.width == 28
    assert sorted(slots.row.tolist()) == [0, 28, 29, 56]
    assert cache.find(edges, 3) is slots
    assert cache.find(edges.clone(), 3) is not slots
    changed = cache.find(edges, 3)
    edges[1, 0] = 2
    assert cache.find(edges, 3) is not changed
    assert copy.deepcopy(cache)._slots is None


def test_one_cache_serves_all_layers_of_a_copy_too(build):
    _, fast = _pair(build, "scalars")
    for module in (fast, copy.deepcopy(fast)):
        caches = {id(block.conv_tp._cache) for block in module.interactions}
        assert len(caches) == 1


def test_removal_restores_every_attribute(build):
    module = build("scalars")
    blocks = [dict(vars(block)) for block in module.interactions]
    names = list(module.state_dict())
    convolutions = [block.conv_tp for block in module.interactions]
    cutoff = module.radial_embedding.cutoff_fn
    assert install_kernels(module) == REPLACED["scalars"]
    assert install_kernels(module) == 0
    assert has_kernels(module)
    remove_kernels(module)
    assert not has_kernels(module)
    assert list(module.state_dict()) == names
    assert all(b.conv_tp is c for b, c in zip(module.interactions, convolutions, strict=True))
    assert module.radial_embedding.cutoff_fn is cutoff
    assert [vars(block).keys() for block in module.interactions] == [b.keys() for b in blocks]
    remove_kernels(module)


def test_only_scalar_convolutions_qualify(build):
    module = build("residual")
    assert is_scalar_convolution(module.interactions[0].conv_tp)
    assert not is_scalar_convolution(module.interactions[1].conv_tp)
    assert not is_scalar_convolution(torch.nn.Linear(1, 1))
    install_kernels(module)
    assert isinstance(module.interactions[0].conv_tp, DenseConvolution)
    assert module.interactions[0].conv_tp.weight_numel == module.interactions[0].conv_tp.original.weight_numel
