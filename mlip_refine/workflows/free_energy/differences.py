"""Free-energy differences of the initial potential: computed along paths to references, or read."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mlip_refine.config import FiniteSize
from mlip_refine.errors import InputError, StatisticsError
from mlip_refine.losses import EnsembleSource, FreeEnergyDifference
from mlip_refine.potential import Acceleration, Potential
from mlip_refine.quantities import MEV, Measured
from mlip_refine.sampling import FrameStore, Length, MDSettings, StatePoint
from mlip_refine.training.tracker import stage_seed
from mlip_refine.workflows.free_energy.cells import CellSettings, equilibrate_cells, liquid_cells
from mlip_refine.workflows.free_energy.finite_size import convention_of
from mlip_refine.workflows.free_energy.frenkel_ladd import (
    AbsoluteFreeEnergy,
    LadderSettings,
    absolute_free_energies,
)
from mlip_refine.workflows.free_energy.from_transition import read_difference
from mlip_refine.workflows.free_energy.liquid_path import (
    LiquidFreeEnergy,
    LiquidPathSettings,
    liquid_free_energies,
)
from mlip_refine.workflows.free_energy.records import (
    LIMIT,
    FreeEnergyResult,
    LiquidReference,
    PhaseFreeEnergy,
)


@dataclass(frozen=True)
class FreeEnergySettings:
    """How initial free-energy differences are computed.

    Attributes:
        replicas: Independent copies of every phase and window.
        cells: How the cell of each phase is found.
        md: Integrator settings of all paths.
        ladder: Reference, windows and lengths of the Frenkel-Ladd path.
        liquid: Fluid, windows and lengths of the path of a liquid.
        liquid_cells: Length of the run at constant pressure that gives the cell of a liquid.
        timestep: Time step, fs: results of different steps do not belong together.
        seed: Random seed of the run.
        dtype: Precision of the dynamics.
        accelerate: How forces are computed (see `Potential.frozen_copy`).
        max_error: Largest accepted standard error of a difference, meV/atom; `None`: any.
        finite_size: What differences are of (see `convention_of`).
        record: What a result file says of these settings.
    """

    replicas: int
    cells: CellSettings
    md: MDSettings
    ladder: LadderSettings
    liquid: LiquidPathSettings
    liquid_cells: Length
    timestep: float
    seed: int
    dtype: str
    accelerate: Acceleration
    max_error: float | None
    finite_size: FiniteSize | None
    record: Mapping[str, Any]


def initial_free_energies(
    losses: Sequence[FreeEnergyDifference],
    given: Mapping[str, FreeEnergyResult],
    points: Mapping[EnsembleSource, StatePoint],
    potential: Potential,
    settings: FreeEnergySettings,
    store: FrameStore,
    folder: Path,
) -> dict[str, FreeEnergyResult]:
    """Return ΔG of the initial model for every loss, by loss name.

    Args:
        losses: Losses that start from ΔG.
        given: What the config names a file for, by loss name.
        points: State points of the sources, in starting cells.
        potential: The initial model.
        settings: How the others are computed.
        store: Where frames are kept.
        folder: The run folder: what is computed is kept there as `initial-NAME.json`, and not computed again.

    Raises:
        InputError: If a file in the folder belongs to another model, state or crystal.
        StatisticsError: If windows do not overlap, or the error of a difference is too large.
        SamplingError: If a phase does not stay what it is.
    """
    results = dict(given)
    missing = []
    for loss in losses:
        kept = folder / f"initial-{loss.name}.json"
        if loss.name not in given and kept.exists():
            results[loss.name] = read_initial(
                kept, loss, points, potential, settings.timestep, settings.finite_size
            )
        elif loss.name not in given:
            missing.append(loss)
    if missing:
        for name, result in compute_free_energies(missing, points, potential, settings, store).items():
            result.write(folder / f"initial-{name}.json")
            results[name] = result
    for name, result in results.items():
        require_error(name, result.delta_g.se, settings.max_error)
    return results


def compute_free_energies(
    losses: Sequence[FreeEnergyDifference],
    points: Mapping[EnsembleSource, StatePoint],
    potential: Potential,
    settings: FreeEnergySettings,
    store: FrameStore,
) -> dict[str, FreeEnergyResult]:
    """Compute ΔG at the state of every loss, by loss name; all phases and windows share their batches.

    Args:
        losses: Losses whose initial difference is needed.
        points: State points of their sources, in starting cells.
        potential: The initial model.
        settings: How to compute.
        store: Where frames are kept.

    Raises:
        StatisticsError: If the windows do not overlap, or a finite-size term cannot be computed.
        SamplingError: If a phase does not stay what it is.
    """
    conventions = {loss.name: convention_of(loss, points, settings.finite_size) for loss in losses}
    limit = {s.name for loss in losses if conventions[loss.name] == LIMIT for s in loss.sources}
    sources = sorted({s for loss in losses for s in loss.sources})
    frozen = potential.frozen_copy(settings.dtype, settings.accelerate)
    phases = [replace(points[s], replicas=settings.replicas, ensemble="nvt") for s in sources]
    energies = _of_crystals(frozen, [p for p in phases if not p.is_liquid], settings, store, limit)
    energies |= _of_liquids(frozen, [p for p in phases if p.is_liquid], settings, store)
    results = {}
    for loss in losses:
        one, two = (energies[s.name] for s in loss.sources)
        convention = conventions[loss.name]
        difference = two.per_atom(convention) - one.per_atom(convention)
        results[loss.name] = FreeEnergyResult(
            model_hash=potential.hash,
            head=potential.head,
            temperature_K=loss.options.temperature,
            pressure_GPa=loss.options.pressure,
            n_atoms=len(one.point.atoms),
            delta_g=difference,
            from_=phase_free_energy(loss.options.from_, one, convention),
            to=phase_free_energy(loss.options.to, two, convention),
            timestep_fs=settings.timestep,
            settings=dict(settings.record),
            convention=convention,
        )
    return results


def _of_crystals(
    frozen: Potential,
    points: Sequence[StatePoint],
    settings: FreeEnergySettings,
    store: FrameStore,
    limit: Collection[str],
) -> dict[str, AbsoluteFreeEnergy]:
    """Return the free energies of crystals by name, each in the cell with its pressure."""
    if not points:
        return {}
    cells = equilibrate_cells(
        frozen, points, settings.cells, seed=settings.seed + 1, stage="cells", store=store
    )
    return absolute_free_energies(
        frozen,
        list(cells.values()),
        settings.md,
        settings.ladder,
        seed=settings.seed,
        store=store,
        limit=limit,
    )


def _of_liquids(
    frozen: Potential, points: Sequence[StatePoint], settings: FreeEnergySettings, store: FrameStore
) -> dict[str, AbsoluteFreeEnergy]:
    """Return the free energies of liquids by name, each in its mean cell."""
    if not points:
        return {}
    cells = liquid_cells(
        frozen,
        points,
        settings.md,
        settings.liquid_cells,
        seed=stage_seed(settings.seed, "liquid-cells"),
        stage="liquid-cells",
        store=store,
    )
    energies = liquid_free_energies(
        frozen,
        list(cells.values()),
        settings.md,
        settings.liquid,
        seed=stage_seed(settings.seed, "liquid"),
        store=store,
    )
    return dict(energies)


def phase_free_energy(name: str, energy: AbsoluteFreeEnergy, convention: str) -> PhaseFreeEnergy:
    """Return what a result file says of one phase.

    Args:
        name: Name of the phase in the config.
        energy: Its absolute free energy.
        convention: What G is of: `CELLS` or `LIMIT`.
    """
    atoms, term = energy.point.atoms, None
    if energy.size_term is not None:
        of_cell = Measured(energy.size_term, energy.size_term_se, "eV")
        term = of_cell.scaled(1 / (MEV * len(atoms)), "meV/atom")
    return PhaseFreeEnergy(
        phase=name,
        kind=_kind(energy.point),
        numbers=atoms.numbers.tolist(),
        scaled_positions=np.round(atoms.get_scaled_positions(wrap=False), 12).tolist(),
        cell=atoms.cell.array.tolist(),
        gibbs=energy.per_atom(convention),
        overlap=energy.overlap,
        size_term=term,
        liquid=_liquid_record(energy) if isinstance(energy, LiquidFreeEnergy) else None,
    )


def _liquid_record(energy: LiquidFreeEnergy) -> LiquidReference:
    """Return what a result file says of the path of a liquid."""
    path, fluid = energy.path, energy.fluid
    return LiquidReference(
        strength=path.strength,
        sigma_A=path.sigma,
        packing=path.packing,
        dissipation_kT_per_atom=path.dissipation,
        windows=list(path.lambdas),
        closest_A=list(path.closest),
        closest_in_liquid_A=path.closest_in_liquid,
        excess=fluid.excess.scaled(1 / (MEV * len(energy.point.atoms)), "meV/atom"),
        strengths=list(fluid.strengths),
    )


def read_initial(
    path: Path,
    loss: FreeEnergyDifference,
    points: Mapping[EnsembleSource, StatePoint],
    potential: Potential,
    timestep: float,
    finite_size: FiniteSize | None = None,
) -> FreeEnergyResult:
    """Read ΔG of the initial model from a file that belongs to this model, state, time step and crystals.

    Args:
        path: A file of `free-energy`; or a `transition.json` or the folder of its run, of which the state of
            the loss is taken.
        loss: The loss that starts from it.
        points: State points of the sources of the loss.
        potential: The initial model.
        timestep: Time step of the run, fs.
        finite_size: What the difference has to be of (see `convention_of`).

    Raises:
        InputError: With the first thing that does not match.
    """
    options = loss.options
    phases = loss.phase_from.phase, loss.phase_to.phase
    result = read_difference(path, phases, options.temperature, options.pressure)
    checks: list[tuple[str, object, object]] = [
        ("model hash", result.model_hash, potential.hash),
        ("head", result.head, potential.head),
        ("temperature (K)", result.temperature_K, options.temperature),
        ("pressure (GPa)", result.pressure_GPa, options.pressure),
        ("timestep (fs)", result.timestep_fs, timestep),
        ("convention (free_energy.finite_size)", result.convention, convention_of(loss, points, finite_size)),
    ]
    for phase, source in ((result.from_, loss.phase_from), (result.to, loss.phase_to)):
        atoms, kind = points[source].atoms, _kind(points[source])
        checks.append((f"phase name of {phase.phase}", phase.phase, source.phase))
        checks.append((f"number of atoms of {phase.phase}", len(phase.numbers), len(atoms)))
        checks.append((f"elements of {phase.phase}", phase.numbers, atoms.numbers.tolist()))
        checks.append((f"kind of {phase.phase}", phase.kind, kind))
        if kind == "crystal":
            sites = np.round(atoms.get_scaled_positions(wrap=False), 6).tolist()
            found = np.round(np.array(phase.scaled_positions), 6).tolist()
            checks.append((f"lattice sites of {phase.phase}", found == sites, True))
    for what, found_value, wanted in checks:
        if found_value != wanted:
            raise InputError(
                f"the initial free energy of {loss.name!r} was computed for something else: {what} differs",
                where=str(path),
                found=found_value,
                expected=str(wanted),
                fix="Compute it anew: mlip-refine free-energy, or initial: compute.",
            )
    return result


def in_result_cells(
    points: Mapping[EnsembleSource, StatePoint], loss: FreeEnergyDifference, result: FreeEnergyResult
) -> dict[EnsembleSource, StatePoint]:
    """Return the points of a loss in the cells that its initial free energy was computed in.

    A liquid starts from the frame in the result.
    """
    ends = {loss.phase_from: result.from_, loss.phase_to: result.to}
    moved = {source: points[source].with_cell(np.array(phase.cell)) for source, phase in ends.items()}
    for source, phase in ends.items():
        if phase.kind == "liquid":
            moved[source].atoms.set_scaled_positions(np.array(phase.scaled_positions))
    return moved


def _kind(point: StatePoint) -> Literal["crystal", "liquid"]:
    """Return what a free-energy file calls a phase."""
    return "liquid" if point.is_liquid else "crystal"


def require_paths(
    loss: FreeEnergyDifference,
    points: Mapping[EnsembleSource, StatePoint],
    where: Callable[..., str | None] = lambda *_: None,
) -> None:
    """Refuse to compute the free energy of what is not judged: a path begins at a crystal or at a liquid.

    A liquid has to have a cell that moves, because its compressibility is needed.

    Args:
        loss: The loss whose difference is to be computed.
        points: State points of its sources.
        where: Returns the place of a key of the config (see `Config.where`).

    Raises:
        InputError: With the phase.
    """
    for source in loss.sources:
        point = points[source]
        if point.identity == "none":
            raise InputError(
                f"loss {loss.name!r} needs the free energy of {source.phase!r}, which may be anything",
                where=where("phases", source.phase, "identity"),
                found="identity none",
                expected="structure, sites or liquid, for initial: compute",
                fix="Give the file of a free-energy difference as initial.",
            )
        if point.is_liquid and point.cell_freedom == "fixed":
            raise InputError(
                f"loss {loss.name!r} needs the compressibility of the liquid {source.phase!r}",
                where=where("phases", source.phase, "cell_freedom"),
                found="cell_freedom fixed",
                expected="isotropic, for initial: compute",
            )


def require_error(name: str, se: float, limit: float | None) -> None:
    """Refuse an initial free energy that is noisier than `free_energy.max_error` (meV/atom).

    Raises:
        StatisticsError: With the length that would do.
    """
    if limit is not None and se > limit:
        raise StatisticsError(
            f"the initial free-energy difference of {name} has a standard error of {se:.2g} meV/atom, "
            f"more than free_energy.max_error = {limit:g}",
            needed=f"production about {(se / limit) ** 2:.2g} times as long, or a larger max_error",
        )
