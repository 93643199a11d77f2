"""`mlip-refine phase-diagram`: boundaries of several phases, and the points where three of them meet."""

from typing import TYPE_CHECKING

from mlip_refine.config import Config, PhaseDiagram
from mlip_refine.errors import InputError
from mlip_refine.workflows.base import Workflow

if TYPE_CHECKING:
    from mlip_refine.workflows.phase_diagram.records import PhaseDiagramResult
    from mlip_refine.workflows.phase_diagram.run import Prepared

LAYOUT = """{folder}
├── config.yaml          the config with every default
├── phase_diagram.json   boundaries, triple points and deviations from experiment, with errors
├── phase_diagram.csv    the boundaries as a table
├── provenance.json      versions and hashes
├── log.txt              what was printed, warnings and errors
└── phase_diagram.png    the diagram"""


def required_section(config: Config) -> PhaseDiagram:
    """Return the section `phase_diagram` of a config.

    Raises:
        InputError: If there is none.
    """
    if config.phase_diagram is None:
        raise InputError(
            "there is nothing to show: the config has no section phase_diagram",
            where=config.where(),
            expected="phase_diagram with transitions, a list of finished runs",
        )
    return config.phase_diagram


phase_diagram: "Workflow[Prepared, PhaseDiagramResult]" = Workflow(
    name="phase-diagram",
    help="Join finished transitions: boundaries of all phases, triple points, beside experiment.",
    example="mlip-refine phase-diagram diagram.yaml --resume",
    layout=LAYOUT,
    check="mlip_refine.workflows.phase_diagram:required_section",
    prepare="mlip_refine.workflows.phase_diagram.run:prepare",
    run="mlip_refine.workflows.phase_diagram.run:run",
    show="mlip_refine.workflows.phase_diagram.tables:print_phase_diagram",
    figures="mlip_refine.workflows.phase_diagram.figures:write_figures",
    section="phase_diagram",
    resumable=("phase_diagram",),
)
