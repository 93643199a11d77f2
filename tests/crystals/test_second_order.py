"""The expansion of a crystal: its gradient is the same in batches of any size, and exact."""

import pytest
import torch
from ase.build import bulk
from torch import Tensor

from mlip_refine.crystals.second_order import SecondOrderEnergy, second_order
from mlip_refine.potential import Graphs, Potential, batching

STENCIL = {2: -1 / 12, 1: 2 / 3, -1: -2 / 3, -2: 1 / 12}
"""Central difference of fourth order."""


@pytest.fixture(scope="module")
def titanium() -> Potential:
    return Potential.load("titanium-compact")


def _moved() -> tuple[Tensor, Tensor]:
    """Displacements and strain, both small and without symmetry."""
    random = torch.Generator().manual_seed(4)
    u, strain = torch.randn(2, 3, generator=random).double(), torch.randn(3, 3, generator=random).double()
    return (0.02 * u).requires_grad_(), (0.005 * (strain + strain.T)).requires_grad_()


def _contracted(found: SecondOrderEnergy) -> Tensor:
    """All of it with weights of its own, so that everything has a part in the gradient."""
    random = torch.Generator().manual_seed(5)
    total = 0.3 * found.energy + 0.2 * found.volume
    for tensor in (found.gradient, found.hessian):
        total = total + (torch.randn(tensor.shape, generator=random).double() * tensor).sum()
    return total


def _expanded(
    potential: Potential, moved: tuple[Tensor, Tensor], *, create_graph: bool = True
) -> SecondOrderEnergy:
    structure = potential.graphs.from_atoms(bulk("Ti", "hcp", a=2.93, c=4.65))
    return second_order(potential, structure, moved, create_graph=create_graph)


def _gradients(potential: Potential) -> tuple[Tensor, ...]:
    moved = _moved()
    inputs = [*moved, *potential.trainable_parameters().values()]
    found = torch.autograd.grad(_contracted(_expanded(potential, moved)), inputs, allow_unused=True)
    return tuple(g for g in found if g is not None)


def test_batches_of_any_size_have_one_gradient(titanium: Potential, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve directions of two atoms at once, and in batches of at most six atoms."""
    sizes: list[int] = []
    collate = type(titanium.graphs).collate

    def noted(self: object, structures: list[object]) -> Graphs:
        sizes.append(2 * len(structures))
        return collate(self, structures)

    monkeypatch.setattr(type(titanium.graphs), "collate", noted)
    whole = _gradients(titanium)
    assert max(sizes) == 24
    sizes.clear()
    monkeypatch.setitem(batching.CHUNK_ATOMS, "cpu", 6)
    parts = _gradients(titanium)
    # One batch for the values, which has all directions in turn, and four for the gradient.
    assert sizes == [6] * 5
    assert len(whole) == len(parts) > 10
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(one.abs().max()))


def test_the_gradient_in_the_deformation_is_that_of_differences(titanium: Potential) -> None:
    u, strain = _moved()
    (to_u, to_strain), h = _gradients(titanium)[:2], 1e-3
    random = torch.Generator().manual_seed(6)
    du, de = torch.randn(2, 3, generator=random).double(), torch.diag(torch.tensor([0.2, -0.1, 0.3])).double()
    difference = 0.0
    for step, weight in STENCIL.items():
        there = (u.detach() + step * h * du, strain.detach() + step * h * de)
        difference += weight / h * float(_contracted(_expanded(titanium, there, create_graph=False)))
    assert float((to_u * du).sum() + (to_strain * de).sum()) == pytest.approx(difference, rel=1e-6)


def test_without_a_graph_nothing_holds_one(titanium: Potential) -> None:
    found = _expanded(titanium, _moved(), create_graph=False)
    for tensor in (found.energy, found.gradient, found.hessian, found.volume):
        assert not tensor.requires_grad


def test_parameters_that_change_before_the_backward_pass_are_noticed(titanium: Potential) -> None:
    """What is back-propagated is found again: it would be that of other parameters."""
    loss = _contracted(_expanded(titanium, _moved()))
    titanium.set_parameters(titanium.parameters())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
