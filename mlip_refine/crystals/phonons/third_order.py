"""Third-order force constants: exact third derivatives of the energy, from few pairs of displaced atoms.

A column is ∂(w · H v)/∂x for displacements v and w of one atom each: one more reverse pass through the
product of the Hessian with v. It costs no more than a central difference of such products (3.6 evaluations of
forces, with the product shared among several w; a difference takes 4.4), and there is no finite step to
choose: it holds to rounding also in single precision, where differences of 1e-3 Å are off by 4e-3.
"""

from collections.abc import Sequence
from itertools import batched, chain, groupby

import torch
from torch import Tensor

from mlip_refine.crystals.phonons.harmonic import HarmonicCrystal
from mlip_refine.crystals.phonons.hessian import unit_displacements
from mlip_refine.crystals.phonons.pair_symmetry import PairColumn, PairSymmetry
from mlip_refine.data.phonons.spacegroups import Translations
from mlip_refine.errors import MlipRefineError
from mlip_refine.potential import Graphs, Potential, Structure, Work

_SHARED = 4
"""Second displacements for one product with the Hessian: 3.5 instead of 5.5 evaluations of forces each."""

_ALLOWED = 1e-3
"""Relative deviation from symmetries that hold by themselves; places are symmetric to 1e-5 Å, not more."""


def third_order_constants(
    crystal: HarmonicCrystal, potential: Potential, cutoff: float | None = None
) -> Tensor:
    """Third-order force constants ∂³U/∂u_i∂u_j∂u_k of a crystal by a potential, without a graph.

    Args:
        crystal: At rest.
        potential: In either precision.
        cutoff: Triplets with two atoms farther apart than this, Å, count nothing; None keeps all. What is
            left obeys the sum rule again afterwards, for which all constants change a little.

    Returns:
        Of the atoms of the primitive cell with all others `[n_prim, N, N, 3, 3, 3]`, eV/Å³, float64, on the
        CPU: invariant under the space group and permutations, with vanishing sums over each atom.

    Raises:
        InputError: The potential does not know an element.
        MlipRefineError: Memory runs out for a single system; or the derivatives contradict their symmetry.
    """
    pairs = PairSymmetry(crystal.translations, crystal.symmetry)
    near = _near(crystal, cutoff)
    first = crystal.translations.primitive_atoms
    columns = pairs.irreducible(near[first])
    values = third_derivatives(potential, crystal.structure(potential), columns)
    found = pairs.complete(columns, values)
    found *= (near[first][:, :, None] & near[first][:, None, :] & near)[..., None, None, None]
    permuted = permutation_symmetrised(crystal.translations, found)
    _require("permutations of atoms", permuted, found)
    summed = without_translations(crystal.translations, permuted)
    if cutoff is None:
        _require("the sum rule of translations", summed, permuted)
    return summed


def third_derivatives(potential: Potential, structure: Structure, columns: Sequence[PairColumn]) -> Tensor:
    """Columns of the third derivatives of one structure, without a graph.

    Args:
        potential: The model.
        structure: Usually a supercell.
        columns: Pairs of displaced atoms with their axes.

    Returns:
        `[n_columns, n_atoms, 3]`, eV/Å³, float64, on the CPU.

    Raises:
        MlipRefineError: If memory runs out for a single system.
    """
    n_atoms = len(structure.positions)
    groups = _sharing(columns)

    def derivatives(part: slice, graphs: Graphs) -> list[Tensor]:
        own = [[columns[k] for k in shared] for shared in groups[part]]
        first = unit_displacements(n_atoms, [shared[0][:2] for shared in own])
        second = torch.zeros(max(map(len, own)), len(own), n_atoms, 3, dtype=torch.float64)
        for g, shared in enumerate(own):
            for turn, column in enumerate(shared):
                second[turn, g, column.other, column.other_axis] = 1.0
        found = _contracted(potential, graphs, torch.cat(first), second.flatten(1, 2))
        return list(found.unflatten(1, (len(own), n_atoms)).unbind(1))

    values = torch.zeros(len(columns), n_atoms, 3, dtype=torch.float64)
    chunks = potential.in_chunks(Work.HESSIAN_GRADIENT, [structure] * len(groups), derivatives)
    for shared, found in zip(groups, chain.from_iterable(chunks), strict=True):
        values[shared] = found[: len(shared)]
    return values


