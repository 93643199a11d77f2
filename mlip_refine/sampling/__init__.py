"""Sampling: state points in, trajectories out, through batched molecular dynamics."""

from mlip_refine.sampling.biases import BatchBias, Bias, BiasValues
from mlip_refine.sampling.md.engine import MolecularDynamics
from mlip_refine.sampling.md.settings import MDSettings, suitable_timestep
from mlip_refine.sampling.monitoring.guards import GuardSettings
from mlip_refine.sampling.no_potential import NoPotential
from mlip_refine.sampling.pair_reference import UhlenbeckFord
from mlip_refine.sampling.references import HarmonicReference, einstein, fit_einstein, fit_harmonic
from mlip_refine.sampling.sampler import Length, last_frames, sample
from mlip_refine.sampling.state_points import Hamiltonian, StatePoint, Trajectory
from mlip_refine.sampling.store import FrameStore

__all__ = [
    "BatchBias",
    "Bias",
    "BiasValues",
    "FrameStore",
    "GuardSettings",
    "Hamiltonian",
    "HarmonicReference",
    "Length",
    "MDSettings",
    "MolecularDynamics",
    "NoPotential",
    "StatePoint",
    "Trajectory",
    "UhlenbeckFord",
    "einstein",
    "fit_einstein",
    "fit_harmonic",
    "last_frames",
    "sample",
    "suitable_timestep",
]
