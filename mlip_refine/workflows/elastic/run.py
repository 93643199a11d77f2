"""Elastic constants of the crystals of a config."""

from dataclasses import dataclass, replace

import ase.io
import numpy as np
from ase import Atoms
from torch import Tensor

from mlip_refine.config import Config
from mlip_refine.crystals.elasticity import StaticElasticity, static_elasticity
from mlip_refine.crystals.moduli import hill_average, reuss_average, voigt_average
from mlip_refine.crystals.relaxation import Rest
from mlip_refine.crystals.symmetry import crystal_lattice
from mlip_refine.crystals.tensors import rotate, stability
from mlip_refine.data.kept_rows import rows_kept
from mlip_refine.files import write_json
from mlip_refine.potential import Potential
from mlip_refine.progress import progress
from mlip_refine.quantities import GPA
from mlip_refine.sampling import FrameStore
from mlip_refine.workflows.base import FRAMES, UNFINISHED, Run
from mlip_refine.workflows.elastic import chosen_phases
from mlip_refine.workflows.elastic.records import ElasticPoint, ElasticResult, PolycrystalModuli
from mlip_refine.workflows.elastic.thermal import ThermalSettings, thermal_elasticity, thermal_settings
from mlip_refine.workflows.from_config import crystal, load_potential, require_interacting


@dataclass(frozen=True)
class Task:
    """One phase under one condition.

    Attributes:
        name: Name of the point.
        phase: Name of the phase.
        atoms: Crystal before relaxation.
        rest: Conditions under which it is at rest.
    """

    name: str
    phase: str
    atoms: Atoms
    rest: Rest


@dataclass(frozen=True)
class Prepared:
    """Everything that a run starts from.

    Attributes:
        name: Name of the run.
        potential: The potential, frozen, in float64.
        tasks: Phases and conditions whose static constants are computed.
        symmetrise: Whether static tensors are projected onto the symmetry of the crystal.
        thermal: Cells whose constants at temperatures are computed, and how.
    """

    name: str
    potential: Potential
    tasks: tuple[Task, ...]
    symmetrise: bool
    thermal: ThermalSettings


def prepare(config: Config) -> Prepared:
    """Check the input of a run.

    Raises:
        InputError: For bad input.
    """
    section, names = config.elastic, chosen_phases(config)
    tasks: list[Task] = []
    for name in names:
        atoms = crystal(config, name)
        held = config.phases[name].cell_freedom == "fixed"
        if section.relax == "atoms" or (section.relax is None and held):
            tasks.append(Task(name, name, atoms, Rest("atoms")))
        else:
            tasks += [Task(f"{name}-{p:g}GPa", name, atoms, Rest("cell", p)) for p in section.pressure]
    potential = load_potential(config).frozen_copy("float64")
    for task in tasks:
        require_interacting(potential, task.atoms, config.where("phases", task.phase))
    thermal = thermal_settings(config, potential, names)
    return Prepared(config.name, potential, tuple(tasks), section.symmetrise, thermal)


def run(prepared: Prepared, run: Run) -> ElasticResult:
    """Compute the static elastic constants of every phase at every pressure, and those at temperatures.

    Raises:
        MlipRefineError: A crystal does not come to rest.
        SamplingError: A crystal does not survive its temperature.
    """
    potential, folder = prepared.potential, run.folder
    points, crystals = [], []
    with progress("elastic constants", len(prepared.tasks)) as tick:
        for task in prepared.tasks:
            found = static_elasticity(potential, task.atoms, task.rest, symmetrise=prepared.symmetrise)
            atoms = found.atoms.copy()
            turn = found.symmetry.to_standard.numpy()
            atoms.set_cell(np.array(atoms.cell) @ turn.T, scale_atoms=True)
            atoms.info["name"] = task.name
            points.append(_point(task, found, atoms))
            crystals.append(atoms)
            tick(len(points))
    result = ElasticResult(folder, prepared.name, potential.hash, tuple(points), head=potential.head)
    ase.io.write(folder / "crystals.extxyz", crystals, format="extxyz")
    write_json(folder / "elastic.json", result.files()["elastic.json"])
    # Not `run.store`, whose frames belong to versions of packages: runs of earlier versions can be extended.
    store = FrameStore(folder / FRAMES, {"seed": run.seed})
    with rows_kept(folder / UNFINISHED):
        for thermal_points in thermal_elasticity(potential, prepared.thermal, store):
            result = replace(result, thermal=result.thermal + thermal_points)
            write_json(folder / "thermal_elastic.json", result.files()["thermal_elastic.json"])
    return result


def _point(task: Task, found: StaticElasticity, standard: Atoms) -> ElasticPoint:
    """Return the record of a crystal; `standard` is the crystal in its standard axes."""
    atoms, turn = found.atoms, found.symmetry.to_standard.to(found.constants)
    b = rotate(found.coefficients, turn)
    eigenvalues = stability(b)
    averages = {"voigt": voigt_average}
    if eigenvalues[0] > 0:  # otherwise the crystal has no modulus at uniform stress
        averages |= {"reuss": reuss_average, "hill": hill_average}
    moduli = {}
    for name, average in averages.items():
        found_moduli = average((b + b.T) / 2)
        moduli[name] = PolycrystalModuli(
            bulk_GPa=float(found_moduli.bulk) / GPA,
            shear_GPa=float(found_moduli.shear) / GPA,
            young_GPa=float(found_moduli.young) / GPA,
            poisson=float(found_moduli.poisson),
        )

    def in_gpa(tensor: Tensor) -> list[list[float]]:
        rows: list[list[float]] = (tensor / GPA).tolist()
        return rows

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
        cell_A=standard.cell.array.tolist(),
        stress_GPa=in_gpa(turn @ found.stress @ turn.T),
        independent_GPa={
            name: float(value) / GPA for name, value in found.symmetry.independent(found.constants).items()
        },
        constants_GPa=in_gpa(rotate(found.constants, turn)),
        clamped_GPa=in_gpa(rotate(found.clamped, turn)),
        stress_strain_GPa=in_gpa(b),
        moduli=moduli,
        stability_GPa=(eigenvalues / GPA).tolist(),
        softest_eV_per_A2=found.softest,
        asymmetry_GPa=found.asymmetry / GPA,
        given=crystal_lattice(task.atoms),
        lattice=crystal_lattice(atoms),
    )
