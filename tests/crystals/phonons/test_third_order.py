"""Third-order force constants: of analytic pairs, beside differences, symmetric, and as phono3py has them."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch import Tensor

from mlip_refine.crystals.phonons import third_order
from mlip_refine.crystals.phonons.harmonic import HarmonicCrystal, forces
from mlip_refine.crystals.phonons.hessian import hessian_products, unit_displacements
from mlip_refine.crystals.phonons.third_order import (
    PairColumn,
    PairSymmetry,
    permutation_symmetrised,
    third_derivatives,
    third_order_constants,
    without_translations,
)
from mlip_refine.errors import MlipRefineError
from mlip_refine.potential import Graphs, Potential

F64 = torch.float64
SALT = bulk("NaCl", "rocksalt", a=5.64)
SHELLS = {2.9: (2.5, 2.7, -9.0), 4.1: (0.8, 4.1, -2.0)}
"""By largest length: stiffness, eV/Å², length at rest, Å, and third derivative, eV/Å³."""


class Pairs(torch.nn.Module):
    """Anharmonic springs along bonds, ½ k x² + ⅙ c x³ with x the stretch, as MACE is called."""

    def __init__(self, numbers: tuple[int, ...]) -> None:
        super().__init__()
        self.constants = torch.nn.Parameter(torch.tensor(list(SHELLS.values()), dtype=F64))
        self.register_buffer("ends", torch.tensor(list(SHELLS), dtype=F64))
        self.register_buffer("atomic_numbers", torch.tensor(numbers))
        self.register_buffer("r_max", torch.tensor(max(SHELLS)))

    def shell(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Lengths, and constants with zeros beyond the last shell."""
        distance = vectors.norm(dim=1)
        shell = torch.bucketize(distance.detach(), self.ends)
        padded = torch.cat([self.constants, torch.zeros(1, 3, dtype=F64)])
        return distance, padded[shell]

    def forward(self, inputs: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        distance, found = self.shell(inputs["shifts"])
        stiffness, length, third = found.unbind(1)
        x = distance - length
        pairs = stiffness * x**2 / 2 + third * x**3 / 6
        system = inputs["batch"][inputs["edge_index"][0]]
        return {"energy": pairs.new_zeros(len(inputs["ptr"]) - 1).index_add(0, system, 0.5 * pairs)}


def dense(potential: Potential, atoms: Atoms) -> Tensor:
    """All third derivatives of `Pairs` by hand `[N, N, N, 3, 3, 3]`.

    φ(r) has A n n n + B (n δ + δ n + ...), A = φ''' - 3 φ''/r + 3 φ'/r², B = φ''/r - φ'/r².
    """
    graphs = potential.graphs.collate([potential.graphs.from_atoms(atoms)])
    module: Any = potential.module
    r, found = module.shell(graphs.vectors)
    stiffness, length, third = found.detach().unbind(1)
    x, n, one = r - length, graphs.vectors / r[:, None], torch.eye(3, dtype=F64)
    slope, bend = stiffness * x + third * x**2 / 2, stiffness + third * x
    a, b = third - 3 * bend / r + 3 * slope / r**2, bend / r - slope / r**2
    along = torch.einsum("e,ea,eb,ec->eabc", a, n, n, n)
    turned = sum(
        torch.einsum(f"e,e{s},{t}->eabc", b, n, one) for s, t in (("a", "bc"), ("b", "ac"), ("c", "ab"))
    )
    total = torch.zeros(*3 * [len(atoms)], 3, 3, 3, dtype=F64)
    for ends in product((0, 1), repeat=3):
        sign = (-1) ** (3 - sum(ends))
        total.index_put_(
            tuple(graphs.edge_index[e] for e in ends), 0.5 * sign * (along + turned), accumulate=True
        )
    return total


def anharmonic(atoms: Atoms) -> Potential:
    return Potential.from_module(Pairs(tuple(sorted({int(z) for z in atoms.numbers}))))


@pytest.fixture(scope="module")
def salt() -> tuple[HarmonicCrystal, Potential]:
    return HarmonicCrystal.of_cell(SALT, np.diag([3, 3, 3])), anharmonic(SALT)


@pytest.fixture(scope="module")
def titanium() -> tuple[HarmonicCrystal, Potential]:
    cell = bulk("Ti", "hcp", a=2.93, c=4.65)
    return HarmonicCrystal.of_cell(cell, np.diag([2, 2, 1])), Potential.load("titanium-compact")


def test_pairs_have_the_constants_that_they_have_by_hand(salt):
    crystal, potential = salt
    found = third_order_constants(crystal, potential)
    expected = dense(potential, crystal.supercell)[crystal.translations.primitive_atoms]
    assert float(expected.abs().max()) > 5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_few_columns_determine_all(salt):
    """Of 108 pairs with 9 pairs of axes each."""
    crystal, _ = salt
    pairs = PairSymmetry(crystal.translations, crystal.symmetry)
    assert len(pairs.irreducible(torch.ones(2, 54, dtype=torch.bool))) < 60


def test_crystals_without_symmetry():
    generator = np.random.default_rng(1)
    cell = SALT * (2, 1, 1)
    cell.positions += generator.normal(scale=0.05, size=cell.positions.shape)
    crystal = HarmonicCrystal.of_cell(cell, np.diag([1, 2, 1]))
    potential = anharmonic(cell)
    assert len(crystal.symmetry.rotations) == 1
    expected = dense(potential, crystal.supercell)[crystal.translations.primitive_atoms]
    torch.testing.assert_close(third_order_constants(crystal, potential), expected, rtol=0, atol=1e-10)


def test_constants_of_a_model_are_differences_of_its_hessian(titanium):
    """Central differences of fourth order, of pairs of atoms and axes from all over the cell."""
    crystal, potential = titanium
    found = third_order_constants(crystal, potential)
    n, h = len(crystal.supercell), 4e-3
    for home, axis, other, other_axis in ((0, 0, 0, 0), (0, 1, 3, 2), (1, 2, 6, 0), (1, 0, 5, 1)):
        atom = int(crystal.translations.primitive_atoms[home])
        v, w = unit_displacements(n, [(atom, axis), (other, other_axis)])
        difference = torch.zeros(n, 3, dtype=F64)
        for steps, weight in {2: -1 / 12, 1: 2 / 3, -1: -2 / 3, -2: 1 / 12}.items():
            moved = crystal.supercell.copy()
            moved.positions += steps * h * v.numpy()
            difference += (
                weight / h * hessian_products(potential, [potential.graphs.from_atoms(moved)], [w])[0]
            )
        column = found[home, other, :, axis, other_axis]
        assert (column - difference).norm() < 1e-6 * found[home, atom].norm()


def test_symmetries_hold_by_themselves(titanium):
    """Nothing has been symmetrised here, and every pair of a class but one follows from another."""
    crystal, potential = titanium
    pairs = PairSymmetry(crystal.translations, crystal.symmetry)
    columns = pairs.irreducible(torch.ones(2, 8, dtype=torch.bool))
    values = third_derivatives(potential, crystal.structure(potential), columns)
    found = pairs.complete(columns, values)
    permuted = permutation_symmetrised(crystal.translations, found)
    torch.testing.assert_close(permuted, found, rtol=0, atol=1e-10)
    for atom in (1, 2):
        assert float(found.sum(atom).abs().max()) < 1e-10
    single = third_order_constants(crystal, potential.frozen_copy("float32"))
    assert (single - found).norm() < 1e-5 * found.norm()


def test_symmetrised_constants_obey_everything(titanium):
    crystal, _ = titanium
    generator = torch.Generator().manual_seed(1)
    random = torch.randn(2, 8, 8, 3, 3, 3, generator=generator, dtype=F64)
    translations = crystal.translations
    once = permutation_symmetrised(translations, random)
    torch.testing.assert_close(permutation_symmetrised(translations, once), once, rtol=0, atol=1e-14)
    torch.testing.assert_close(once, once.transpose(1, 2).transpose(-1, -2), rtol=0, atol=1e-14)
    found = without_translations(translations, once)
    torch.testing.assert_close(permutation_symmetrised(translations, found), found, rtol=0, atol=1e-14)
    torch.testing.assert_close(without_translations(translations, found), found, rtol=0, atol=1e-14)
    for atom in (1, 2):
        assert float(found.sum(atom).abs().max()) < 1e-13


def test_a_cutoff_beyond_all_bonds_changes_nothing_and_a_shorter_one_cuts(salt):
    crystal, potential = salt
    whole = third_order_constants(crystal, potential)
    torch.testing.assert_close(third_order_constants(crystal, potential, 4.1), whole, rtol=0, atol=1e-10)
    short = third_order_constants(crystal, potential, 3.0)
    assert (short - whole).norm() > 0.01 * whole.norm()
    torch.testing.assert_close(
        permutation_symmetrised(crystal.translations, short), short, rtol=0, atol=1e-13
    )
    assert float(short.sum(2).abs().max()) < 1e-12


@pytest.mark.parametrize("what", ["permutations of atoms", "the sum rule of translations"])
def test_wrong_derivatives_are_refused(titanium, monkeypatch, what: str):
    """A constant in all slopes breaks the sum rule, once permutations are not looked at."""
    crystal, right = titanium
    potential = Potential.from_module(right.module)
    plain = Graphs.forces

    def wrong(graphs: Graphs, slope: Tensor) -> Tensor:
        found = plain(graphs, slope)
        return found if slope.requires_grad else found + 0.05 * found.abs().mean()

    monkeypatch.setattr(Graphs, "forces", wrong)
    if what != "permutations of atoms":
        monkeypatch.setattr(third_order, "permutation_symmetrised", lambda _, constants: constants)
    with pytest.raises(MlipRefineError, match=f"third derivatives of this model contradict {what}"):
        third_order_constants(crystal, potential)


def test_phono3py_finds_the_same_from_forces(salt):
    phono3py = pytest.importorskip("phono3py")
    crystal, potential = salt
    phonon = crystal.phonopy()
    pairs = phono3py.Phono3py(phonon.unitcell, np.eye(3, dtype=int), primitive_matrix=phonon.primitive_matrix)
    pairs.generate_displacements(distance=0.005)
    moved = [crystal.supercell.copy() for _ in pairs.supercells_with_displacements]
    for atoms, cell in zip(moved, pairs.supercells_with_displacements, strict=True):
        atoms.positions = cell.positions
    pairs.forces = forces(potential, moved)
    pairs.produce_fc3(is_compact_fc=True)
    found = third_order_constants(crystal, potential)
    assert np.abs(pairs.fc3 - found.numpy()).max() < 1e-3 * float(found.abs().max())


def test_grueneisen_parameters_are_those_of_a_change_of_volume(salt):
    """γ = -V/(2 ω²) dω²/dV; in this structure atoms keep their places when it expands."""
    gruneisen = pytest.importorskip("phono3py.phonon3.gruneisen")
    crystal, potential = salt
    phonon = crystal.phonopy(crystal.force_constants(potential))
    third = third_order_constants(crystal, potential).numpy()
    points = np.array([[1, 0, 0], [1, 1, 0], [1, 2, 0]]) / 3
    mode = gruneisen.Gruneisen(phonon.force_constants, third, phonon.supercell, phonon.primitive)
    mode.set_qpoints(points)
    mode.run()
    squares, h = [], 1e-4
    for scale in (1 + h, 1 - h):
        cell = crystal.primitive
        cell.set_cell(scale * cell.cell.array, scale_atoms=True)
        strained = crystal.moved(cell)
        bands = strained.phonopy(strained.force_constants(potential))
        squares.append([bands.get_frequencies(q) ** 2 for q in points])
    here = np.array([phonon.get_frequencies(q) ** 2 for q in points])
    expected = -(np.array(squares[0]) - squares[1]) / (6 * h) / (2 * here)
    found = np.einsum("qmaa->qm", mode.gruneisen_parameters) / 3
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_columns_come_in_the_order_that_was_asked_for(titanium):
    crystal, potential = titanium
    structure = crystal.structure(potential)
    columns = [PairColumn(1, 2, 3, 0), PairColumn(0, 0, 3, 1), PairColumn(1, 2, 0, 0)]
    together = third_derivatives(potential, structure, columns)
    alone = torch.cat([third_derivatives(potential, structure, [c]) for c in columns])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
