"""What a YAML file may say: strict sections with units, and messages that name file and line."""

from mlip_refine.config.document import Config
from mlip_refine.config.dump import dump_config
from mlip_refine.config.elastic import Elastic
from mlip_refine.config.evaluation import Evaluation
from mlip_refine.config.free_energy import FreeEnergy
from mlip_refine.config.load import config_from_dict, load_config, validate_node
from mlip_refine.config.located import LocatedNode
from mlip_refine.config.md import MD
from mlip_refine.config.output import Output
from mlip_refine.config.overrides import parse_overrides
from mlip_refine.config.phases import Phase
from mlip_refine.config.phonons import Phonons
from mlip_refine.config.potential import Potential
from mlip_refine.config.replay import Replay
from mlip_refine.config.sampling import Guards, Sampling
from mlip_refine.config.schema import config_schema
from mlip_refine.config.section import Count, Paths, Section, Words
from mlip_refine.config.training import Training
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

__all__ = [
    "MD",
    "Config",
    "Count",
    "Dimension",
    "Elastic",
    "EnergyPerAtom",
    "Evaluation",
    "FreeEnergy",
    "Guards",
    "Length",
    "LocatedNode",
    "Output",
    "Paths",
    "Phase",
    "Phonons",
    "PositiveEnergyPerAtom",
    "PositivePressure",
    "Potential",
    "Pressure",
    "Rate",
    "Replay",
    "Sampling",
    "Section",
    "Temperature",
    "Time",
    "TimeOrZero",
    "Training",
    "Words",
    "config_from_dict",
    "config_schema",
    "dump_config",
    "load_config",
    "parse_overrides",
    "problem",
    "validate_node",
]
