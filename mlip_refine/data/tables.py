"""Experimental tables: CSV files that say what their numbers are, where they come from and how sure they are.

A table begins with lines ``# key: text`` and has one line for each column:

    # title: Elastic constants of hcp titanium
    # conditions: adiabatic (ultrasound), ambient pressure
    # source: Fisher and Renken, Phys. Rev. 135, A482 (1964)
    # licence: Apache-2.0
    # column: temperature | K | exact
    # column: C11 | GPa | 1 % assumed
    temperature,C11
    4,176.1

The third part of a column is its standard uncertainty: a number in the unit or in percent, and whether it is
`stated` by the source or `assumed` here; or `exact`, or `unknown`. An empty cell is a value that was not
measured. The first column is what values are looked up by; a temperature or a pressure may be in any unit of
its kind, such as °C or kbar.
"""

import csv
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic_core import PydanticCustomError

from mlip_refine.config.units import PRESSURE, TEMPERATURE
from mlip_refine.errors import InputError, bytes_in_words, nearest
from mlip_refine.files import user_path
from mlip_refine.quantities import Target

_LONGEST = 100_000_000
"""Bytes of a table; no experiment has so many points."""

_KEYS = ("title", "conditions", "source", "licence", "note")
_BASES = ("stated", "assumed")
_STATES = {"temperature": TEMPERATURE.bounded(least=0.0), "pressure": PRESSURE}
"""What a state is described by, and may be the first column of a table."""


@dataclass(frozen=True)
class Column:
    """One quantity of a table.

    Attributes:
        name: Name in the header.
        unit: Unit of values and uncertainties.
        values: Measured values `[n_rows]`, nan where nothing was measured.
        uncertainties: Standard uncertainty of every value `[n_rows]`, nan where it is unknown.
        basis: Origin of the uncertainties: `stated` by the source, `assumed` by the table, `exact` or
            `unknown`.
    """

    name: str
    unit: str
    values: NDArray[np.float64]
    uncertainties: NDArray[np.float64]
    basis: str


@dataclass(frozen=True)
class Table:
    """A table with its provenance.

    Attributes:
        path: File that it was read from.
        title: Title.
        conditions: Conditions of the measurement, such as adiabatic.
        source: Publication and digitisation.
        licence: Licence of the digitised data.
        notes: Notes to the user.
        columns: Columns by name; values are looked up by the first.
    """

    path: Path
    title: str
    conditions: str
    source: str
    licence: str
    notes: tuple[str, ...]
    columns: Mapping[str, Column]

    def __getitem__(self, name: str) -> Column:
        """Return a column.

        Raises:
            InputError: There is none of that name.
        """
        if name not in self.columns:
            raise _unknown("no such column", name, self.columns, str(self.path))
        return self.columns[name]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.index.values)

    @cached_property
    def index(self) -> Column:
        """The first column."""
        return next(iter(self.columns.values()))

    def at(self, temperature: float, pressure: float) -> float:
        """Return the value of the first column at a state, in the unit of that column.

        Args:
            temperature: Temperature of the state, K.
            pressure: Its pressure, GPa.

        Raises:
            InputError: The first column is neither of the two.
        """
        state = {"temperature": temperature, "pressure": pressure}
        name = self.index.name
        if name not in state:
            raise InputError(
                "the table is not looked up by a state",
                where=str(self.path),
                found=f"first column {name}",
                expected=" or ".join(state),
            )
        factor, offset = _STATES[name].conversion(self.index.unit)
        return (state[name] - offset) / factor

    def target(self, name: str, at: float, uncertainty: float | None = None) -> Target:
        """Return the value of a column at a value of the first, such as a temperature in K, as a target.

        Between two rows it is interpolated linearly, its uncertainty too: errors of neighbours are taken as
        common. Rows with the same first value count with their mean.

        Args:
            name: Name of the column.
            at: Value of the first column, in its unit and within its range.
            uncertainty: Standard uncertainty in the unit of the column, instead of the table's.

        Raises:
            InputError: No such column, outside of what was measured, a table that is no function of its
                first column, or an uncertainty that is unknown or zero and not given.
        """
        column = self[name]
        value, known = self.measured(name, at)
        if uncertainty is not None:
            known = uncertainty
        if not (math.isfinite(known) and known > 0):
            raise InputError(
                f"the uncertainty of {name} is {'unknown' if math.isnan(known) else f'{known:g}'}",
                where=str(self.path),
                fix="Give one with the target.",
            )
        state = {}
        if self.index.name in _STATES:
            factor, offset = _STATES[self.index.name].conversion(self.index.unit)
            state[self.index.name] = at * factor + offset
        source = f"{self.source} ({self.conditions})"
        return Target(value, known, column.unit, **state, source=source)

    def measured(self, name: str, at: float) -> tuple[float, float]:
        """Return value and standard uncertainty of a column at a value of the first, as for `target`.

        The uncertainty is not a number where it is unknown.

        Raises:
            InputError: No such column, outside of what was measured, or a table that is no function of its
                first column.
        """
        column = self[name]
        there = np.isfinite(column.values)
        x = self.index.values[there]
        if not len(x) or (np.diff(x) < 0).any():
            raise InputError(
                f"the table is no function of {self.index.name}: its rows do not ascend", where=str(self.path)
            )
        # Rounding of a conversion, such as 300 K to 26.85 °C, does not lead out of the range.
        slack = 1e-12 * max(abs(x[0]), abs(x[-1]))
        if not x[0] - slack <= at <= x[-1] + slack:
            raise InputError(
                f"{name} was not measured there",
                where=str(self.path),
                found=f"{self.index.name} {at:g} {self.index.unit}",
                expected=f"{x[0]:g} to {x[-1]:g}",
            )
        unique, rows = np.unique(x, return_inverse=True)
        count = np.bincount(rows)
        value, error = (
            float(np.interp(at, unique, np.bincount(rows, v[there]) / count))
            for v in (column.values, column.uncertainties)
        )
        return value, error


