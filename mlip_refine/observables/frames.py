"""Sampled frames as observables see them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mlip_refine.observables.base import Sample
from mlip_refine.sampling import GoodFrames


def sample_of(frames: GoodFrames, probes: Mapping[str, Tensor] | None = None) -> Sample:
    """Turn the frames of a simulation into a sample with the energies and stresses that it recorded.

        frames = trajectory.good()
        measure(RadialDistribution(8.0), sample_of(frames), frames.inefficiency)

    Args:
        frames: Of an ensemble whose temperature is held (nvt or npt), for what fluctuates; of any other for
            structure and averages.
        probes: Further ones, or others than those of the simulation.
    """
    atoms = frames.point.atoms
    return Sample(
        probes={"energy": frames.model_energy, "stress": frames.stress, **(probes or {})},
        positions=frames.positions,
        cells=frames.cells,
        numbers=atoms.numbers,
        masses=torch.from_numpy(atoms.get_masses()),
        temperature=frames.point.temperature,
        pressure=frames.point.pressure,
        free_cell=frames.point.freedom != "fixed",
    )
