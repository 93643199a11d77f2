"""Phonons of one crystal, beside its reference, and what else the config asks of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from phonopy import Phonopy
from torch import Tensor

from mlip_refine.config import Phonons
from mlip_refine.config.sections.phonons import Conductivity
from mlip_refine.crystals.phonons.harmonic import HarmonicCrystal
from mlip_refine.crystals.phonons.hessian import require_hessian
from mlip_refine.crystals.phonons.thermodynamics import phonon_properties
from mlip_refine.crystals.phonons.third_order import third_order_constants
from mlip_refine.data.phonons.spacegroups import reduced_formula
from mlip_refine.errors import MlipRefineError, OutOfMemoryError
from mlip_refine.potential import Potential
from mlip_refine.workflows.phonons.extras import (
    band_structures,
    conduction,
    expansion,
    export_for_phono3py,
    export_second,
    gruneisen_parameters,
)
from mlip_refine.workflows.phonons.records import PhononPoint
from mlip_refine.workflows.phonons.store import Store
from mlip_refine.workflows.phonons.tasks import Task

FAILURES = (MlipRefineError, ValueError, RuntimeError)
"""What one crystal may end in: the last two are of numpy, torch and phonopy (`LinAlgError` is either)."""

_HELD = "the cell is held (cell_freedom: fixed)"


def reason(error: Exception) -> str:
    """An error in words."""
    return str(error) if isinstance(error, MlipRefineError) else f"{type(error).__name__}: {error}"


def find_point(potential: Potential, task: Task, store: Store) -> PhononPoint:
    """Find the phonons of a crystal, and keep them.

    Args:
        potential: In float64.
        task: Which crystal.
        store: Keeps the point, and files beside it.

    Raises:
        MlipRefineError: The crystal does not come to rest, or second derivatives of the model are wrong.
        ValueError: A library refuses the crystal.
        RuntimeError: Likewise.
    """
    section = store.section
    rested = task.crystal if task.rest is None else task.crystal.at_rest(potential, task.rest)
    require_hessian(potential, rested.structure(potential))
    constants, difference = _constants(potential, rested, section)
    phonon, reference = rested.phonopy(constants), _reference(task)
    compared = _compared(phonon, reference, section)
    if section.export:
        export_second(phonon, store.path(task, ".phonopy.yaml"))
    found, refused, lasting = _attempted(
        _further(potential, task, store, rested, constants, phonon, reference)
    )
    structures, modes = found.pop("bands", None), found.pop("gruneisen", None)
    errors = {} if structures is None else structures.get("errors", {})
    point = PhononPoint(
        name=task.name,
        cell=task.cell,
        **_size(task, rested),
        **compared,
        method_difference=difference,
        band_error_THz=errors.get("mean_THz"),
        gruneisen=None if modes is None else modes.as_json([section.temperature]),
        refused=_refused(task, section) | refused,
        **found,
    )
    modes_json = None if modes is None else modes.modes_as_json()
    store.write(task, point, lasting=lasting, structures=structures, gruneisen_modes=modes_json)
    return point


def _size(task: Task, rested: HarmonicCrystal) -> dict[str, Any]:
    """What the crystal is."""
    primitive, reference = rested.primitive, task.reference
    return {
        "formula": reduced_formula(primitive),
        "n_primitive": len(primitive),
        "n_atoms": len(rested.supercell),
        "volume_A3_per_atom": _volume(rested),
        "reference_volume_A3_per_atom": None if reference is None else _volume(task.crystal),
        "material": None if reference is None else reference.metadata.material,
    }


def _compared(phonon: Phonopy, reference: Phonopy | None, section: Phonons) -> dict[str, Any]:
    """What the phonons on the mesh amount to, beside those of the reference."""
    found, on_mesh = phonon_properties(phonon, section.mesh, section.temperature)
    if reference is None:
        return {"properties": asdict(found)}
    wanted, reference_mesh = phonon_properties(reference, section.mesh, section.temperature)
    error = on_mesh.distance(reference_mesh)
    return {"properties": asdict(found), "reference": asdict(wanted), "frequency_error_THz": error}


def _reference(task: Task) -> Phonopy | None:
    if task.reference is None or task.reference.force_constants is None:
        return None
    return task.crystal.phonopy(task.reference.force_constants)


def _further(
    potential: Potential,
    task: Task,
    store: Store,
    rested: HarmonicCrystal,
    constants: Tensor,
    phonon: Phonopy,
    reference: Phonopy | None,
) -> dict[str, Callable[[], Any]]:
    """What the config asks for beyond harmonic phonons."""
    section = store.section
    wanted: dict[str, Callable[[], Any]] = {}
    if section.bands:
        wanted["bands"] = partial(band_structures, task.crystal, phonon, reference)
    if task.rest is not None and task.rest.freedom == "cell":
        if section.gruneisen:
            wanted["gruneisen"] = partial(gruneisen_parameters, potential, rested, phonon, section)
        if section.quasi_harmonic is not None:
            wanted["quasi_harmonic"] = partial(expansion, potential, rested, section, section.quasi_harmonic)
    if section.conductivity is not None:
        files = [store.path(task, f".{order}.hdf5") for order in ("fc2", "fc3")] if section.export else []
        wanted["conductivity"] = partial(
            _conduction, potential, rested, constants, section.conductivity, files
        )
    return wanted


def _attempted(wanted: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, str], bool]:
    """What was found, why not what the crystal does not carry, and whether that lies in the crystal."""
    found: dict[str, Any] = {}
    refused: dict[str, str] = {}
    lasting = True
    for name, compute in wanted.items():
        try:
            found[name] = compute()
        except FAILURES as error:
            refused[name] = reason(error)
            lasting = lasting and not isinstance(error, OutOfMemoryError)
    return found, refused, lasting


def _refused(task: Task, section: Phonons) -> dict[str, str]:
    """What a crystal cannot have, whatever the model is."""
    refused = {}
    if task.reference is not None and task.reference.force_constants is None:
        refused["reference"] = "the calculation has displacements, but no force constants"
    if task.rest is not None and task.rest.freedom == "atoms":
        asked = {"gruneisen": section.gruneisen, "quasi_harmonic": section.quasi_harmonic is not None}
        refused |= {name: _HELD for name, is_wanted in asked.items() if is_wanted}
    return refused


def _conduction(
    potential: Potential,
    rested: HarmonicCrystal,
    second: Tensor,
    settings: Conductivity,
    files: Sequence[Path],
) -> dict[str, Any]:
    """Conduction of heat; force constants of second and third order are written to two files, if given."""
    third = third_order_constants(rested, potential, settings.cutoff)
    if files:
        export_for_phono3py(rested, files[0], force_constants=second)
        export_for_phono3py(rested, files[1], fc3=third)
    return conduction(rested, second, third, settings)


def _constants(
    potential: Potential, rested: HarmonicCrystal, section: Phonons
) -> tuple[Tensor, float | None]:
    """Force constants by the first method, and how far those of the other differ."""
    found = [rested.force_constants(potential, m, section.displacement) for m in section.method]
    if len(found) == 1:
        return found[0], None
    return found[0], float((found[1] - found[0]).abs().max() / found[0].abs().max())


def _volume(harmonic: HarmonicCrystal) -> float:
    return float(harmonic.supercell.cell.volume / len(harmonic.supercell))
