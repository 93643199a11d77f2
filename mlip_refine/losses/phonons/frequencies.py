"""Phonon frequencies at wave vectors beside those of a reference."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Self

import numpy as np
import torch
from torch import Tensor

from mlip_refine.crystals.phonons.dynamical_matrix import (
    BlochSums,
    commensurate_points,
    frequencies,
    squared_frequencies,
)
from mlip_refine.crystals.phonons.harmonic import HarmonicCrystal
from mlip_refine.crystals.phonons.hessian import hessian_gradients, hessian_products, unit_displacements
from mlip_refine.crystals.symmetry import mesh_points
from mlip_refine.data.phonons.reference import PhononReference
from mlip_refine.errors import InputError
from mlip_refine.losses.options import PhononFrequenciesOptions
from mlip_refine.losses.phonons.base import BatchResult, Gradients, PhononLoss, mean_over
from mlip_refine.potential import Potential, Structure


@dataclass(frozen=True)
class _ReferenceFrequencies:
    """Frequencies of a material.

    Attributes:
        sums: Give dynamical matrices.
        weights: Weights of the wave vectors `[n_q]`; they add up to 1.
        squares: Squared frequencies of the reference `[n_q, n_modes]`, eV/Å²/amu.
    """

    sums: BlochSums
    weights: Tensor
    squares: Tensor

    @classmethod
    def of(cls, reference: PhononReference, mesh: Sequence[int] | None) -> Self:
        """Frequencies of a reference, on a mesh or at the wave vectors that its supercell holds.

        Raises:
            InputError: It has no force constants.
        """
        primitive = HarmonicCrystal.of_reference(reference).primitive
        if mesh is None:
            points = commensurate_points(reference.supercell.cell.array, primitive.cell.array)
            weights = np.full(len(points), 1 / len(points))
        else:
            points, weights = mesh_points(primitive, mesh)
        sums = BlochSums.of(reference.supercell, reference.translations, primitive.cell.array, points)
        constants = reference.force_constants
        if constants is None:
            raise InputError(f"{reference.name} has no force constants", fix="Use the loss phonon_hvp.")
        squares = squared_frequencies(sums.matrices(constants))
        return cls(sums, torch.from_numpy(weights), squares)


class PhononFrequencies(PhononLoss):
    """Mean over materials, wave vectors and modes of the error of frequencies; unit THz.

    Frequencies of unstable modes are below zero. Modes are compared in ascending order; of those that are
    degenerate in the model all move together (`squared_frequencies`). The model's force constants are built
    from the columns of its Hessian that differ by symmetry. Each of them costs 3.3(2) steps of energies and
    forces of its supercell: once without a graph, and once for the gradient. In single precision frequencies
    near zero are uncertain by a thousandth of the largest.
    """

    Options = PhononFrequenciesOptions
    options: PhononFrequenciesOptions

    def _use(self, references: Iterable[PhononReference]) -> None:
        super()._use(references)
        self._wanted: dict[int, _ReferenceFrequencies] = {}

    def directions(self, reference: PhononReference) -> int:
        """How many directions of a material are evaluated in an update: its irreducible columns."""
        return len(reference.irreducible())

    def batch(self, potential: Potential, materials: Sequence[int]) -> BatchResult:
        """The mean loss of some of the materials."""
        structures, directions, counts = list[Structure](), list[Tensor](), list[int]()
        for number in materials:
            columns = [(c.atom, c.axis) for c in self.references[number].irreducible()]
            structures += [self.structure(potential, number)] * len(columns)
            directions += unit_displacements(self.references[number].n_atoms, columns)
            counts.append(len(columns))
        products = [v.cpu().requires_grad_() for v in hessian_products(potential, structures, directions)]
        with torch.enable_grad():
            rest = iter(products)
            hessians = (list(islice(rest, count)) for count in counts)
            compared = [self._compared(n, torch.stack(h)) for n, h in zip(materials, hessians, strict=True)]
            value = torch.stack([error for error, _ in compared]).mean()
        gradients: Gradients = []
        if torch.is_grad_enabled():
            adjoints = torch.autograd.grad(value, products)
            gradients = hessian_gradients(potential, structures, directions, adjoints)
        spread = mean_over([float(error.detach()) for error, _ in compared], "")
        measured = {"mean absolute error": mean_over([mae for _, mae in compared], "THz")}
        return BatchResult(value.detach(), spread.se, gradients, measured)

    def _compared(self, number: int, columns: Tensor) -> tuple[Tensor, float]:
        """Error of a material from columns of the model's Hessian, and its mean absolute error, THz."""
        reference = self.references[number]
        if number not in self._wanted:
            self._wanted[number] = _ReferenceFrequencies.of(reference, self.options.mesh)
        wanted = self._wanted[number]
        constants = reference.symmetry.complete(reference.translations, reference.irreducible(), columns)
        squares = squared_frequencies(wanted.sums.matrices(constants))
        floor = self.options.floor
        difference = frequencies(squares, floor) - frequencies(wanted.squares, floor)
        error = wanted.weights @ self.deviation(difference).mean(1)
        bare = frequencies(squares.detach()) - frequencies(wanted.squares)
        return error, float(wanted.weights @ bare.abs().mean(1))
