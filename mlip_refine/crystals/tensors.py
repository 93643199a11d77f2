"""Elastic tensors: notations, rotations, conventions of strain, and what follows from fluctuations.

Rank-4 tensors with the symmetries C_ijkl = C_jikl = C_ijlk travel as Voigt matrices `[..., 6, 6]` of their
components (C_14 is C_xxyz, no factors of 2), in eV/Å³ like stresses `[..., 3, 3]`, tensile positive.
Everything is differentiable, batched over leading dimensions, and of the floating type of its input.

Three tensors are told apart (Wallace 1970; Barron and Klein 1965), equal only without stress:

- the second derivatives in the linear symmetric strain ε, x → (1 + ε) x: `born` of a potential;
- C, those in the Lagrangian strain η = ε + ε²/2: the elastic constants, with the symmetry C_ijkl = C_klij;
- B, the stress-strain coefficients dσ_ij/dε_kl: what strained cells and sound show under stress.
"""

import math

import torch
from torch import Tensor

from mlip_refine.quantities import KB, VOIGT

_ROWS, _COLUMNS = [i for i, _ in VOIGT], [j for _, j in VOIGT]
_NUMBER = [[0, 5, 4], [5, 1, 3], [4, 3, 2]]


def to_voigt(tensor: Tensor) -> Tensor:
    """Return the components of tensors `[..., 3, 3, 3, 3]` as Voigt matrices `[..., 6, 6]`."""
    return tensor[..., _ROWS, _COLUMNS, :, :][..., _ROWS, _COLUMNS]


def from_voigt(matrix: Tensor) -> Tensor:
    """Return the tensors `[..., 3, 3, 3, 3]` of Voigt matrices `[..., 6, 6]`."""
    number = torch.tensor(_NUMBER, device=matrix.device)
    return matrix[..., number[:, :, None, None], number[None, None]]


def stress_to_voigt(stress: Tensor) -> Tensor:
    """Return the components of symmetric tensors `[..., 3, 3]` in Voigt order `[..., 6]`."""
    return stress[..., _ROWS, _COLUMNS]


def stress_from_voigt(components: Tensor) -> Tensor:
    """Return the symmetric tensors `[..., 3, 3]` of components in Voigt order `[..., 6]`."""
    return components[..., torch.tensor(_NUMBER, device=components.device)]


def to_mandel(matrix: Tensor) -> Tensor:
    """Return Voigt matrices `[..., 6, 6]` in the orthonormal basis of symmetric tensors (Mandel).

    There rotations are orthogonal, the inverse is the compliance, and eigenvalues do not depend on the frame.
    """
    scale = _scale(matrix)
    return scale[:, None] * matrix * scale


def from_mandel(matrix: Tensor) -> Tensor:
    """Return the Voigt matrices of matrices in the orthonormal basis `[..., 6, 6]`."""
    scale = _scale(matrix)
    return matrix / scale[:, None] / scale


def mandel_basis(like: Tensor) -> Tensor:
    """Return the orthonormal basis of symmetric tensors `[6, 3, 3]` in Voigt order, typed as `like`."""
    basis = torch.zeros(6, 3, 3, dtype=like.dtype, device=like.device)
    for number, (i, j) in enumerate(VOIGT):
        basis[number, i, j] = basis[number, j, i] = 1.0 if i == j else math.sqrt(0.5)
    return basis


def rotate(matrix: Tensor, rotations: Tensor) -> Tensor:
    """Return Voigt matrices `[..., 6, 6]` of the crystal turned by R, x' = R x, with R `[..., 3, 3]`."""
    rotations = rotations.to(matrix)
    basis = mandel_basis(rotations)
    turned = rotations[..., None, :, :] @ basis @ rotations.mT[..., None, :, :]
    # How rotations act on symmetric tensors, in their orthonormal basis.
    turn = torch.einsum("aij,...bij->...ab", basis, turned)
    return from_mandel(turn @ to_mandel(matrix) @ turn.mT)


def project(matrix: Tensor, rotations: Tensor) -> Tensor:
    """Return the mean of a Voigt matrix `[6, 6]` over a point group of rotations `[n_rotations, 3, 3]`.

    This is the nearest tensor with the symmetry of the crystal.
    """
    return rotate(matrix, rotations).mean(0)


def from_linear_strain(born: Tensor, stress: Tensor) -> Tensor:
    """Return C from second derivatives in the linear symmetric strain at the same stress, both of U or of F.

    C_ijkl = (1/V) ∂²U/∂ε_ij∂ε_kl - ¼(σ_ik δ_jl + σ_il δ_jk + σ_jk δ_il + σ_jl δ_ik), by the chain rule with
    η = ε + ε²/2.

    Args:
        born: Second derivatives (1/V) ∂²U/∂ε∂ε `[..., 6, 6]`.
        stress: Stress (1/V) ∂U/∂ε `[..., 3, 3]`.
    """
    return born - _stress_terms(stress) / 4


