"""Observables: averages over frames that are reweightable, differentiable and have standard errors.

They are pure functions of a `Sample`: nothing here knows a potential or molecular dynamics.
"""

from mlip_refine.observables.base import Observable, Probe, Sample, average, measure, sample_of
from mlip_refine.observables.cell import (
    CellAngles,
    Density,
    Lattice,
    Pressure,
    Stress,
    Volume,
    conventional_lattice,
)
from mlip_refine.observables.structure import AngularDistribution, RadialDistribution, StructureFactor
from mlip_refine.observables.thermodynamics import (
    BulkModulus,
    Enthalpy,
    HeatCapacityP,
    HeatCapacityV,
    LinearExpansion,
    ThermalExpansion,
)

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
    "Probe",
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
