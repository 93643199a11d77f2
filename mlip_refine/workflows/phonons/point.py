"""Phonons of one crystal, beside its reference, and further properties that the config asks for."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from phonopy import Phonopy
from torch import Tensor

from mlip_refine.config import Phonons
from mlip_refine.config.sections.phonons import Conductivity, QuasiHarmonic
from mlip_refine.crystals.phonons.bands import band_errors, band_path, bands
from mlip_refine.crystals.phonons.conductivity import ConductivitySettings, thermal_conductivity
from mlip_refine.crystals.phonons.dos import densities_of_states, overlap
from mlip_refine.crystals.phonons.gruneisen import Gruneisen, gruneisen, outer_volumes
from mlip_refine.crystals.phonons.harmonic import HarmonicCrystal
from mlip_refine.crystals.phonons.hessian import require_hessian
from mlip_refine.crystals.phonons.quasi_harmonic import (
    compressed_crystals,
    pressures_of_volumes,
    quasi_harmonic,
)
from mlip_refine.crystals.phonons.thermodynamics import phonon_properties
from mlip_refine.crystals.phonons.third_order import third_order_constants
from mlip_refine.crystals.symmetry import crystal_lattice
from mlip_refine.data.hdf5 import new_hdf5
from mlip_refine.data.phonons.spacegroups import reduced_formula
from mlip_refine.errors import MlipRefineError, OutOfMemoryError, StorageError
from mlip_refine.files import written
from mlip_refine.potential import Potential
from mlip_refine.quantities import IMAGINARY
from mlip_refine.workflows.phonons.records import PhononPoint
from mlip_refine.workflows.phonons.store import Store
from mlip_refine.workflows.phonons.tasks import Task

FAILURES = (MlipRefineError, ValueError, RuntimeError)
"""Errors that a crystal may end in: the last two come from numpy (`LinAlgError`), torch and phonopy."""

MODEL, REFERENCE = "model", "reference"
"""Names of band structures in results and figures."""


def reason(error: Exception) -> str:
    """Return the message of an error."""
    return str(error) if isinstance(error, MlipRefineError) else f"{type(error).__name__}: {error}"


def find_point(potential: Potential, task: Task, store: Store) -> PhononPoint:
    """Compute the phonons of a crystal, and keep them.

    Args:
        potential: Potential in float64.
        task: The crystal.
        store: Store of the point, and of files beside it.

    Raises:
        MlipRefineError: The crystal does not come to rest, or second derivatives of the model are wrong.
        ValueError: A library refuses the crystal.
        RuntimeError: Likewise.
    """
    section, calculation = store.section, task.reference
    rested = task.crystal if task.rest is None else task.crystal.at_rest(potential, task.rest)
    require_hessian(potential, rested.structure(potential))
    by_method = [rested.force_constants(potential, m, section.displacement) for m in section.method]
    constants, difference = by_method[0], None
    if len(by_method) > 1:
        difference = float((by_method[1] - constants).abs().max() / constants.abs().max())
    phonon, reference = rested.phonopy(constants), None
    given, lattice = (crystal_lattice(crystal.primitive) for crystal in (task.crystal, rested))
    # A cell of the data, or one that relaxation made symmetric, may hold several primitive cells.
    n_primitive = (lattice if calculation is None else given).n_primitive
    share = n_primitive / len(rested.primitive)
    properties, on_mesh = phonon_properties(phonon, section.mesh, section.temperature)
    reference_properties, error = None, None
    if calculation is not None and calculation.force_constants is not None:
        reference = task.crystal.phonopy(calculation.force_constants)
        wanted, reference_mesh = phonon_properties(reference, section.mesh, section.temperature)
        reference_properties, error = asdict(wanted.per_cell(share)), on_mesh.distance(reference_mesh)
    if section.export:
        with written(store.path(task, ".phonopy.yaml")) as path, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # phonopy warns of a dataset without displacements
            phonon.save(path, settings={"force_constants": True})
    found, refused, lasting = further_properties(potential, task, store, rested, constants, phonon, reference)
    structures, modes = found.pop("bands", None), found.pop("gruneisen", None)
    errors = {} if structures is None else structures.get("errors", {})
    point = PhononPoint(
        name=task.name,
        cell=task.cell,
        formula=reduced_formula(rested.primitive),
        n_primitive=n_primitive,
        n_atoms=len(rested.supercell),
        volume_A3_per_atom=_volume(rested),
        properties=asdict(properties.per_cell(share)),
        reference=reference_properties,
        frequency_error_THz=error,
        reference_volume_A3_per_atom=None if calculation is None else _volume(task.crystal),
        material=None if calculation is None else calculation.metadata.material,
        method_difference=difference,
        band_error_THz=errors.get("mean_THz"),
        gruneisen=None if modes is None else modes.as_json([section.temperature]),
        refused=refused,
        given=given,
        lattice=lattice,
        **found,
    )
    modes_json = None if modes is None else modes.modes_as_json()
    store.write(task, point, lasting=lasting, structures=structures, gruneisen_modes=modes_json)
    return point


def further_properties(
    potential: Potential,
    task: Task,
    store: Store,
    rested: HarmonicCrystal,
    constants: Tensor,
    phonon: Phonopy,
    reference: Phonopy | None,
) -> tuple[dict[str, Any], dict[str, str], bool]:
    """Compute what the config asks for beyond harmonic phonons; what fails is left out with the reason.

    Args:
        potential: Potential in float64.
        task: The crystal before relaxation.
        store: Store of files beside the point.
        rested: The crystal at rest.
        constants: Compact force constants of the crystal at rest, eV/Å².
        phonon: Phonons of the crystal at rest, with frequencies on a mesh.
        reference: Phonons by the reference, likewise; None without one.

    Returns:
        Properties by the names of their keys in the section `phonons`; reasons why others are missing, also
        the reference; and whether these reasons would be the same in a further run.
    """
    section = store.section
    wanted: dict[str, Callable[[], Any]] = {}
    refused: dict[str, str] = {}
    if task.reference is not None and task.reference.force_constants is None:
        refused["reference"] = "the calculation has displacements, but no force constants"
    if section.bands:
        wanted["bands"] = partial(band_structures, task.crystal, phonon, reference)
    # Both compare the volume at rest with others.
    of_volumes: dict[str, Callable[[], Any]] = {}
    if section.gruneisen:
        of_volumes["gruneisen"] = partial(gruneisen_parameters, potential, rested, phonon, section)
    if section.quasi_harmonic is not None:
        settings = section.quasi_harmonic
        of_volumes["quasi_harmonic"] = partial(expansion, potential, rested, section, settings)
    if task.rest is not None and task.rest.freedom == "cell":
        wanted |= of_volumes
    elif task.rest is not None:
        refused |= dict.fromkeys(of_volumes, "the cell is held (cell_freedom: fixed)")
    if section.conductivity is not None:
        files = [store.path(task, f".{order}.hdf5") for order in ("fc2", "fc3")] if section.export else []
        wanted["conductivity"] = partial(
            conductivity, potential, rested, constants, section.conductivity, files
        )
    found: dict[str, Any] = {}
    lasting = True
    for name, compute in wanted.items():
        try:
            found[name] = compute()
        except StorageError:
            raise
        except FAILURES as error:
            refused[name] = reason(error)
            lasting = lasting and not isinstance(error, OutOfMemoryError)
    return found, refused, lasting


def band_structures(crystal: HarmonicCrystal, phonon: Phonopy, reference: Phonopy | None) -> dict[str, Any]:
    """Return bands and densities of states of a crystal and its reference, and how they differ.

    Args:
        crystal: Crystal before relaxation, whose cell determines the path of both.
        phonon: Phonons by the model, with frequencies on a mesh.
        reference: Phonons by the reference, likewise; None without one.
    """
    both = {MODEL: phonon} if reference is None else {REFERENCE: reference, MODEL: phonon}
    path = band_path(crystal.primitive)
    lines = {name: bands(one, path) for name, one in both.items()}
    densities = dict(zip(both, densities_of_states(list(both.values())), strict=True))
    found: dict[str, Any] = {
        "bands": {name: one.as_json() for name, one in lines.items()},
        "densities": {name: one.as_json() for name, one in densities.items()},
    }
    if reference is not None:
        found["errors"] = band_errors(lines[MODEL], lines[REFERENCE]).as_json()
        found["overlap"] = overlap(densities[MODEL], densities[REFERENCE])
    return found


def gruneisen_parameters(
    potential: Potential, crystal: HarmonicCrystal, phonon: Phonopy, section: Phonons
) -> Gruneisen:
    """Compute mode Grüneisen parameters of a crystal at rest."""
    smaller, larger = (
        c.phonopy(c.force_constants(potential, section.method[0], section.displacement))
        for c in outer_volumes(potential, crystal)
    )
    return gruneisen(phonon, smaller, larger, section.mesh)


def expansion(
    potential: Potential, crystal: HarmonicCrystal, section: Phonons, settings: QuasiHarmonic
) -> dict[str, Any]:
    """Compute the quasi-harmonic expansion of a crystal at rest."""
    pressures = pressures_of_volumes(potential, crystal, settings.volumes)
    crystals = compressed_crystals(potential, crystal, pressures, section.method[0], section.displacement)
    return quasi_harmonic(crystals, settings.temperature, section.mesh).as_json()


def conductivity(
    potential: Potential,
    crystal: HarmonicCrystal,
    second: Tensor,
    settings: Conductivity,
    files: Sequence[Path],
) -> dict[str, Any]:
    """Compute the lattice thermal conductivity; force constants are written to two files, if given."""
    third = third_order_constants(crystal, potential, settings.cutoff)
    if files:
        _export_for_phono3py(crystal, files[0], force_constants=second)
        _export_for_phono3py(crystal, files[1], fc3=third)
    chosen = ConductivitySettings(settings.temperature, settings.mesh, settings.isotopes, IMAGINARY)
    found = thermal_conductivity(crystal, second, third, chosen)
    return {
        "temperatures_K": found.temperatures.tolist(),
        "kappa_W_m_K": found.kappa.tolist(),
        "mean_W_m_K": found.mean.tolist(),
        "mesh": list(found.mesh),
        "isotopes": found.isotopes,
    }


def _export_for_phono3py(crystal: HarmonicCrystal, path: Path, **constants: Tensor) -> None:
    """Write compact force constants, eV/Å² or eV/Å³, by their names in phono3py's files."""
    with new_hdf5(path) as file:
        for name, values in constants.items():
            file.create_dataset(name, data=values.numpy(), compression="gzip")
        file.create_dataset("p2s_map", data=crystal.translations.primitive_atoms.numpy())


def _volume(crystal: HarmonicCrystal) -> float:
    return float(crystal.supercell.cell.volume / len(crystal.supercell))
