"""What else phonons of a crystal tell: bands, Grüneisen parameters, expansion, conduction of heat."""

import warnings
from pathlib import Path
from typing import Any

import h5py
from phonopy import Phonopy
from torch import Tensor

from mlip_refine.config import Phonons
from mlip_refine.config.sections.phonons import Conductivity, QuasiHarmonic
from mlip_refine.crystals.phonons.bands import band_errors, band_path, bands
from mlip_refine.crystals.phonons.conductivity import ConductivitySettings, thermal_conductivity
from mlip_refine.crystals.phonons.dos import densities_of_states, overlap
from mlip_refine.crystals.phonons.gruneisen import Gruneisen, gruneisen, outer_volumes
from mlip_refine.crystals.phonons.harmonic import HarmonicCrystal
from mlip_refine.crystals.phonons.quasi_harmonic import (
    compressed_crystals,
    pressures_of_volumes,
    quasi_harmonic,
)
from mlip_refine.files import written
from mlip_refine.potential import Potential
from mlip_refine.quantities import IMAGINARY

MODEL, REFERENCE = "model", "reference"
"""Names of band structures in results and figures."""


def band_structures(crystal: HarmonicCrystal, phonon: Phonopy, reference: Phonopy | None) -> dict[str, Any]:
    """Bands and densities of states of a crystal and its reference, and how they differ.

    Args:
        crystal: Before it came to rest: its cell tells the path of both.
        phonon: By the model, with frequencies on a mesh.
        reference: By the reference, likewise; None without one.
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
    """Mode Grüneisen parameters of a crystal at rest."""
    smaller, larger = (
        c.phonopy(c.force_constants(potential, section.method[0], section.displacement))
        for c in outer_volumes(potential, crystal)
    )
    return gruneisen(phonon, smaller, larger, section.mesh)


def expansion(
    potential: Potential, crystal: HarmonicCrystal, section: Phonons, settings: QuasiHarmonic
) -> dict[str, Any]:
    """Quasi-harmonic expansion of a crystal at rest."""
    pressures = pressures_of_volumes(potential, crystal, settings.volumes)
    pressed = compressed_crystals(potential, crystal, pressures, section.method[0], section.displacement)
    return quasi_harmonic(pressed, settings.temperature, section.mesh).as_json()


def conduction(
    crystal: HarmonicCrystal, second: Tensor, third: Tensor, settings: Conductivity
) -> dict[str, Any]:
    """Lattice thermal conductivity by force constants of second and third order."""
    chosen = ConductivitySettings(settings.temperature, settings.mesh, settings.isotopes, IMAGINARY)
    found = thermal_conductivity(crystal, second, third, chosen)
    return {
        "temperatures_K": found.temperatures.tolist(),
        "kappa_W_m_K": found.kappa.tolist(),
        "mean_W_m_K": found.mean.tolist(),
        "mesh": list(found.mesh),
        "isotopes": found.isotopes,
    }


def export_second(phonon: Phonopy, path: Path) -> None:
    """Write a crystal with its force constants as phonopy reads them."""
    with written(path) as partial, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a dataset without displacements lacks
        phonon.save(partial, settings={"force_constants": True})


def export_for_phono3py(crystal: HarmonicCrystal, path: Path, **constants: Tensor) -> None:
    """Write force constants as phono3py reads them, compact, eV/Å² or eV/Å³, by their names in its files."""
    with written(path) as partial, h5py.File(partial, "w") as file:
        for name, values in constants.items():
            file.create_dataset(name, data=values.numpy(), compression="gzip")
        file.create_dataset("p2s_map", data=crystal.translations.primitive_atoms.numpy())
