"""Options of the losses on observables, and how an observable is made of them.

This module imports no torch: a config is checked, and `mlip-refine schema` and `losses` answer, without it.
Observables are named by dotted names, or imported where they are made.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from ase import Atoms, units
from pydantic import Field, GetJsonSchemaHandler, field_validator, model_validator
from pydantic_core import CoreSchema

from mlip_refine.config import Count, Dimension, Length, Pressure, Section, Temperature, problem
from mlip_refine.config.units import LENGTH, PRESSURE
from mlip_refine.errors import MlipRefineError
from mlip_refine.losses.targets import (
    Curve,
    Targets,
    Values,
    given_targets,
    parse_values,
    spacing,
    table_targets,
)

if TYPE_CHECKING:
    from mlip_refine.data import Table
    from mlip_refine.observables import Lattice, Observable

_ANGLE = Dimension("angle", {"°": 1.0, "deg": 1.0, "rad": math.degrees(1.0)})
_DENSITY = Dimension("density", {"g/cm³": 1.0, "g/cm3": 1.0, "kg/m³": 1e-3, "kg/m3": 1e-3}, above=0.0)
_VOLUME = Dimension("atomic volume", {"Å³/atom": 1.0, "Å3/atom": 1.0, "nm³/atom": 1e3}, above=0.0)
_ENTHALPY = Dimension("enthalpy", {"eV/atom": 1.0, "meV/atom": 1e-3})
_EXPANSION = Dimension("thermal expansion", {"/K": 1.0, "ppm/K": 1e-6})
_GAS_CONSTANT = float(units._k * units._Nav)
_HEAT_CAPACITY = Dimension("heat capacity", {"k_B": 1.0, "J/mol/K": 1.0 / _GAS_CONSTANT}, above=0.0)
_NUMBER = Dimension("number", {"1": 1.0})
_WAVE_NUMBER = Dimension("wave number", {"/Å": 1.0, "/A": 1.0, "/nm": 0.1}, least=0.0)

WaveNumber = Annotated[float, _WAVE_NUMBER]
Bounds = Annotated[tuple[float, float], Field(strict=False)]

_SEVERAL: Any = float | str | list[float | str] | dict[str, float | str] | None
"""What a config may write for `Values`."""

Cell = Literal["free", "fixed", "any"]


class ObservableOptions(Section):
    """Options that all losses on observables share; a subclass names its observable."""

    dimension: ClassVar[Dimension]
    """Physical dimension of the values, in the unit of the observable."""

    cell: ClassVar[Cell] = "any"
    """Cells in which the observable is defined: moving (free), fixed, or any."""

    columns_kept: ClassVar[bool] = False
    """Whether columns are kept as long as frames are the same: for slow ones of positions and cells alone."""

    is_curve: ClassVar[bool] = False
    """Whether the values are bins of a curve: too many for results, which then have their deviations."""

    phase: str = Field(description="A phase among phases.")
    temperature: Temperature = Field(description="Temperature of the target, K.")
    pressure: Pressure = Field(0.0, description="Pressure of the target, GPa.")
    target: Values | None = Field(
        None,
        description="Target value with or without unit; for several values a list, or some of them by label.",
    )
    uncertainty: Values | None = Field(
        None, description="Standard error of the target, or of each; beside a table instead of what it says."
    )
    table: str | None = Field(
        None, description="Instead of target: an experimental table of the package, or a CSV file."
    )

    @abstractmethod
    def observable(self, crystal: Atoms, table: "Table | None") -> "Observable":
        """Return the observable of a phase, given its ideal crystal in the box that is sampled."""

    @classmethod
    @abstractmethod
    def table_columns(cls) -> str:
        """Return which columns a table needs, in words, for `mlip-refine losses NAME`."""

    def targets(self, loss: str, known: Sequence[str], table: "Table | None") -> Targets:
        """Return target and uncertainty by label: here those of the config.

        Args:
            loss: Name of the loss, for messages.
            known: Labels of all values of the observable.
            table: Table that the options name, if any.

        Raises:
            InputError: Targets that do not fit the labels.
        """
        if table is not None or self.given_target is None or self.uncertainty is None:
            raise MlipRefineError(f"loss {loss!r} has no targets without its table")
        return given_targets(loss, known, self.given_target, self.uncertainty)

    @property
    def lattice_constants(self) -> tuple[float, ...]:
        """Lattice constants of a prescribed cell, Å; empty: the cell of the phase."""
        return ()

    @property
    def given_target(self) -> Values | None:
        """The target of the config, or the default of a subclass."""
        return self.target

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Give target and uncertainty the unit of the dimension."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        for key in ("target", "uncertainty"):
            schema["properties"][key]["x-unit"] = cls.dimension.unit
        return schema

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
    """Options of observables with one value, or a few values with labels."""

    kind: ClassVar["str | type[Observable]"]

    labels: ClassVar[tuple[str, ...]]
    """Labels of the observable, here too so that `mlip-refine losses` can name them without torch."""

    columns: dict[str, str] = Field(
        {},
        description="Columns of the table by label; empty: those that are called like labels.",
    )

    def observable(self, crystal: Atoms, table: "Table | None") -> "Observable":  # noqa: ARG002 - others need them
        """Return the observable, which needs neither crystal nor table."""
        kind = resolve_name(self.kind) if isinstance(self.kind, str) else self.kind
        found: Observable = kind()
        return found

    @classmethod
    def table_columns(cls) -> str:
        """Return the names of columns that are found without being told."""
        some = ", or some of these" if len(cls.labels) > 1 else ""
        units = list(cls.dimension.units)
        unit = f"in one of {', '.join(units)}" if len(units) > 1 else f"unit {units[0]}"
        return (
            f"First temperature, K, or pressure, GPa. Then {', '.join(cls.labels)}{some}, {unit}. For other "
            f"names: columns: {{{cls.labels[0]}: NAME}}."
        )

    def targets(self, loss: str, known: Sequence[str], table: "Table | None") -> Targets:
        """Return target and uncertainty by label, of the config or of the table at the state."""
        if table is None:
            return super().targets(loss, known, None)
        state = {"temperature": self.temperature, "pressure": self.pressure}
        return table_targets(loss, known, table, self.columns, state, self.dimension, self.uncertainty)

    @model_validator(mode="after")
    def _columns_of_a_table(self) -> Self:
        if self.columns and self.table is None:
            raise problem("a table that has these columns", key="columns")
        return self


class InCellOptions(ScalarOptions):
    """Options of observables that may be taken in a cell with given lattice constants."""

    lattice: Annotated[tuple[Length, ...], Field(strict=False, max_length=2)] = Field(
        (), description="Lattice constants (a) or (a, c) of a fixed cell, Å; empty: the cell of the phase."
    )

    @property
    def lattice_constants(self) -> tuple[float, ...]:
        """Lattice constants of the prescribed cell, Å."""
        return self.lattice


class PressureOptions(InCellOptions):
    """Pressure of a fixed cell, ⟨N kT/V - tr σ/3⟩, GPa; the default target is that of the state."""

    dimension = PRESSURE
    labels = ("pressure",)
    cell = "fixed"
    kind = "mlip_refine.observables:Pressure"

    @property
    def given_target(self) -> Values:
        """The target, or the pressure of the state."""
        return self.pressure if self.target is None else self.target


class StressOptions(InCellOptions):
    """Stress of a fixed cell (xx, yy, zz, yz, xz, xy; tensile positive), GPa; the default target is -P."""

    dimension = PRESSURE
    labels = ("xx", "yy", "zz", "yz", "xz", "xy")
    cell = "fixed"
    kind = "mlip_refine.observables:Stress"

    @property
    def given_target(self) -> Values:
        """The target, or the pressure of the state without shear."""
        return (-self.pressure,) * 3 + (0.0,) * 3 if self.target is None else self.target


class DensityOptions(ScalarOptions):
    """Mass density ⟨M/V⟩ of a cell that moves, g/cm³."""

    dimension = _DENSITY
    labels = ("density",)
    cell = "free"
    kind = "mlip_refine.observables:Density"


class VolumeOptions(ScalarOptions):
    """Atomic volume ⟨V⟩/N of a cell that moves, Å³/atom."""

    dimension = _VOLUME
    labels = ("volume",)
    cell = "free"
    kind = "mlip_refine.observables:Volume"


class UnitCellOptions(ScalarOptions):
    """Options of observables of the unit cell."""

    ratios: dict[
        str, Annotated[tuple[float | None, ...], Field(strict=False, min_length=3, max_length=3)]
    ] = Field(
        {},
        description="By constant: for every vector of the box its length in units of it, null where it "
        "does not show it; empty: constants of the conventional unit cell, from the "
        "symmetry of the phase.",
    )

    def lattice(self, crystal: Atoms) -> "Lattice":
        """Return the lattice constants of a phase as an observable.

        Raises:
            InputError: Ratios that are not above zero, or a box that does not show any constant.
        """
        from mlip_refine.observables import Lattice, conventional_lattice

        if self.ratios:
            return Lattice(self.ratios)
        return conventional_lattice(crystal.cell.array, crystal.positions, crystal.numbers)


class LatticeOptions(UnitCellOptions):
    """Lattice constants (a, b, c) of the unit cell in a cell that moves, Å."""

    dimension = LENGTH
    labels = ("a", "b", "c")
    cell = "free"

    def observable(self, crystal: Atoms, table: "Table | None") -> "Observable":  # noqa: ARG002 - as in the base
        """Lattice constants of the phase."""
        return self.lattice(crystal)


class LinearExpansionOptions(UnitCellOptions):
    """Thermal expansion of lattice constants (alpha_a, alpha_b, alpha_c) in a cell that moves, 1/K."""

    dimension = _EXPANSION
    labels = ("alpha_a", "alpha_b", "alpha_c")
    cell = "free"

    def observable(self, crystal: Atoms, table: "Table | None") -> "Observable":  # noqa: ARG002 - as in the base
        """Expansion of the lattice constants of the phase."""
        from mlip_refine.observables import LinearExpansion

        return LinearExpansion(self.lattice(crystal))


class ThermalExpansionOptions(ScalarOptions):
    """Thermal expansion of the volume (alpha), cov(V, H)/(kT² ⟨V⟩) in a cell that moves, 1/K."""

    dimension = _EXPANSION
    labels = ("alpha",)
    cell = "free"
    kind = "mlip_refine.observables:ThermalExpansion"


class CellAnglesOptions(ScalarOptions):
    """Angles of the box (alpha, beta, gamma) in a cell that moves, °."""

    dimension = _ANGLE
    labels = ("alpha", "beta", "gamma")
    cell = "free"
    kind = "mlip_refine.observables:CellAngles"


class EnthalpyOptions(InCellOptions):
    """Enthalpy ⟨U + PV⟩/N without the kinetic part, eV/atom."""

    dimension = _ENTHALPY
    labels = ("enthalpy",)
    kind = "mlip_refine.observables:Enthalpy"


class BulkModulusOptions(ScalarOptions):
    """Isothermal bulk modulus (K_T), kT ⟨V⟩/var V in a cell that moves, GPa."""

    dimension = PRESSURE.bounded(above=0.0)
    labels = ("K_T",)
    cell = "free"
    kind = "mlip_refine.observables:BulkModulus"


class HeatCapacityOptions(InCellOptions):
    """Heat capacity per atom with its kinetic part, C_P where the cell moves, else C_V, k_B."""

    dimension = _HEAT_CAPACITY
    labels = ("heat_capacity",)
    kind = "mlip_refine.losses.ensemble.observable:HeatCapacity"


class CurveOptions(ObservableOptions):
    """Options of observables that are a curve over bins of equal width.

    Targets are given for every bin, or a table has them, at any places: it is interpolated to the bins.
    """

    dimension = _NUMBER
    columns_kept = True
    is_curve = True
    abscissa: ClassVar[str]
    """Unit of the axis on which the bins lie, in words where it depends on options."""

    bins: Count | None = Field(
        None, description="Number of bins; null: bins as wide as the rows of the table are apart."
    )
    column: str | None = Field(None, description="Column of the table; null: the only one beside the first.")
    within: Bounds | None = Field(
        None,
        description="Part of the table that is compared, in the unit of its first column; null: all.",
    )

    @classmethod
    def table_columns(cls) -> str:
        """Return what the two columns of a curve are."""
        return (
            f"First the axis, in {cls.abscissa}; then the curve. Names are free; where there are more than "
            "two columns, column: NAME says which one is the curve."
        )

    @abstractmethod
    def curve(self, table: "Table | None") -> "tuple[Observable, Curve]":
        """Return the observable and its bins, which follow the table where the config leaves them open."""

    def observable(self, crystal: Atoms, table: "Table | None") -> "Observable":  # noqa: ARG002 - as in the base
        """Return the curve as an observable."""
        return self.curve(table)[0]

    def targets(self, loss: str, known: Sequence[str], table: "Table | None") -> Targets:
        """Return target and uncertainty of every bin, of the config or of the table where it has values."""
        if table is None:
            return super().targets(loss, known, None)
        error = self.uncertainty if isinstance(self.uncertainty, float) else None
        return self.curve(table)[1].targets(loss, table, self.column, error)

    @model_validator(mode="after")
    def _every_key_counts(self) -> Self:
        if self.table is None and (self.column or self.within):
            raise problem("a table beside it", key="column" if self.column else "within")
        if self.table is not None and not isinstance(self.uncertainty, float | None):
            raise problem("one number beside a table", key="uncertainty")
        return self

    def _bins(self, length: float, table: "Table | None", default: int) -> int:
        """Number of bins on a length: as given, from the spacing of the table, or the default."""
        return self.bins or (default if table is None else max(1, round(length / spacing(table))))


class RadialDistributionOptions(CurveOptions):
    """Radial distribution function g(r); over Å."""

    abscissa = "Å"

    largest: Length | None = Field(None, description="Largest distance, Å; null: of the table, or 8 Å.")
    pair: Annotated[tuple[str | None, str | None], Field(strict=False)] = Field(
        (None, None), description="Elements of the two atoms; null is any."
    )

    def curve(self, table: "Table | None") -> "tuple[Observable, Curve]":
        """Return g(r) from zero on, and its bins."""
        from mlip_refine.observables import RadialDistribution

        largest = self.largest or (8.0 if table is None else float(table.index.values.max()))
        found = RadialDistribution(largest, self._bins(largest, table, 160), self.pair)
        return found, Curve(found.labels, found.radii, self.abscissa, found.unit, self.within)


class AngularDistributionOptions(CurveOptions):
    """Distribution of the angles between neighbours, its integral one; over cos θ or degrees."""

    abscissa = "° or, for cosines, 1"

    distance: Length = Field(description="Largest distance of a neighbour, Å.")
    variable: Literal["angle", "cosine"] = Field(
        "angle", description="Axis of the density: the angle in ° or cos θ."
    )
    triple: Annotated[tuple[str | None, str | None, str | None], Field(strict=False)] = Field(
        (None, None, None),
        description="Elements of one neighbour, the atom in the middle and the other neighbour; null is any.",
    )

    def curve(self, table: "Table | None") -> "tuple[Observable, Curve]":
        """Return the density over the whole range, and its bins."""
        from mlip_refine.observables import AngularDistribution

        length, unit = (180.0, "°") if self.variable == "angle" else (2.0, "1")
        found = AngularDistribution(self.distance, self._bins(length, table, 90), self.variable, self.triple)
        return found, Curve(found.labels, found.middles, unit, found.unit, self.within, density=True)


class StructureFactorOptions(CurveOptions):
    """Static structure factor S(q); over 1/Å."""

    abscissa = "1/Å"

    smallest: WaveNumber | None = Field(
        None, description="Lower end of the shells, 1/Å; null: that of the table."
    )
    largest: WaveNumber | None = Field(
        None, description="Upper end of the shells, 1/Å; null: that of the table."
    )
    scattering_lengths: dict[str, float] | None = Field(
        None, description="Scattering lengths by element, in any unit; null: all atoms scatter alike."
    )

    def curve(self, table: "Table | None") -> "tuple[Observable, Curve]":
        """Return S(q) in shells, and the shells."""
        from mlip_refine.observables import StructureFactor

        q = (math.nan,) if table is None else table.index.values
        smallest = float(min(q)) if self.smallest is None else self.smallest
        largest = float(max(q)) if self.largest is None else self.largest
        bins = self._bins(largest - smallest, table, 100)
        found = StructureFactor(smallest, largest, bins, self.scattering_lengths)
        return found, Curve(found.labels, found.wave_numbers, self.abscissa, found.unit, self.within)

    @model_validator(mode="after")
    def _shells(self) -> Self:
        if self.table is None and (self.smallest is None or self.largest is None):
            raise problem("where the shells begin and end", key="smallest")
        return self


OBSERVABLES: dict[str, type[ObservableOptions]] = {
    "angular_distribution": AngularDistributionOptions,
    "bulk_modulus": BulkModulusOptions,
    "cell_angles": CellAnglesOptions,
    "density": DensityOptions,
    "enthalpy": EnthalpyOptions,
    "heat_capacity": HeatCapacityOptions,
    "lattice": LatticeOptions,
    "linear_expansion": LinearExpansionOptions,
    "pressure": PressureOptions,
    "radial_distribution": RadialDistributionOptions,
    "stress": StressOptions,
    "structure_factor": StructureFactorOptions,
    "thermal_expansion": ThermalExpansionOptions,
    "volume": VolumeOptions,
}
"""Options of every loss on an observable by its name in a config; each of them makes an `ObservableLoss`."""
