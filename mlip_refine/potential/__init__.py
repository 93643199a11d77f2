"""MACE potentials: safe loading, energies, forces and stresses differentiable in the parameters, saving."""

# Before e3nn: 0.4.4 loads its constants in a way that torch >= 2.6 allows only once mace is imported.
import mace  # noqa: F401  # isort: skip

from mlip_refine.potential.graphs import GraphBuilder, Graphs, Structure
from mlip_refine.potential.model import Potential, resolve_device

__all__ = ["GraphBuilder", "Graphs", "Potential", "Structure", "resolve_device"]
