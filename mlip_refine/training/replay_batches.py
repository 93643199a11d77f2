"""Replay batches as graphs with labels, and held-out errors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mlip_refine.data import Frame
from mlip_refine.potential import Graphs, Potential, Structure, Work
from mlip_refine.quantities import GPA


@dataclass(frozen=True)
class LabelledFrame:
    """A structure with its labels.

    Attributes:
        structure: With neighbours.
        energy: eV.
        forces: `[n_atoms, 3]`, eV/Å.
        stress: `[3, 3]`, eV/Å³, tensile positive, or `None`.
    """

    structure: Structure
    energy: float
    forces: Tensor
    stress: Tensor | None

    @classmethod
    def from_frame(cls, potential: Potential, frame: Frame) -> Self:
        """Find the neighbours of a frame that was read with energy and forces."""
        positions, cell = torch.as_tensor(np.array(frame.positions)), torch.as_tensor(np.array(frame.cell))
        structure = potential.graphs.structure(positions, cell, potential.graphs.species(frame.numbers))
        stress = None if frame.stress is None else torch.as_tensor(np.array(frame.stress))
        return cls(structure, float(frame.energy or 0.0), torch.as_tensor(np.array(frame.forces)), stress)


def labels(frames: Sequence[LabelledFrame], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Labels of a batch, as `losses.Replay` reads them."""
    real: dict[str, Any] = {"device": device, "dtype": dtype}
    blank = torch.zeros(3, 3)
    return {
        "energy": torch.tensor([f.energy for f in frames], **real),
        "forces": torch.cat([f.forces for f in frames]).to(**real),
        "stress": torch.stack([blank if f.stress is None else f.stress for f in frames]).to(**real),
        "has_stress": torch.tensor([f.stress is not None for f in frames], **real),
        "n_atoms": torch.tensor([len(f.forces) for f in frames], **real),
    }


@dataclass(frozen=True)
class HeldOutErrors:
    """Mean absolute errors on held-out frames.

    Attributes:
        energy_mae_mev_per_atom: Energy per atom, meV.
        forces_mae_mev_per_A: Force components, meV/Å.
        stress_mae_gpa: Stress components, GPa; `None` without stress labels.
        n_frames: Frames that were measured.
    """

    energy_mae_mev_per_atom: float
    forces_mae_mev_per_A: float  # noqa: N815 - the unit's own case
    stress_mae_gpa: float | None
    n_frames: int


def held_out_errors(potential: Potential, frames: Sequence[LabelledFrame]) -> HeldOutErrors:
    """Errors of a potential on held-out frames, in chunks.

    Raises:
        MlipRefineError: If memory runs out for a single system.
    """

    def deviations(part: slice, graphs: Graphs) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            out = potential.evaluate(graphs, ("energy", "forces", "stress"))
        ref = labels(frames[part], potential.device, potential.dtype)
        energy = (out["energy"] - ref["energy"]) / ref["n_atoms"]
        forces, stress = out["forces"] - ref["forces"], out["stress"] - ref["stress"]
        found = (energy, forces.flatten(), stress[ref["has_stress"] > 0].flatten())
        return tuple(values.detach().abs() for values in found)  # type: ignore[return-value]

    parts = potential.in_chunks(Work.FORCES, [f.structure for f in frames], deviations)
    energy, forces, stress = (torch.cat(values) for values in zip(*parts, strict=True))
    return HeldOutErrors(
        energy_mae_mev_per_atom=1e3 * float(energy.mean()),
        forces_mae_mev_per_A=1e3 * float(forces.mean()),
        stress_mae_gpa=float(stress.mean()) / GPA if len(stress) else None,
        n_frames=len(frames),
    )
