"""What `elastic_constants` is asked for: its options, and the targets of every temperature."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mlip_refine.config import Count, Length, PositivePressure, Pressure, Section, Temperature, problem
from mlip_refine.data import Table


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
    strain: float = Field(0.01, gt=0, lt=0.1, description="deformation: component of the strain tensor.")

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
        """Those of a table, interpolated, with its uncertainties or another one for all constants, GPa."""
        found = {name: table.target(name, temperature) for name in table.columns if name != table.index.name}
        constants = {n: (t.value, uncertainty or t.uncertainty) for n, t in found.items() if t.unit == "GPa"}
        return cls(temperature, tuple(found[n].value for n in "ac" if n in found), constants)
