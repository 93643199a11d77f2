"""`mlip-refine md`: molecular dynamics of the phases with averages and their errors."""

from itertools import product
from typing import TYPE_CHECKING

from mlip_refine.config import MD, Config
from mlip_refine.errors import InputError
from mlip_refine.workflows.base import Workflow
from mlip_refine.workflows.checks import require_phase

if TYPE_CHECKING:
    from mlip_refine.workflows.md.records import MDResult
    from mlip_refine.workflows.md.run import Prepared

LAYOUT = """{folder}
├── config.yaml       the config with every default
├── frames/           sampled frames (HDF5)
├── md.json           averages with errors
├── series.csv        energy, volume, pressure and cell of every frame
├── speed.json        how fast it was
├── dynamics/         correlations and spectra, with dynamics, and dynamics.json
├── extxyz/           the frames that count, with export: true
├── provenance.json   versions, seed, device and hashes
├── log.txt           what was printed, warnings and errors
└── *.png             energy, volume and pressure over time"""


def required_section(config: Config) -> MD:
    """Return the section `md` of a config.

    Raises:
        InputError: If there is none.
    """
    if config.md is None:
        raise InputError(
            "there is nothing to run: the config has no section md",
            where=config.where(),
            expected="md with at least a temperature",
        )
    return config.md


def chosen_states(config: Config) -> list[tuple[str, float, float]]:
    """Return phase, temperature (K) and pressure (GPa) of every state point.

    Raises:
        InputError: If there are none, or a phase is not among those of the config.
    """
    section = required_section(config)
    phases = list(config.phases) if section.phases is None else section.phases
    for i, name in enumerate(phases):
        require_phase(config, name, "md", config.where("md", "phases", i))
    if not phases:
        raise InputError("there is nothing to run: the config has no phases", where=config.where("md"))
    return list(product(phases, section.temperature, section.pressure))


md: "Workflow[Prepared, MDResult]" = Workflow(
    name="md",
    help="Run molecular dynamics of the phases, and average with errors.",
    example="mlip-refine md configs/md.yaml md.temperature='300 K'",
    layout=LAYOUT,
    check="mlip_refine.workflows.md:chosen_states",
    plan="mlip_refine.workflows.md.plan:plan",
    prepare="mlip_refine.workflows.md.run:prepare",
    run="mlip_refine.workflows.md.run:run",
    show="mlip_refine.workflows.md.tables:print_md",
    figures="mlip_refine.workflows.md.figures:write_figures",
    section="md",
    resumable=("md.dynamics", "md.export"),
    growing=("md.duration",),
)
