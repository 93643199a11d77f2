"""Properties of the phonons of a crystal: largest frequency, thermodynamics, stability.

Free energy, entropy and heat capacity are those of harmonic oscillators on a mesh of wave vectors, per
primitive cell, as in the MDR phonon benchmark (Loew et al., npj Comput. Mater. 11, 178, 2025). The three
acoustic modes at Γ are left out: their frequencies are zero but for rounding, whose sign would decide on up
to 0.6 J/K/mol of entropy on a mesh of 8 × 8 × 8. Imaginary modes are left out, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from phonopy import Phonopy

from mlip_refine.quantities import IMAGINARY

ZERO = 0.01
"""Frequencies nearer to zero than this, THz, are too near for their logarithms. Tighter than `IMAGINARY`: a
mode that counts at some of several volumes alone would be an error of their differences."""


@dataclass(frozen=True)
class PhononProperties:
    """Phonons of a crystal on a mesh, per primitive cell.

    Attributes:
        max_THz: Largest frequency.
        min_THz: Lowest frequency, below zero when imaginary.
        free_energy_kJ_mol: F, with zero-point energy.
        entropy_J_K_mol: S.
        heat_capacity_J_K_mol: C_V.
        imaginary: Share of modes that are imaginary.
    """

    max_THz: float  # noqa: N815 - the unit's own case
    min_THz: float  # noqa: N815 - the unit's own case
    free_energy_kJ_mol: float  # noqa: N815 - the unit's own case
    entropy_J_K_mol: float  # noqa: N815 - the unit's own case
    heat_capacity_J_K_mol: float  # noqa: N815 - the unit's own case
    imaginary: float

    def per_cell(self, share: float) -> "PhononProperties":
        """Return the same of another cell: free energy, entropy and heat capacity times a share.

        Args:
            share: Atoms of that cell over the atoms of this one.
        """
        return replace(
            self,
            free_energy_kJ_mol=share * self.free_energy_kJ_mol,
            entropy_J_K_mol=share * self.entropy_J_K_mol,
            heat_capacity_J_K_mol=share * self.heat_capacity_J_K_mol,
        )


@dataclass(frozen=True)
class MeshFrequencies:
    """Frequencies on a mesh.

    Attributes:
        points: Wave vectors that differ by symmetry `[n_q, 3]`, in the reciprocal lattice.
        weights: Shares of the mesh that the wave vectors stand for `[n_q]`.
        frequencies: Frequencies in ascending order `[n_q, n_modes]`, THz; imaginary ones are below zero.
    """

    points: NDArray[np.float64]
    weights: NDArray[np.float64]
    frequencies: NDArray[np.float64]

    def distance(self, other: "MeshFrequencies") -> float | None:
        """Return the mean absolute difference, THz; None when the meshes have different points."""
        same = self.points.shape == other.points.shape and np.allclose(self.points, other.points)
        if not same:
            return None
        differences = np.abs(self.frequencies - other.frequencies).mean(axis=1)
        return float(self.weights @ differences)


def phonon_properties(
    phonon: Phonopy, mesh: Sequence[int], temperature: float
) -> tuple[PhononProperties, MeshFrequencies]:
    """Compute the frequencies on a Γ-centred mesh, and the properties that follow from them.

    Args:
        phonon: Phonopy's object with force constants.
        mesh: Points along each reciprocal vector.
        temperature: Temperature of the thermodynamic functions, K.
    """
    phonon.run_mesh(list(mesh), is_gamma_center=True)
    found: Any = phonon.mesh
    weights = found.weights / found.weights.sum()
    on_mesh = MeshFrequencies(np.array(found.qpoints), weights, np.sort(found.frequencies, axis=1))
    phonon.run_thermal_properties(temperatures=[temperature], exclude_gamma_acoustic=True)
    thermal: Any = phonon.thermal_properties
    properties = PhononProperties(
        max_THz=float(on_mesh.frequencies.max()),
        min_THz=float(on_mesh.frequencies.min()),
        free_energy_kJ_mol=float(thermal.free_energy[0]),
        entropy_J_K_mol=float(thermal.entropy[0]),
        heat_capacity_J_K_mol=float(thermal.heat_capacity[0]),
        imaginary=float(weights @ (on_mesh.frequencies < IMAGINARY).mean(axis=1)),
    )
    return properties, on_mesh
