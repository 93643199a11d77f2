"""Elastic constants at zero temperature: exact crystals, any box, differences of relaxed cells."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import neighbor_list
from torch import Tensor

from mlip_refine.crystals import relaxation, tensors
from mlip_refine.crystals.elasticity import StaticElasticity, primitive_cell, static_elasticity
from mlip_refine.crystals.relaxation import Rest, relax
from mlip_refine.errors import InputError, MlipRefineError
from mlip_refine.potential import Curvature, GraphBuilder, Graphs, Potential
from mlip_refine.quantities import GPA

STENCIL = {2: -1 / 12, 1: 2 / 3, -1: -2 / 3, -2: 1 / 12}
"""Central difference of fourth order."""


class Pairs:
    """What second derivatives ask of a potential, for the energy of pairs."""

    def __init__(self, pair: Callable[[Tensor], Tensor], cutoff: float) -> None:
        self.pair, self.dtype = pair, torch.float64
        self.graphs = GraphBuilder((6, 11, 17, 18, 30), cutoff, self.dtype, torch.device("cpu"))

    def curvature(self, graphs: Graphs) -> Curvature:
        vectors = graphs.vectors if graphs.vectors.grad_fn else graphs.vectors.detach().requires_grad_()
        with torch.enable_grad():
            r = vectors.norm(dim=1)
            pairs = 0.5 * self.pair(r) * (r < self.graphs.cutoff)
            system = graphs.batch[graphs.edge_index[0]]
            energy = torch.zeros(graphs.n_graphs, dtype=self.dtype).index_add(0, system, pairs)
            (slope,) = torch.autograd.grad(energy.sum(), vectors, create_graph=True)
        return Curvature(graphs, vectors, energy, slope)

    def chunks(self, structures: list[Any], work: Any) -> list[slice]:
        return [slice(0, 5), slice(5, len(structures))]

    def in_chunks(self, work: Any, structures: list[Any], evaluate: Callable[..., Any]) -> Iterator[Any]:
        for part in (slice(0, 3), slice(3, len(structures))):
            yield evaluate(part, self.graphs.collate(structures[part]))


def _lennard_jones(r: Tensor) -> Tensor:
    """With two derivatives that vanish at the cutoff of 2.5."""
    edge = torch.tensor(2.5, dtype=r.dtype)
    first, second = -24 * (2 * edge**-13 - edge**-7), 24 * (26 * edge**-14 - 7 * edge**-8)
    shifted = 4 * (r**-12 - r**-6) - 4 * (edge**-12 - edge**-6)
    return shifted - (r - edge) * first - (r - edge) ** 2 / 2 * second


def _lattice_sum(atoms: Atoms) -> Tensor:
    """Born's (1/2V) Σ (φ''/r² - φ'/r³) r_i r_j r_k r_l, the elastic constants at any stress."""
    vectors = torch.from_numpy(neighbor_list("D", atoms, 2.5))
    r = vectors.norm(dim=1).requires_grad_()
    (slope,) = torch.autograd.grad(_lennard_jones(r).sum(), r, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), r)
    weight = (bend / r**2 - slope / r**3).detach() / 2 / atoms.cell.volume
    return tensors.to_voigt(torch.einsum("n,ni,nj,nk,nl->ijkl", weight, *[vectors] * 4))


def _turned(atoms: Atoms, seed: int) -> tuple[Atoms, Tensor]:
    """The crystal in another frame, and the rotation there."""
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]
    turn *= np.linalg.det(turn)
    turned = atoms.copy()
    turned.set_cell(np.array(atoms.cell) @ turn.T, scale_atoms=True)
    return turned, torch.from_numpy(turn)


@pytest.mark.parametrize("a", [1.50, 1.55])
def test_a_lennard_jones_crystal_has_the_constants_of_its_lattice_sum(a: float) -> None:
    """Every atom is a centre of symmetry: nothing relaxes, and the sum is exact under any pressure."""
    atoms = bulk("Ar", "fcc", a=a)
    found = static_elasticity(Pairs(_lennard_jones, 2.5), atoms)
    assert found.stress.abs().max() > 1
    torch.testing.assert_close(found.constants, _lattice_sum(atoms), rtol=1e-10, atol=1e-9)
    assert found.softest is None
    assert found.asymmetry < 1e-9


def test_a_lennard_jones_crystal_comes_to_rest_under_a_pressure() -> None:
    pressure = 3.0 / GPA
    found = static_elasticity(Pairs(_lennard_jones, 2.5), bulk("Ar", "fcc", a=1.7), Rest("cell", pressure))
    torch.testing.assert_close(found.stress, -3.0 * torch.eye(3).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(found.constants, _lattice_sum(found.atoms), rtol=1e-10, atol=1e-9)
    expected = found.symmetry.independent(found.constants)["C44"] - 3.0
    assert found.symmetry.independent(found.coefficients)["C44"].item() == pytest.approx(expected.item())


def test_a_diamond_of_springs_has_no_shear_modulus_once_it_relaxes() -> None:
    """Central springs k along bonds: C11 = C12 = k/3a; C44 is that too while clamped, and 0 relaxed."""
    a, k = 4.0, 7.0
    length = 3**0.5 / 4 * a
    springs = Pairs(lambda r: 0.5 * k * (r - length) ** 2, 2.2)
    atoms = bulk("ZnC", "zincblende", a=a)
    atoms.positions[1] += [0.02, -0.03, 0.01]
    found = static_elasticity(springs, atoms)
    relaxed, clamped = found.symmetry.independent(found.constants), found.symmetry.independent(found.clamped)
    for name in ("C11", "C12"):
        assert relaxed[name].item() == pytest.approx(k / (3 * a), rel=1e-10)
        assert clamped[name].item() == pytest.approx(k / (3 * a), rel=1e-10)
    assert clamped["C44"].item() == pytest.approx(k / (3 * a), rel=1e-10)
    assert relaxed["C44"].abs() < 1e-10
    assert found.softest == pytest.approx(8 * k / 3)
    assert found.symmetry.space_group == "F-43m"


def test_a_crystal_that_is_no_minimum_says_so() -> None:
    length = 3**0.5
    repelling = Pairs(lambda r: -3.0 * (r - length) ** 2, 2.2)
    found = static_elasticity(repelling, bulk("ZnC", "zincblende", a=4.0))
    assert found.softest == pytest.approx(-16.0)


def test_a_crystal_that_does_not_come_to_rest_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relaxation, "_STEPS", 2)
    with pytest.raises(MlipRefineError, match="does not come to rest in 2 steps"):
        relax(Pairs(_lennard_jones, 2.5), bulk("Ar", "fcc", a=1.8), Rest("cell"))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def titanium() -> Potential:
    return Potential.load("titanium-compact")


def _hcp() -> Atoms:
    return bulk("Ti", "hcp", a=2.93, c=4.65)


def test_the_tensor_is_that_of_the_crystal_not_of_its_box_or_frame(titanium: Potential) -> None:
    expected = static_elasticity(titanium, _hcp()).constants
    scale = 1e-8 * expected.abs().max()
    turned, turn = _turned(_hcp(), 3)
    sheared = _hcp()
    sheared.set_cell(np.array([[1, 0, 0], [2, 1, 0], [-1, 1, 1]]) @ np.array(sheared.cell), scale_atoms=False)
    found = static_elasticity(titanium, turned, symmetrise=False).constants
    assert (found - tensors.rotate(expected, turn)).abs().max() < scale
    for atoms in (sheared, _hcp() * (2, 1, 1)):
        raw = static_elasticity(titanium, atoms, primitive=False, symmetrise=False)
        assert len(raw.atoms) == len(atoms)
        assert (raw.constants - expected).abs().max() < scale


def test_a_supercell_is_reduced_to_its_primitive_cell_in_its_frame(titanium: Potential) -> None:
    turned, turn = _turned(bulk("Ti", "bcc", a=2.8, cubic=True), 5)
    small = primitive_cell(turned * (2, 1, 3))
    assert len(small) == 1
    assert primitive_cell(small) is small
    found = static_elasticity(titanium, turned * (2, 1, 3), symmetrise=False)
    expected = static_elasticity(titanium, bulk("Ti", "bcc", a=2.8))
    difference = found.constants - tensors.rotate(expected.constants, turn)
    assert difference.abs().max() < 1e-8 * expected.constants.abs().max()


def _strained(atoms: Atoms, strain: np.ndarray) -> Atoms:
    strained = atoms.copy()
    strained.set_cell(np.array(atoms.cell) @ (np.eye(3) + strain), scale_atoms=True)
    return strained


def test_the_coefficients_are_differences_of_the_stress_of_relaxed_cells(
    titanium: Potential,
) -> None:
    """Of hcp under a stress that is no pressure, where B is not symmetric."""
    bent = np.array([[0.01, 0.008, 0], [0.008, -0.012, 0.006], [0, 0.006, -0.02]])
    start = relax(titanium, _strained(_hcp(), bent), Rest())
    found, h = static_elasticity(titanium, start), 1e-3
    assert found.softest is not None
    assert (found.constants - found.clamped).abs().max() > 5 * GPA
    b = found.coefficients
    assert (b - b.T).abs().max() > 0.5 * GPA
    for column, (i, j) in {0: (0, 0), 3: (1, 2)}.items():
        unit = np.zeros((3, 3))
        unit[i, j] += 0.5
        unit[j, i] += 0.5
        slope = torch.zeros(3, 3).double()
        for step, weight in STENCIL.items():
            at_rest = static_elasticity(titanium, _strained(start, step * h * unit))
            slope += weight / h * at_rest.stress
        difference = tensors.stress_to_voigt(slope) - b[:, column]
        assert difference.abs().max() < 1e-6 * b.abs().max()


@pytest.mark.parametrize("rest", [Rest(), Rest("cell", 5.0)])
def test_gradients_follow_the_crystal_to_its_new_rest(titanium: Potential, rest: Rest) -> None:
    """Against differences between crystals that come to rest with changed parameters."""
    potential = Potential.from_module(titanium.module)
    bent = np.array([[0.01, 0.008, 0], [0.008, -0.012, 0.006], [0, 0.006, -0.02]])
    atoms, random = relax(potential, _strained(_hcp(), bent), rest), torch.Generator().manual_seed(6)
    weights = torch.randn(6, 6, generator=random).double()
    parameters = potential.parameters()
    noise = {name: torch.randn(p.shape, generator=random).double() for name, p in parameters.items()}
    change = {name: p.abs().mean() * noise[name] for name, p in parameters.items()}

    def contracted(found: StaticElasticity) -> Tensor:
        return (weights * found.constants).sum()

    trained = potential.trainable_parameters()
    value = contracted(static_elasticity(potential, atoms, rest, create_graph=True))
    gradients = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
    slope = sum((change[n] * g).sum() for n, g in zip(trained, gradients, strict=True) if g is not None)
    h, difference = 2e-5, 0.0
    for step, weight in STENCIL.items():
        with potential.holding({n: p + step * h * change[n] for n, p in parameters.items()}):
            difference += weight / h * contracted(static_elasticity(potential, atoms, rest)).item()
    assert float(slope) == pytest.approx(difference, rel=1e-4)


def test_single_precision_is_refused() -> None:
    potential = Potential.load("titanium-compact", default_dtype="float32")
    with pytest.raises(InputError, match="double precision"):
        static_elasticity(potential, _hcp())
