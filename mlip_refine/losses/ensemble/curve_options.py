"""What a config says of the curves that are losses: g(r), angles, S(q)."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

from ase import Atoms
from pydantic import Field, model_validator

from mlip_refine.config import Count, Dimension, Length, problem
from mlip_refine.data import Table
from mlip_refine.losses.ensemble.curve import Curve, spacing
from mlip_refine.losses.ensemble.observable_options import ObservableOptions
from mlip_refine.losses.targets import Wanted
from mlip_refine.observables import AngularDistribution, Observable, RadialDistribution, StructureFactor

_NUMBER = Dimension("number", {"1": 1.0})
_WAVE_NUMBER = Dimension("wave number", {"/Å": 1.0, "/A": 1.0, "/nm": 0.1}, least=0.0)

WaveNumber = Annotated[float, _WAVE_NUMBER]
Bounds = Annotated[tuple[float, float], Field(strict=False)]


class CurveOptions(ObservableOptions):
    """Options of observables that are a curve over bins of equal width.

    Targets are given for every bin, or a table has them, at any places: it is interpolated to the bins.
    """

    dimension = _NUMBER
    structural = True
    abscissa: ClassVar[str]
    """Unit of what the bins lie on."""

    bins: Count | None = Field(None, description="Their number; null: as wide as the rows of the table.")
    column: str | None = Field(None, description="Of the table; null: the one beside the first.")
    within: Bounds | None = Field(
        None,
        description="Part of the table that is compared, in the unit of its first column; null: all.",
    )

    @abstractmethod
    def curve(self, table: Table | None) -> tuple[Observable, Curve]:
        """The observable, with bins that follow the table where the config leaves them open."""

    def observable(self, crystal: Atoms, table: Table | None) -> Observable:  # noqa: ARG002 - as in the base
        """The curve."""
        return self.curve(table)[0]

    def wanted(self, loss: str, known: Sequence[str], table: Table | None) -> Wanted:
        """Targets of every bin, of the config or of the table where it has values."""
        if table is None:
            return super().wanted(loss, known, None)
        error = self.uncertainty if isinstance(self.uncertainty, float) else None
        return Wanted.of(known, self.curve(table)[1].targets(loss, table, self.column, error))

    @model_validator(mode="after")
    def _every_key_counts(self) -> Self:
        if self.table is None and (self.column or self.within):
            raise problem("a table beside it", key="column" if self.column else "within")
        if self.table is not None and not isinstance(self.uncertainty, float | None):
            raise problem("one number beside a table", key="uncertainty")
        return self

    def _bins(self, length: float, table: Table | None, default: int) -> int:
        """Number of bins on a length: as given, as wide as the rows of the table, or the default."""
        return self.bins or (default if table is None else max(1, round(length / spacing(table))))


class RadialDistributionOptions(CurveOptions):
    """Radial distribution function g(r); over Å."""

    abscissa = "Å"

    largest: Length | None = Field(None, description="Largest distance, Å; null: of the table, or 8 Å.")
    pair: Annotated[tuple[str | None, str | None], Field(strict=False)] = Field(
        (None, None), description="Elements of the two atoms; null is any."
    )

    def curve(self, table: Table | None) -> tuple[Observable, Curve]:
        """g(r) from zero on."""
        largest = self.largest or (8.0 if table is None else float(table.index.values.max()))
        found = RadialDistribution(largest, self._bins(largest, table, 160), self.pair)
        return found, Curve(found.labels, found.radii, self.abscissa, found.unit, self.within)


class AngularDistributionOptions(CurveOptions):
    """Distribution of the angles between neighbours, its integral one; over cos θ or degrees."""

    distance: Length = Field(description="Largest distance of a neighbour, Å.")
    variable: Literal["angle", "cosine"] = Field("angle", description="What the density is over: ° or cos θ.")
    triple: Annotated[tuple[str | None, str | None, str | None], Field(strict=False)] = Field(
        (None, None, None),
        description="Elements of one neighbour, the atom in the middle and the other neighbour; null is any.",
    )

    def curve(self, table: Table | None) -> tuple[Observable, Curve]:
        """The density over the whole range."""
        length, unit = (180.0, "°") if self.variable == "angle" else (2.0, "1")
        found = AngularDistribution(self.distance, self._bins(length, table, 90), self.variable, self.triple)
        return found, Curve(found.labels, found.middles, unit, found.unit, self.within, density=True)


class StructureFactorOptions(CurveOptions):
    """Static structure factor S(q); over 1/Å."""

    abscissa = "1/Å"

    smallest: WaveNumber | None = Field(None, description="Where the shells begin, 1/Å; null: as the table.")
    largest: WaveNumber | None = Field(None, description="Where they end, 1/Å; null: as the table.")
    scattering_lengths: dict[str, float] | None = Field(
        None, description="By element, any unit; null: all atoms scatter alike."
    )

    def curve(self, table: Table | None) -> tuple[Observable, Curve]:
        """S(q) in shells."""
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
