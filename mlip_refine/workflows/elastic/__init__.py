"""`mlip-refine elastic`: elastic constants of the phases."""

from typing import TYPE_CHECKING

from mlip_refine.config import Config
from mlip_refine.errors import InputError
from mlip_refine.workflows.base import Workflow
from mlip_refine.workflows.checks import require_solids

if TYPE_CHECKING:
    from mlip_refine.workflows.elastic.records import ElasticResult
    from mlip_refine.workflows.elastic.run import Prepared

LAYOUT = """{folder}
├── config.yaml       the config with every default
├── elastic.json      tensors, moduli and stability of every phase at every pressure
├── crystals.extxyz   the crystals at rest, in the axes of their tensors
├── thermal_elastic.json   constants, moduli and pressure at elastic.temperature
├── provenance.json   versions, seed, device and hashes
├── log.txt           what was printed, warnings and errors
└── frames/           what was sampled for it (HDF5)"""


def chosen_phases(config: Config) -> list[str]:
    """Return the names of the phases whose elastic constants are computed.

    Raises:
        InputError: If there are none, one is unknown or a liquid, or there are several for one table.
    """
    section = config.elastic
    names = list(config.phases if section.phases is None else section.phases)
    if not names:
        raise InputError("there is nothing to do: the config has no phases", where=config.where("elastic"))
    require_solids(config, names, "elastic", "elastic constants")
    if section.table is not None and len(names) > 1:
        raise InputError(
            "a table of measurements belongs to one phase",
            where=config.where("elastic", "table"),
            found=f"{section.table} for {', '.join(names)}",
            fix="Name the phase in elastic.phases, and run once for each.",
        )
    return names


elastic: "Workflow[Prepared, ElasticResult]" = Workflow(
    name="elastic",
    help="Find the elastic constants, moduli and stability of the phases, at rest and at temperatures.",
    example="mlip-refine elastic configs/elastic.yaml elastic.pressure='[0 GPa, 10 GPa]'",
    layout=LAYOUT,
    check="mlip_refine.workflows.elastic:chosen_phases",
    prepare="mlip_refine.workflows.elastic.run:prepare",
    run="mlip_refine.workflows.elastic.run:run",
    show="mlip_refine.workflows.elastic.tables:print_result",
    section="elastic",
    growing=("sampling.frames",),
)
