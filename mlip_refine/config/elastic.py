"""The section ``elastic``: elastic constants of the crystals."""

from typing import Literal, Self

from pydantic import Field, model_validator

from mlip_refine.config.md import Names, Pressures
from mlip_refine.config.section import Section
from mlip_refine.config.units import problem


class Elastic(Section):
    """Elastic constants at zero temperature, every crystal at every pressure."""

    phases: Names | None = Field(None, description="Names of phases; null: all.")
    relax: Literal["cell", "atoms"] | None = Field(
        None,
        description="What comes to rest first: the cell at the pressure with its atoms, or the atoms in the "
        "cell as it is given; null: the cell, unless the phase has cell_freedom fixed.",
    )
    pressure: Pressures = Field(
        (0.0,), description="One pressure or several, GPa, at which cells come to rest."
    )
    symmetrise: bool = Field(
        True,
        description="Project the tensors onto the symmetry of the crystal; else as they come out.",
    )

    @model_validator(mode="after")
    def _points_differ(self) -> Self:
        for key in ("phases", "pressure"):
            values = [f"{value}" for value in getattr(self, key) or ()]
            if len(set(values)) < len(values):
                raise problem("values that differ", key=key)
        return self

    @model_validator(mode="after")
    def _pressure_counts(self) -> Self:
        if self.relax == "atoms" and self.pressure != (0.0,):
            raise problem("no key 'pressure': relax: atoms keeps the cell", key="pressure")
        return self
