"""Phonons of the crystals of a config, beside reference calculations."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ase.data import chemical_symbols

from mlip_refine.config import Config
from mlip_refine.crystals.phonons.conductivity import require_phono3py
from mlip_refine.errors import InputError, MlipRefineError
from mlip_refine.files import write_json
from mlip_refine.potential import Potential
from mlip_refine.progress import progress
from mlip_refine.workflows.from_config import load_potential
from mlip_refine.workflows.phonons.point import FAILURES, find_point, reason
from mlip_refine.workflows.phonons.records import PhononPoint, PhononResult, read_phonons_json
from mlip_refine.workflows.phonons.reduction import compared_with, require_comparable
from mlip_refine.workflows.phonons.store import Store
from mlip_refine.workflows.phonons.tables import write_phonon_figures
from mlip_refine.workflows.phonons.tasks import Task, phonon_tasks
from mlip_refine.workflows.run_folder import open_run_folder

LAYOUT = """{folder}
├── config.yaml       the config with every default
├── phonons.json      frequencies and thermodynamics of every crystal, errors against references
├── crystals/         the same of each as soon as it is done, with bands, modes and exported force constants
└── *.png             bands and densities of states of each crystal, errors over all"""


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
    tasks, left_out = phonon_tasks(config)
    baseline = _baseline(config)
    if section.conductivity is not None:
        require_phono3py()
    potential = load_potential(config).frozen_copy("float64")
    tasks = _of_known_elements(config, potential, tasks, left_out)
    folder = open_run_folder(config, resume=resume)
    opened(folder)
    store = Store(folder, potential.hash, section)
    points = _points(potential, tasks, store, left_out)
    result = PhononResult(
        folder, config.name, potential.hash, section.mesh, section.temperature, points, left_out
    )
    if baseline is not None:
        result = replace(result, baseline=compared_with(baseline, result))
    write_json(folder / "phonons.json", result.as_json())
    write_phonon_figures(folder)
    return result


def _baseline(config: Config) -> PhononResult | None:
    """The result of another potential that the config names for comparison.

    Raises:
        InputError: It cannot be read, or is of another mesh or temperature.
    """
    section = config.phonons
    if section.baseline is None:
        return None
    found = read_phonons_json(config.resolve(section.baseline))
    require_comparable(found, section.mesh, section.temperature)
    return found


def _of_known_elements(
    config: Config, potential: Potential, tasks: Sequence[Task], left_out: dict[str, str]
) -> list[Task]:
    """Tasks of which the model knows every element; the others are left out, or refused together."""
    known = set(potential.graphs.atomic_numbers)
    unknown = {task.title: _symbols({*task.crystal.supercell.numbers.tolist()} - known) for task in tasks}
    kept = [task for task in tasks if not unknown[task.title]]
    strange = {task.name: unknown[task.title] for task in tasks if unknown[task.title]}
    of_phases = any(task.reference is None for task in tasks if unknown[task.title])
    may_skip = config.phonons.skip_refused and not of_phases
    if strange and not (may_skip and kept):
        raise InputError(
            f"the model does not know every element of {len(strange)} crystals",
            found="; ".join(f"{name}: {symbols}" for name, symbols in strange.items()),
            expected=_symbols(known),
            fix="phonons.skip_refused leaves such materials out." if kept and not of_phases else None,
        )
    left_out |= {title: f"the model does not know {names}" for title, names in unknown.items() if names}
    return kept


def _symbols(numbers: set[int]) -> str:
    return ", ".join(chemical_symbols[z] for z in sorted(numbers))


def _points(
    potential: Potential, tasks: Sequence[Task], store: Store, left_out: dict[str, str]
) -> tuple[PhononPoint, ...]:
    """What every crystal has, as far as it is not known yet."""
    (store.folder / "crystals").mkdir(exist_ok=True)
    points: list[PhononPoint] = []
    with progress("phonons", len(tasks)) as tick:
        for done, task in enumerate(tasks, 1):
            try:
                points.append(store.read(task) or find_point(potential, task, store))
            except FAILURES as error:
                if task.reference is None or not store.section.skip_refused:
                    raise MlipRefineError(f"{task.title}: {reason(error)}") from error
                left_out[task.title] = reason(error)
            tick(done)
    if not points:
        reasons = "; ".join(f"{title}: {why}" for title, why in left_out.items())
        raise MlipRefineError(f"no crystal is left: {reasons}")
    return tuple(points)
