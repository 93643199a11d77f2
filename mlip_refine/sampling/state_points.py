"""State points, which are sampled, and the trajectories that come of it."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from mlip_refine.quantities import GPA, KB
from mlip_refine.sampling.biases import Bias
from mlip_refine.statistics import statistical_inefficiency

Ensemble = Literal["nvt", "npt", "nve", "nph"]
Thermostat = Literal["langevin", "nose_hoover"]
CellFreedom = Literal["isotropic", "anisotropic", "hexagonal", "triclinic", "fixed"]
Identity = Literal["structure", "sites", "liquid", "molten", "none"]

# Series of a trajectory: one value per replica and frame.
SERIES = ("positions", "cells", "model_energy", "bias_energy", "stress", "kinetic_energy")


@dataclass(frozen=True)
class Hamiltonian:
    """U = scale · U_model + bias_scale · U_bias.

    The model alone is (1, 0); the windows of a Frenkel-Ladd path are (1 - λ, λ) with a harmonic reference.
    With a scale of 0 the model has no part in the dynamics: it is evaluated for stored frames only, and not
    even there with `NoPotential`.
    """

    scale: float = 1.0
    bias_scale: float = 0.0
    bias: Bias | None = None


@dataclass(frozen=True)
class StatePoint:
    """A structure in one ensemble at one temperature and pressure, under a Hamiltonian.

    Attributes:
        name: Name, unique in a batch; reports and stores use it.
        atoms: The ideal crystal, or a liquid to start from: sites, and the cell that NVT keeps and NPT starts
            from.
        temperature: Temperature, K.
        pressure: Pressure, GPa; in NVT only a label.
        ensemble: `nvt`, `npt`, `nve` or `nph`; the last two start at the temperature and keep their energy
            or enthalpy.
        thermostat: Thermostat of `nvt`: Langevin, or a Nosé-Hoover chain; `npt` is always Langevin.
        cell_freedom: What `npt` and `nph` may change: the volume (`isotropic`), x with y and z (`hexagonal`),
            three axes (`anisotropic`), or lengths and angles (`triclinic`).
        replicas: Number of independent copies.
        hamiltonian: Energy function that is simulated.
        identity: What makes a system the phase that it is: its `structure` (the sites where the structure is
            not recognised), the very `sites` of the ideal crystal, that it is `liquid` and no crystal, or
            `none`: it is not judged. `molten` is a liquid that is not judged while it runs.
        timestep: Time step, fs; that of the settings if `None`.
        friction: Friction of the thermostat, 1/ps; that of the settings if `None`.
        barostat_time: Period of volume oscillations, fs; that of the settings if `None`.
    """

    name: str
    atoms: Atoms
    temperature: float
    pressure: float = 0.0
    ensemble: Ensemble = "nvt"
    cell_freedom: CellFreedom = "isotropic"
    replicas: int = 1
    hamiltonian: Hamiltonian = field(default_factory=Hamiltonian)
    thermostat: Thermostat = "langevin"
    identity: Identity = "structure"
    timestep: float | None = None
    friction: float | None = None
    barostat_time: float | None = None

    @property
    def beta(self) -> float:
        """1/kT, 1/eV."""
        return 1.0 / (KB * self.temperature)

    @property
    def freedom(self) -> CellFreedom:
        """What the cell may do in this ensemble."""
        return self.cell_freedom if self.ensemble in ("npt", "nph") else "fixed"

    @property
    def is_liquid(self) -> bool:
        """Whether the phase is a liquid: its atoms are a start, and no sites."""
        return self.identity in ("liquid", "molten")

    @property
    def langevin(self) -> bool:
        """Whether Langevin noise holds the temperature of the atoms."""
        return self.ensemble == "npt" or (self.ensemble == "nvt" and self.thermostat == "langevin")

    @property
    def degrees_of_freedom(self) -> int:
        """Momenta that are free: without Langevin noise the total momentum stays zero."""
        n = 3 * len(self.atoms)
        return n if self.langevin or n == 3 else n - 3

    @property
    def pv(self) -> float:
        """Pressure times the volume of the ideal cell, eV."""
        return self.pressure * GPA * float(self.atoms.cell.volume)

    def with_cell(self, cell: np.ndarray) -> Self:
        """Return the same point in another cell (rows, Å), the sites carried along affinely."""
        atoms = self.atoms.copy()
        atoms.set_cell(cell, scale_atoms=True)
        return replace(self, atoms=atoms)


@dataclass(frozen=True)
class Trajectory:
    """The frames of one state point.

    Only the frames that `kept` marks count: `run.positions[run.kept]` are their positions
    `[n_kept, n_atoms, 3]`, replica after replica, and likewise for every other series.

    Attributes:
        point: State point that was sampled.
        positions: Positions `[replicas, n_frames, n_atoms, 3]`, Å, unwrapped, float64.
        cells: Cells (rows) `[replicas, n_frames, 3, 3]`, Å.
        model_energy: Unscaled model energy `[replicas, n_frames]`, eV.
        bias_energy: Unscaled bias energy `[replicas, n_frames]`, eV.
        stress: Model stress `[replicas, n_frames, 3, 3]`, eV/Å³, tensile positive, without the kinetic part.
        kinetic_energy: Kinetic energy of the atoms `[replicas, n_frames]`, eV.
        kept: Frames that count: no fault discarded them `[replicas, n_frames]`.
        steps: Steps at which the frames were taken `[n_frames]`.
        revoked: Step after which the frames of earlier segments do not count either `[replicas]`.
        verdicts: What happened to systems, one line each.
    """

    point: StatePoint
    positions: Tensor
    cells: Tensor
    model_energy: Tensor
    bias_energy: Tensor
    stress: Tensor
    kinetic_energy: Tensor
    kept: Tensor
    steps: Tensor | None = None
    revoked: Tensor | None = None
    verdicts: tuple[str, ...] = ()

    @property
    def n_atoms(self) -> int:
        """Atoms per cell."""
        return self.positions.shape[2]

    @property
    def n_kept(self) -> int:
        """Number of kept frames, of all replicas."""
        return int(self.kept.sum())

    def inefficiency(self, values: Tensor) -> float:
        """Return the statistical inefficiency of values `[n_kept]`; frames that were not kept are gaps."""
        return inefficiency_on_grid(values, self.kept)

    def total_stress(self) -> Tensor:
        """Return the mean stress of the kept frames with its kinetic part, -NkT/V `[3, 3]`, eV/Å³."""
        stress, volume = self.stress[self.kept], torch.linalg.det(self.cells[self.kept]).abs()
        kinetic = self.n_atoms * KB * self.point.temperature / volume
        eye = torch.eye(3, dtype=stress.dtype)
        total: Tensor = (stress - kinetic[..., None, None] * eye).mean(0)
        return total

    def last(self) -> tuple[Tensor, Tensor]:
        """Return positions `[n, n_atoms, 3]` and cells `[n, 3, 3]` of the last kept frame of each replica, Å.

        Replicas without a kept frame are left out.
        """
        n_frames = self.kept.shape[1]
        order = torch.arange(1, n_frames + 1) * self.kept
        last, alive = order.argmax(dim=1), self.kept.any(dim=1)
        replicas = torch.arange(len(last))[alive]
        return self.positions[replicas, last[alive]], self.cells[replicas, last[alive]]

    def extend(self, later: Self) -> Self:
        """Return this trajectory followed by a later segment of the same replicas.

        Later faults count: a system that is set back to a step before the later segment takes its
        frames since then with it.
        """
        joined: dict[str, Any] = {
            name: torch.cat([getattr(self, name), getattr(later, name)], dim=1) for name in SERIES
        }
        kept, steps, revoked = self.kept, None, None
        if self.steps is not None and later.steps is not None:
            steps = torch.cat([self.steps, later.steps])
            if self.revoked is not None and later.revoked is not None:
                kept = kept & (self.steps <= later.revoked[:, None])
                revoked = torch.minimum(self.revoked, later.revoked)
        joined |= {"kept": torch.cat([kept, later.kept], dim=1), "steps": steps, "revoked": revoked}
        verdicts = tuple(dict.fromkeys(self.verdicts + later.verdicts))
        return replace(self, **joined, verdicts=verdicts)


def inefficiency_on_grid(values: Tensor, kept: Tensor) -> float:
    """Return the statistical inefficiency of values `[n]` of the frames in `kept` `[replicas, n_frames]`."""
    grid = torch.zeros(kept.shape, dtype=torch.float64)
    grid[kept] = values.detach().double().cpu()
    return statistical_inefficiency(grid, kept)
