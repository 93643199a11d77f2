"""`mlip-refine transition`: where two phases coexist, over temperature and pressure."""

from typing import TYPE_CHECKING

from mlip_refine.config import Config, Transition
from mlip_refine.errors import InputError
from mlip_refine.workflows.base import Workflow
from mlip_refine.workflows.checks import require_phase

if TYPE_CHECKING:
    from mlip_refine.workflows.transition.prepare import Prepared
    from mlip_refine.workflows.transition.records import TransitionResult

LAYOUT = """{folder}
├── config.yaml       the config with every default
├── frames/           sampled frames (HDF5)
├── transition.json   boundary, anchors and the state of both phases, with errors
├── boundary.csv      the boundary as a table
├── provenance.json   versions, seed, device and hashes
├── log.txt           what was printed, warnings and errors
└── *.png             ΔG over temperature, and the boundary"""


def required_section(config: Config) -> Transition:
    """Return the section `transition` of a config.

    Raises:
        InputError: If there is none, or it names a phase that the config does not have.
    """
    section = config.transition
    if section is None:
        raise InputError(
            "there is nothing to run: the config has no section transition",
            where=config.where(),
            expected="transition with from, to and at least two temperatures",
        )
    for key, name in (("from", section.from_), ("to", section.to)):
        require_phase(config, name, "transition", config.where("transition", key))
        if config.phases[name].cell_freedom == "fixed":
            raise InputError(
                f"the cell of {name!r} is fixed: it cannot follow the pressure",
                where=config.where("phases", name, "cell_freedom"),
                expected="isotropic, hexagonal, anisotropic or triclinic",
            )
    return section


transition: "Workflow[Prepared, TransitionResult]" = Workflow(
    name="transition",
    help="Find where two phases coexist: T(P) with slopes, from ladders of NPT ensembles.",
    example="mlip-refine transition configs/transition.yaml --resume",
    layout=LAYOUT,
    check="mlip_refine.workflows.transition:required_section",
    plan="mlip_refine.workflows.transition.plan:plan",
    prepare="mlip_refine.workflows.transition.prepare:prepare",
    run="mlip_refine.workflows.transition.run:run",
    show="mlip_refine.workflows.transition.tables:print_transition",
    figures="mlip_refine.workflows.transition.figures:write_figures",
    section="transition",
    resumable=("transition.report_at", "transition.max_error", "transition.extensions"),
    growing=("transition.duration",),
)
