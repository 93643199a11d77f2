"""Initial free-energy differences: computed along Frenkel-Ladd paths, written to a file, and read back."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from mlip_refine.config import Config
from mlip_refine.errors import InputError, StatisticsError
from mlip_refine.files import write_json
from mlip_refine.losses import EnsembleSource, FreeEnergyDifference
from mlip_refine.potential import Potential
from mlip_refine.quantities import MEV, Measured
from mlip_refine.sampling import FrameStore, Length, StatePoint
from mlip_refine.workflows.free_energy.cells import equilibrate_cells
from mlip_refine.workflows.free_energy.frenkel_ladd import (
    AbsoluteFreeEnergy,
    LadderSettings,
    absolute_free_energies,
)
from mlip_refine.workflows.from_config import md_settings, state_points, timestep

FORMAT = "mlip_refine free energies 1"
CONVENTION = "G = F + PV of the whole cell, centre of mass in V/N (Freitas, Asta and de Koning 2016)"


# A result file with keys that these classes do not have is not one of theirs.
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class PhaseFreeEnergy:
    """Absolute free energy of one phase in its cell.

    Attributes:
        phase: Name in the config.
        numbers: Atomic numbers.
        scaled_positions: Lattice sites `[n_atoms][3]`.
        cell: Rows, Å, of the cell with the wanted pressure.
        gibbs_mev_per_atom: G = F + PV, with `gibbs_se` its standard error.
        overlap: Smallest overlap between neighbouring windows.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    phase: str
    numbers: list[int]
    scaled_positions: list[list[float]]
    cell: list[list[float]]
    gibbs_mev_per_atom: float
    gibbs_se: float
    overlap: float


@dataclass(frozen=True)
class FreeEnergyResult:
    """ΔG = G_to - G_from of one model at one state.

    Attributes:
        model_hash: Of the model that it belongs to.
        head: Head of the model.
        temperature_K: Temperature.
        pressure_GPa: Pressure.
        n_atoms: Atoms per cell: finite-size errors cancel only between equal sizes.
        delta_g_mev_per_atom: The difference, with `delta_g_se` its standard error.
        from_: Phase I.
        to: Phase II.
        timestep_fs: Of the integrator.
        settings: How it was computed.
        convention: What is counted.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    model_hash: str
    head: str
    temperature_K: float  # noqa: N815 - the unit's own case
    pressure_GPa: float  # noqa: N815 - the unit's own case
    n_atoms: int
    delta_g_mev_per_atom: float
    delta_g_se: float
    from_: PhaseFreeEnergy
    to: PhaseFreeEnergy
    timestep_fs: float
    settings: dict[str, Any]
    convention: str = CONVENTION

    @property
    def delta_g(self) -> Measured:
        """The difference as a measured quantity, meV/atom."""
        return Measured(self.delta_g_mev_per_atom, self.delta_g_se, "meV/atom")

    def write(self, path: Path) -> None:
        """Write as JSON, atomically."""
        data = {"format": FORMAT} | asdict(self)
        data["from"] = data.pop("from_")
        write_json(path, data)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a result file.

        Raises:
            InputError: If the file is missing or is not one.
        """
        try:
            data = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            problem = "the free-energy file cannot be read"
            raise InputError(problem, where=str(path), found=str(error)) from error
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise InputError("this is not a free-energy file", where=str(path), expected=f"format: {FORMAT}")
        try:
            return TypeAdapter(cls).validate_python(data | {"from_": data.pop("from", None)})
        except ValidationError as error:
            first = error.errors()[0]
            key, problem = (
                ".".join(map(str, first["loc"])),
                "the free-energy file lacks a key or has a wrong value",
            )
            raise InputError(problem, where=str(path), found=f"{key}: {first['msg']}") from error


def compute_free_energies(
    config: Config, potential: Potential, losses: Sequence[FreeEnergyDifference], store: FrameStore
) -> dict[str, FreeEnergyResult]:
    """ΔG of the model at the state of every loss, by loss name; all phases and windows share their batches.

    Raises:
        InputError: If two phases differ in size, or one is no crystal.
        StatisticsError: If the windows do not overlap.
        SamplingError: If a phase does not stay what it is.
    """
    section = config.free_energy
    sources = sorted({s for loss in losses for s in loss.sources})
    points = state_points(config, sources, potential, section.replicas)
    points = {s: replace(p, ensemble="nvt") for s, p in points.items()}
    for loss in losses:
        require_equal_sizes(loss, points)
        require_crystals(config, loss, points)
    frozen = potential.frozen_copy(config.sampling.dtype, config.sampling.accelerate)
    cells = _cells(config, frozen, points, store)
    energies = absolute_free_energies(
        frozen,
        list(cells.values()),
        md_settings(config, friction=section.friction, interval=section.interval),
        ladder_settings(config),
        seed=config.seed,
        store=store,
    )
    return {loss.name: _difference(config, potential, loss, energies) for loss in losses}


def ladder_settings(config: Config) -> LadderSettings:
    """Reference, windows and lengths; segments of at most a picosecond or so, so that little is ever lost."""
    section = config.free_energy
    frames, fit = (max(1, round(t / section.interval)) for t in (section.production, section.fit))
    segment = max(1, round(1000.0 / section.interval))
    return LadderSettings(
        reference=section.reference,
        windows=section.windows,
        fit=Length(section.equilibration, fit, segment),
        ladder=Length(section.equilibration, frames, segment),
    )


