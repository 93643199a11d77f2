"""Elastic tensors: notations, conventions of strain under stress, averages and symmetry."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import neighbor_list
from ase.spacegroup import crystal as ase_crystal
from torch import Tensor

from mlip_refine.crystals import tensors
from mlip_refine.crystals.moduli import hill_average, reuss_average, voigt_average
from mlip_refine.crystals.symmetry import INDEPENDENT, Symmetry, find_symmetry
from mlip_refine.quantities import KB

Draw = Callable[..., Tensor]


def _random(draw: Draw) -> Tensor:
    root = draw(6, 6)
    return root @ root.T + 2 * torch.eye(6)


def _rotation(draw: Draw) -> Tensor:
    return torch.linalg.qr(draw(3, 3))[0]


def _isotropic(bulk_modulus: float, shear: float) -> Tensor:
    lame = bulk_modulus - 2 * shear / 3
    matrix = shear * torch.tensor([2.0, 2, 2, 1, 1, 1]).double().diag()
    matrix[:3, :3] += lame
    return matrix


def test_notations_are_inverse_and_keep_components(gaussian: Draw) -> None:
    matrix = _random(gaussian)
    full = tensors.from_voigt(matrix)
    assert full[0, 0, 1, 2] == full[0, 0, 2, 1] == matrix[0, 3]
    assert full[0, 1, 0, 2] == matrix[5, 4]
    assert torch.equal(tensors.to_voigt(full), matrix)
    torch.testing.assert_close(tensors.from_mandel(tensors.to_mandel(matrix)), matrix)
    strain = gaussian(3, 3)
    strain = strain + strain.T
    energy = torch.einsum("ij,ijkl,kl", strain, full, strain)
    scale = torch.tensor([1.0, 1, 1, 2, 2, 2]).double().sqrt()
    mandel = scale * tensors.stress_to_voigt(strain)
    torch.testing.assert_close(mandel @ tensors.to_mandel(matrix) @ mandel, energy)


def test_rotation_is_that_of_the_full_tensor(gaussian: Draw) -> None:
    matrices, turn = torch.stack([_random(gaussian), _random(gaussian)]), _rotation(gaussian)
    full = torch.einsum("ia,jb,kc,ld,nabcd->nijkl", turn, turn, turn, turn, tensors.from_voigt(matrices))
    torch.testing.assert_close(tensors.rotate(matrices, turn), tensors.to_voigt(full))


def test_moduli_and_stability_do_not_depend_on_the_frame(gaussian: Draw) -> None:
    matrix = _random(gaussian)
    turned = tensors.rotate(matrix, _rotation(gaussian))
    for average in (voigt_average, reuss_average, hill_average):
        torch.testing.assert_close(average(turned).bulk, average(matrix).bulk)
        torch.testing.assert_close(average(turned).shear, average(matrix).shear)
    torch.testing.assert_close(tensors.stability(turned), tensors.stability(matrix))
    assert reuss_average(matrix).bulk < voigt_average(matrix).bulk
    assert reuss_average(matrix).shear < voigt_average(matrix).shear


def test_an_isotropic_solid_has_its_moduli_in_every_average(gaussian: Draw) -> None:
    matrix = _isotropic(110.0, 44.0)
    torch.testing.assert_close(tensors.rotate(matrix, _rotation(gaussian)), matrix)
    for average in (voigt_average, reuss_average, hill_average):
        assert average(matrix).bulk.item() == pytest.approx(110.0)
        assert average(matrix).shear.item() == pytest.approx(44.0)
    assert hill_average(matrix).poisson.item() == pytest.approx((330 - 88) / (88 + 660))
    assert hill_average(matrix).young.item() == pytest.approx(2 * 44.0 * (1 + (330 - 88) / (88 + 660)))
    expected = torch.tensor([88.0] * 5 + [330.0]).double()
    torch.testing.assert_close(tensors.stability(matrix), expected)


def test_voigt_and_reuss_of_a_cubic_crystal_are_the_textbook_ones() -> None:
    """Copper: C11, C12, C44 = 168.4, 121.4, 75.4 GPa (Nye 1957)."""
    c11, c12, c44 = 168.4, 121.4, 75.4
    matrix = torch.diag(torch.tensor([c11 - c12] * 3 + [c44] * 3).double())
    matrix[:3, :3] += c12
    assert voigt_average(matrix).shear.item() == pytest.approx((c11 - c12 + 3 * c44) / 5)
    reuss = 5 * (c11 - c12) * c44 / (4 * c44 + 3 * (c11 - c12))
    assert reuss_average(matrix).shear.item() == pytest.approx(reuss)
    assert reuss_average(matrix).bulk.item() == pytest.approx((c11 + 2 * c12) / 3)


def test_a_crystal_that_shears_by_itself_is_unstable() -> None:
    matrix = _isotropic(110.0, 44.0)
    matrix[5, 5] = -1.0
    assert (tensors.stability(matrix) < 0).sum() == 1


def test_constants_and_stress_strain_coefficients_under_pressure() -> None:
    """B11 = C11 - P, B12 = C12 + P, B44 = C44 - P."""
    matrix, pressure = _isotropic(110.0, 44.0), 7.0
    stress = -pressure * torch.eye(3).double()
    change = tensors.to_stress_strain(matrix, stress) - matrix
    expected = -pressure * torch.eye(6).double()
    expected[:3, :3] += pressure * (1 - torch.eye(3))
    torch.testing.assert_close(change, expected)


def test_conversions_are_inverse_and_batched(gaussian: Draw) -> None:
    matrices, stresses = gaussian(4, 6, 6), gaussian(4, 3, 3)
    stresses = stresses + stresses.mT
    there = tensors.to_stress_strain(matrices, stresses)
    torch.testing.assert_close(tensors.from_stress_strain(there, stresses), matrices)
    one = tensors.from_linear_strain(matrices[1], stresses[1])
    torch.testing.assert_close(tensors.from_linear_strain(matrices, stresses)[1], one)


def _pair(r: Tensor) -> Tensor:
    """Lennard-Jones energy shifted with its first two derivatives at the cutoff."""
    edge = torch.tensor(2.5, dtype=r.dtype)

    def bare(x: Tensor) -> Tensor:
        return 4 * (x**-12 - x**-6)

    first, second = -24 * (2 * edge**-13 - edge**-7), 24 * (26 * edge**-14 - 7 * edge**-8)
    return bare(r) - bare(edge) - (r - edge) * first - (r - edge) ** 2 / 2 * second


def _lennard_jones(deformation: Tensor, a: float) -> Tensor:
    """Energy of one atom of a deformed fcc crystal."""
    vectors = torch.from_numpy(neighbor_list("D", bulk("Ar", "fcc", a=a), 2.5))
    r = (vectors @ deformation.T).norm(dim=1)
    return 0.5 * (_pair(r) * (r < 2.5)).sum()


def _from_six(components: Tensor) -> Tensor:
    xx, yy, zz, yz, xz, xy = components
    return torch.stack([torch.stack([xx, xy, xz]), torch.stack([xy, yy, yz]), torch.stack([xz, yz, zz])])


def _cauchy(deformation: Tensor, a: float) -> Tensor:
    leaf = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    energy = _lennard_jones((torch.eye(3) + leaf) @ deformation, a)
    (slope,) = torch.autograd.grad(energy, leaf, create_graph=True)
    return slope / (a**3 / 4 * torch.linalg.det(deformation))


@pytest.mark.parametrize("stressed", ["pressure", "shear"])
def test_the_conventions_of_a_lennard_jones_crystal_under_stress(stressed: str) -> None:
    """Second derivatives in ε and in η by autograd, and stresses of strained cells, at one stress."""
    a = 1.5
    start = torch.eye(3).double()
    if stressed == "shear":
        start = start + torch.tensor([[0.01, 0.02, 0], [0.02, -0.02, 0.01], [0, 0.01, 0.03]])
    volume = a**3 / 4 * torch.linalg.det(start)
    zero, twice = torch.zeros(6).double(), torch.tensor([1.0, 1, 1, 2, 2, 2]).double()

    def linear(six: Tensor) -> Tensor:
        return _lennard_jones((torch.eye(3) + _from_six(six / twice)) @ start, a)

    def lagrangian(six: Tensor) -> Tensor:
        # The stretch to second order in η: what is left out has no second derivative.
        eta = _from_six(six / twice)
        return _lennard_jones((torch.eye(3) + eta - eta @ eta / 2) @ start, a)

    def strained(six: Tensor) -> Tensor:
        return tensors.stress_to_voigt(_cauchy((torch.eye(3) + _from_six(six / twice)) @ start, a))

    hessian, jacobian = torch.autograd.functional.hessian, torch.autograd.functional.jacobian
    stress = _cauchy(start, a).detach()
    assert stress.abs().max() > 5
    constants = tensors.from_linear_strain(hessian(linear, zero) / volume, stress)
    torch.testing.assert_close(constants, hessian(lagrangian, zero) / volume)
    torch.testing.assert_close(tensors.to_stress_strain(constants, stress), jacobian(strained, zero))
    # Central forces between centres of symmetry: Cauchy's relations, for C under any stress.
    full = tensors.from_voigt(constants)
    torch.testing.assert_close(full, full.transpose(1, 2))


def test_an_ideal_gas_keeps_its_pressure_from_fluctuations() -> None:
    """Without forces B11 = B12 = P, and B44 = 0: C of the kinetic term at the stress -P."""
    volume, temperature, n_atoms = torch.tensor(1000.0).double(), 300.0, 64
    zero = torch.zeros(6, 6).double()
    constants = tensors.isothermal_from_fluctuations(zero, zero, n_atoms, temperature, volume)
    pressure = n_atoms * KB * temperature / volume
    expected = torch.zeros(6, 6).double()
    expected[:3, :3] = pressure
    found = tensors.to_stress_strain(constants, -pressure * torch.eye(3).double())
    torch.testing.assert_close(found, expected)


def test_an_ideal_gas_is_stiffer_by_gamma_when_no_heat_flows() -> None:
    """B of sound: 5/3 P; λ = -(N k/V) δ, C_v = 3/2 N k."""
    volume, temperature, n_atoms = torch.tensor(1000.0).double(), 300.0, 64
    isothermal = tensors.kinetic_term(n_atoms, temperature, volume)
    thermal = -n_atoms * KB / volume * torch.eye(3).double()
    heat = torch.tensor(1.5 * n_atoms * KB).double()
    constants = tensors.adiabatic(isothermal, thermal, heat, temperature, volume)
    pressure = n_atoms * KB * temperature / volume
    found = voigt_average(tensors.to_stress_strain(constants, -pressure * torch.eye(3).double()))
    assert (found.bulk / pressure).item() == pytest.approx(5 / 3)


def test_the_fluctuations_of_a_gaussian_stress_soften(gaussian: Draw) -> None:
    """C^T by the formula, term by term and in a batch."""
    born, root, volume = gaussian(2, 6, 6), gaussian(2, 6, 6), torch.tensor([500.0, 700.0]).double()
    covariance = root @ root.mT
    found = tensors.isothermal_from_fluctuations(born, covariance, 8, 400.0, volume)
    one = 8 * KB * 400.0 / 700.0
    expected = born[1] - 700.0 / (KB * 400.0) * covariance[1]
    expected = expected + one * torch.tensor([2.0, 2, 2, 1, 1, 1]).double().diag()
    torch.testing.assert_close(found[1], expected)


def _general(spacegroup: int, *cellpar: float) -> Atoms:
    """Atoms at a general position."""
    return ase_crystal("O", [(0.1, 0.3, 0.2)], spacegroup=spacegroup, cellpar=cellpar)


def _rutile() -> Atoms:
    sites, cell = [(0, 0, 0), (0.3, 0.3, 0)], [4.6, 4.6, 3, 90, 90, 90]
    return ase_crystal("TiO", sites, spacegroup=136, cellpar=cell)


CRYSTALS: dict[str, Callable[[], Atoms]] = {
    "m-3m": lambda: bulk("Ti", "bcc", a=3.25),
    "m-3": lambda: _general(200, 5.4, 5.4, 5.4, 90, 90, 90),
    "6/mmm": lambda: bulk("Ti", "hcp", a=2.93, c=4.65),
    "6/m": lambda: _general(176, 7, 7, 5, 90, 90, 120),
    "-3m": lambda: _general(164, 7, 7, 5, 90, 90, 120),
    "-3": lambda: _general(147, 7, 7, 5, 90, 90, 120),
    "4/mmm": _rutile,
    "4/m": lambda: _general(84, 6, 6, 5, 90, 90, 90),
    "mmm": lambda: _general(47, 6, 7, 5, 90, 90, 90),
    "2/m": lambda: _general(10, 6, 7, 5, 90, 105, 90),
    "-1": lambda: _general(2, 6, 7, 5, 80, 105, 95),
}


def _symmetry(atoms: Atoms) -> Symmetry:
    return find_symmetry(np.array(atoms.cell), atoms.positions, atoms.numbers)


def _turned(atoms: Atoms, turn: Tensor) -> Atoms:
    turned = atoms.copy()
    turned.set_cell(np.array(atoms.cell) @ turn.numpy().T, scale_atoms=True)
    return turned


@pytest.mark.parametrize("laue", CRYSTALS)
def test_independent_constants_tell_the_tensor_whatever_the_frame(laue: str, gaussian: Draw) -> None:
    atoms = CRYSTALS[laue]()
    turn = _rotation(gaussian)
    turn = turn * torch.linalg.det(turn)
    symmetry, turned = _symmetry(atoms), _symmetry(_turned(atoms, turn))
    assert symmetry.laue == turned.laue == laue
    projected = torch.stack([tensors.project(_random(gaussian), symmetry.rotations) for _ in range(30)])
    assert torch.linalg.matrix_rank(projected.view(30, 36), rtol=1e-9) == len(INDEPENDENT[laue])
    values = torch.stack([torch.stack(list(symmetry.independent(c).values())) for c in projected])
    assert torch.linalg.matrix_rank(values, rtol=1e-9) == len(INDEPENDENT[laue])
    there = turned.independent(tensors.rotate(projected[0], turn))
    for name, value in symmetry.independent(projected[0]).items():
        torch.testing.assert_close(there[name], value, rtol=0, atol=1e-8, msg=name)


def test_both_settings_of_trigonal_groups_have_c14() -> None:
    """P-31m has its two-fold axes where P-3m1 has none."""
    for group in (162, 164):
        symmetry = _symmetry(_general(group, 7, 7, 5, 90, 90, 120))
        matrix = torch.rand(6, 6, generator=torch.Generator().manual_seed(group)).double()
        projected = tensors.project(matrix + matrix.T, symmetry.rotations)
        standard = tensors.rotate(projected, symmetry.to_standard)
        assert standard[0, 3].abs() > 1e-3
        assert standard[0, 4].abs() < 1e-10


def test_projection_is_idempotent_and_the_nearest(gaussian: Draw) -> None:
    symmetry = _symmetry(CRYSTALS["6/mmm"]())
    matrix = _random(gaussian)
    projected = tensors.project(matrix, symmetry.rotations)
    torch.testing.assert_close(tensors.project(projected, symmetry.rotations), projected)
    difference = tensors.to_mandel(matrix - projected)
    assert (difference * tensors.to_mandel(projected)).sum().abs() < 1e-9
    assert projected[5, 5].item() == pytest.approx(((projected[0, 0] - projected[0, 1]) / 2).item())


def test_everything_is_differentiable(gaussian: Draw) -> None:
    matrix, stress = _random(gaussian).requires_grad_(), (gaussian(3, 3) * 0.1).requires_grad_()

    def shear(c: Tensor, s: Tensor) -> Tensor:
        b = tensors.to_stress_strain(tensors.from_linear_strain(c, s + s.T), s + s.T)
        return hill_average(b).shear + tensors.stability(b).sum()

    assert torch.autograd.gradcheck(shear, (matrix, stress))
