"""Sampling: state points in, trajectories out, through batched molecular dynamics."""

from mlip_refine.sampling.md.engine import MolecularDynamics
from mlip_refine.sampling.md.settings import MDSettings, suitable_timestep
from mlip_refine.sampling.monitoring.guards import GuardSettings
from mlip_refine.sampling.references import HarmonicReference, einstein, fit_einstein, fit_harmonic
from mlip_refine.sampling.sampler import Length, last_frames, sample
from mlip_refine.sampling.state_points import Hamiltonian, StatePoint, Trajectory
from mlip_refine.sampling.store import FrameStore

__all__ = [
    "FrameStore",
    "GuardSettings",
    "Hamiltonian",
    "HarmonicReference",
    "Length",
    "MDSettings",
    "MolecularDynamics",
    "StatePoint",
    "Trajectory",
    "einstein",
    "fit_einstein",
    "fit_harmonic",
    "last_frames",
    "sample",
    "suitable_timestep",
]
