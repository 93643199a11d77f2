"""Elastic constants at temperatures: the file `thermal_elastic.json`, and its table."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from rich import box
from rich.console import Console
from rich.table import Table

from mlip_refine.errors import InputError
from mlip_refine.quantities import Measured, error_of

FORMAT = "mlip_refine thermal elastic 1"

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
        atom_steps: Steps of molecular dynamics times atoms, the equilibration included.
        constants: Independent constants C in the standard axes, GPa.
        isothermal: The same at constant temperature, GPa.
        stress_strain: Independent components of the symmetric part of the stress-strain coefficients B at the
            stress of the cell, GPa: what measurements show; they are C where there is no stress.
        moduli: K, G, E (GPa) and nu by Voigt's average of B.
        pressure: Of the cell, GPa; `None` where it is refused.
        rest_strain: Strain xx, yy, zz in the standard axes that would bring the cell to no pressure, to
            first order; fluctuation only.
        targets: Measured values of the table, GPa.
        verdicts: What happened to systems.
        refused: Why there are no values; empty where there are.
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
    targets: Values
    verdicts: tuple[str, ...]
    constants: Values = field(default_factory=dict)
    isothermal: Values = field(default_factory=dict)
    stress_strain: Values = field(default_factory=dict)
    moduli: Values = field(default_factory=dict)
    pressure: Measured | None = None
    rest_strain: Values = field(default_factory=dict)
    refused: str = ""

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
        """Plain data; what is refused is null."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values = {name: data[name] for name in ("targets", *_FOUND)} | {"rest_lattice": self.rest_lattice}
        data |= {name: {k: _plain(m) for k, m in v.items()} for name, v in values.items()}
        if self.refused:
            return data | dict.fromkeys([*_FOUND, "rest_lattice"])
        return data | {"pressure": _plain(self.pressure), "refused": None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read plain data."""
        read = {name: value for name, value in data.items() if name != "rest_lattice"}
        for name in ("targets", *_FOUND):
            read[name] = {k: _read(m) for k, m in (data[name] or {}).items()}
        read["pressure"] = data["pressure"] and _read(data["pressure"])
        read |= {name: tuple(data[name]) for name in ("lattice_A", "verdicts")}
        return cls(**read | {"refused": data["refused"] or ""})


_FOUND = ("constants", "isothermal", "stress_strain", "moduli", "rest_strain")


def _plain(measured: Measured | None) -> dict[str, Any] | None:
    return asdict(measured) | {"se": measured.known_se} if measured else None


def _read(data: Mapping[str, Any]) -> Measured:
    return Measured(data["value"], error_of(data["se"]), data["unit"])


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
    """Print a table for every phase and method: C, below it B with its moduli, and what was measured."""
    for phase, kind, method in dict.fromkeys((p.phase, p.kind, p.method) for p in points):
        mine = [p for p in points if (p.phase, p.kind, p.method) == (phase, kind, method)]
        console.print(_table(f"{phase}: {kind} constants, GPa, by {method}", mine))
    for p in points:
        if p.refused:
            console.print(f"{p.name}, {p.method}: {p.refused}", markup=False, soft_wrap=True)


def _table(title: str, points: Sequence[ThermalElasticPoint]) -> Table:
    columns = list(dict.fromkeys(c for p in points for c in (*p.constants, *p.moduli)))
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for heading in ("T, K", "", *columns, "P"):
        table.add_column(heading, justify="right", overflow="fold")
    for p in points:
        temperature = f"{p.temperature_K:g}"
        if p.refused or p.pressure is None:
            table.add_row(temperature, "refused")
            continue
        table.add_row(temperature, "C", *_cells(p.constants, columns), _number(p.pressure))
        table.add_row("", "B", *_cells({**p.stress_strain, **p.moduli}, columns))
        if p.targets:
            wanted = [f"{p.targets[c].value:.4g}" if c in p.targets else "" for c in columns]
            table.add_row("", "measured", *wanted, style="dim")
    return table


def _cells(values: Values, columns: Sequence[str]) -> list[str]:
    return [_number(values[c]) if c in values else "" for c in columns]


def _number(measured: Measured) -> str:
    return str(measured).removesuffix(measured.unit).strip()
