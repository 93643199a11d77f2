"""Targets of observables: values of a config, or of a table at a state or along a curve.

This module imports no torch (see `mlip_refine.losses.registry`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydantic_core import PydanticCustomError

from mlip_refine.config import Dimension
from mlip_refine.errors import InputError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from mlip_refine.data import Table

type Values = float | tuple[float, ...] | dict[str, float]
"""One value, one for every label in their order, or values by label."""

type Targets = dict[str, tuple[float, float]]
"""Target and standard uncertainty by label, in the unit of the observable."""

UP_TO_A_FACTOR = "arbitrary"
"""Unit of the column of a table that gives a density without its norm."""

WHOLE = 0.95
"""Fraction of its range that a density must cover before it can be normalised."""


def parse_values(dimension: Dimension, given: object) -> Values:
    """Read values with or without units, in the stored unit.

    Raises:
        PydanticCustomError: A value is no quantity of this kind.
    """
    if isinstance(given, Mapping):
        return {str(label): dimension.parse(value) for label, value in given.items()}
    if isinstance(given, Sequence) and not isinstance(given, str):
        return tuple(dimension.parse(value) for value in given)
    return dimension.parse(given)


def given_targets(loss: str, known: Sequence[str], target: Values, uncertainty: Values) -> Targets:
    """Targets and uncertainties by label, from what a config gives.

    Raises:
        InputError: Values for labels that the observable does not have, or not one for each.
    """
    values = by_label(loss, "target", known, target)
    errors = by_label(loss, "uncertainty", tuple(values), uncertainty, common=True)
    return {label: (value, errors[label]) for label, value in values.items()}


def by_label(
    loss: str, key: str, known: Sequence[str], given: Values, *, common: bool = False
) -> dict[str, float]:
    """Values by label; one value counts for all labels if it is `common`.

    Raises:
        InputError: An unknown label, or a wrong number of values.
    """
    if isinstance(given, Mapping):
        for label in given:
            require_known(f"loss {loss!r}: no {label!r} to have a {key}", label, known)
        missing = [label for label in known if label not in given] if common else []
        if missing:
            raise InputError(f"loss {loss!r}: no {key} of {', '.join(missing)}")
        return dict(given)
    values = given if isinstance(given, tuple) else (given,) * (len(known) if common else 1)
    if len(values) != len(known):
        raise InputError(
            f"loss {loss!r}: {key} does not fit",
            found=f"{len(values)} value{'s' if len(values) != 1 else ''}",
            expected=f"{len(known)} ({_listed(known)}), or some of these by name",
        )
    return dict(zip(known, values, strict=True))


def table_targets(
    loss: str,
    known: Sequence[str],
    table: "Table",
    columns: Mapping[str, str],
    state: Mapping[str, float],
    dimension: Dimension,
    uncertainty: Values | None,
) -> Targets:
    """Targets and uncertainties by label, from a table that has a column for each.

    Args:
        loss: Name, for messages.
        known: Labels of the observable.
        table: Looked up by its first column.
        columns: Columns by label; empty: those that are called like labels.
        state: Temperature, K, and pressure, GPa, by name.
        dimension: Dimension of the observable.
        uncertainty: Instead of those of the table.

    Raises:
        InputError: An unknown label or column, a column of another kind, or a state outside of the table.
    """
    at = table.at(**state)
    chosen = dict(columns) or {label: label for label in known if label in table.columns}
    for label in chosen:
        require_known(f"loss {loss!r}: no {label!r} to take a column for", label, known)
    if not chosen:
        raise InputError(
            f"loss {loss!r}: the table has no column for it",
            where=str(table.path),
            found=", ".join(table.columns),
            expected=_listed(known),
            fix="Name the columns: columns: {LABEL: COLUMN}.",
        )
    errors = (
        {} if uncertainty is None else by_label(loss, "uncertainty", tuple(chosen), uncertainty, common=True)
    )
    return {label: looked_up(table, name, at, dimension, errors.get(label)) for label, name in chosen.items()}


def looked_up(
    table: "Table", column: str, at: float, dimension: Dimension, uncertainty: float | None
) -> tuple[float, float]:
    """Value and uncertainty of a column in the unit of a dimension.

    Raises:
        InputError: A column of another kind, a state outside of the table, or no uncertainty.
    """
    found = table.target(column, at, uncertainty)
    value, own = converted(table, column, found.value, found.uncertainty, dimension)
    return value, own if uncertainty is None else uncertainty


def converted(
    table: "Table", column: str, value: float, uncertainty: float, dimension: Dimension
) -> tuple[float, float]:
    """Value and uncertainty of a column, in its own unit, in the unit of a dimension.

    Raises:
        InputError: The column is of another kind, or the value cannot be one of this kind.
    """
    unit = table[column].unit
    try:
        factor, offset = dimension.conversion(unit)
    except PydanticCustomError as error:
        raise InputError(
            f"the column {column} is no {dimension.kind}",
            where=str(table.path),
            found=f"unit {unit}",
            expected=", ".join(dimension.units),
        ) from error
    try:
        return dimension.checked(value * factor + offset), uncertainty * factor
    except PydanticCustomError as error:
        raise InputError(
            f"{column} is no {dimension.kind}",
            where=str(table.path),
            found=f"{value:g} {unit}",
            expected=(error.context or {})["expected"],
        ) from error


def require_known(problem: str, label: str, known: Sequence[str]) -> None:
    """Refuse a label that an observable does not have.

    Raises:
        InputError: With the nearest one that it has.
    """
    if label not in known:
        word = nearest(label, known)
        fix = f"Did you mean {word!r}?" if word else None
        raise InputError(problem, expected=f"some of {_listed(known)}", fix=fix)


def _listed(labels: Sequence[str]) -> str:
    """Labels in a line, cut short where they are many."""
    return ", ".join(labels) if len(labels) <= 6 else f"{', '.join(labels[:3])}, ..., {labels[-1]}"


@dataclass(frozen=True)
class Curve:
    """Where a curve is known, and in which units.

    Attributes:
        labels: Labels of the bins `[m]`.
        middles: Middles of the bins `[m]`, ascending and evenly spaced.
        abscissa: Unit of the middles.
        unit: Unit of the curve.
        within: Part that is compared; all by default.
        density: Whether its integral is one, so that a table may give it up to a factor.
    """

    labels: tuple[str, ...]
    middles: "Tensor"
    abscissa: str
    unit: str
    within: tuple[float, float] | None = None
    density: bool = False

    def inside(self, x: float) -> bool:
        """Whether a point is compared."""
        return self.within is None or self.within[0] <= x <= self.within[1]

    def targets(self, loss: str, table: "Table", column: str | None, uncertainty: float | None) -> Targets:
        """Targets and uncertainties of the bins whose middle lies in the range of a table, interpolated.

        A density that is given up to a factor is normalised.

        Args:
            loss: Name, for messages.
            table: Its first column is what the bins lie on.
            column: Column of the curve; by default the only one beside the first.
            uncertainty: Instead of that of the table, after normalisation.

        Raises:
            InputError: Another unit, no bin that is compared, or an uncertainty that is not known.
        """
        others = [name for name in table.columns if name != table.index.name]
        if not column and len(others) != 1:
            raise InputError(
                f"loss {loss!r}: which column of the table is the curve?",
                where=str(table.path),
                found=", ".join(others),
                fix="Name it as column.",
            )
        name = column or others[0]
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

    def _require_unit(self, table: "Table", column: str, units: Sequence[str]) -> None:
        unit = table[column].unit
        if unit not in units:
            raise InputError(
                f"the column {column} has another unit",
                where=str(table.path),
                found=unit,
                expected=" or ".join(units),
            )

    def _norm(self, loss: str, table: "Table", column: str, covered: Sequence[float]) -> float:
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


def spacing(table: "Table") -> float:
    """Mean distance of the values of the first column, which ascend.

    Raises:
        InputError: There is one value only.
    """
    unique = np.unique(table.index.values)
    if len(unique) < 2:
        raise InputError("a curve needs more than one row", where=str(table.path))
    return float((unique[-1] - unique[0]) / (len(unique) - 1))
