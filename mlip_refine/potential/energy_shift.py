"""Atomic energies E0: the drift of absolute energies in training, and how it is undone.

Forces, stresses and experiments do not see the zero of the energy. A model that learns from them alone drifts
by hundreds of meV/atom (Röcken and Zavadlav 2024, who correct it by a constant). E0 of MACE, one number per
element that nothing else depends on, takes the drift away again: forces, stresses and differences between
structures of one composition stay what they are.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ase.data import chemical_symbols
from torch import Tensor

from mlip_refine.errors import InputError
from mlip_refine.potential.graphs import Structure
from mlip_refine.potential.model import Potential

LEAST = 1e-3
"""Smallest over largest singular value of the compositions that still tells elements apart."""


@dataclass(frozen=True)
class Compositions:
    """Compositions of structures.

    Attributes:
        numbers: Atomic numbers of the elements that occur.
        fractions: Share of every element in the atoms `[n_structures, n_elements]`, float64.
    """

    numbers: tuple[int, ...]
    fractions: Tensor

    @classmethod
    def of(cls, potential: Potential, structures: Sequence[Structure]) -> "Compositions":
        """Count the atoms of structures.

        Args:
            potential: Potential, whose elements the structures refer to.
            structures: Structures, at least one.
        """
        known = potential.graphs.atomic_numbers
        counts = torch.stack([torch.bincount(s.species.cpu(), minlength=len(known)) for s in structures])
        occurring = counts.sum(0).nonzero().flatten()
        fractions = counts[:, occurring].double() / counts.sum(1, keepdim=True)
        return cls(tuple(known[i] for i in occurring.tolist()), fractions)

    def require(self, elements: Iterable[int] = (), where: str | None = None) -> None:
        """Refuse compositions that do not tell the energy of every element.

        Args:
            elements: Atomic numbers that have to be among them.
            where: Place in the config, for messages.

        Raises:
            InputError: If an element is missing, or elements always come in the same proportion.
        """
        missing = sorted(set(elements) - set(self.numbers))
        if missing:
            raise InputError(
                f"the frames do not tell atomic energies of {_symbols(missing)}",
                where=where,
                found=f"frames of {_symbols(self.numbers)} only",
                fix=f"Add frames with {_symbols(missing)}.",
            )
        sizes = torch.linalg.svdvals(self.fractions)
        rank = int((sizes > LEAST * sizes[0]).sum())
        if rank < len(self.numbers):
            raise InputError(
                f"the frames do not tell atomic energies of {_symbols(self.numbers)} apart",
                where=where,
                found=f"{rank} independent compositions",
                expected=f"at least {len(self.numbers)}",
                fix="Add frames of other compositions.",
            )

    def energies(self, per_atom: Tensor) -> dict[int, float]:
        """Return the energies of the elements, eV, that explain energies per atom `[n_structures]`, eV, best.

        Least squares in the energies per atom. The fractions of a structure add up to 1, so the residuals add
        up to nothing: the mean over the structures is met exactly.
        """
        found = torch.linalg.lstsq(self.fractions, per_atom.double().cpu()[:, None]).solution[:, 0]
        return dict(zip(self.numbers, found.tolist(), strict=True))


def shift_energies(
    potential: Potential, initial: Potential, structures: Sequence[Structure]
) -> dict[str, float]:
    """Shift E0 of a potential so that its mean energy per atom is that of the initial one.

    With it, the mean signed error of the energies per atom is what it was, whatever the labels. E0 of other
    elements, and of other heads, stay.

    Args:
        potential: Potential after training, changed in place.
        initial: Potential before training, with the same elements.
        structures: Structures, with neighbours, whose mean energy is restored.

    Returns:
        Shift of E0 by element, eV.

    Raises:
        InputError: If the compositions do not tell the energy of every element.
        MlipRefineError: If memory runs out for a single system.
    """
    compositions = Compositions.of(potential, structures)
    compositions.require()
    drift = potential.energies(structures) - initial.energies(structures)
    n_atoms = torch.tensor([len(s.species) for s in structures])
    shifts = {number: -energy for number, energy in compositions.energies(drift / n_atoms).items()}
    own = atomic_energies(potential)
    for number, shift in shifts.items():
        own[potential.graphs.atomic_numbers.index(number)] += shift
    return {chemical_symbols[number]: shift for number, shift in shifts.items()}


def atomic_energies(potential: Potential) -> Tensor:
    """Return E0 of the head in use `[n_elements]`, eV, in the order and precision of the model: a view."""
    block: Any = potential.module.atomic_energies_fn
    energies: Tensor = torch.atleast_2d(block.atomic_energies)[potential.heads.index(potential.head)]
    return energies


def _symbols(numbers: Iterable[int]) -> str:
    return ", ".join(chemical_symbols[number] for number in numbers)
