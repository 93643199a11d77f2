"""mlip_refine: correct pretrained MACE potentials with free energies, and keep what they know.

The Python door, in the words of the command line:

    from mlip_refine import ase_calculator, finetune, load_config, load_potential

    potential = load_potential("titanium-compact")
    result = finetune(load_config("configs/quickstart.yaml"))
    calculator = ase_calculator(result.model)

Names are imported when they are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlip_refine.workflows import WORKFLOWS

if TYPE_CHECKING:
    from mlip_refine.config import Config as Config
    from mlip_refine.config import config_from_dict as config_from_dict
    from mlip_refine.config import load_config as load_config
    from mlip_refine.data import experimental_table as experimental_table
    from mlip_refine.data import read_table as read_table
    from mlip_refine.potential import Potential as Potential
    from mlip_refine.potential import ase_calculator as ase_calculator
    from mlip_refine.workflows.bench.run import bench as bench
    from mlip_refine.workflows.elastic import elastic as elastic
    from mlip_refine.workflows.finetune import finetune as finetune
    from mlip_refine.workflows.finetune.run import FinetuneResult as FinetuneResult
    from mlip_refine.workflows.free_energy import free_energies as free_energies
    from mlip_refine.workflows.free_energy import free_energy as free_energy
    from mlip_refine.workflows.from_config import load_potential as load_potential
    from mlip_refine.workflows.md import md as md
    from mlip_refine.workflows.phase_diagram import phase_diagram as phase_diagram
    from mlip_refine.workflows.phonons import phonons as phonons
    from mlip_refine.workflows.transition import transition as transition

    __version__: str

_HOMES = {
    "Config": "mlip_refine.config",
    "FinetuneResult": "mlip_refine.workflows.finetune.run",
    "Potential": "mlip_refine.potential",
    "ase_calculator": "mlip_refine.potential",
    "bench": "mlip_refine.workflows.bench.run",
    "config_from_dict": "mlip_refine.config",
    "experimental_table": "mlip_refine.data",
    "free_energies": "mlip_refine.workflows.free_energy",
    "load_config": "mlip_refine.config",
    "load_potential": "mlip_refine.workflows.from_config",
    "read_table": "mlip_refine.data",
    **{name: module for module, _, name in (workflow.partition(":") for workflow in WORKFLOWS)},
}
__all__ = ["__version__"]
__all__ += list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a name of the API on first use (PEP 562)."""
    if name == "__version__":
        value = import_module("importlib.metadata").version("mlip-refine")
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Every name of the API, imported or not."""
    return sorted({*globals(), *__all__})
