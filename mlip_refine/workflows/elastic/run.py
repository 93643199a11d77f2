"""Elastic constants of the crystals of a config."""

from dataclasses import dataclass, replace

import ase.io
import numpy as np
from ase import Atoms
from torch import Tensor

from mlip_refine.config import Config, Elastic
from mlip_refine.crystals.elasticity import StaticElasticity, static_elasticity
from mlip_refine.crystals.moduli import Moduli, hill_average, reuss_average, voigt_average
from mlip_refine.crystals.relaxation import Rest
from mlip_refine.crystals.tensors import rotate, stability
from mlip_refine.errors import InputError
from mlip_refine.files import write_json
from mlip_refine.potential import Potential
from mlip_refine.progress import progress
from mlip_refine.quantities import GPA
from mlip_refine.workflows.base import Run
from mlip_refine.workflows.elastic.records import ElasticPoint, ElasticResult, PolycrystalModuli
from mlip_refine.workflows.elastic.thermal import thermal_elasticity
from mlip_refine.workflows.from_config import crystal, load_potential, require_phase


@dataclass(frozen=True)
class _Task:
    """One phase under one condition."""

    name: str
    phase: str
    atoms: Atoms
    rest: Rest


@dataclass(frozen=True)
class Prepared:
    """Everything that a run starts from.

    Attributes:
        config: The config.
        potential: The potential, frozen, in float64.
        tasks: Phases and conditions whose static constants are computed.
        phases: Phases whose constants at temperatures are computed.
    """

    config: Config
    potential: Potential
    tasks: list[_Task]
    phases: list[str]


def prepare(config: Config) -> Prepared:
    """Check the input of a run.

    Raises:
        InputError: For bad input.
    """
    tasks = _tasks(config, config.elastic)
    phases = list(dict.fromkeys(task.phase for task in tasks))
    _require_one_phase(config, phases)
    potential = load_potential(config).frozen_copy("float64")
    for task in tasks:
        potential.graphs.species(task.atoms.numbers)
    return Prepared(config, potential, tasks, phases)


def run(prepared: Prepared, run: Run) -> ElasticResult:
    """Find the static elastic constants of every phase at every pressure, and those at temperatures.

    Raises:
        MlipRefineError: A crystal does not come to rest.
        SamplingError: If a crystal does not survive its temperature.
    """
    config, potential, tasks, folder = prepared.config, prepared.potential, prepared.tasks, run.folder
    section = config.elastic
    points, crystals = [], []
    with progress("elastic constants", len(tasks)) as tick:
        for task in tasks:
            found = static_elasticity(potential, task.atoms, task.rest, symmetrise=section.symmetrise)
            points.append(_point(task, found))
            crystals.append(_in_standard_axes(task.name, found))
            tick(len(points))
    result = ElasticResult(folder, config.name, potential.hash, tuple(points))
    ase.io.write(folder / "crystals.extxyz", crystals, format="extxyz")
    write_json(folder / "elastic.json", result.as_json())
    if section.temperature is None:
        return result
    for points_of_state in thermal_elasticity(config, potential, prepared.phases, folder):
        result = replace(result, thermal=result.thermal + points_of_state)
        write_json(folder / "thermal_elastic.json", result.files()["thermal_elastic.json"])
    return result


def _require_one_phase(config: Config, phases: list[str]) -> None:
    """Refuse a table for several phases: it holds the cells and the constants of one."""
    if config.elastic.table is not None and len(phases) > 1:
        raise InputError(
            "a table of measurements belongs to one phase",
            where=config.where("elastic", "table"),
            found=f"{config.elastic.table} for {', '.join(phases)}",
            fix="Name the phase in elastic.phases, and run once for each.",
        )


def _tasks(config: Config, section: Elastic) -> list[_Task]:
    names = list(config.phases) if section.phases is None else section.phases
    if not names:
        raise InputError("there is nothing to do: the config has no phases", where=config.where("elastic"))
    return [task for i, name in enumerate(names) for task in _tasks_of(config, section, name, i)]


def _tasks_of(config: Config, section: Elastic, name: str, number: int) -> list[_Task]:
    require_phase(config, name, "elastic", config.where("elastic", "phases", number))
    phase = config.phases[name]
    if phase.identity == "liquid":
        raise InputError(
            f"the phase {name!r} is a liquid: it has no elastic constants",
            where=config.where("phases", name, "identity"),
            fix="Name the crystals in elastic.phases.",
        )
    atoms = crystal(config, name)
    held = section.relax == "atoms" or (section.relax is None and phase.cell_freedom == "fixed")
    if held:
        return [_Task(name, name, atoms, Rest("atoms"))]
    return [_Task(f"{name}-{p:g}GPa", name, atoms, Rest("cell", p)) for p in section.pressure]


def _point(task: _Task, found: StaticElasticity) -> ElasticPoint:
    atoms, turn = found.atoms, found.symmetry.to_standard.to(found.constants)
    independent = found.symmetry.independent(found.constants)
    b = rotate(found.coefficients, turn)
    eigenvalues = stability(b)
    return ElasticPoint(
        name=task.name,
        phase=task.phase,
        relaxed=task.rest.freedom,
        pressure_GPa=task.rest.pressure if task.rest.freedom == "cell" else None,
        n_atoms=len(atoms),
        n_atoms_given=len(task.atoms),
        space_group=found.symmetry.space_group,
        laue_class=found.symmetry.laue,
        volume_A3_per_atom=atoms.cell.volume / len(atoms),
        energy_eV_per_atom=float(found.energy) / len(atoms),
        cell_A=_in_standard_axes(task.name, found).cell.array.tolist(),
        stress_GPa=_gpa(turn @ found.stress @ turn.T),
        independent_GPa={name: float(value) / GPA for name, value in independent.items()},
        constants_GPa=_gpa(rotate(found.constants, turn)),
        clamped_GPa=_gpa(rotate(found.clamped, turn)),
        stress_strain_GPa=_gpa(b),
        moduli=_averages((b + b.T) / 2, stable=bool(eigenvalues[0] > 0)),
        stability_GPa=(eigenvalues / GPA).tolist(),
        softest_eV_per_A2=found.softest,
        asymmetry_GPa=found.asymmetry / GPA,
    )


def _averages(coefficients: Tensor, *, stable: bool) -> dict[str, PolycrystalModuli]:
    """Of a crystal that is not stable only Voigt's: at uniform stress it has no modulus."""
    averages = {"voigt": voigt_average, "reuss": reuss_average, "hill": hill_average}
    return {n: _plain(average(coefficients)) for n, average in averages.items() if stable or n == "voigt"}


def _plain(moduli: Moduli) -> PolycrystalModuli:
    bulk, shear, young = (float(value) / GPA for value in (moduli.bulk, moduli.shear, moduli.young))
    return PolycrystalModuli(bulk, shear, young, float(moduli.poisson))


def _gpa(tensor: Tensor) -> list[list[float]]:
    rows: list[list[float]] = (tensor / GPA).tolist()
    return rows


def _in_standard_axes(name: str, found: StaticElasticity) -> Atoms:
    turn = found.symmetry.to_standard.numpy()
    atoms: Atoms = found.atoms.copy()
    atoms.set_cell(np.array(atoms.cell) @ turn.T, scale_atoms=True)
    atoms.info["name"] = name
    return atoms
