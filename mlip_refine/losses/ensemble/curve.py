"""Targets of curves, such as g(r), from tables."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mlip_refine.data import Table
from mlip_refine.errors import InputError

UP_TO_A_FACTOR = "arbitrary"
"""Unit of the column of a table that gives a density without its norm."""

WHOLE = 0.95
"""Part of its range that a density must cover before it can be normalised."""


@dataclass(frozen=True)
class Curve:
    """Where a curve is known, and in which units.

    Attributes:
        labels: Of the bins.
        middles: Of the bins `[m]`, ascending and evenly spaced.
        abscissa: Unit of the middles.
        unit: Of the curve.
        within: Part that is compared; all by default.
        density: Whether its integral is one, so that a table may give it up to a factor.
    """

    labels: tuple[str, ...]
    middles: Tensor
    abscissa: str
    unit: str
    within: tuple[float, float] | None = None
    density: bool = False

    def inside(self, x: float) -> bool:
        """Whether a point is compared."""
        return self.within is None or self.within[0] <= x <= self.within[1]

    def targets(
        self, loss: str, table: Table, column: str | None, uncertainty: float | None
    ) -> dict[str, tuple[float, float]]:
        """Targets and uncertainties of the bins whose middle lies in the range of a table, interpolated.

        A density that is given up to a factor is normalised.

        Args:
            loss: Name, for messages.
            table: Its first column is what the bins lie on.
            column: Of the curve; by default the only one beside the first.
            uncertainty: Instead of that of the table, after normalisation.

        Raises:
            InputError: Another unit, no bin that is compared, or an uncertainty that is not known.
        """
        name = column or self._only_column(loss, table)
        self._require_unit(table, table.index.name, (self.abscissa,))
        self._require_unit(table, name, (self.unit, UP_TO_A_FACTOR) if self.density else (self.unit,))
        x = table.index.values
        bins = zip(self.labels, self.middles.tolist(), strict=True)
        covered = [(label, at) for label, at in bins if x.min() <= at <= x.max()]
        factor = self._norm(loss, table, name, [at for _, at in covered])
        error = None if uncertainty is None else uncertainty / factor
        found = {label: table.target(name, at, error) for label, at in covered if self.inside(at)}
        if not found:
            raise InputError(
                f"loss {loss!r}: no bin lies where the table has values",
                where=str(table.path),
                found=f"{table.index.name} {x.min():g} to {x.max():g} {self.abscissa}",
                fix="Change within, or the bins.",
            )
        return {label: (t.value * factor, t.uncertainty * factor) for label, t in found.items()}

    def _only_column(self, loss: str, table: Table) -> str:
        others = [name for name in table.columns if name != table.index.name]
        if len(others) != 1:
            raise InputError(
                f"loss {loss!r}: which column of the table is the curve?",
                where=str(table.path),
                found=", ".join(others),
                fix="Name it as column.",
            )
        return others[0]

    def _require_unit(self, table: Table, column: str, units: Sequence[str]) -> None:
        unit = table[column].unit
        if unit not in units:
            raise InputError(
                f"the column {column} has another unit",
                where=str(table.path),
                found=unit,
                expected=" or ".join(units),
            )

    def _norm(self, loss: str, table: Table, column: str, covered: Sequence[float]) -> float:
        """Factor that gives a density the integral of one, where the table leaves it open."""
        if table[column].unit != UP_TO_A_FACTOR:
            return 1.0
        if len(covered) < WHOLE * len(self.middles):
            raise InputError(
                f"loss {loss!r}: a curve up to a factor is normalised only if the table covers its range",
                where=str(table.path),
                found=f"{len(covered)} of {len(self.middles)} bins",
            )
        width = float(self.middles[1] - self.middles[0])
        return 1.0 / (width * sum(table.target(column, at, 1.0).value for at in covered))


def spacing(table: Table) -> float:
    """Mean distance of the values of the first column, which ascend.

    Raises:
        InputError: There is one value only.
    """
    unique = np.unique(table.index.values)
    if len(unique) < 2:
        raise InputError("a curve needs more than one row", where=str(table.path))
    return float((unique[-1] - unique[0]) / (len(unique) - 1))
