"""Sampled frames as observables see them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mlip_refine.observables.base import Sample
from mlip_refine.sampling import GoodFrames, StatePoint


def sample_of(frames: GoodFrames, probes: Mapping[str, Tensor] | None = None) -> Sample:
    """Turn the frames of a simulation into a sample with the energies and stresses that it recorded.

        frames = trajectory.good()
        measure(RadialDistribution(8.0), sample_of(frames), frames.inefficiency)

    Args:
        frames: Of an ensemble whose temperature is held (nvt or npt), for what fluctuates; of any other for
            structure and averages.
        probes: Further ones, or others than those of the simulation.
    """
    recorded = {"energy": frames.model_energy, "stress": frames.stress}
    return sample_at(frames.point, frames.positions, frames.cells, recorded | dict(probes or {}))


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
