"""`mlip-refine free-energy`: free-energy differences of the phases, without changing the potential."""

import shutil

from mlip_refine.config import Config, LocatedNode
from mlip_refine.errors import InputError
from mlip_refine.losses import FreeEnergyDifference, loss_specs
from mlip_refine.sampling import FrameStore
from mlip_refine.workflows.free_energy.differences import (
    initial_free_energies,
    require_crystals,
    require_equal_sizes,
)
from mlip_refine.workflows.free_energy.records import FreeEnergyResult
from mlip_refine.workflows.from_config import bind_losses, free_energy_settings, load_potential, with_timestep
from mlip_refine.workflows.run_folder import open_run_folder, packages


def free_energies(config: Config, *, resume: bool = False) -> dict[str, FreeEnergyResult]:
    """Compute ΔG of the potential at the state of every `free_energy_difference` loss, ignoring `initial`.

    The results are written to the run folder as `initial-NAME.json`, for `initial:` of later runs.

    Args:
        config: The config.
        resume: Whether an interrupted run is continued.

    Raises:
        InputError: For bad input; nothing has been overwritten.
        StatisticsError: If the samples do not determine the numbers.
        SamplingError: If a phase does not stay what it is.
    """
    config = config.model_copy(update={"losses": tuple(_to_compute(node) for node in config.losses)})
    specs = loss_specs(config.losses)
    differences = [spec for spec in specs if issubclass(spec.type.loss_class, FreeEnergyDifference)]
    if not differences:
        raise InputError(
            "there is nothing to compute: the config has no loss free_energy_difference",
            where=config.where("losses"),
            fix="Add one for every pair of phases, with from, to and temperature.",
        )
    potential = load_potential(config)
    # A time step that is not given is that of all crystals of the config, as in finetune: it takes no results
    # of another one.
    chosen = specs if config.sampling.timestep is None else differences
    losses, points = bind_losses(config, chosen, potential, trained=False)
    wanted = [loss for loss in losses if isinstance(loss, FreeEnergyDifference)]
    for loss in wanted:
        require_equal_sizes(loss, points)
        require_crystals(loss, points, config.where)
    settings = free_energy_settings(with_timestep(config, potential, points.values()))
    folder = open_run_folder(config, resume=resume)
    store = FrameStore(folder / "frames", {"seed": config.seed, "packages": packages()})
    results = initial_free_energies(wanted, {}, points, potential, settings, store, folder)
    if not config.output.keep_frames:
        shutil.rmtree(store.folder, ignore_errors=True)
    return results


def _to_compute(node: LocatedNode) -> LocatedNode:
    """Return a loss without the file of its initial difference."""
    if node.type != "free_energy_difference":
        return node
    return LocatedNode(node.to_dict() | {"initial": "compute"}, node.places, node.label)
