"""Reweightable ensembles: frames of a reference model, and the free energy that leads to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from mlip_refine.losses import Frames
from mlip_refine.potential import Potential, Structure
from mlip_refine.quantities import GPA, KB, Measured
from mlip_refine.sampling import StatePoint, Trajectory
from mlip_refine.statistics import (
    bar_estimate,
    kish_size,
    log_weights,
    require_effective,
    require_estimate,
)


@dataclass(frozen=True)
class Ensemble:
    """Frames of one state point, drawn under a reference model.

    Attributes:
        point: The state.
        structures: Frames with their neighbours, replica after replica.
        energy: Energies of the reference, recomputed on the path that training uses `[n]`, eV, float64.
        pv: Pressure times volume `[n]`, eV.
        inefficiency: Statistical inefficiency of the energies, in frames.
        shift: Free energy of the reference minus that of the initial model, eV, whole cell.
        stage: Where the frames lie in the store.
        ends: Positions `[replicas, n_atoms, 3]` and cells of the last good frame of every replica, Å.
        reference: Parameters of the reference model, by name.
        verdicts: What happened to systems, one line each.
    """

    point: StatePoint
    structures: Sequence[Structure]
    energy: Tensor
    pv: Tensor
    inefficiency: float
    shift: Measured
    stage: str
    ends: tuple[Tensor, Tensor]
    reference: Mapping[str, Tensor]
    verdicts: tuple[str, ...] = ()

    @classmethod
    def from_trajectory(cls, potential: Potential, trajectory: Trajectory, stage: str) -> Self:
        """Prepare the good frames of a trajectory that `potential` drew."""
        good = trajectory.good()
        structures = potential.graphs.frames(good.positions, good.cells, good.point.atoms.numbers)
        energy = potential.energies(structures)
        return cls(
            point=good.point,
            structures=structures,
            energy=energy,
            pv=good.point.pressure * GPA * torch.linalg.det(good.cells).abs(),
            inefficiency=good.inefficiency(energy),
            shift=Measured(0.0, 0.0, "eV"),
            stage=stage,
            ends=trajectory.last(),
            reference=potential.parameters(),
            verdicts=trajectory.verdicts,
        )

    @property
    def log_q(self) -> Tensor:
        """Log-density of the frames under their reference, up to a constant `[n]`."""
        return -self.point.beta * (self.energy + self.pv)

    @property
    def independent(self) -> float:
        """Number of independent frames."""
        return len(self.structures) / self.inefficiency

    def enthalpy(self) -> Measured:
        """Mean U + PV of the reference, eV, whole cell; at fixed cell, P is the wanted pressure."""
        values = self.energy + self.pv
        spread = values.std() if len(values) > 1 else torch.tensor(torch.inf)
        return Measured(float(values.mean()), float(spread) / self.independent**0.5, "eV")

    def n_eff(self, energy: Tensor) -> float:
        """Kish effective number of frames under a model with these energies `[n]`."""
        return float(kish_size(log_weights(-self.point.beta * (energy - self.energy))))

    def frames(self, energy: Tensor) -> Frames:
        """What a loss sees, with energies `[n]` of the current model."""
        return Frames(
            probes={"energy": energy},
            log_q=self.log_q,
            pv=self.pv,
            beta=self.point.beta,
            n_atoms=len(self.point.atoms),
            inefficiency=self.inefficiency,
            shift=self.shift,
            enthalpy=self.enthalpy(),
        )

    def require_frames(self, minimum: float) -> None:
        """Refuse an ensemble with too few independent frames.

        Raises:
            StatisticsError: With the number of frames that would do.
        """
        what = f"the ensemble {self.point.name}"
        require_effective(self.independent, minimum, what, have_length=len(self.structures), unit="frames")

    def continued_by(self, later: Self, energy_here: Tensor, energy_there: Tensor) -> Self:
        """The later ensemble with its shift: this one's plus BAR from this reference to the later one.

        Args:
            later: Ensemble of the new reference at the same state.
            energy_here: Energies of the new reference on the frames of this ensemble, eV.
            energy_there: Energies of this reference on the frames of the later one, eV.

        Raises:
            StatisticsError: If the two references overlap too little.
        """
        beta = self.point.beta
        step = bar_estimate(
            beta * (energy_here - self.energy),
            beta * (later.energy - energy_there),
            (self.inefficiency, later.inefficiency),
        )
        require_estimate(step, f"the chain of references of {self.point.name}", min_effective=2.0)
        kt = KB * self.point.temperature
        return replace(later, shift=self.shift + Measured(float(step.value) * kt, step.se * kt, "eV"))