def to_stress_strain(constants: Tensor, stress: Tensor) -> Tensor:
    """Return the stress-strain coefficients B of a crystal under stress (Wallace 1970).

    B_ijkl = C_ijkl + ½(σ_ik δ_jl + σ_il δ_jk + σ_jk δ_il + σ_jl δ_ik - 2 σ_ij δ_kl). Under a stress that is
    no pressure, B_ijkl differs from B_klij.

    Args:
        constants: Elastic constants C `[..., 6, 6]`.
        stress: Total stress, with its kinetic part at finite temperature `[..., 3, 3]`.
    """
    return constants + _stress_strain_terms(stress)


def from_stress_strain(coefficients: Tensor, stress: Tensor) -> Tensor:
    """Return C from the stress-strain coefficients B (see `to_stress_strain`)."""
    return coefficients - _stress_strain_terms(stress)


def kinetic_term(n_atoms: int, temperature: float, volume: Tensor) -> Tensor:
    """Return the part of the momenta in C^T, (N kT/V)(δ_ik δ_jl + δ_il δ_jk) `[..., 6, 6]`, eV/Å³.

    It belongs to the Lagrangian strain: the linear one would have half of it.

    Args:
        n_atoms: Number of atoms.
        temperature: Temperature, K.
        volume: Volume `[...]`, Å³.
    """
    pattern = torch.tensor([2.0, 2.0, 2.0, 1.0, 1.0, 1.0], dtype=volume.dtype, device=volume.device)
    return (n_atoms * KB * temperature / volume)[..., None, None] * pattern.diag()


def isothermal_from_fluctuations(
    born: Tensor, stress_covariance: Tensor, n_atoms: int, temperature: float, volume: Tensor
) -> Tensor:
    """Return the isothermal constants C^T of a fixed cell `[..., 6, 6]`.

    C^T = ⟨C^B⟩ - (V/kT)[⟨σσ⟩ - ⟨σ⟩⟨σ⟩] + (N kT/V)(δ_ik δ_jl + δ_il δ_jk)
    (Squire, Holt and Hoover 1969; Lutsko 1989).

    Args:
        born: Born term ⟨C^B⟩, the mean of `from_linear_strain` of every frame `[..., 6, 6]`.
        stress_covariance: Covariance of the configurations' stress components in Voigt order `[..., 6, 6]`.
        n_atoms: Number of atoms.
        temperature: Temperature, K.
        volume: Volume `[...]`, Å³.
    """
    fluctuation = (volume / (KB * temperature))[..., None, None] * stress_covariance
    return born - fluctuation + kinetic_term(n_atoms, temperature, volume)


def adiabatic(
    isothermal: Tensor, thermal_stress: Tensor, heat_capacity: Tensor, temperature: float, volume: Tensor
) -> Tensor:
    """Return the adiabatic constants C^S = C^T + (T V/C_v) λλ (Wallace 1972).

    Args:
        isothermal: Isothermal constants C^T `[..., 6, 6]`.
        thermal_stress: Thermal stress λ = ∂σ/∂T at fixed strain `[..., 3, 3]`, eV/Å³/K.
        heat_capacity: Heat capacity C_v of the whole cell `[...]`, eV/K.
        temperature: Temperature, K.
        volume: Volume of the whole cell `[...]`, Å³.
    """
    coupling = stress_to_voigt(thermal_stress)
    factor = temperature * volume / heat_capacity
    return isothermal + factor[..., None, None] * coupling[..., :, None] * coupling[..., None, :]


def stability(coefficients: Tensor) -> Tensor:
    """Return the eigenvalues of the symmetric part of B at the applied stress `[..., 6]`, ascending, eV/Å³.

    A crystal is stable if all are above zero (Born's criteria; under stress Wang et al. 1993).

    Args:
        coefficients: Stress-strain coefficients B `[..., 6, 6]`; without stress they are C.
    """
    values: Tensor = torch.linalg.eigvalsh(to_mandel((coefficients + coefficients.mT) / 2))
    return values


def _stress_terms(stress: Tensor) -> Tensor:
    """Return σ_ik δ_jl + σ_il δ_jk + σ_jk δ_il + σ_jl δ_ik `[..., 6, 6]`."""
    one = torch.eye(3, dtype=stress.dtype, device=stress.device)
    term = to_voigt(torch.einsum("...ik,jl->...ijkl", stress, one))
    other = to_voigt(torch.einsum("...il,jk->...ijkl", stress, one))
    back = to_voigt(torch.einsum("...jk,il->...ijkl", stress, one))
    return term + other + back + to_voigt(torch.einsum("...jl,ik->...ijkl", stress, one))


def _stress_strain_terms(stress: Tensor) -> Tensor:
    one = torch.eye(3, dtype=stress.dtype, device=stress.device)
    return _stress_terms(stress) / 2 - stress_to_voigt(stress)[..., :, None] * stress_to_voigt(one)


def _scale(like: Tensor) -> Tensor:
    root = math.sqrt(2.0)
    return torch.tensor([1.0, 1.0, 1.0, root, root, root], dtype=like.dtype, device=like.device)
