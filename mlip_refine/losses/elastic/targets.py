"""What `elastic_constants` is asked for: its options, and the targets of every temperature."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from mlip_refine.config import Dimension
from mlip_refine.config.units import LENGTH, PRESSURE
from mlip_refine.data import Table
from mlip_refine.errors import InputError
from mlip_refine.losses.options import ElasticTarget
from mlip_refine.losses.targets import converted, looked_up

_CONSTANT = re.compile("C[1-6][1-6]")


@dataclass(frozen=True)
class CellTargets:
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
        place, names = _place(table, temperature), _names(table)
        if not names:
            raise InputError(
                "the table has no elastic constants",
                where=str(table.path),
                found=", ".join(table.columns),
                expected="columns such as C11",
            )
        constants = {n: looked_up(table, n, place, PRESSURE, uncertainty) for n in names}
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
    """Elastic constants that a table has."""
    return [name for name in table.columns if _CONSTANT.fullmatch(name)]


def _measured(table: Table, name: str, temperature: float, dimension: Dimension) -> tuple[float, float]:
    value, uncertainty = table.measured(name, _place(table, temperature))
    return converted(table, name, value, uncertainty, dimension)


def _place(table: Table, temperature: float) -> float:
    """Return the value of the first column at a temperature in K."""
    if table.index.name != "temperature":
        raise InputError(
            "the table is not looked up by temperature",
            where=str(table.path),
            found=f"first column {table.index.name}",
            expected="temperature",
        )
    return table.at(temperature, 0.0)
