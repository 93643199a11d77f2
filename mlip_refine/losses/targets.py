"""Targets of observables: one value, several, values by label, or those that a table has at a state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from pydantic_core import PydanticCustomError
from torch import Tensor

from mlip_refine.config import Dimension
from mlip_refine.data import Table
from mlip_refine.errors import InputError, nearest

type Values = float | tuple[float, ...] | dict[str, float]
"""One value, one for every label in their order, or values by label."""


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


@dataclass(frozen=True)
class Wanted:
    """What some of the outputs of an observable should be, in its unit.

    Attributes:
        labels: Of these outputs.
        places: Of these outputs among all `[k]`.
        values: `[k]`, float64.
        uncertainties: Standard ones `[k]`, float64.
    """

    labels: tuple[str, ...]
    places: Tensor
    values: Tensor
    uncertainties: Tensor

    @classmethod
    def of(cls, known: Sequence[str], targets: Mapping[str, tuple[float, float]]) -> Self:
        """Collect targets with uncertainties by label; `known` are the labels of all outputs."""
        values, uncertainties = torch.tensor(list(targets.values()), dtype=torch.float64).unbind(1)
        places = torch.tensor([known.index(label) for label in targets])
        return cls(tuple(targets), places, values, uncertainties)

    def deviations(self, outputs: Tensor) -> Tensor:
        """Outputs `[m]` minus targets, in standard uncertainties `[k]`."""
        chosen = outputs[self.places.to(outputs.device)]
        return (chosen - self.values.to(outputs)) / self.uncertainties.to(outputs)


def given_targets(
    loss: str, known: Sequence[str], target: Values, uncertainty: Values
) -> dict[str, tuple[float, float]]:
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
    table: Table,
    columns: Mapping[str, str],
    state: Mapping[str, float],
    dimension: Dimension,
    uncertainty: Values | None,
) -> dict[str, tuple[float, float]]:
    """Targets and uncertainties by label, from a table that has a column for each.

    Args:
        loss: Name, for messages.
        known: Labels of the observable.
        table: Looked up by its first column.
        columns: Columns by label; empty: those that are called like labels.
        state: Temperature, K, and pressure, GPa, by name.
        dimension: Of the observable.
        uncertainty: Instead of those of the table.

    Raises:
        InputError: An unknown label or column, a column of another kind, or a state outside of the table.
    """
    if table.index.name not in state:
        raise InputError(
            f"loss {loss!r}: the table is not looked up by a state",
            where=str(table.path),
            found=f"first column {table.index.name}",
            expected=" or ".join(state),
        )
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
    at = state[table.index.name]
    return {label: looked_up(table, name, at, dimension, errors.get(label)) for label, name in chosen.items()}


def looked_up(
    table: Table, column: str, at: float, dimension: Dimension, uncertainty: float | None
) -> tuple[float, float]:
    """Value and uncertainty of a column in the unit of a dimension.

    Raises:
        InputError: A column of another kind, a state outside of the table, or no uncertainty.
    """
    factor = factor_of(table, column, dimension)
    found = table.target(column, at, None if uncertainty is None else uncertainty / factor)
    return found.value * factor, found.uncertainty * factor


def factor_of(table: Table, column: str, dimension: Dimension) -> float:
    """What a column is multiplied by to have the unit of a dimension.

    Raises:
        InputError: It is of another kind.
    """
    unit = table[column].unit
    try:
        return dimension.parse(f"1 {unit}")
    except PydanticCustomError as error:
        raise InputError(
            f"the column {column} is no {dimension.kind}",
            where=str(table.path),
            found=f"unit {unit}",
            expected=", ".join(dimension.units),
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
