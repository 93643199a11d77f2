"""Result files of run folders as typed records, written and read in one way.

A measured number is `{"value": ..., "se": ..., "unit": ...}` in every file; `se` is its standard error, null
where it is not known. Other numbers have their unit in the name, in the unit's own case (`temperature_K`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, TypeAdapter, ValidationError

from mlip_refine.errors import InputError
from mlip_refine.files import require_regular, write_json
from mlip_refine.quantities import Measured, error_of


def _from_json(data: object) -> object:
    if isinstance(data, Mapping) and {"value", "se", "unit"} == set(data):
        try:
            return Measured(float(data["value"]), error_of(data["se"]), str(data["unit"]))
        except (TypeError, OverflowError) as error:
            raise ValueError(f"{data} is no measured number") from error
    return data


def _to_json(measured: Measured) -> dict[str, Any]:
    return {"value": measured.value, "se": measured.known_se, "unit": measured.unit}


MeasuredField = Annotated[Measured, BeforeValidator(_from_json), PlainSerializer(_to_json)]
"""A measured number as the field of a record."""


class Record(BaseModel):
    """Base of what result files hold: immutable, without keys that are not declared."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, ser_json_inf_nan="constants"
    )

    def as_json(self) -> dict[str, Any]:
        """Return the record as plain data."""
        return self.model_dump(mode="json", by_alias=True)


class Estimate(Record):
    """A measured number, or the reason why there is none.

    Attributes:
        value: Value; `None` where it is refused.
        se: Standard error; `None` where it is not known.
        unit: Unit of both.
        refused: Why there is no value; `None` where there is one.
    """

    value: float | None
    se: float | None
    unit: str
    refused: str | None = None

    @classmethod
    def of(cls, measured: Measured, **further: Any) -> Self:
        """Return the record of a measured number."""
        return cls(value=measured.value, se=measured.known_se, unit=measured.unit, **further)

    @classmethod
    def refuse(cls, unit: str, reason: str, **further: Any) -> Self:
        """Return the record of a number that the data do not carry."""
        return cls(value=None, se=None, unit=unit, refused=reason, **further)

    @property
    def measured(self) -> Measured | None:
        """The measured number; `None` where it is refused."""
        return None if self.value is None else Measured(self.value, error_of(self.se), self.unit)


def write_record(path: Path, record: Record) -> None:
    """Write a record as JSON, atomically."""
    write_json(path, record.as_json())


def read_text(path: Path) -> str:
    """Read a result file.

    Raises:
        InputError: If it is missing or cannot be read.
    """
    try:
        return require_regular(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(
            "the result file is missing",
            where=str(path),
            fix="Is the run finished? Go on with it by --resume.",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("the result file cannot be read", where=str(path), found=str(error)) from error


def read_record[R: Record](path: Path, model: type[R], what: str) -> R:
    """Read a result file whose `format` is that of its record.

    Args:
        path: Path of the file.
        model: Class of the record, whose field `format` has the expected name and version as its default.
        what: What the file should hold, such as "result of elastic".

    Raises:
        InputError: The file is missing, is of another format, or lacks a key.
    """
    expected = model.model_fields["format"].default
    try:
        data = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"this is no {what}", where=str(path), found=str(error)) from error
    found = data.get("format") if isinstance(data, Mapping) else None
    if found != expected:
        raise InputError(f"this is no {what}", where=str(path), found=found, expected=f"format: {expected}")
    return validated(model, data, str(path), what)


def validated[R](model: type[R], data: object, where: str, what: str) -> R:
    """Return a record from plain data.

    Args:
        model: Class of the record: a `Record` or a dataclass.
        data: The plain data.
        where: Place of the data, for messages.
        what: What the data should be, such as "summary".

    Raises:
        InputError: With the key that is missing, unknown or wrong.
    """
    try:
        return TypeAdapter(model).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise InputError(f"the {what} lacks a key", where=where, expected=f"key {key!r}") from error
        if not key:
            raise InputError(f"this is no {what}", where=where, found=first["msg"]) from error
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"the {what} has a wrong value", where=where, found=f"{key}: {message}") from error
