"""The section ``phase_diagram``: boundaries of several phases from finished runs of ``transition``."""

from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from mlip_refine.config.section import Paths, Section, Words
from mlip_refine.config.sections.md import Names
from mlip_refine.config.units import Pressure, problem

Pair = Annotated[tuple[str, str], Field(strict=False)]
"""Two phases."""


class PressureRange(Section):
    """Pressures at even distances."""

    from_: Pressure = Field(alias="from", description="Lowest pressure, GPa.")
    to: Pressure = Field(description="Highest pressure, GPa.")
    points: int = Field(11, ge=2, le=100_000, description="Number of pressures, both ends among them.")

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if not self.to > self.from_:
            raise problem(f"a pressure above from ({self.from_:g} GPa)", key="to")
        return self


class Experiment(Section):
    """An experimental table of boundaries, whose first column is the pressure."""

    table: str = Field(min_length=1, description="Name of a table of the package, or path of a CSV file.")
    columns: dict[str, Names] | None = Field(
        None,
        description="Columns of a boundary by its name, such as {bcc-liquid: T_melt}. null: T_A_B and T_B_A "
        "of the phases A and B, and T_melt of a boundary of `liquid`.",
    )


def _experiment(value: object) -> object:
    """Read the name of a table as a section with that name alone."""
    return {"table": value} if isinstance(value, str) else value


class PhaseDiagram(Section):
    """Boundaries of any number of phases, and the points where three of them meet."""

    transitions: Paths = Field(
        description="Finished runs of `transition`: their folders or transition.json, one per boundary."
    )
    phases: Words | None = Field(None, description="Phases to show; null: all of the transitions.")
    boundaries: Annotated[tuple[Pair, ...], Field(strict=False)] | None = Field(
        None, description="Pairs of phases to show, such as [[hcp, bcc]]; null: all of the transitions."
    )
    pressure: PressureRange | None = Field(
        None, description="Pressures of the report; null: 11 over those of the transitions."
    )
    experiment: Annotated[
        Experiment | None, BeforeValidator(_experiment, json_schema_input_type=Experiment | str | None)
    ] = Field(None, description="Experimental table to lay over it.")
    compare: Paths | None = Field(
        None,
        description="Runs of `transition` or `phase-diagram` of other potentials to lay over it, such as "
        "the potential before its refinement.",
    )
