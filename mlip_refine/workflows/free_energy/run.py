"""`mlip-refine free-energy`: what it checks, computes and prints."""

from dataclasses import dataclass

from rich.console import Console

from mlip_refine.config import Config
from mlip_refine.losses import EnsembleSource, FreeEnergyDifference, loss_specs
from mlip_refine.potential import Potential
from mlip_refine.sampling import StatePoint
from mlip_refine.workflows.base import Run
from mlip_refine.workflows.free_energy.differences import (
    FreeEnergySettings,
    initial_free_energies,
    require_paths,
)
from mlip_refine.workflows.free_energy.finite_size import require_comparable
from mlip_refine.workflows.free_energy.records import FreeEnergies
from mlip_refine.workflows.from_config import (
    bind_losses,
    free_energy_settings,
    load_potential,
    melting,
    with_timestep,
)
from mlip_refine.workflows.melt import Melting


@dataclass(frozen=True)
class Prepared:
    """Everything that a calculation starts from.

    Attributes:
        potential: The potential.
        losses: Losses whose initial difference is computed.
        points: State points of their sources, in starting cells.
        melting: Which of them are to be molten, and how.
        settings: How the differences are computed.
    """

    potential: Potential
    losses: list[FreeEnergyDifference]
    points: dict[EnsembleSource, StatePoint]
    melting: Melting
    settings: FreeEnergySettings


def prepare(config: Config) -> Prepared:
    """Check the input, and turn the config into the state points and settings of the calculation.

    Raises:
        InputError: For bad input.
    """
    specs = loss_specs(config.losses)
    potential = load_potential(config)
    # A time step that is not given is that of all crystals of the config, as in finetune: it takes no results
    # of another one.
    if config.sampling.timestep is not None:
        specs = [spec for spec in specs if issubclass(spec.type.loss_class, FreeEnergyDifference)]
    losses, points = bind_losses(config, specs, potential, trained=False)
    computed = [loss for loss in losses if isinstance(loss, FreeEnergyDifference)]
    for loss in computed:
        require_comparable(loss, points, config.free_energy.finite_size)
        require_paths(loss, points, config.where)
    config = with_timestep(config, potential, points.values())
    needed = {source for loss in computed for source in loss.sources}
    return Prepared(potential, computed, points, melting(config, needed), free_energy_settings(config))


def run(prepared: Prepared, run: Run) -> FreeEnergies:
    """Compute the differences that are not in the run folder yet.

    Raises:
        InputError: If a file in the folder belongs to another model, state or crystal.
        StatisticsError: If windows do not overlap, or the error of a difference is too large.
        SamplingError: If a phase does not stay what it is.
    """
    results = initial_free_energies(
        prepared.losses,
        {},
        prepared.melting.molten(prepared.potential, prepared.points, run.store),
        prepared.potential,
        prepared.settings,
        run.store,
        run.folder,
    )
    return FreeEnergies(run.folder, results)


def show(console: Console, result: FreeEnergies) -> None:
    """Print every difference, and where it was written."""
    for name, found in result.results.items():
        console.print(
            f"{name}: G({found.to.phase}) - G({found.from_.phase}) = {found.delta_g} at "
            f"{found.temperature_K:g} K, {found.pressure_GPa:g} GPa, {found.size}"
        )
    console.print(f"written to {result.folder}")
