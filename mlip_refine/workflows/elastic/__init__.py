"""`mlip-refine elastic`: elastic constants of the phases."""

from typing import TYPE_CHECKING

from mlip_refine.workflows.base import Workflow

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

elastic: "Workflow[Prepared, ElasticResult]" = Workflow(
    name="elastic",
    help="Find the elastic constants, moduli and stability of the phases, at rest and at temperatures.",
    example="mlip-refine elastic configs/elastic.yaml elastic.pressure='[0 GPa, 10 GPa]'",
    layout=LAYOUT,
    prepare="mlip_refine.workflows.elastic.run:prepare",
    run="mlip_refine.workflows.elastic.run:run",
    show="mlip_refine.workflows.elastic.tables:print_result",
    section="elastic",
    growing=("sampling.frames",),
)
