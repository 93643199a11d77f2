"""Second derivatives against differences of first ones, of the energy, and in the parameters."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch import Tensor

from mlip_refine.potential import Graphs, Potential, batching
from mlip_refine.quantities import VOIGT

Build = Callable[..., torch.nn.Module]
STENCIL = {2: -1 / 12, 1: 2 / 3, -1: -2 / 3, -2: 1 / 12}
"""Central difference of fourth order."""


def _titanium() -> list[Atoms]:
    """Rattled bcc, and hcp in a triclinic box."""
    rng = np.random.default_rng(2)
    frames = [bulk("Ti", "bcc", a=3.25, cubic=True), bulk("Ti", "hcp", a=2.93, c=4.65)]
    shear = np.eye(3) + np.array([[0.02, 0.11, -0.07], [0.0, -0.03, 0.09], [0.05, 0.0, 0.01]])
    frames[1].set_cell(np.array(frames[1].cell) @ shear, scale_atoms=True)
    for atoms in frames:
        atoms.positions += rng.normal(scale=0.1, size=atoms.positions.shape)
    return frames


@pytest.fixture(scope="module")
def shared() -> Potential:
    """Titanium in float64; tests must leave it as it is."""
    return Potential.load("titanium-compact")


@pytest.fixture
def titanium(shared: Potential) -> Iterator[Potential]:
    before = shared.hash
    yield shared
    assert shared.hash == before


def _graphs(potential: Potential, frames: list[Atoms]) -> Graphs:
    return potential.graphs.collate([potential.graphs.from_atoms(a) for a in frames])


def _directions(graphs: Graphs, seed: int) -> tuple[Tensor, Tensor]:
    """Random displacements, and random symmetric strains."""
    random = torch.Generator().manual_seed(seed)
    v = torch.randn(graphs.positions.shape, generator=random, dtype=torch.float64)
    e = torch.randn(graphs.cell.shape, generator=random, dtype=torch.float64)
    return v.to(graphs.cell), (e + e.mT).to(graphs.cell) / 4


def _moved(graphs: Graphs, v: Tensor, e: Tensor, h: float) -> Graphs:
    """Graphs displaced by h v and strained by h ε."""
    strained = h * e[graphs.batch[graphs.edge_index[0]]] @ graphs.vectors[:, :, None]
    return replace(graphs.displaced(h * v), vectors=graphs.displaced(h * v).vectors + strained[:, :, 0])


def _slopes(potential: Potential, graphs: Graphs, v: Tensor, e: Tensor, h: float) -> tuple[Tensor, Tensor]:
    """∂U/∂x and ∂U/∂ε of moved graphs, with the strain counted from the unmoved ones."""
    slope = potential.curvature(_moved(graphs, v, e, h)).slope.detach()
    return -graphs.forces(slope), graphs.stress(graphs.vectors, slope) * graphs.volume[:, None, None]


def _assert_second_derivatives(potential: Potential, graphs: Graphs) -> None:
    h, (v, e) = 2e-4, _directions(graphs, 1)
    found = potential.hessian_product(graphs, v, e)
    steps = [_slopes(potential, graphs, v, e, step * h) for step in STENCIL]
    for mine, parts in zip(found, zip(*steps, strict=True), strict=True):
        theirs = sum(weight / h * part for weight, part in zip(STENCIL.values(), parts, strict=True))
        assert not mine.requires_grad
        assert (mine - theirs).norm() < 1e-7 * theirs.norm()


def test_products_are_the_derivatives_of_forces_and_stress(titanium: Potential) -> None:
    _assert_second_derivatives(titanium, _graphs(titanium, _titanium()))


@pytest.mark.parametrize(
    "kind",
    [
        "density",
        "nonlinear",
        pytest.param("residual", marks=pytest.mark.slow),
        pytest.param("all-residual", marks=pytest.mark.slow),
        pytest.param("three-layers", marks=pytest.mark.slow),
        pytest.param("scalars", marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_model_has_second_derivatives(kind: str, build: Build, frames: list[Atoms]) -> None:
    potential = Potential.from_module(build(kind))
    _assert_second_derivatives(potential, _graphs(potential, frames[:1]))


def test_many_directions_share_one_forward_and_are_linear_and_symmetric(titanium: Potential) -> None:
    graphs = _graphs(titanium, _titanium())
    curvature = titanium.curvature(graphs)
    (v, e), (w, f) = _directions(graphs, 1), _directions(graphs, 2)
    first, second = curvature.along(v, e), curvature.along(w, f)
    one = (first.positions * w).sum() + (first.strain * f).sum()
    other = (second.positions * v).sum() + (second.strain * e).sum()
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    apart = zip(curvature.along(v), curvature.along(strains=e), strict=True)
    for together, (of_v, of_e) in zip(first, apart, strict=True):
        torch.testing.assert_close(together, of_v + of_e, rtol=1e-10, atol=1e-10)


def test_the_sum_over_a_row_of_the_hessian_vanishes(titanium: Potential) -> None:
    graphs = _graphs(titanium, _titanium())
    product = titanium.hessian_product(graphs, torch.ones_like(graphs.positions))
    assert product.positions.abs().max() < 1e-10
    assert product.strain.abs().max() < 1e-10


def test_born_is_the_second_derivative_of_the_energy_of_a_strained_box(titanium: Potential) -> None:
    """Energies of Atoms objects whose triclinic box is really strained, by second differences."""
    atoms, h = _titanium()[1], 1e-3
    found = titanium.evaluate(_graphs(titanium, [atoms]), ("born",))["born"][0]
    _, (strain,) = _directions(_graphs(titanium, [atoms]), 3)
    frames = []
    for step in (2, 1, 0, -1, -2):
        deformation = np.eye(3) + step * h * strain.numpy()
        frames.append(atoms.copy())
        frames[-1].set_cell(np.array(atoms.cell) @ deformation)
        frames[-1].positions = atoms.positions @ deformation
    energies = titanium.evaluate(_graphs(titanium, frames))["energy"].detach()
    second = energies @ torch.tensor([-1.0, 16.0, -30.0, 16.0, -1.0]).double() / (12 * h**2)
    twice = torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, 2.0]).double()
    engineering = twice * torch.stack([strain[i, j] for i, j in VOIGT])
    expected = second.item() / atoms.cell.volume
    assert (engineering @ found @ engineering).item() == pytest.approx(expected, rel=1e-6)


def test_born_equals_products_with_unit_strains_and_comes_with_the_other_probes(titanium: Potential) -> None:
    graphs = _graphs(titanium, _titanium())
    found = titanium.evaluate(graphs, ("energy", "forces", "stress", "born"))
    for name, value in titanium.evaluate(graphs, ("energy", "forces", "stress")).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)
    assert not found["stress"].requires_grad
    torch.testing.assert_close(found["born"], found["born"].mT, rtol=1e-9, atol=1e-12)
    strains = torch.zeros_like(graphs.cell)
    strains[:, 0, 1] = strains[:, 1, 0] = 0.5
    row = titanium.hessian_product(graphs, strains=strains).strain / graphs.volume[:, None, None]
    torch.testing.assert_close(found["born"][:, 5, 2], row[:, 2, 2], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found["born"][:, 5, 3], row[:, 1, 2], rtol=1e-10, atol=1e-14)


def test_parts_of_a_batch_give_the_same(titanium: Potential, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = _graphs(titanium, _titanium() * 2)
    whole = titanium.evaluate(graphs, ("energy", "born"))
    monkeypatch.setitem(batching.CHUNK_ATOMS, "cpu", 2)
    parts = titanium.evaluate_chunked(graphs, ("energy", "born"))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value.detach(), rtol=1e-10, atol=1e-10)


def test_single_precision_is_good_to_a_thousandth(titanium: Potential) -> None:
    single, graphs = (
        Potential.load("titanium-compact", default_dtype="float32"),
        _graphs(titanium, _titanium()),
    )
    small = _graphs(single, _titanium())
    born = [p.evaluate(g, ("born",))["born"].double() for p, g in ((titanium, graphs), (single, small))]
    assert (born[1] - born[0]).abs().max() < 1e-3 * born[0].abs().max()
    for exact, rough in zip(
        titanium.hessian_product(graphs, *_directions(graphs, 4)),
        single.hessian_product(small, *_directions(small, 4)),
        strict=True,
    ):
        assert (rough - exact).norm() < 1e-3 * exact.norm()


@pytest.mark.parametrize("what", ["born", "second"])
def test_gradients_in_the_parameters_are_those_of_differences(shared: Potential, what: str) -> None:
    """Along a random change of all parameters, relative to their size."""
    potential = Potential.from_module(shared.module)
    graphs, random = _graphs(potential, _titanium()), torch.Generator().manual_seed(6)
    parameters = potential.parameters()
    change = {
        n: p.std().nan_to_num(1.0) * torch.randn(p.shape, generator=random).double()
        for n, p in parameters.items()
    }
    weights = torch.randn(2, 6, 6, generator=random).double()

    def contracted() -> Tensor:
        if what == "born":
            return (weights * potential.evaluate(graphs, ("born",), create_graph=True)["born"]).sum()
        (v, e), (w, f) = _directions(graphs, 1), _directions(graphs, 2)
        product = potential.hessian_product(graphs, v, e, create_graph=True)
        return (product.positions * w).sum() + (product.strain * f).sum()

    trained = potential.trainable_parameters()
    gradients = torch.autograd.grad(contracted(), list(trained.values()), allow_unused=True)
    slope = sum((change[n] * g).sum() for n, g in zip(trained, gradients, strict=True) if g is not None)
    h, difference = 1e-4, 0.0
    for step, weight in STENCIL.items():
        with potential.holding({n: p + step * h * change[n] for n, p in parameters.items()}):
            difference += weight / h * contracted().item()
    assert float(slope) == pytest.approx(difference, rel=1e-4)


def test_atoms_without_neighbours_have_no_curvature(titanium: Potential) -> None:
    lone = Atoms("Ti", cell=[30.0, 30.0, 30.0], pbc=True)
    graphs = _graphs(titanium, [lone])
    found = titanium.evaluate(graphs, ("energy", "born"), create_graph=True)
    assert not found["born"].any()
    assert not titanium.hessian_product(graphs, torch.ones_like(graphs.positions)).positions.any()
