"""Sampled frames as observables see them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mlip_refine.observables.base import Sample
from mlip_refine.sampling import StatePoint, Trajectory


def sample_of(run: Trajectory, probes: Mapping[str, Tensor] | None = None) -> Sample:
    """Turn the kept frames of a simulation into a sample with the energies and stresses that it recorded.

        measure(RadialDistribution(8.0), sample_of(trajectory), trajectory.inefficiency)

    Args:
        run: Of an ensemble whose temperature is held (nvt or npt), for what fluctuates; of any other for
            structure and averages.
        probes: Further ones, or others than those of the simulation.
    """
    kept = run.kept
    recorded = {"energy": run.model_energy[kept], "stress": run.stress[kept]}
    return sample_at(run.point, run.positions[kept], run.cells[kept], recorded | dict(probes or {}))


def sample_at(point: StatePoint, positions: Tensor, cells: Tensor, probes: Mapping[str, Tensor]) -> Sample:
    """Frames of a state point as a sample.

    Args:
        point: Where they were drawn.
        positions: `[n, n_atoms, 3]`, Å, unwrapped.
        cells: Rows `[n, 3, 3]`, Å.
        probes: Of the model (see `Sample`).
    """
    return Sample(
        probes=probes,
        positions=positions,
        cells=cells,
        numbers=point.atoms.numbers,
        masses=torch.from_numpy(point.atoms.get_masses()),
        temperature=point.temperature,
        pressure=point.pressure,
        free_cell=point.freedom != "fixed",
    )
