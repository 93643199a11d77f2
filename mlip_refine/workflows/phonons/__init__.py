"""`mlip-refine phonons`: phonons of the phases, or of materials beside reference calculations."""

from typing import TYPE_CHECKING

from mlip_refine.config import Config
from mlip_refine.errors import InputError
from mlip_refine.workflows.base import Workflow
from mlip_refine.workflows.checks import require_solids

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


def chosen_phases(config: Config) -> list[str]:
    """Return the names of the phases whose phonons are computed: where there is data, only those it names.

    Raises:
        InputError: If there are neither phases nor data, or a phase is unknown or a liquid.
    """
    section = config.phonons
    names = section.phases
    if names is None:
        names = () if section.data else tuple(config.phases)
    if not names and not section.data:
        raise InputError("there is nothing to do: no phases, no data", where=config.where("phonons"))
    require_solids(config, names, "phonons", "phonons")
    return list(names)


phonons: "Workflow[Prepared, PhononResult]" = Workflow(
    name="phonons",
    help="Find the phonons of the phases, or of materials beside reference calculations.",
    example="mlip-refine phonons configs/phonons.yaml phonons.mesh=[9,9,9]",
    layout=LAYOUT,
    check="mlip_refine.workflows.phonons:chosen_phases",
    prepare="mlip_refine.workflows.phonons.run:prepare",
    run="mlip_refine.workflows.phonons.run:run",
    show="mlip_refine.workflows.phonons.tables:print_phonons",
    figures="mlip_refine.workflows.phonons.figures:draw_figures",
    section="phonons",
    resumable=("phonons.baseline",),
)
