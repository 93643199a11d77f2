"""Stress and stress-strain coefficients of a crystal, with its symmetry."""

from typing import ClassVar

import torch
from torch import Tensor

from mlip_refine.crystals.symmetry import Symmetry
from mlip_refine.crystals.tensors import stress_from_voigt, stress_to_voigt
from mlip_refine.observables.base import Observable, Sample
from mlip_refine.observables.cell import Stress


class SymmetricStress(Observable):
    """Total stress in the standard axes of a crystal, GPa: the components that symmetry leaves independent.

    One of a cubic crystal, xx and zz of a hexagonal one. The others are noise or follow from these, and would
    count too little or too often in a mean.
    """

    probes: ClassVar[frozenset[str]] = Stress.probes
    unit = "GPa"

    def __init__(self, symmetry: Symmetry) -> None:
        """Choose the components for a symmetry.

        Args:
            symmetry: Of the ideal crystal, in the frame of the frames.
        """
        turns, standard = symmetry.rotations, symmetry.to_standard
        units = stress_from_voigt(torch.eye(6, dtype=torch.float64))
        mean = torch.einsum("rij,kjl,rml->kim", turns, units, turns) / len(turns)
        rows = stress_to_voigt(standard @ mean @ standard.T).T
        chosen = _independent(rows)
        self.labels = tuple(Stress.labels[i] for i in chosen)
        self.rows = rows[chosen]
        """From the six components in the frame of the crystal `[k, 6]`."""

    def columns(self, sample: Sample) -> Tensor:
        """Six components of every frame, in the frame of the crystal `[n, 6]`."""
        return Stress().columns(sample)

    def derive(self, means: Tensor, sample: Sample) -> Tensor:  # noqa: ARG002 - others need the state
        """The components `[k]`."""
        return self.of(means)

    def of(self, stress: Tensor) -> Tensor:
        """The components `[k]` of a stress in Voigt order `[6]`, in the frame of the crystal."""
        return self.rows.to(stress) @ stress

    def under(self, pressure: float) -> Tensor:
        """The components `[k]` at a pressure."""
        return torch.tensor([-pressure if label in {"xx", "yy", "zz"} else 0.0 for label in self.labels])


def _independent(rows: Tensor) -> list[int]:
    """Numbers of the rows that do not follow from those before."""
    chosen: list[int] = []
    for i in range(len(rows)):
        if int(torch.linalg.matrix_rank(rows[[*chosen, i]], rtol=1e-8)) > len(chosen):
            chosen.append(i)
    return chosen
