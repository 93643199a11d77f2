"""Whether force constants can be what they say: measured before anything is symmetrised away."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlip_refine.data.phonons.force_constants import HARMONIC
from mlip_refine.data.phonons.reference import Displacement, PhononReference
from mlip_refine.data.phonons.spacegroups import CrystalSymmetry, Translations
from mlip_refine.errors import InputError


@dataclass(frozen=True)
class PhononTolerances:
    """Largest deviations that are accepted; ratios, but for the last.

    The defaults are about ten times what is found in sound calculations, and far below what a wrong order of
    atoms, a wrong unit or a wrong cell makes of them.

    Attributes:
        sum_rule: Acoustic sum rule: |Σ_j Φ[i, j]| over the largest entry of Φ.
        asymmetry: |Φ - Φᵀ|, likewise.
        space_group: |Φ - its mean over the space group|, likewise.
        misfit: |F + Φ u| over |F|, for displaced supercells.
        net_force: |Σ_i F_i| over √N |F|, for displaced supercells.
        residual_force: Largest force on an atom of the undisplaced supercell, eV/Å: not a ratio.
    """

    sum_rule: float = 0.1
    asymmetry: float = 0.1
    space_group: float = 0.1
    misfit: float = 0.3
    net_force: float = 0.1
    residual_force: float = 0.1


_MEANINGS = {
    "sum_rule": (
        "the force constants break the acoustic sum rule",
        "Check that they were made for this supercell, in this order of atoms.",
    ),
    "asymmetry": (
        "the force constants are not symmetric, Φ[i, j] ≠ Φ[j, i]ᵀ",
        "Check supercell matrix, primitive matrix and order of atoms.",
    ),
    "space_group": (
        "the force constants do not have the symmetry of the crystal",
        "Check the order of atoms, and that the structure is the one that they were made for.",
    ),
    "misfit": (
        "forces of displaced supercells are not what the force constants give",
        "Check the order of atoms, and that displacements are small enough to be harmonic.",
    ),
    "net_force": (
        "forces of a displaced supercell do not add up to 0",
        "Check that they are those of the whole supercell.",
    ),
    "residual_force": (
        "the undisplaced supercell is far from rest",
        "Phonons are those of a relaxed structure: relax it.",
    ),
}


def deviations(
    translations: Translations,
    symmetry: CrystalSymmetry,
    force_constants: Tensor | None,
    displacements: Sequence[Displacement],
    residual_forces: NDArray[np.float64] | None,
) -> dict[str, float]:
    """Measure what `PhononTolerances` bounds.

    Args:
        translations: Lattice translations of the supercell.
        symmetry: Space group of the supercell.
        force_constants: As read or fitted `[n_prim, N, 3, 3]`, eV/Å², not symmetrised; None for none.
        displacements: With their forces, those of the undisplaced supercell subtracted.
        residual_forces: The latter `[N, 3]`, eV/Å; None when unknown.
    """
    found = {}
    if residual_forces is not None:
        found["residual_force"] = float(np.linalg.norm(residual_forces, axis=1).max())
    if displacements:
        forces = torch.stack([d.forces for d in displacements])
        norms = forces.flatten(1).norm(dim=1) * forces.shape[1] ** 0.5
        found["net_force"] = float((forces.sum(1).norm(dim=1) / norms.clamp(min=1e-12)).max())
    if force_constants is not None:
        largest = force_constants.abs().max()
        transposed = translations.transposed(force_constants)
        mean = symmetry.symmetrised(translations, force_constants)
        sums = torch.cat([force_constants.sum(1), transposed.sum(1)])
        found["sum_rule"] = float(sums.abs().max() / largest)
        found["asymmetry"] = float((force_constants - transposed).abs().max() / largest)
        found["space_group"] = float((force_constants - mean).abs().max() / largest)
        small = [d for d in displacements if d.displacement.norm(dim=1).max() < HARMONIC]
        if small:
            forces = torch.stack([d.forces for d in small])
            given = translations.multiply(force_constants, torch.stack([d.displacement for d in small]))
            missed = (forces + given).flatten(1).norm(dim=1) / forces.flatten(1).norm(dim=1).clamp(min=1e-12)
            found["misfit"] = float(missed.max())
    return found


def check_deviations(found: Mapping[str, float], tolerances: PhononTolerances, where: str) -> None:
    """Refuse a calculation that is not what it should be.

    Raises:
        InputError: A deviation is not finite, or larger than its tolerance.
    """
    for field in fields(tolerances):
        value, largest = found.get(field.name, 0.0), getattr(tolerances, field.name)
        if not value <= largest:
            problem, fix = _MEANINGS[field.name]
            expected = f"at most {largest:g}"
            raise InputError(problem, where=where, found=f"{value:.3g}", expected=expected, fix=fix)


def check_unique(references: Sequence[PhononReference], places: Sequence[str]) -> None:
    """Refuse a set in which a name, or a calculation, comes twice.

    Args:
        references: The set.
        places: Where every one comes from, for the message.

    Raises:
        InputError: A name comes twice, or two names have one calculation: it would count twice, and perhaps
            both be trained on and be tested with.
    """
    order = np.argsort([reference.name for reference in references], kind="stable")
    for i, j in pairwise(order.tolist()):
        if references[i].name == references[j].name:
            raise InputError(
                f"two calculations are named {references[i].name!r}",
                where=places[j],
                found=f"the other in {places[i]}",
                fix="Leave one out, or give them names in an index.",
            )
    known: dict[bytes, int] = {}
    for i, reference in enumerate(references):
        first = known.setdefault(_fingerprint(reference), i)
        if first != i:
            raise InputError(
                f"one calculation has two names, {references[first].name!r} and {reference.name!r}",
                where=places[i],
                found=f"the same in {places[first]}",
                fix="Leave one out.",
            )


def _fingerprint(reference: PhononReference) -> bytes:
    """Hash of crystal, force constants and forces."""
    atoms, digest = reference.supercell, sha256()
    tensors = [d.forces for d in reference.displacements]
    tensors += [] if reference.force_constants is None else [reference.force_constants]
    arrays = (atoms.numbers, atoms.cell.array, atoms.positions, *(t.numpy() for t in tensors))
    for values in arrays:
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.digest()


def functional_warnings(
    references: Sequence[PhononReference], base: str | None = None, replay: str | None = None
) -> list[str]:
    """Return warnings about functionals that would be mixed.

    Phonon frequencies of PBE and PBEsol differ by a few percent: a model that is trained on both learns
    neither.

    Args:
        references: Materials that are trained on.
        base: Functional of what the base model was trained on; None when unknown.
        replay: Functional of the replay data; None when there are none.

    Returns:
        A sentence for every pair of functionals that differ, and one for materials that do not name theirs.
    """
    groups: dict[str | None, list[str]] = {}
    for reference in references:
        groups.setdefault(reference.metadata.functional, []).append(reference.name)
    warnings = []
    if None in groups:
        warnings.append(f"the functional of {some_of(groups.pop(None))} is not known")
    known = {name: members for name, members in groups.items() if name is not None}
    if len(known) > 1:
        parts = ", ".join(f"{functional} ({some_of(names)})" for functional, names in known.items())
        warnings.append(f"phonon references mix functionals: {parts}")
    for what, functional in (("the base model was trained on", base), ("the replay data are", replay)):
        others = {f: names for f, names in known.items() if functional is not None and f != functional}
        warnings += [
            f"phonons of {some_of(names)} are {other}, but {what} {functional}"
            for other, names in others.items()
        ]
    return warnings


def some_of(names: Sequence[str]) -> str:
    """Return the first names in a line, and how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