def permutation_symmetrised(translations: Translations, constants: Tensor) -> Tensor:
    """Mean over all orders of the three atoms `[n_prim, N, N, 3, 3, 3]`."""
    later = (constants + _last_two(constants)) / 2
    second = _first_two(translations, later)
    return (later + second + _last_two(second)) / 3


def without_translations(translations: Translations, constants: Tensor) -> Tensor:
    """Return the nearest constants that obey the sum rule over each of the three atoms.

    With T the projector on uniform translations, Ψ ↦ (1 - T)⊗(1 - T)⊗(1 - T) Ψ: one step, exact.

    Args:
        translations: Of the supercell.
        constants: Symmetric under permutations `[n_prim, N, N, 3, 3, 3]`.
    """
    pairs = constants.mean(2)
    atoms = pairs.mean(1)
    homes, back = translations.primitive_index, translations.inverse[translations.translation_index]
    every_pair, every = pairs[homes[:, None], back], atoms[homes]
    found = constants - pairs[:, :, None] - pairs.transpose(-1, -2)[:, None]
    # A mean over the first atom is one over the last, whose axis moves to the front.
    found -= every_pair.permute(0, 1, 4, 2, 3)
    found += atoms[:, None, None] + every.transpose(-3, -2)[:, None] + every.permute(0, 2, 3, 1)
    return found.sub_(atoms.mean(0))


def _sharing(columns: Sequence[PairColumn]) -> list[list[int]]:
    """Groups of columns, by number, with the same first displacement."""
    order = sorted(range(len(columns)), key=lambda k: columns[k])
    return [
        list(shared)
        for _, same in groupby(order, key=lambda k: columns[k][:2])
        for shared in batched(same, _SHARED)
    ]


def _contracted(potential: Potential, graphs: Graphs, first: Tensor, second: Tensor) -> Tensor:
    """Third derivatives along `[n_atoms, 3]` and each of `[n, n_atoms, 3]`: as many as the latter, eV/Å³."""
    curvature = potential.curvature(graphs)
    with torch.enable_grad():
        product = curvature.along(first, create_graph=True).positions
    found = []
    for along in second.to(product):
        (slope,) = torch.autograd.grad(product, curvature.vectors, along, retain_graph=True)
        found.append(-graphs.forces(slope))
    return torch.stack(found).detach().double().cpu()


def _near(crystal: HarmonicCrystal, cutoff: float | None) -> Tensor:
    """Which atoms are within the cutoff of which `[N, N]`, by their nearest images."""
    n_atoms = len(crystal.supercell)
    if cutoff is None:
        return torch.ones(n_atoms, n_atoms, dtype=torch.bool)
    distances = crystal.supercell.get_all_distances(mic=True)
    return torch.from_numpy(distances <= cutoff + crystal.symprec)


def _last_two(constants: Tensor) -> Tensor:
    """Ψ[i, k, j] in the place of Ψ[i, j, k]."""
    return constants.transpose(1, 2).transpose(-1, -2)


def _first_two(translations: Translations, constants: Tensor) -> Tensor:
    """Ψ[j, i, k] in the place of Ψ[i, j, k], compactly."""
    back = translations.inverse[translations.translation_index]
    homes, first = translations.primitive_index, back[:, translations.primitive_atoms].T
    return constants[homes[None, :, None], first[:, :, None], back[None]].transpose(-3, -2)


def _require(what: str, right: Tensor, found: Tensor) -> None:
    """Refuse what differs too much from what it should be, or is not a number."""
    deviation = float((right - found).norm() / found.norm().clamp(min=1e-12))
    if not deviation <= _ALLOWED:
        raise MlipRefineError(
            f"third derivatives of this model contradict {what}: a relative error of {deviation:.1e}, "
            f"allowed {_ALLOWED:.0e}"
        )
