"""What a config says of every observable that is a loss, and how the observable is made of it."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from ase import Atoms, units
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from mlip_refine import observables
from mlip_refine.config import Dimension, Length, Pressure, Section, Temperature, problem
from mlip_refine.config.units import LENGTH, PRESSURE
from mlip_refine.data import Table
from mlip_refine.errors import MlipRefineError
from mlip_refine.losses.targets import Values, Wanted, given_targets, parse_values, table_targets
from mlip_refine.observables import Lattice, Observable, Sample
from mlip_refine.observables.cell import conventional_lattice
from mlip_refine.quantities import MEV

_ANGLE = Dimension("angle", {"°": 1.0, "deg": 1.0, "rad": math.degrees(1.0)})
_DENSITY = Dimension("density", {"g/cm³": 1.0, "g/cm3": 1.0, "kg/m³": 1e-3, "kg/m3": 1e-3}, above=0.0)
_VOLUME = Dimension("atomic volume", {"Å³/atom": 1.0, "Å3/atom": 1.0, "nm³/atom": 1e3}, above=0.0)
_ENTHALPY = Dimension("enthalpy", {"eV/atom": 1.0, "meV/atom": MEV})
_EXPANSION = Dimension("thermal expansion", {"/K": 1.0, "ppm/K": 1e-6})
_GAS_CONSTANT = float(units._k * units._Nav)
_HEAT_CAPACITY = Dimension("heat capacity", {"k_B": 1.0, "J/mol/K": 1.0 / _GAS_CONSTANT}, above=0.0)

_SEVERAL: Any = float | str | list[float | str] | dict[str, float | str] | None
"""What a config may write for `Values`."""

Cell = Literal["free", "fixed", "any"]


class ObservableOptions(Section):
    """Options that all observables share. A subclass says what they are of."""

    dimension: ClassVar[Dimension]
    """Kind of the quantity, in the unit of the observable."""

    cell: ClassVar[Cell] = "any"
    """Cells that tell it: in others it is no function of the potential, or another one."""

    structural: ClassVar[bool] = False
    """Whether it depends on positions and cells alone, and takes a while."""

    phase: str = Field(description="A phase among phases.")
    temperature: Temperature = Field(description="Where the target holds, K.")
    pressure: Pressure = Field(0.0, description="Where the target holds, GPa.")
    target: Values | None = Field(
        None,
        description="Wanted value with or without unit; of several a list, or some of them by label.",
    )
    uncertainty: Values | None = Field(
        None, description="Standard error of the target, or of each; beside a table instead of what it says."
    )
    table: str | None = Field(
        None, description="Instead of target: an experimental table of the package, or a CSV file."
    )

    @abstractmethod
    def observable(self, crystal: Atoms, table: Table | None) -> Observable:
        """The observable of a phase, from its ideal crystal in the box that is sampled."""

    def wanted(self, loss: str, known: Sequence[str], table: Table | None) -> Wanted:
        """What the outputs with these labels should be: here as the config says.

        Raises:
            InputError: Targets that do not fit the labels.
        """
        if table is not None or self.given_target is None or self.uncertainty is None:
            raise MlipRefineError(f"loss {loss!r} has no targets without its table")
        return Wanted.of(known, given_targets(loss, known, self.given_target, self.uncertainty))

    @property
    def lattice_constants(self) -> tuple[float, ...]:
        """Of a cell that is prescribed, Å; empty: the phase says what its cell is and does."""
        return ()

    @property
    def given_target(self) -> Values | None:
        """The target, or what a subclass takes where there is none."""
        return self.target

    @field_validator("target", mode="plain", json_schema_input_type=_SEVERAL)
    @classmethod
    def _target_with_units(cls, given: Any) -> Values | None:
        return None if given is None else parse_values(cls.dimension, given)

    @field_validator("uncertainty", mode="plain", json_schema_input_type=_SEVERAL)
    @classmethod
    def _uncertainty_with_units(cls, given: Any) -> Values | None:
        return None if given is None else parse_values(cls.dimension.bounded(above=0.0), given)

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.target is not None and self.table is not None:
            raise problem("a target or a table, not both", key="table")
        if self.table is None and self.given_target in (None, {}):
            raise problem(f"a target ({self.dimension.unit}), or a table", key="target")
        if self.table is None and self.uncertainty is None:
            raise problem(f"the uncertainty of the target ({self.dimension.unit})", key="uncertainty")
        return self


class ScalarOptions(ObservableOptions):
    """Options of observables that are one value, or a few told apart by labels."""

    kind: ClassVar[type[Observable]]

    columns: dict[str, str] = Field(
        {},
        description="Columns of the table by label; empty: those that are called like labels.",
    )

    def observable(self, crystal: Atoms, table: Table | None) -> Observable:  # noqa: ARG002 - others need them
        """The observable, which here needs nothing."""
        return self.kind()

    def wanted(self, loss: str, known: Sequence[str], table: Table | None) -> Wanted:
        """Targets by label, of the config or of the table at the state."""
        if table is None:
            return super().wanted(loss, known, None)
        state = {"temperature": self.temperature, "pressure": self.pressure}
        targets = table_targets(loss, known, table, self.columns, state, self.dimension, self.uncertainty)
        return Wanted.of(known, targets)

    @model_validator(mode="after")
    def _columns_of_a_table(self) -> Self:
        if self.columns and self.table is None:
            raise problem("a table that has these columns", key="columns")
        return self


class InCellOptions(ScalarOptions):
    """Options of what can be told in a cell that is prescribed."""

    lattice: Annotated[tuple[Length, ...], Field(strict=False, max_length=2)] = Field(
        (), description="Lattice constants (a) or (a, c) of a fixed cell, Å; empty: the cell of the phase."
    )

    @property
    def lattice_constants(self) -> tuple[float, ...]:
        """Of the prescribed cell, Å."""
        return self.lattice


class PressureOptions(InCellOptions):
    """Pressure of a fixed cell, ⟨N kT/V - tr σ/3⟩, GPa; the default target is that of the state."""

    dimension = PRESSURE
    cell = "fixed"
    kind = observables.Pressure

    @property
    def given_target(self) -> Values:
        """The target, or the pressure of the state."""
        return self.pressure if self.target is None else self.target


class StressOptions(InCellOptions):
    """Stress of a fixed cell (xx, yy, zz, yz, xz, xy; tensile positive), GPa; the default target is -P."""

    dimension = PRESSURE
    cell = "fixed"
    kind = observables.Stress

    @property
    def given_target(self) -> Values:
        """The target, or the pressure of the state without shear."""
        return (-self.pressure,) * 3 + (0.0,) * 3 if self.target is None else self.target


class DensityOptions(ScalarOptions):
    """Mass density ⟨M/V⟩ of a cell that moves, g/cm³."""

    dimension = _DENSITY
    cell = "free"
    kind = observables.Density


class VolumeOptions(ScalarOptions):
    """Atomic volume ⟨V⟩/N of a cell that moves, Å³/atom."""

    dimension = _VOLUME
    cell = "free"
    kind = observables.Volume


class UnitCellOptions(ScalarOptions):
    """Options of what is told of the unit cell."""

    ratios: dict[
        str, Annotated[tuple[float | None, ...], Field(strict=False, min_length=3, max_length=3)]
    ] = Field(
        {},
        description="By constant, for every vector of the box its length in units of it, null where it does "
        "not show it; empty: constants of the conventional unit cell, by the symmetry of the phase.",
    )

    def lattice(self, crystal: Atoms) -> Lattice:
        """Lattice constants of a phase.

        Raises:
            InputError: Ratios that are not above zero, or a box that does not show any constant.
        """
        if self.ratios:
            return Lattice(self.ratios)
        return conventional_lattice(crystal.cell.array, crystal.positions, crystal.numbers)


class LatticeOptions(UnitCellOptions):
    """Lattice constants (a, b, c) of the unit cell in a cell that moves, Å."""

    dimension = LENGTH
    cell = "free"

    def observable(self, crystal: Atoms, table: Table | None) -> Observable:  # noqa: ARG002 - as in the base
        """Lattice constants of the phase."""
        return self.lattice(crystal)


class LinearExpansionOptions(UnitCellOptions):
    """Thermal expansion of lattice constants (alpha_a, alpha_b, alpha_c) in a cell that moves, 1/K."""

    dimension = _EXPANSION
    cell = "free"

    def observable(self, crystal: Atoms, table: Table | None) -> Observable:  # noqa: ARG002 - as in the base
        """Expansion of the lattice constants of the phase."""
        return observables.LinearExpansion(self.lattice(crystal))


class ThermalExpansionOptions(ScalarOptions):
    """Thermal expansion of the volume (alpha), cov(V, H)/(kT² ⟨V⟩) in a cell that moves, 1/K."""

    dimension = _EXPANSION
    cell = "free"
    kind = observables.ThermalExpansion


class CellAnglesOptions(ScalarOptions):
    """Angles of the box (alpha, beta, gamma) in a cell that moves, °."""

    dimension = _ANGLE
    cell = "free"
    kind = observables.CellAngles


class EnthalpyOptions(InCellOptions):
    """Enthalpy ⟨U + PV⟩/N without the kinetic part, eV/atom."""

    dimension = _ENTHALPY
    kind = observables.Enthalpy


class BulkModulusOptions(ScalarOptions):
    """Isothermal bulk modulus (K_T), kT ⟨V⟩/var V in a cell that moves, GPa."""

    dimension = PRESSURE.bounded(above=0.0)
    cell = "free"
    kind = observables.BulkModulus


class HeatCapacity(Observable):
    """C_P where the cell moves, C_V where it is fixed, per atom in k_B."""

    labels = ("heat_capacity",)
    unit = "k_B"

    def columns(self, sample: Sample) -> Tensor:
        """First two moments of enthalpy or energy `[n, 2]`."""
        return _heat_capacity(sample).columns(sample)

    def derive(self, means: Tensor, sample: Sample) -> Tensor:
        """Heat capacity `[1]`."""
        return _heat_capacity(sample).derive(means, sample)


def _heat_capacity(sample: Sample) -> Observable:
    return observables.HeatCapacityP() if sample.free_cell else observables.HeatCapacityV()


class HeatCapacityOptions(InCellOptions):
    """Heat capacity per atom with its kinetic part, C_P where the cell moves, else C_V, k_B."""

    dimension = _HEAT_CAPACITY
    kind = HeatCapacity
