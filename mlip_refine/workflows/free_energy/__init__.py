"""`mlip-refine free-energy`: free-energy differences between phases, without changing the potential."""

from typing import TYPE_CHECKING, Any

from mlip_refine.config import Config, LocatedNode
from mlip_refine.errors import InputError
from mlip_refine.losses.registry import loss_specs
from mlip_refine.workflows.base import Workflow

if TYPE_CHECKING:
    from mlip_refine.workflows.free_energy.records import FreeEnergies, FreeEnergyResult
    from mlip_refine.workflows.plan import PlanRecord

LAYOUT = """{folder}
├── config.yaml       the config with every default
├── frames/           sampled frames (HDF5)
├── initial-*.json    free-energy differences, for initial: of later runs
├── provenance.json   versions, seed, device and hashes
└── log.txt           what was printed, warnings and errors"""


def check_losses(config: Config) -> None:
    """Check that a config asks for a free-energy difference, and that the options of its losses are valid.

    Raises:
        InputError: If it asks for none, or for an unknown loss or a wrong option.
    """
    loss_specs(config.losses)
    if not any(loss.type == "free_energy_difference" for loss in config.losses):
        raise InputError(
            "there is nothing to compute: the config has no loss free_energy_difference",
            where=config.where("losses"),
            fix="Add one for every pair of phases, with from, to and temperature.",
        )


class FreeEnergyWorkflow(Workflow[Any, "FreeEnergies"]):
    """The workflow of a config whose losses all compute their initial difference, whatever file they name."""

    def __call__(self, config: Config, **options: Any) -> "FreeEnergies":
        """Compute and write the differences; see `Workflow.__call__`."""
        return super().__call__(_all_computed(config), **options)

    def dry_run(self, config: Config) -> "PlanRecord":
        """Return what a run would take; see `Workflow.dry_run`."""
        return super().dry_run(_all_computed(config))


def _all_computed(config: Config) -> Config:
    """Return the config with losses that all compute their initial difference."""
    losses = tuple(
        LocatedNode(node.to_dict() | {"initial": "compute"}, node.places, node.label)
        if node.type == "free_energy_difference"
        else node
        for node in config.losses
    )
    return config.model_copy(update={"losses": losses})


free_energy = FreeEnergyWorkflow(
    name="free-energy",
    help="Compute the free-energy differences of the phases, without changing the potential.",
    example="mlip-refine free-energy configs/quickstart.yaml --resume",
    layout=LAYOUT,
    check="mlip_refine.workflows.free_energy:check_losses",
    plan="mlip_refine.workflows.free_energy.plan:plan",
    prepare="mlip_refine.workflows.free_energy.run:prepare",
    run="mlip_refine.workflows.free_energy.run:run",
    show="mlip_refine.workflows.free_energy.run:show",
)


def free_energies(config: Config, *, resume: bool = False) -> "dict[str, FreeEnergyResult]":
    """Compute ΔG of the potential at the state of every `free_energy_difference` loss, ignoring `initial`.

    The results are written to the run folder as `initial-NAME.json`, for `initial:` of later runs.

    Args:
        config: The config.
        resume: Whether an interrupted run is continued.

    Returns:
        The differences by name of the loss.

    Raises:
        InputError: For bad input; nothing has been overwritten.
        StatisticsError: If the samples do not determine the numbers.
        SamplingError: If a phase does not stay what it is.
    """
    return free_energy(config, resume=resume).results
