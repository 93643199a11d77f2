"""MACE potentials: safe loading, energies, forces and stresses differentiable in the parameters, saving."""

import contextlib
import io

# Before e3nn: 0.4.4 loads its constants in a way that torch >= 2.6 allows only once mace is imported. What
# mace prints about accelerators that are not installed does not belong in the output of a command.
with contextlib.redirect_stdout(io.StringIO()):
    import mace.modules  # noqa: F401

from mlip_refine.potential.acceleration.choose import Acceleration
from mlip_refine.potential.batching import Work
from mlip_refine.potential.curvature import Curvature, Second, deformed
from mlip_refine.potential.graphs import GraphBuilder, Graphs, Structure
from mlip_refine.potential.model import Potential, resolve_device

__all__ = [
    "Acceleration",
    "Curvature",
    "GraphBuilder",
    "Graphs",
    "Potential",
    "Second",
    "Structure",
    "Work",
    "deformed",
    "resolve_device",
]
