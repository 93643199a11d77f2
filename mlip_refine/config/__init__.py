"""What a YAML file may say: strict sections with units, and messages that name file and line."""

from mlip_refine.config.load import config_from_dict, dump_config, load_config, validate_node
from mlip_refine.config.root import Config, Output, PotentialSection, config_schema
from mlip_refine.config.section import Count, Paths, Section, Words
from mlip_refine.config.sections.elastic import Elastic
from mlip_refine.config.sections.md import MD
from mlip_refine.config.sections.phase_diagram import Experiment, PhaseDiagram, PressureRange
from mlip_refine.config.sections.phases import Phase
from mlip_refine.config.sections.phonons import Phonons
from mlip_refine.config.sections.sampling import FiniteSize, FreeEnergy, Guards, Sampling
from mlip_refine.config.sections.training import Evaluation, ReplaySection, Training
from mlip_refine.config.sections.transition import Anchor, Coexistence, Transition
from mlip_refine.config.units import (
    Dimension,
    EnergyPerAtom,
    Length,
    PositiveEnergyPerAtom,
    PositivePressure,
    Pressure,
    Rate,
    Temperature,
    Time,
    TimeOrZero,
    problem,
)
from mlip_refine.config.yaml.reader import parse_overrides
from mlip_refine.config.yaml.source_map import LocatedNode

__all__ = [
    "MD",
    "Anchor",
    "Coexistence",
    "Config",
    "Count",
    "Dimension",
    "Elastic",
    "EnergyPerAtom",
    "Evaluation",
    "Experiment",
    "FiniteSize",
    "FreeEnergy",
    "Guards",
    "Length",
    "LocatedNode",
    "Output",
    "Paths",
    "Phase",
    "PhaseDiagram",
    "Phonons",
    "PositiveEnergyPerAtom",
    "PositivePressure",
    "PotentialSection",
    "Pressure",
    "PressureRange",
    "Rate",
    "ReplaySection",
    "Sampling",
    "Section",
    "Temperature",
    "Time",
    "TimeOrZero",
    "Training",
    "Transition",
    "Words",
    "config_from_dict",
    "config_schema",
    "dump_config",
    "load_config",
    "parse_overrides",
    "problem",
    "validate_node",
]