def experimental_table(name: str | Path) -> Table:
    """Read a table that comes with the package, such as ``titanium-hcp-elastic``, or a file of one's own.

    Raises:
        InputError: There is neither, or the file is no table.
    """
    return read_table(tables_of_package().get(str(name), name))


def find_table(name: str, resolve: Callable[[str], Path]) -> Table:
    """Read the table that a config names: a CSV file if there is one, else a table of the package.

    Args:
        name: As it was written.
        resolve: Turns a path of the config into an absolute one.

    Raises:
        InputError: There is neither, or the file is no table.
    """
    path = resolve(name)
    return read_table(path) if path.is_file() else experimental_table(name)


def tables_of_package() -> dict[str, Path]:
    """Return the tables that come with the package, by name."""
    folder = Path(str(files("mlip_refine").joinpath("assets")))
    return {path.stem: path for path in sorted(folder.glob("*.csv"))}


def read_table(path: str | Path) -> Table:
    """Read a table.

    Args:
        path: A CSV file, or where there is none of that path, the name of a table of the package.

    Raises:
        InputError: The file is missing, or a line is not what it should be; with the line and the column.
    """
    path = user_path(path)
    known = tables_of_package()
    if str(path) in known and not path.is_file():
        path = known[str(path)]
    elif not path.exists() and str(path) == path.stem:
        raise _unknown("no such experimental table", str(path), known, None)
    try:
        if path.stat().st_size > _LONGEST:
            raise InputError(
                "no table is so long", where=str(path), found=bytes_in_words(path.stat().st_size)
            )
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("the table cannot be read", where=str(path), found=str(error)) from error
    texts, notes, described = _header(path, lines)
    names = list(described)
    body = [(i, line) for i, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    try:
        rows = list(csv.reader(line for _, line in body))
    except csv.Error as error:
        raise InputError(f"the table is no CSV ({error})", where=str(path)) from error
    if len(rows) < 2:
        raise InputError("the table has no rows", where=str(path))
    if rows[0] != names:
        raise InputError(
            "the columns are not those of the header",
            where=f"{path}:{body[0][0]}",
            found=",".join(rows[0]),
            expected=",".join(names),
        )
    numbers = []
    for (line, _), cells in zip(body[1:], rows[1:], strict=True):
        where = f"{path}:{line}"
        if len(cells) != len(names):
            raise InputError(
                "a row is not complete",
                where=where,
                found=f"{len(cells)} cells",
                expected=f"{len(names)} ({', '.join(names)})",
            )
        row = [_number(cell, f"{where}, {name}") for cell, name in zip(cells, names, strict=True)]
        if math.isnan(row[0]):
            raise InputError("the first column has no gaps", where=f"{where}, {names[0]}")
        numbers.append(row)
    columns = {
        name: _column(name, *described[name], values)
        for name, values in zip(names, np.array(numbers).T, strict=True)
    }
    if names[0] in _STATES:
        unit, _, where = described[names[0]]
        dimension = _STATES[names[0]]
        try:
            factor, offset = dimension.conversion(unit)
        except PydanticCustomError as error:
            expected = ", ".join(dimension.units)
            raise InputError(
                f"no {names[0]}", where=where, found=f"unit {unit}", expected=expected
            ) from error
        for (line, _), row in zip(body[1:], numbers, strict=True):
            try:
                dimension.checked(row[0] * factor + offset)
            except PydanticCustomError as error:
                raise InputError(
                    f"no {names[0]}", where=f"{path}:{line}", found=f"{row[0]:g} {unit}"
                ) from error
    return Table(path, **texts, notes=tuple(notes), columns=columns)


def _header(
    path: Path, lines: Iterable[str]
) -> tuple[dict[str, str], list[str], dict[str, tuple[str, str, str]]]:
    """Texts by key; notes; and unit, uncertainty and place of the description of every column."""
    texts: dict[str, str] = {}
    columns: dict[str, tuple[str, str, str]] = {}
    notes: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.startswith("#"):
            continue
        where = f"{path}:{number}"
        key, _, text = (part.strip() for part in line[1:].partition(":"))
        if key == "column":
            parts = [part.strip() for part in text.split("|")]
            if len(parts) != 3 or not all(parts):
                raise InputError(
                    "a column is not described", where=where, found=text, expected="name | unit | uncertainty"
                )
            name, unit, uncertainty = parts
            _once(name, columns, where)
            columns[name] = (unit, uncertainty, where)
        elif key == "note":
            notes.append(text)
        elif key in _KEYS and text:
            _once(key, texts, where)
            texts[key] = text
        else:
            raise _unknown("a line of the header is not 'key: text'", key, (*_KEYS, "column"), where)
    missing = [key for key in _KEYS if key not in texts and key != "note"]
    if missing or not columns:
        missing += [] if columns else ["column"]
        raise InputError(
            "the header of the table is not complete", where=str(path), expected=", ".join(missing)
        )
    return texts, notes, columns


def _once(name: str, found: Iterable[str], where: str) -> None:
    if name in found:
        raise InputError("the header says it twice", where=where, found=name)


def _number(cell: str, where: str) -> float:
    if not cell.strip():
        return math.nan
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError("not a number", where=where, found=repr(cell), expected="a number, or nothing")
    return value


def _column(name: str, unit: str, text: str, where: str, values: NDArray[np.float64]) -> Column:
    """A column with the uncertainty that the text of its description gives."""
    if text in ("exact", "unknown"):
        return Column(name, unit, values, np.full_like(values, 0.0 if text == "exact" else np.nan), text)
    size, _, basis = text.rpartition(" ")
    relative = size.endswith("%")
    try:
        uncertainty = float(size.removesuffix("%"))
    except ValueError:
        uncertainty = math.nan
    if basis not in _BASES or not uncertainty > 0:
        raise InputError(
            f"the uncertainty of {name} is not one",
            where=where,
            found=text,
            expected="exact, unknown, or a number above 0, or percent, with stated or assumed",
        )
    errors = np.abs(values) * uncertainty / 100 if relative else np.full_like(values, uncertainty)
    return Column(name, unit, values, errors, basis)


def _unknown(problem: str, found: str, known: Iterable[str], where: str | None) -> InputError:
    names = list(known)
    word = nearest(found, names)
    fix = f"Did you mean {word!r}?" if word else None
    return InputError(problem, where=where, found=found, expected=", ".join(names), fix=fix)
