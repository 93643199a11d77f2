"""Phonons of the crystals of a config, beside reference calculations."""

from dataclasses import dataclass, replace

from ase.data import chemical_symbols

from mlip_refine.config import Config, Phonons
from mlip_refine.crystals.phonons.conductivity import require_phono3py
from mlip_refine.data.kept_rows import rows_kept
from mlip_refine.errors import InputError, MlipRefineError, StorageError
from mlip_refine.potential import Potential
from mlip_refine.progress import progress
from mlip_refine.workflows.base import UNFINISHED, Run
from mlip_refine.workflows.from_config import load_potential, require_interacting
from mlip_refine.workflows.phonons.point import FAILURES, find_point, reason
from mlip_refine.workflows.phonons.records import (
    PhononPoint,
    PhononResult,
    compared_with,
    read_phonons_json,
    require_comparable,
)
from mlip_refine.workflows.phonons.store import Store
from mlip_refine.workflows.phonons.tasks import Task, phonon_tasks


@dataclass(frozen=True)
class Prepared:
    """Everything that a run starts from.

    Attributes:
        name: Name of the run.
        section: The section `phonons` of the config.
        potential: The potential, frozen, in float64.
        tasks: Crystals whose phonons are computed.
        left_out: Why other materials are left out, by title.
        baseline: Result of another potential to compare with.
    """

    name: str
    section: Phonons
    potential: Potential
    tasks: list[Task]
    left_out: dict[str, str]
    baseline: PhononResult | None


def prepare(config: Config) -> Prepared:
    """Check the input of a run.

    Raises:
        InputError: For bad input.
    """
    section = config.phonons
    tasks, left_out = phonon_tasks(config)
    baseline = None
    if section.baseline is not None:
        baseline = read_phonons_json(config.resolve(section.baseline))
        require_comparable(baseline, section.mesh, section.temperature)
    if section.conductivity is not None:
        require_phono3py()
    potential = load_potential(config).frozen_copy("float64")

    def symbols(numbers: set[int]) -> str:
        return ", ".join(chemical_symbols[z] for z in sorted(numbers))

    # Materials with elements that the model does not know are left out where that is allowed; phases never.
    known = set(potential.graphs.atomic_numbers)
    unknown = {task.title: symbols({*task.crystal.supercell.numbers.tolist()} - known) for task in tasks}
    strange = [task for task in tasks if unknown[task.title]]
    kept = [task for task in tasks if not unknown[task.title]]
    possible = kept and all(task.reference is not None for task in strange)
    if strange and not (possible and section.skip_refused):
        elements = {task.name: unknown[task.title] for task in strange}
        raise InputError(
            f"the model does not know every element of {len(elements)} crystals",
            found="; ".join(f"{name}: {names}" for name, names in elements.items()),
            expected=symbols(known),
            fix="phonons.skip_refused leaves such materials out." if possible else None,
        )
    for task in kept:
        if task.reference is None:
            require_interacting(potential, task.crystal.supercell, config.where("phases", task.name))
    left_out |= {task.title: f"the model does not know {unknown[task.title]}" for task in strange}
    return Prepared(config.name, section, potential, kept, left_out, baseline)


def run(prepared: Prepared, run: Run) -> PhononResult:
    """Compute the phonons of phases, and of materials with a reference, whose errors are measured.

    Raises:
        MlipRefineError: A crystal does not come to rest, or second derivatives of the model are wrong.
    """
    section, potential, left_out = prepared.section, prepared.potential, dict(prepared.left_out)
    store = Store(run.folder, potential.hash, section)
    (run.folder / "crystals").mkdir(exist_ok=True)
    points: list[PhononPoint] = []
    with progress("phonons", len(prepared.tasks)) as tick:
        for done, task in enumerate(prepared.tasks, 1):
            try:
                with rows_kept(run.folder / UNFINISHED):
                    points.append(store.read(task) or find_point(potential, task, store))
            except StorageError:
                raise
            except FAILURES as error:
                if task.reference is None or not section.skip_refused:
                    raise MlipRefineError(f"{task.title}: {reason(error)}") from error
                left_out[task.title] = reason(error)
            tick(done)
    if not points:
        reasons = "; ".join(f"{title}: {why}" for title, why in left_out.items())
        raise MlipRefineError(f"no crystal is left: {reasons}")
    result = PhononResult(
        run.folder,
        prepared.name,
        potential.hash,
        section.mesh,
        section.temperature,
        tuple(points),
        left_out,
        head=potential.head,
    )
    if prepared.baseline is None:
        return result
    return replace(result, baseline=compared_with(prepared.baseline, result))
