"""What `elastic_constants` is asked for: its options, and the targets of every temperature."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mlip_refine.config import (
    Count,
    Dimension,
    Length,
    PositivePressure,
    Pressure,
    Section,
    Temperature,
    problem,
)
from mlip_refine.config.sections.elastic import Strain
from mlip_refine.config.units import LENGTH, PRESSURE
from mlip_refine.data import Table
from mlip_refine.errors import InputError
from mlip_refine.losses.targets import factor_of, looked_up

_CONSTANT = re.compile("C[1-6][1-6]")


class ElasticTarget(Section):
    """Elastic constants at one temperature."""

    temperature: Temperature = Field(description="K.")
    lattice: Annotated[tuple[Length, ...], Field(strict=False, max_length=2)] = Field(
        (), description="Lattice constants (a) or (a, c) of the cell, Å; empty: those of the phase."
    )
    constants: dict[str, Pressure] = Field(
        min_length=1, description="Wanted constants by name, in the standard axes, such as C11: 162 GPa."
    )
    uncertainty: PositivePressure = Field(1.0, description="Standard error of each constant, GPa.")


class ElasticConstantsOptions(Section):
    """Options of `elastic_constants`."""

    phase: str = Field(description="A crystal among phases.")
    method: Literal["static", "fluctuation", "deformation"] = Field(
        "fluctuation",
        description="fluctuation: of the stress, with the Born term, reweighted. deformation: stress of "
        "strained cells, reweighted. static: of the relaxed crystal, with what temperature adds from frames.",
    )
    kind: Literal["adiabatic", "isothermal"] = Field(
        "adiabatic", description="What the targets are; ultrasound measures adiabatic constants."
    )
    targets: Annotated[tuple[ElasticTarget, ...], Field(strict=False)] = Field(
        (), description="One entry per temperature."
    )
    table: str | None = Field(
        None,
        description="Instead of targets: an experimental table of the package, such as titanium-hcp-elastic, "
        "or a CSV file with columns temperature, C11, ... and, for the cell, a and c.",
    )
    temperatures: Annotated[tuple[Temperature, ...], Field(strict=False)] = Field(
        (), description="Temperatures that are taken from the table, K."
    )
    uncertainty: PositivePressure | None = Field(
        None, description="Standard error of each constant of the table, GPa; null: what the table says."
    )
    pressure: Pressure | None = Field(
        None, description="Pressure that the cells should be at, GPa; null: the stress is not matched."
    )
    pressure_uncertainty: PositivePressure = Field(0.05, description="Of every component of the stress, GPa.")
    thermal: bool = Field(True, description="static: add what temperature adds; false: compare at 0 K.")
    every: Count = Field(20, description="static: updates between two draws of frames.")
    smooth: bool = Field(
        True,
        description="static: describe what temperature adds by αT + βT² where there are three temperatures "
        "or more, each with one cell.",
    )
    born_every: Count = Field(
        4,
        description="Frames from one with a Born term to the next. It costs nine evaluations, with its "
        "gradient thirty, but fluctuates little: of one frame in 4 most errors are within 10 % of those of "
        "all, of one in 10 some are a third larger.",
    )
    strain: Strain = 0.01

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.method == "deformation" and self.kind == "adiabatic":
            raise problem("kind: isothermal: strained cells at one temperature show these", key="kind")
        if (self.table is None) == (not self.targets) or (self.table is None) != (not self.temperatures):
            raise problem("either targets, or a table with temperatures", key="targets")
        if self.uncertainty is not None and self.table is None:
            raise problem("no uncertainty beside targets: each has its own", key="uncertainty")
        states = [(t.temperature, t.lattice) for t in self.targets] or [(t, ()) for t in self.temperatures]
        if len(set(states)) < len(states):
            raise problem("every temperature once", key="targets" if self.targets else "temperatures")
        return self


@dataclass(frozen=True)
class Wanted:
    """Targets at one temperature: K, Å, and values with uncertainties in GPa by name."""

    temperature: float
    lattice: tuple[float, ...]
    constants: Mapping[str, tuple[float, float]]

    @classmethod
    def of(cls, target: ElasticTarget) -> Self:
        """Those of an entry of the config."""
        constants = {name: (value, target.uncertainty) for name, value in target.constants.items()}
        return cls(target.temperature, target.lattice, constants)

    @classmethod
    def from_table(cls, table: Table, temperature: float, uncertainty: float | None = None) -> Self:
        """Those of a table, interpolated, with its uncertainties or another one for all constants, GPa.

        Raises:
            InputError: The table has no constants, is not by temperature, has other units, or uncertainties
                are unknown and not given.
        """
        names = _names(table)
        if not names:
            raise InputError(
                "the table has no elastic constants",
                where=str(table.path),
                found=", ".join(table.columns),
                expected="columns such as C11",
            )
        constants = {n: looked_up(table, n, temperature, PRESSURE, uncertainty) for n in names}
        return cls(temperature, lattice_of(table, temperature), constants)


def constants_of(table: Table, temperature: float) -> dict[str, tuple[float, float]]:
    """Elastic constants of a table at a temperature, with their uncertainties, GPa; nan where unknown.

    Raises:
        InputError: The table is not by temperature, does not have it, or has constants in other units.
    """
    return {name: _measured(table, name, temperature, PRESSURE) for name in _names(table)}


def lattice_of(table: Table, temperature: float) -> tuple[float, ...]:
    """Lattice constants (a) or (a, c) of a table at a temperature, Å; none where it has none.

    Raises:
        InputError: The table is not by temperature, does not have it, or has lengths in other units.
    """
    return tuple(_measured(table, n, temperature, LENGTH)[0] for n in "ac" if n in table.columns)


def _names(table: Table) -> list[str]:
    """Elastic constants that a table has, by temperature."""
    _require_temperature(table)
    return [name for name in table.columns if _CONSTANT.fullmatch(name)]


def _measured(table: Table, name: str, temperature: float, dimension: Dimension) -> tuple[float, float]:
    _require_temperature(table)
    factor = factor_of(table, name, dimension)
    value, uncertainty = table.measured(name, temperature)
    return factor * value, factor * uncertainty


def _require_temperature(table: Table) -> None:
    if table.index.name != "temperature" or table.index.unit != "K":
        raise InputError(
            "the table is not looked up by temperature",
            where=str(table.path),
            found=f"first column {table.index.name}, {table.index.unit}",
            expected="temperature, K",
        )
