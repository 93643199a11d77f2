"""Elastic constants at temperatures: the file `thermal_elastic.json`, and its table."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rich import box
from rich.console import Console
from rich.table import Table

from mlip_refine.errors import InputError
from mlip_refine.quantities import Measured

FORMAT = "mlip_refine thermal elastic 1"

WIDTH = 130
"""Of tables that do not go to a terminal, characters."""

type Values = Mapping[str, Measured]


@dataclass(frozen=True)
class ThermalElasticPoint:
    """Elastic constants of one crystal in one fixed cell at one temperature, by one method.

    Attributes:
        name: Of the state.
        phase: Of the config.
        method: `fluctuation` or `deformation`.
        kind: `adiabatic` or `isothermal`.
        temperature_K: Temperature.
        lattice_A: Lattice constants (a) or (a, c) that the table gives; empty for the cell of the phase.
        n_atoms: Of the cell.
        frames: That count.
        atom_steps: Steps of molecular dynamics times atoms.
        constants: Independent constants in the standard axes, GPa.
        isothermal: The same at constant temperature, GPa.
        moduli: K, G (GPa) and nu by Voigt's average; fluctuation only.
        pressure: Of the cell, GPa.
        rest_strain: Strain xx, yy, zz in the standard axes that would bring the cell to no pressure, to
            first order; fluctuation only.
        targets: Measured values of the table, GPa.
        verdicts: What happened to systems.
    """

    name: str
    phase: str
    method: str
    kind: str
    temperature_K: float  # noqa: N815 - the unit's own case
    lattice_A: tuple[float, ...]  # noqa: N815 - the unit's own case
    n_atoms: int
    frames: int
    atom_steps: int
    constants: Values
    isothermal: Values
    moduli: Values
    pressure: Measured
    rest_strain: Values
    targets: Values
    verdicts: tuple[str, ...]

    @property
    def rest_lattice(self) -> dict[str, Measured]:
        """Lattice constants at no pressure, Å, where the cell has (a, c) or (a)."""
        if not self.lattice_A or not self.rest_strain:
            return {}
        xx, yy, zz = (self.rest_strain[n] for n in ("xx", "yy", "zz"))
        across = Measured((xx.value + yy.value) / 2, (xx.se + yy.se) / 2, "")
        along = {"a": across, "c": zz}
        return {
            axis: Measured(length * (1 + along[axis].value), length * along[axis].se, "Å")
            for axis, length in zip("ac", self.lattice_A, strict=False)
        }

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in _VALUES:
            data[name] = {k: _plain(m) for k, m in data[name].items()}
        return data | {"pressure": _plain(self.pressure)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read plain data."""
        read = dict(data)
        for name in _VALUES:
            read[name] = {k: Measured(**m) for k, m in data[name].items()}
        read |= {"pressure": Measured(**data["pressure"]), "lattice_A": tuple(data["lattice_A"])}
        return cls(**read | {"verdicts": tuple(data["verdicts"])})


_VALUES = ("constants", "isothermal", "moduli", "rest_strain", "targets")


def _plain(measured: Measured) -> dict[str, Any]:
    return {"value": measured.value, "se": measured.se, "unit": measured.unit}


def thermal_json(name: str, model_hash: str, points: tuple[ThermalElasticPoint, ...]) -> dict[str, Any]:
    """What `thermal_elastic.json` holds."""
    found = [p.as_json() for p in points]
    return {"format": FORMAT, "name": name, "model_hash": model_hash, "points": found}


def read_thermal_elastic(folder: Path) -> tuple[ThermalElasticPoint, ...]:
    """Read `thermal_elastic.json` of a run folder.

    Raises:
        InputError: The file is missing or is none of these.
    """
    path = Path(folder) / "thermal_elastic.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return tuple(ThermalElasticPoint.from_json(entry) for entry in data["points"])
    except FileNotFoundError as error:
        raise InputError("the result file is missing", where=str(path)) from error
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        problem = "this is no result of elastic constants at temperatures"
        raise InputError(problem, where=str(path), found=str(error)) from error


def print_thermal_elastic(console: Console, points: tuple[ThermalElasticPoint, ...]) -> None:
    """Print constants, moduli and pressure of every state, measured values below them where there are any."""
    for method in dict.fromkeys(p.method for p in points):
        mine = [p for p in points if p.method == method]
        columns = list(mine[0].constants) + list(mine[0].moduli)
        table = Table(title=f"{mine[0].kind} constants, GPa, by {method}", box=box.SIMPLE_HEAD)
        for title in ("T, K", "phase", *columns, "P"):
            table.add_column(title, justify="right")
        for p in mine:
            values = {**p.constants, **p.moduli}
            cells = [_number(values[c]) for c in columns]
            table.add_row(f"{p.temperature_K:g}", p.phase, *cells, _number(p.pressure))
            if p.targets:
                row = [f"{p.targets[c].value:.4g}" if c in p.targets else "" for c in columns]
                table.add_row("", "measured", *row, "", style="dim")
        console.print(table, width=None if console.is_terminal else max(console.width, WIDTH))


def _number(measured: Measured) -> str:
    return str(measured).removesuffix(measured.unit).strip()
