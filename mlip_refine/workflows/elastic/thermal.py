"""Elastic constants at temperatures, from the stress of sampled cells that are held."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from mlip_refine.config import Config
from mlip_refine.crystals.moduli import voigt_average
from mlip_refine.crystals.symmetry import INDEPENDENT, Symmetry, find_symmetry
from mlip_refine.data import find_table
from mlip_refine.errors import StatisticsError
from mlip_refine.losses import EnsembleSource
from mlip_refine.losses.base import UNSTRAINED
from mlip_refine.losses.elastic.targets import constants_of, lattice_of
from mlip_refine.observables.base import Observable, average, measure, sample_of, values_of
from mlip_refine.observables.cell import Pressure, Stress
from mlip_refine.observables.elasticity import (
    Deformation,
    FluctuationElasticity,
    FluctuationModuli,
    RestStrain,
    deformation_constants,
    errors_of_stresses,
)
from mlip_refine.potential import Acceleration, Potential
from mlip_refine.quantities import Measured
from mlip_refine.sampling import FrameStore, Length, MDSettings, StatePoint, Trajectory, sample
from mlip_refine.statistics import require_effective
from mlip_refine.training.streaming import further_probes, with_gaps
from mlip_refine.workflows.elastic.records import ThermalElasticPoint
from mlip_refine.workflows.from_config import (
    md_settings,
    sampling_length,
    state_points,
    timestep,
    with_timestep,
)

STAGE = "elastic"

SEGMENT = 1000.0
"""Time between two writes to disk, fs: an interruption costs at most this, and longer runs extend it."""

MODULI = {"K": "GPa", "G": "GPa", "E": "GPa", "nu": ""}
"""Moduli of a polycrystal with their units."""

Method = Literal["fluctuation", "deformation"]


@dataclass(frozen=True)
class ThermalCell:
    """A cell at a temperature.

    Attributes:
        source: Phase, temperature and lattice constants of the cell.
        points: State points to sample: the cell itself, then the strained ones in the order of the strains,
            as far as a method needs them.
        symmetry: Symmetry of the crystal.
        deformation: Strains that determine its constants.
        targets: Measured constants by name, GPa.
    """

    source: EnsembleSource
    points: tuple[StatePoint, ...]
    symmetry: Symmetry
    deformation: Deformation
    targets: Mapping[str, Measured]


@dataclass(frozen=True)
class ThermalSettings:
    """Cells at temperatures, and how their constants are found.

    Attributes:
        cells: The cells.
        methods: Methods, one after the other.
        adiabatic: Whether fluctuations give adiabatic constants.
        born_every: Frames from one with a Born term to the next.
        min_effective_frames: Fewest independent frames that constants may rest on.
        md: Settings of the dynamics.
        timestep: Time step of the dynamics, fs.
        length: Length of the sampling.
        seed: Random seed.
        dtype: Floating type of the sampling.
        accelerate: Acceleration of the sampling.
    """

    cells: tuple[ThermalCell, ...]
    methods: tuple[Method, ...]
    adiabatic: bool
    born_every: int
    min_effective_frames: float
    md: MDSettings
    timestep: float
    length: Length
    seed: int
    dtype: str
    accelerate: Acceleration


def thermal_settings(config: Config, potential: Potential, phases: Sequence[str]) -> ThermalSettings:
    """Return what a config asks for at temperatures.

    Args:
        config: Config with the sections `elastic` and `sampling`.
        potential: Potential in float64.
        phases: Names of crystals.

    Raises:
        InputError: A table does not have the temperatures.
    """
    section = config.elastic
    table = None if section.table is None else find_table(section.table, config.resolve)
    cells = []
    for phase in phases:
        for temperature in section.temperature or ():
            source = EnsembleSource(
                phase, temperature, 0.0, () if table is None else lattice_of(table, temperature)
            )
            atoms = state_points(config, [source], potential, 1)[source].atoms
            symmetry = find_symmetry(atoms.cell.array, atoms.positions, atoms.numbers)
            deformation = Deformation.of(symmetry, section.strain)
            strains = deformation.strains if "deformation" in section.method else ()
            sampled = [replace(source, strain=strain) for strain in (UNSTRAINED, *strains)]
            points = state_points(config, sampled, potential, config.sampling.replicas)
            measured = {} if table is None else constants_of(table, temperature)
            names = [name for name in INDEPENDENT[symmetry.laue] if name in measured]
            targets = {name: Measured(*measured[name], "GPa") for name in names}
            cells.append(ThermalCell(source, tuple(points.values()), symmetry, deformation, targets))
    config = with_timestep(config, potential, [point for cell in cells for point in cell.points])
    segment = max(1, round(SEGMENT / config.sampling.interval))
    return ThermalSettings(
        cells=tuple(cells),
        methods=section.method,
        adiabatic=section.kind == "adiabatic",
        born_every=section.born_every,
        min_effective_frames=config.sampling.min_effective_frames,
        md=md_settings(config),
        timestep=timestep(config),
        length=replace(sampling_length(config), segment=segment),
        seed=config.seed,
        dtype=config.sampling.dtype,
        accelerate=config.sampling.accelerate,
    )


def thermal_elasticity(
    potential: Potential, settings: ThermalSettings, store: FrameStore
) -> Iterator[tuple[ThermalElasticPoint, ...]]:
    """Sample the cells and compute their elastic constants, one cell after the other.

    Whole segments that were sampled before are not sampled again, also where more frames are wanted now.
    Where frames are too few or too correlated, a point has the reason in place of its constants.

    Args:
        potential: Potential in float64.
        settings: The cells, and how their constants are found.
        store: Store of the frames.

    Yields:
        The points of a cell, one for each method.

    Raises:
        SamplingError: A crystal does not survive.
    """
    frozen = potential.frozen_copy(settings.dtype, settings.accelerate)
    # One batch per crystal and temperature: what is done is kept if a later one is interrupted.
    for cell in settings.cells:
        sampled = sample(
            frozen,
            cell.points,
            settings.md,
            settings.length,
            seed=settings.seed,
            stage=f"{STAGE}-{cell.source.name}",
            store=store,
        )
        runs = [sampled[point.name] for point in cell.points]
        yield tuple(_point(potential, settings, cell, method, runs) for method in settings.methods)


def _point(
    potential: Potential,
    settings: ThermalSettings,
    cell: ThermalCell,
    method: Method,
    runs: Sequence[Trajectory],
) -> ThermalElasticPoint:
    """Return the constants of a cell by one method, or why there are none."""
    fluctuation = method == "fluctuation"
    runs = runs[:1] if fluctuation else runs
    try:
        for run in runs:
            pressure = -run.stress[run.kept].diagonal(dim1=1, dim2=2).mean(-1)
            independent = run.n_kept / run.inefficiency(pressure)
            what = f"the stress of {run.point.name}"
            minimum = settings.min_effective_frames
            require_effective(independent, minimum, what, have_length=run.n_kept, unit="frames")
        if fluctuation:
            values = _by_fluctuation(potential, settings, cell.symmetry, runs[0])
        else:
            values = of_strained_cells(cell.deformation, runs)
            values["isothermal"] = values["constants"]
    except StatisticsError as error:
        values = {"refused": str(error)}
    step, interval = settings.timestep, settings.md.interval
    equilibration = settings.length.equilibration
    first = max(1, round(equilibration / step)) if equilibration > 0 else 0
    per_frame = max(1, round(interval / step))
    steps = [(first + per_frame * run.kept.shape[1]) * len(run.kept) * run.n_atoms for run in runs]
    return ThermalElasticPoint(
        name=cell.source.name,
        phase=cell.source.phase,
        method=method,
        kind="adiabatic" if fluctuation and settings.adiabatic else "isothermal",
        temperature_K=cell.source.temperature,
        lattice_A=cell.source.lattice,
        n_atoms=runs[0].n_atoms,
        frames=sum(run.n_kept for run in runs),
        atom_steps=sum(steps),
        **values,
        targets=cell.targets,
        verdicts=tuple(verdict for run in runs for verdict in run.verdicts),
    )


def _by_fluctuation(
    potential: Potential, settings: ThermalSettings, symmetry: Symmetry, run: Trajectory
) -> dict[str, Any]:
    """Return constants, moduli, pressure and the strain to rest from the fluctuations of one cell.

    Raises:
        StatisticsError: The Born term is known on too few frames.
    """
    every, minimum = settings.born_every, settings.min_effective_frames
    positions, cells = run.positions[run.kept][::every], run.cells[run.kept][::every]
    what = f"the Born term of {run.point.name}, of one frame in {every},"
    require_effective(len(positions), minimum, what, have_length=run.n_kept, unit="frames")
    # Neighbours are found for the frames with a Born term alone.
    structures = potential.graphs.frames(positions, cells, run.point.atoms.numbers)
    born = further_probes(potential, structures, {"born": 1})["born"]
    sampled = sample_of(run, {"born": with_gaps(values_of(born), run.n_kept, every)})
    adiabatic = settings.adiabatic

    def values(observable: Observable) -> dict[str, Measured]:
        return dict(zip(observable.labels, measure(observable, sampled, run.inefficiency), strict=True))

    moduli = values(FluctuationModuli(symmetry, adiabatic=adiabatic))
    return {
        "constants": values(FluctuationElasticity(symmetry, adiabatic=adiabatic)),
        "isothermal": values(FluctuationElasticity(symmetry)),
        "stress_strain": values(FluctuationElasticity(symmetry, adiabatic=adiabatic, stress_strain=True)),
        "moduli": {name: replace(m, unit=MODULI[name]) for name, m in moduli.items()},
        "pressure": values(Pressure())["pressure"],
        "rest_strain": values(RestStrain(symmetry)),
    }


def of_strained_cells(deformation: Deformation, runs: Sequence[Trajectory]) -> dict[str, Any]:
    """Return isothermal constants C and coefficients B, Voigt's moduli of B, and the pressure.

    Args:
        deformation: The strains.
        runs: The cell itself, then the strained ones in the order of the strains.

    Returns:
        `constants`, `stress_strain` and `moduli` (K, G, E, nu) by name, and `pressure`.
    """

    def function(stress: Tensor) -> Tensor:
        """Return all of them from the mean stress of every cell `[1 + 2 n_directions, 6]`, GPa."""
        c = deformation_constants(deformation, stress)
        b = deformation_constants(deformation, stress, stress_strain=True)
        mean = voigt_average(torch.einsum("m,mij->ij", b, deformation.basis.to(b)))
        moduli = torch.stack([mean.bulk, mean.shear, mean.young, mean.poisson])
        return torch.cat([c, b, moduli, -stress[0, :3].mean().reshape(1)])

    names = INDEPENDENT[deformation.symmetry.laue]
    labels = [(kind, name, "GPa") for kind in ("constants", "stress_strain") for name in names]
    labels += [("moduli", name, unit) for name, unit in MODULI.items()]
    *values, pressure = of_stresses(function, runs)
    found: dict[str, Any] = {"pressure": Measured(*pressure, "GPa")}
    for (kind, name, unit), value in zip(labels, values, strict=True):
        found.setdefault(kind, {})[name] = Measured(*value, unit)
    return found


def of_stresses(
    function: Callable[[Tensor], Tensor], runs: Sequence[Trajectory]
) -> list[tuple[float, float]]:
    """Return values and standard errors of a function of the mean stresses of independent cells.

    Args:
        function: Differentiable function of stresses `[n_runs, 6]`, GPa, that gives `[m]`.
        runs: The cells.
    """

    def errors(run: Trajectory, observable: Observable) -> list[float]:
        return [m.se for m in measure(observable, sample_of(run), run.inefficiency)]

    stress = torch.stack([average(Stress(), sample_of(run)) for run in runs])
    found = errors_of_stresses(function, stress, [partial(errors, run) for run in runs])
    return list(zip(function(stress).tolist(), found, strict=True))
