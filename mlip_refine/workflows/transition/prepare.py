"""What `mlip-refine transition` checks, and the state points and settings that it makes of a config."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

from mlip_refine.config import Coexistence, Config, Transition
from mlip_refine.errors import InputError
from mlip_refine.losses import EnsembleSource
from mlip_refine.potential import Potential
from mlip_refine.sampling import Length, MDSettings, StatePoint
from mlip_refine.sampling.monitoring.phase_identity import require_ovito
from mlip_refine.workflows.free_energy.differences import FreeEnergySettings
from mlip_refine.workflows.free_energy.finite_size import compared
from mlip_refine.workflows.from_config import (
    free_energy_settings,
    load_potential,
    md_settings,
    melting,
    state_points,
    with_timestep,
)
from mlip_refine.workflows.melt import Melting
from mlip_refine.workflows.transition import required_section
from mlip_refine.workflows.transition.coexistence import (
    CoexistenceSettings,
    box_of,
    require_room,
)
from mlip_refine.workflows.transition.ladder import (
    LadderSettings,
)

SEGMENT = 2000.0
"""Time between two writes of the ladder to disk, fs."""


@dataclass(frozen=True)
class Prepared:
    """Everything that a calculation starts from.

    Attributes:
        name: Name of the run.
        section: The section `transition` of the config.
        potential: The potential.
        points: NPT state points of the ladder, in starting cells; liquids that are to be molten still as
            crystals.
        melting: Which of them are to be molten, and how.
        ladder: How the rungs are sampled.
        free_energy: How absolute free energies are computed.
        min_effective: Least number of independent frames of an estimate.
        convention: What Gibbs energies are of: cells of N atoms, or the thermodynamic limit.
        boxes: How boxes of crystal and liquid are made and run; `None` for none.
    """

    name: str
    section: Transition
    potential: Potential
    points: Mapping[EnsembleSource, StatePoint]
    melting: Melting
    ladder: LadderSettings
    free_energy: FreeEnergySettings
    min_effective: float
    convention: str
    boxes: CoexistenceSettings | None = None

    @property
    def phases(self) -> tuple[str, str]:
        """Names of both phases, in the order from, to."""
        return self.section.from_, self.section.to


def prepare(config: Config) -> Prepared:
    """Check the input, and turn the config into state points and settings.

    Raises:
        InputError: For bad input.
    """
    section = required_section(config)
    potential = load_potential(config)
    sources = [
        EnsembleSource(name, t, p)
        for name, t, p in product(
            (section.from_, section.to), sorted(section.temperature), sorted(section.pressure)
        )
    ]
    found = state_points(config, sources, potential, section.replicas)
    points = {s: replace(p, ensemble="npt", thermostat="langevin") for s, p in found.items()}
    convention = compared(
        points[sources[0]],
        points[sources[-1]],
        config.free_energy.finite_size,
        "transition",
        config.where("transition"),
    )
    if section.coexistence is not None:
        atoms = next(point.atoms for point in points.values() if not point.is_liquid)
        box = box_of(atoms, atoms.cell.array, section.coexistence.n_atoms)
        require_room(box, potential.graphs.cutoff, config.where("transition", "coexistence", "n_atoms"))
    config = with_timestep(config, potential, points.values())
    frames = max(1, round(section.duration / section.interval))
    length = Length(section.equilibration, frames, max(1, round(SEGMENT / section.interval)))
    md = md_settings(config, interval=section.interval)
    return Prepared(
        name=config.name,
        section=section,
        potential=potential,
        points=points,
        melting=melting(config, points),
        ladder=LadderSettings(md, length, config.seed),
        free_energy=free_energy_settings(config),
        min_effective=config.sampling.min_effective_frames,
        convention=convention,
        boxes=None if section.coexistence is None else _box_settings(config, section.coexistence, md),
    )


def _box_settings(config: Config, section: Coexistence, md: MDSettings) -> CoexistenceSettings:
    """Return how boxes of crystal and liquid are made and run.

    Raises:
        InputError: Unless one phase is a crystal and the other is molten from it.
    """
    transition = required_section(config)
    names = transition.from_, transition.to
    melts = {name: melt for name in names if (melt := config.phases[name].melt) is not None}
    if len(melts) != 1 or next(iter(melts.values())).from_ not in names:
        raise InputError(
            "coexistence is of a crystal and its melt",
            where=config.where("transition", "coexistence"),
            found=f"{names[0]} and {names[1]}",
            expected="one phase with melt, from the other one",
        )
    require_ovito()
    return CoexistenceSettings(
        n_atoms=section.n_atoms,
        starts=section.starts,
        pressures=section.pressure,
        heat=next(iter(melts.values())).temperature,
        preparation=section.preparation,
        duration=section.duration,
        md=md,
        seed=config.seed,
    )
