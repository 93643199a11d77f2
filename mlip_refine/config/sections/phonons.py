"""The section ``phonons``: phonons of the crystals, beside reference calculations."""

import math
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from mlip_refine.config.section import Count, Paths, Section
from mlip_refine.config.sections.md import Names, Temperatures, several
from mlip_refine.config.units import Length, Temperature, problem

_MOST_POINTS = 10**7
"""Most wave vectors of a mesh: frequencies of them all are in memory at once."""


def _mesh(value: tuple[int, int, int]) -> tuple[int, int, int]:
    if math.prod(value) > _MOST_POINTS:
        raise problem(f"at most {_MOST_POINTS:,} wave vectors in all, such as 200 along each vector")
    return value


Mesh = Annotated[tuple[Count, Count, Count], Field(strict=False), AfterValidator(_mesh)]
"""Points along the three reciprocal vectors."""

_SMALLEST, _LARGEST = 0.7, 1.5
"""Volumes over the one at rest: beyond these no equation of state around it holds."""

_OF_DATA = ("split", "lowest_frequency", "materials", "baseline", "cell", "skip_refused")
"""Keys that say something about data."""


class QuasiHarmonic(Section):
    """Thermal expansion from phonons of crystals at rest under several pressures."""

    temperature: Temperatures = Field(
        (100.0, 200.0, 300.0, 400.0, 500.0), description="One temperature or several, K."
    )
    volumes: Annotated[tuple[float, ...], Field(strict=False, min_length=5)] = Field(
        (0.97, 0.98, 0.99, 1.0, 1.01, 1.02, 1.03),
        description="About these times the volume at rest, some below and some above 1, all from 0.7 to 1.5; "
        "the free energy must be smallest between them.",
    )

    @model_validator(mode="after")
    def _around_rest(self) -> Self:
        smallest, largest = min(self.volumes), max(self.volumes)
        if not _SMALLEST <= smallest < 1 < largest <= _LARGEST:
            expected = f"some below and some above 1, all from {_SMALLEST} to {_LARGEST}"
            raise problem(f"volumes over the one at rest: {expected}", key="volumes")
        if len(set(self.volumes)) < len(self.volumes):
            raise problem("values that differ", key="volumes")
        return self


class Conductivity(Section):
    """Lattice thermal conductivity in the relaxation-time approximation; needs the extra `conductivity`."""

    temperature: Temperatures = Field((300.0,), description="One temperature or several, K.")
    mesh: Mesh = Field((11, 11, 11), description="Γ-centred mesh of wave vectors.")
    isotopes: bool = Field(False, description="Whether the natural mixture of isotopes scatters, too.")
    cutoff: Length | None = Field(
        None, description="Triplets with a pair of atoms further apart than this have no constants, Å."
    )


class Phonons(Section):
    """Phonons of phases of the config, and of materials whose phonons have been calculated otherwise."""

    phases: Names | None = Field(
        None, description="Names of phases; null: all, or none of them where there is data."
    )
    supercell: Length = Field(12.0, description="Of phases: opposite faces are at least this far apart, Å.")
    data: Paths | None = Field(
        None,
        description="Phonon calculations of phonopy or phono3py: files, folders, or an index.csv of many.",
    )
    split: Literal["train", "val", "test", "kappa103"] | None = Field(
        None, description="Part of the data, by the index or by material; null: all."
    )
    lowest_frequency: float | None = Field(
        None, description="THz; materials that the index has below this are left out, such as unstable ones."
    )
    materials: Names | None = Field(None, description="Names of materials of the data; null: all.")
    skip_refused: bool = Field(
        False,
        description="Leave out materials that fail a check, have an element that the model does not know, or "
        "do not come to rest, and say which.",
    )
    cell: Annotated[
        tuple[Literal["reference", "relaxed"], ...],
        BeforeValidator(several, json_schema_input_type=str | list[str]),
    ] = Field(
        ("reference",),
        description="Of materials: the cell of the reference, the cell at rest by the model (relaxed), or "
        "both. Phases are at rest by the model; one with cell_freedom: fixed keeps its cell.",
    )
    method: Annotated[
        tuple[Literal["hessian", "displacements"], ...],
        BeforeValidator(several, json_schema_input_type=str | list[str]),
    ] = Field(
        ("hessian",),
        description="Force constants from exact second derivatives, from forces of displaced atoms, or from "
        "the first of both, and how far the other differs.",
    )
    displacement: Length = Field(0.01, description="displacements: of one atom, Å.")
    mesh: Mesh = Field((20, 20, 20), description="Γ-centred mesh of wave vectors, reduced by symmetry.")
    temperature: Temperature = Field(300.0, description="Of thermodynamic functions, K.")
    bands: bool = Field(True, description="Band structures and densities of states, with errors and figures.")
    gruneisen: bool = Field(False, description="Mode Grüneisen parameters of crystals at rest.")
    quasi_harmonic: QuasiHarmonic | None = Field(
        None, description="Thermal expansion of crystals at rest; null: none."
    )
    conductivity: Conductivity | None = Field(
        None,
        description="Lattice thermal conductivity by phono3py, from exact third derivatives; null: none.",
    )
    export: bool = Field(
        False, description="Write force constants as phonopy.yaml; with conductivity, as HDF5 of phono3py."
    )
    baseline: str | None = Field(
        None,
        description="phonons.json of another potential on the same materials, such as the one before "
        "training: the table says by how much errors became smaller.",
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for key in ("phases", "materials", "cell", "method"):
            values = getattr(self, key) or ()
            if len(set(values)) < len(values):
                raise problem("values that differ", key=key)
        at_rest = self.phases is not None or self.data is None or "relaxed" in self.cell
        for key in ("gruneisen", "quasi_harmonic"):
            if getattr(self, key) and not at_rest:
                raise problem("cell: relaxed: volumes are compared with that at rest", key=key)
        for key in () if self.data else _OF_DATA:
            if self._is_given(key):
                raise problem("data: what it is about", key=key)
        if self.data and self.phases is None and self._is_given("supercell"):
            raise problem("phases: materials have the supercells of the data", key="supercell")
        return self

    def _is_given(self, key: str) -> bool:
        """Whether a key does not have its default; a config that is written has all keys."""
        given: bool = getattr(self, key) != type(self).model_fields[key].default
        return given
