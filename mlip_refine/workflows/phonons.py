"""Phonons of the crystals of a config, beside reference calculations."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from numpy.typing import NDArray
from phonopy import Phonopy
from torch import Tensor

from mlip_refine.config import Config, Phonons
from mlip_refine.config.phonons import Conductivity
from mlip_refine.data.phonon_prototype import reduced_formula
from mlip_refine.data.phonon_sets import read_phonon_set
from mlip_refine.data.phonons import PhononReference
from mlip_refine.errors import InputError, MlipRefineError, nearest
from mlip_refine.files import write_json
from mlip_refine.observables.crystal import primitive_cell
from mlip_refine.observables.harmonic_crystal import HarmonicCrystal
from mlip_refine.observables.hessian import require_hessian
from mlip_refine.observables.phonon_properties import phonon_properties
from mlip_refine.observables.relaxation import Rest
from mlip_refine.observables.thermal_conductivity import require_phono3py
from mlip_refine.observables.third_order import third_order_constants
from mlip_refine.potential import Potential
from mlip_refine.progress import progress
from mlip_refine.report.phonon_records import PhononPoint, PhononResult, read_phonons_json
from mlip_refine.report.phonons import write_phonon_figures
from mlip_refine.workflows.phonon_extras import (
    band_structures,
    conduction,
    expansion,
    export_second,
    export_third,
    gruneisen_parameters,
)
from mlip_refine.workflows.run_folder import open_run_folder
from mlip_refine.workflows.setup import crystal, load_potential, require_phase

LAYOUT = """{folder}
├── config.yaml       the config with every default
├── phonons.json      frequencies and thermodynamics of every crystal, errors against references
├── crystals/         the same of each as soon as it is done, with bands and exported force constants
└── *.png             bands and densities of states of each crystal, errors over all"""


@dataclass(frozen=True)
class _Task:
    """One crystal in one kind of cell.

    Attributes:
        name: Of the phase or material.
        cell: `reference` or `relaxed`.
        crystal: In a supercell, before it comes to rest.
        reference: What it is compared with; None for a phase.
    """

    name: str
    cell: str
    crystal: HarmonicCrystal
    reference: PhononReference | None = None

    @property
    def title(self) -> str:
        """How messages name it."""
        return f"{self.name} ({self.cell})"


@dataclass(frozen=True)
class _Kept:
    """Crystals that are done, in files of their own.

    Attributes:
        folder: Of the run; the files are in `crystals`.
        model_hash: Of the potential: what another one found does not count.
    """

    folder: Path
    model_hash: str

    def path(self, task: _Task, suffix: str) -> Path:
        """A file of a crystal."""
        return self.folder / "crystals" / f"{task.name}-{task.cell}{suffix}"

    def read(self, task: _Task) -> PhononPoint | None:
        """What is known about a crystal already."""
        try:
            data = json.loads(self.path(task, ".json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return PhononPoint(**data["point"]) if data["model_hash"] == self.model_hash else None

    def write(self, task: _Task, point: PhononPoint, structures: dict[str, Any] | None) -> None:
        """Keep what was found, bands too."""
        document = {"model_hash": self.model_hash, "point": asdict(point), "structures": structures}
        write_json(self.path(task, ".json"), document)


def phonons(
    config: Config, *, resume: bool = False, opened: Callable[[Path], None] = lambda _: None
) -> PhononResult:
    """Find the phonons of phases, and of materials with a reference, whose errors are measured.

    Args:
        config: What to do, in its section `phonons`; without one, all phases.
        resume: Go on with a run that was interrupted.
        opened: Called with the run folder, once the input has been checked.

    Returns:
        What `phonons.json` holds.

    Raises:
        InputError: For bad input; nothing has been overwritten.
        MlipRefineError: A crystal does not come to rest, or second derivatives of the model are wrong.
    """
    section = config.phonons
    tasks = [*_phases(config), *_materials(config)]
    _require_tasks(config, tasks)
    phonon_baseline(config)
    if section.conductivity is not None:
        require_phono3py()
    potential = load_potential(config).frozen_copy("float64")
    folder = open_run_folder(config, resume=resume)
    opened(folder)
    kept = _Kept(folder, potential.hash)
    (folder / "crystals").mkdir(exist_ok=True)
    points, left_out = list[PhononPoint](), dict[str, str]()
    with progress("phonons", len(tasks)) as tick:
        for done, task in enumerate(tasks, 1):
            try:
                points.append(kept.read(task) or _found(config, potential, task, kept))
            except MlipRefineError as error:
                if task.reference is None or not section.skip_refused:
                    raise
                left_out[task.title] = str(error)
            tick(done)
    result = PhononResult(
        folder, config.name, potential.hash, section.mesh, section.temperature, tuple(points), left_out
    )
    write_json(folder / "phonons.json", result.as_json())
    write_phonon_figures(folder)
    return result


def phonon_baseline(config: Config) -> PhononResult | None:
    """The result of another potential that the config names for comparison.

    Raises:
        InputError: It cannot be read.
    """
    name = config.phonons.baseline
    return None if name is None else read_phonons_json(config.resolve(name))


def _phases(config: Config) -> Iterator[_Task]:
    """Phases in supercells of their primitive cells."""
    section = config.phonons
    names = section.phases
    if names is None:
        names = () if section.data else tuple(config.phases)
    for number, name in enumerate(names):
        require_phase(config, name, "phonons", config.where("phonons", "phases", number))
        if config.phases[name].identity == "liquid":
            raise InputError(
                f"the phase {name!r} is a liquid: it has no phonons",
                where=config.where("phases", name, "identity"),
                fix="Name the crystals in phonons.phases.",
            )
        cell = primitive_cell(crystal(config, name))
        yield _Task(name, "relaxed", HarmonicCrystal.of_cell(cell, _multiples(cell, section.supercell)))


def _multiples(cell: Atoms, length: float) -> NDArray[np.int64]:
    """How often to repeat a cell so that its faces are as far apart as asked."""
    heights = 1 / np.linalg.norm(cell.cell.reciprocal(), axis=1)
    multiples: NDArray[np.int64] = np.diag(np.ceil(length / heights - 1e-9).astype(int))
    return multiples


def _materials(config: Config) -> Iterator[_Task]:
    """Materials that have a reference, in all kinds of cells."""
    section = config.phonons
    known: dict[str, PhononReference] = {}
    for path in map(config.resolve, section.data or ()):
        for reference in read_phonon_set(
            path,
            split=section.split,
            lowest_frequency=section.lowest_frequency,
            skip_refused=section.skip_refused,
        ):
            if reference.name in known:
                raise InputError("a material comes twice", where=str(path), found=reference.name)
            known[reference.name] = reference
    for name in section.materials or known:
        reference = known.get(name) or _unknown(config, name, list(known))
        for cell in section.cell:
            yield _Task(name, cell, HarmonicCrystal.of_reference(reference), reference)


def _unknown(config: Config, name: str, known: Sequence[str]) -> PhononReference:
    word = nearest(name, known)
    raise InputError(
        f"the data has no material {name!r}",
        where=config.where("phonons", "materials"),
        expected=f"one of {len(known)} names",
        fix=f"Did you mean {word!r}?" if word else None,
    )


def _require_tasks(config: Config, tasks: Sequence[_Task]) -> None:
    if not tasks:
        raise InputError("there is nothing to do: no phases, no data", where=config.where("phonons"))
    names = [(task.name, task.cell) for task in tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(
            "a phase and a material have one name", where=config.where("phonons"), found=twice[0]
        )


def _found(config: Config, potential: Potential, task: _Task, kept: _Kept) -> PhononPoint:
    """Phonons of one crystal."""
    section, rested = config.phonons, _at_rest(config, potential, task)
    require_hessian(potential, rested.structure(potential))
    constants, difference = _constants(config, potential, rested)
    phonon, reference = rested.phonopy(constants), _reference(task)
    found, on_mesh = phonon_properties(phonon, section.mesh, section.temperature)
    wanted, error = None, None
    if reference is not None:
        of_reference, reference_mesh = phonon_properties(reference, section.mesh, section.temperature)
        wanted, error = asdict(of_reference), on_mesh.distance(reference_mesh)
    structures = band_structures(task.crystal, phonon, reference, section) if section.bands else None
    point = PhononPoint(
        name=task.name,
        cell=task.cell,
        formula=reduced_formula(rested.primitive),
        n_primitive=len(rested.primitive),
        n_atoms=len(rested.supercell),
        volume_A3_per_atom=_volume(rested),
        properties=asdict(found),
        reference=wanted,
        frequency_error_THz=error,
        reference_volume_A3_per_atom=None if task.reference is None else _volume(task.crystal),
        method_difference=difference,
        band_error_THz=structures["errors"]["mean_THz"] if structures and reference is not None else None,
        **_further(config, potential, task, rested, constants, kept),
    )
    kept.write(task, point, structures)
    return point


def _reference(task: _Task) -> Phonopy | None:
    if task.reference is None or task.reference.force_constants is None:
        return None
    return task.crystal.phonopy(task.reference.force_constants)


def _further(
    config: Config,
    potential: Potential,
    task: _Task,
    rested: HarmonicCrystal,
    constants: Tensor,
    kept: _Kept,
) -> dict[str, Any]:
    """What the config asks for beyond harmonic phonons; what the crystal does not carry is refused."""
    section, phonon = config.phonons, rested.phonopy(constants)
    if section.export:
        export_second(phonon, kept.path(task, ".phonopy.yaml"))
    wanted: dict[str, Callable[[], dict[str, Any]]] = {}
    if task.cell == "relaxed":
        if section.gruneisen:
            wanted["gruneisen"] = partial(gruneisen_parameters, potential, rested, phonon, section)
        if section.quasi_harmonic is not None:
            wanted["quasi_harmonic"] = partial(expansion, potential, rested, section, section.quasi_harmonic)
    if section.conductivity is not None:
        wanted["conductivity"] = partial(
            _conduction, potential, rested, constants, section, kept.path(task, ".fc3.hdf5")
        )
    found: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for name, compute in wanted.items():
        try:
            found[name] = compute()
        except MlipRefineError as error:
            refused[name] = str(error)
    return {**found, "refused": refused}


def _conduction(
    potential: Potential, rested: HarmonicCrystal, second: Tensor, section: Phonons, path: Path
) -> dict[str, Any]:
    settings = section.conductivity or Conductivity()
    third = third_order_constants(rested, potential, settings.cutoff)
    if section.export:
        export_third(rested, third, path)
    return conduction(rested, second, third, settings)


def _at_rest(config: Config, potential: Potential, task: _Task) -> HarmonicCrystal:
    """The crystal of a task, at rest by the model unless it keeps the cell of the reference."""
    potential.graphs.species(task.crystal.supercell.numbers)
    if task.cell == "reference":
        return task.crystal
    held = task.reference is None and config.phases[task.name].cell_freedom == "fixed"
    return task.crystal.at_rest(potential, Rest("atoms" if held else "cell"))


def _constants(config: Config, potential: Potential, rested: HarmonicCrystal) -> tuple[Tensor, float | None]:
    """Force constants by the first method, and how far those of the other differ."""
    section = config.phonons
    found = [rested.force_constants(potential, m, section.displacement) for m in section.method]
    if len(found) == 1:
        return found[0], None
    return found[0], float((found[1] - found[0]).abs().max() / found[0].abs().max())


def _volume(harmonic: HarmonicCrystal) -> float:
    return float(harmonic.supercell.cell.volume / len(harmonic.supercell))