def _cells(
    config: Config, frozen: Potential, points: Mapping[EnsembleSource, StatePoint], store: FrameStore
) -> dict[str, StatePoint]:
    section = config.sampling
    settings = md_settings(config, interval=cell_interval(config))
    return equilibrate_cells(
        frozen,
        list(points.values()),
        settings,
        cell_length(config),
        iterations=section.cell_iterations,
        seed=config.seed + 1,
        stage="cells",
        store=store,
    )


def cell_interval(config: Config) -> float:
    """Time between the frames whose stress finds a cell, fs."""
    return max(timestep(config), min(40.0, config.sampling.cell_equilibration / 10))


def cell_length(config: Config) -> Length:
    """Each iteration towards a cell: the first third equilibrates."""
    total = config.sampling.cell_equilibration
    return Length(total / 3, max(1, round(2 * total / 3 / cell_interval(config))))


def require_equal_sizes(loss: FreeEnergyDifference, points: Mapping[EnsembleSource, StatePoint]) -> None:
    """Refuse phases of different size or composition.

    Raises:
        InputError: With both sizes.
    """
    one, two = (sorted(points[s].atoms.numbers.tolist()) for s in loss.sources)
    if one != two:
        raise InputError(
            f"loss {loss.name!r} compares cells of different content",
            found=f"{len(one)} atoms of {loss.options.from_!r}, {len(two)} of {loss.options.to!r}",
            expected="equal numbers of the same atoms: finite-size errors of ΔG cancel only then",
        )


def require_crystals(
    config: Config, loss: FreeEnergyDifference, points: Mapping[EnsembleSource, StatePoint]
) -> None:
    """Refuse to compute the free energy of what has no sites: a Frenkel-Ladd path begins at a crystal.

    Raises:
        InputError: With the phase.
    """
    for source in loss.sources:
        if points[source].identity in ("liquid", "none"):
            raise InputError(
                f"loss {loss.name!r} needs the free energy of {source.phase!r}, which is no crystal",
                where=config.where("phases", source.phase, "identity"),
                found=f"identity {points[source].identity}",
                expected="structure or sites, for initial: compute",
                fix="Give the file of a free-energy difference as initial.",
            )


def _difference(
    config: Config,
    potential: Potential,
    loss: FreeEnergyDifference,
    energies: Mapping[str, AbsoluteFreeEnergy],
) -> FreeEnergyResult:
    one, two = (energies[s.name] for s in loss.sources)
    n_atoms = len(one.point.atoms)
    difference = (two.gibbs - one.gibbs).scaled(1 / (MEV * n_atoms), "meV/atom")
    return FreeEnergyResult(
        model_hash=potential.hash,
        head=potential.head,
        temperature_K=loss.options.temperature,
        pressure_GPa=loss.options.pressure,
        n_atoms=n_atoms,
        delta_g_mev_per_atom=difference.value,
        delta_g_se=difference.se,
        from_=_phase(loss.options.from_, one),
        to=_phase(loss.options.to, two),
        timestep_fs=timestep(config),
        settings=config.free_energy.model_dump() | {"seed": config.seed, "dtype": config.sampling.dtype},
    )


def _phase(name: str, energy: AbsoluteFreeEnergy) -> PhaseFreeEnergy:
    atoms = energy.point.atoms
    per_atom = energy.gibbs.scaled(1 / (MEV * len(atoms)), "meV/atom")
    return PhaseFreeEnergy(
        phase=name,
        numbers=atoms.numbers.tolist(),
        scaled_positions=np.round(atoms.get_scaled_positions(wrap=False), 12).tolist(),
        cell=atoms.cell.array.tolist(),
        gibbs_mev_per_atom=per_atom.value,
        gibbs_se=per_atom.se,
        overlap=energy.overlap,
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


def read_initial(
    path: Path,
    config: Config,
    potential: Potential,
    loss: FreeEnergyDifference,
    points: Mapping[EnsembleSource, StatePoint],
) -> FreeEnergyResult:
    """Read ΔG of the initial model from a file that belongs to this model, state and crystals.

    Raises:
        InputError: With the first thing that does not match.
    """
    result = FreeEnergyResult.read(path)
    options = loss.options
    checks: list[tuple[str, object, object]] = [
        ("model hash", result.model_hash, potential.hash),
        ("head", result.head, potential.head),
        ("temperature (K)", result.temperature_K, options.temperature),
        ("pressure (GPa)", result.pressure_GPa, options.pressure),
        ("timestep (fs)", result.timestep_fs, timestep(config)),
        ("convention", result.convention, CONVENTION),
    ]
    for phase, source in ((result.from_, loss.phase_from), (result.to, loss.phase_to)):
        atoms = points[source].atoms
        sites = np.round(atoms.get_scaled_positions(wrap=False), 6).tolist()
        checks.append((f"phase name of {phase.phase}", phase.phase, source.phase))
        checks.append((f"number of atoms of {phase.phase}", len(phase.numbers), len(atoms)))
        checks.append((f"elements of {phase.phase}", phase.numbers, atoms.numbers.tolist()))
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
    """The points of a loss in the cells that its initial free energy was computed in."""
    ends = {loss.phase_from: result.from_, loss.phase_to: result.to}
    return {source: points[source].with_cell(np.array(phase.cell)) for source, phase in ends.items()}
