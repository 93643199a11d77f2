"""Observables: what is averaged over frames, reweightable, differentiable and with errors.

One file per quantity. Pure functions of a `Sample`: no model and no dynamics here.
"""

from mlip_refine.observables.adf import AngularDistribution
from mlip_refine.observables.base import Observable, Sample, average, measure
from mlip_refine.observables.bulk_modulus import BulkModulus
from mlip_refine.observables.density import Density
from mlip_refine.observables.enthalpy import Enthalpy
from mlip_refine.observables.frames import sample_of
from mlip_refine.observables.heat_capacity import HeatCapacityP, HeatCapacityV
from mlip_refine.observables.lattice import CellAngles, Lattice
from mlip_refine.observables.pressure import Pressure
from mlip_refine.observables.rdf import RadialDistribution
from mlip_refine.observables.stress import Stress
from mlip_refine.observables.structure_factor import StructureFactor
from mlip_refine.observables.thermal_expansion import LinearExpansion, ThermalExpansion
from mlip_refine.observables.unit_cell import conventional_lattice
from mlip_refine.observables.volume import Volume

__all__ = [
    "AngularDistribution",
    "BulkModulus",
    "CellAngles",
    "Density",
    "Enthalpy",
    "HeatCapacityP",
    "HeatCapacityV",
    "Lattice",
    "LinearExpansion",
    "Observable",
    "Pressure",
    "RadialDistribution",
    "Sample",
    "Stress",
    "StructureFactor",
    "ThermalExpansion",
    "Volume",
    "average",
    "conventional_lattice",
    "measure",
    "sample_of",
]
