"""MACE potentials: safe loading, energies, forces and stresses differentiable in the parameters, saving.

Names are imported when they are first used: graphs need no mace, the names of model files not even torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlip_refine.potential.acceleration.choose import Acceleration as Acceleration
    from mlip_refine.potential.atoms import AtomsResult as AtomsResult
    from mlip_refine.potential.batching import Work as Work
    from mlip_refine.potential.calculator import ase_calculator as ase_calculator
    from mlip_refine.potential.curvature import Curvature as Curvature
    from mlip_refine.potential.curvature import GeometryDerivatives as GeometryDerivatives
    from mlip_refine.potential.curvature import deformed as deformed
    from mlip_refine.potential.graphs import GraphBuilder as GraphBuilder
    from mlip_refine.potential.graphs import Graphs as Graphs
    from mlip_refine.potential.graphs import Structure as Structure
    from mlip_refine.potential.model import Potential as Potential
    from mlip_refine.potential.model import resolve_device as resolve_device

_MODULES = {
    "Acceleration": "acceleration.choose",
    "AtomsResult": "atoms",
    "Curvature": "curvature",
    "GraphBuilder": "graphs",
    "Graphs": "graphs",
    "Potential": "model",
    "GeometryDerivatives": "curvature",
    "Structure": "graphs",
    "Work": "batching",
    "ase_calculator": "calculator",
    "deformed": "curvature",
    "resolve_device": "model",
}

__all__ = [
    "Acceleration",
    "AtomsResult",
    "Curvature",
    "GeometryDerivatives",
    "GraphBuilder",
    "Graphs",
    "Potential",
    "Structure",
    "Work",
    "ase_calculator",
    "deformed",
    "resolve_device",
]


def __getattr__(name: str) -> Any:
    """Import a name of the room on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value
