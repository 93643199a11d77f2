"""`mlip-refine phonons`: phonons of the phases, or of materials beside reference calculations."""

from typing import TYPE_CHECKING

from mlip_refine.workflows.base import Workflow

if TYPE_CHECKING:
    from mlip_refine.workflows.phonons.records import PhononResult
    from mlip_refine.workflows.phonons.run import Prepared

LAYOUT = """{folder}
├── config.yaml       the config with every default
├── phonons.json      frequencies and thermodynamics of every crystal, errors against references
├── crystals/         the same of each as soon as it is done, with bands, modes and exported force constants
├── provenance.json   versions, seed, device and hashes
├── log.txt           what was printed, warnings and errors
└── *.png             bands and densities of states of each crystal, errors over all"""

phonons: "Workflow[Prepared, PhononResult]" = Workflow(
    name="phonons",
    help="Find the phonons of the phases, or of materials beside reference calculations.",
    example="mlip-refine phonons configs/phonons.yaml phonons.mesh=[9,9,9]",
    layout=LAYOUT,
    prepare="mlip_refine.workflows.phonons.run:prepare",
    run="mlip_refine.workflows.phonons.run:run",
    show="mlip_refine.workflows.phonons.tables:print_phonons",
    figures="mlip_refine.workflows.phonons.figures:draw_figures",
    section="phonons",
    resumable=("phonons.baseline",),
)
