"""The section ``elastic``: elastic constants of the crystals."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from mlip_refine.config.section import Count, Section
from mlip_refine.config.sections.md import Names, Pressures, Temperatures, several
from mlip_refine.config.units import problem

Strain = Annotated[
    float,
    Field(
        gt=0,
        lt=0.1,
        description="deformation: component of the strain tensor. What central differences miss grows with "
        "its square and is not in the errors, which grow as it becomes smaller.",
    ),
]


class Elastic(Section):
    """Elastic constants: at zero temperature, every crystal at every pressure, and at temperatures."""

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
        description="Project static tensors onto the symmetry of the crystal; else as they come out.",
    )
    temperature: Temperatures | None = Field(
        None, description="Temperatures at which fixed cells are sampled as well, K; null: none."
    )
    table: str | None = Field(
        None,
        description="Experimental table that gives the cells at these temperatures, and values to compare "
        "with: of the package, such as titanium-hcp-elastic, or a CSV file; null: the cells of the phases.",
    )
    method: Annotated[
        tuple[Literal["fluctuation", "deformation"], ...],
        BeforeValidator(several, json_schema_input_type=str | list[str]),
    ] = Field(
        ("fluctuation",),
        description="At temperatures: fluctuation of the stress with the Born term, stress of strained cells "
        "(deformation), or both.",
    )
    kind: Literal["adiabatic", "isothermal"] = Field(
        "adiabatic", description="Of the constants by fluctuation; strained cells show isothermal ones."
    )
    strain: Strain = 0.01
    born_every: Count = Field(
        4,
        description="Frames from one with a Born term to the next. It costs nine evaluations, but "
        "fluctuates little: of one frame in 4 most errors are within 10 % of those of all, of one in 10 some "
        "are a third larger.",
    )

    @model_validator(mode="after")
    def _points_differ(self) -> Self:
        for key in ("phases", "pressure", "temperature", "method"):
            values = [f"{value}" for value in getattr(self, key) or ()]
            if len(set(values)) < len(values):
                raise problem("values that differ", key=key)
        return self

    @model_validator(mode="after")
    def _pressure_counts(self) -> Self:
        if self.table is not None and self.temperature is None:
            raise problem("temperature: at which the table is read", key="table")
        if self.relax == "atoms" and self.pressure != (0.0,):
            raise problem("no key 'pressure': relax: atoms keeps the cell", key="pressure")
        return self
