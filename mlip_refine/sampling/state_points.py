"""What is sampled: structures at temperatures and pressures under a Hamiltonian."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from mlip_refine.quantities import GPA, KB
from mlip_refine.sampling.harmonic import HarmonicReference

Ensemble = Literal["nvt", "npt"]
CellFreedom = Literal["isotropic", "anisotropic", "fixed"]


@dataclass(frozen=True)
class Hamiltonian:
    """U = scale · U_model + bias_scale · U_bias.

    The model alone is (1, 0); the windows of a Frenkel-Ladd path are (1 - λ, λ) with a harmonic reference.
    """

    scale: float = 1.0
    bias_scale: float = 0.0
    bias: HarmonicReference | None = None


@dataclass(frozen=True)
class StatePoint:
    """One ensemble to sample.

    Attributes:
        name: Unique in a batch; reports and stores use it.
        atoms: The ideal crystal: sites, and the cell that NVT keeps and NPT starts from.
        temperature: K.
        pressure: GPa; in NVT only a label.
        ensemble: `nvt` or `npt`.
        cell_freedom: What NPT may change: the volume (`isotropic`) or three axes (`anisotropic`).
        replicas: Independent copies.
        hamiltonian: What is simulated.
    """

    name: str
    atoms: Atoms
    temperature: float
    pressure: float = 0.0
    ensemble: Ensemble = "nvt"
    cell_freedom: CellFreedom = "isotropic"
    replicas: int = 1
    hamiltonian: Hamiltonian = field(default_factory=Hamiltonian)

    @property
    def beta(self) -> float:
        """1/kT, 1/eV."""
        return 1.0 / (KB * self.temperature)

    @property
    def pv(self) -> float:
        """Pressure times the volume of the ideal cell, eV."""
        return self.pressure * GPA * float(self.atoms.cell.volume)

    def with_cell(self, cell: np.ndarray) -> Self:
        """The same point in another cell (rows, Å), the sites carried along affinely."""
        atoms = self.atoms.copy()
        atoms.set_cell(cell, scale_atoms=True)
        return replace(self, atoms=atoms)


@dataclass(frozen=True)
class Trajectory:
    """The frames of one state point.

    Attributes:
        point: What was sampled.
        positions: `[replicas, n_frames, n_atoms, 3]`, Å, unwrapped, float64.
        cells: Rows `[replicas, n_frames, 3, 3]`, Å.
        model_energy: Unscaled model energy `[replicas, n_frames]`, eV.
        bias_energy: Unscaled bias energy `[replicas, n_frames]`, eV.
        stress: Model stress `[replicas, n_frames, 3, 3]`, eV/Å³, tensile positive, without the kinetic part.
        kept: Replicas that ran to the end without a verdict against them `[replicas]`.
        verdicts: Why replicas were stopped, one line each.
    """

    point: StatePoint
    positions: Tensor
    cells: Tensor
    model_energy: Tensor
    bias_energy: Tensor
    stress: Tensor
    kept: Tensor
    verdicts: tuple[str, ...] = ()

    @property
    def n_atoms(self) -> int:
        """Atoms per cell."""
        return self.positions.shape[2]

    def good(self) -> Self:
        """Only the replicas that were kept."""
        if bool(self.kept.all()):
            return self
        names = ("positions", "cells", "model_energy", "bias_energy", "stress", "kept")
        kept: dict[str, Any] = {name: getattr(self, name)[self.kept] for name in names}
        return replace(self, **kept)

    def extend(self, later: Self) -> Self:
        """This trajectory followed by a later segment of the same replicas."""
        names = ("positions", "cells", "model_energy", "bias_energy", "stress")
        joined: dict[str, Any] = {
            name: torch.cat([getattr(self, name), getattr(later, name)], dim=1) for name in names
        }
        verdicts = tuple(dict.fromkeys(self.verdicts + later.verdicts))
        return replace(self, **joined, kept=self.kept & later.kept, verdicts=verdicts)

    def total_stress(self) -> Tensor:
        """Mean stress with its kinetic part, -NkT/V `[3, 3]`, eV/Å³."""
        volume = torch.linalg.det(self.cells).abs()
        kinetic = self.n_atoms * KB * self.point.temperature / volume
        eye = torch.eye(3, dtype=self.stress.dtype)
        total: Tensor = (self.stress - kinetic[..., None, None] * eye).mean((0, 1))
        return total
