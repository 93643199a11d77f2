"""Numbers with units: what a config may write, and what the program stores.

A bare number is taken in the default unit of its kind; text carries its own unit. Stored are K, GPa,
fs, Å, meV/atom and 1/ps, whatever was written.
"""

import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Self

from pydantic import GetJsonSchemaHandler, SerializationInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from mlip_refine.errors import nearest

_QUANTITY = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(.*?)\s*")
# CODATA 2014, as in ASE, which is not imported: a refused config should cost no time.
_KJ_PER_MOL = 10.364269574711573
_BOHR = 0.5291772105638411


def problem(expected: str, fix: str = "", key: str | tuple[str, ...] | None = None) -> PydanticCustomError:
    """Return an error that the config's printer understands.

    Args:
        expected: What is allowed.
        fix: What to do, a sentence of its own.
        key: The key inside the section that is at fault, where a check spans several; or the keys that
            lead to it.
    """
    template = "expected {expected}. {fix}" if fix else "expected {expected}"
    return PydanticCustomError("mlip_refine", template, {"expected": expected, "fix": fix, "key": key})


@dataclass(frozen=True, eq=False)
class Dimension:
    """A kind of quantity, attached to a float field by ``Annotated``.

    Attributes:
        kind: What it is called in messages.
        units: Factor to the stored unit by symbol; the first is the stored and default unit.
        offsets: What to add after the factor, by symbol.
        readable: Units that a dumped config prefers, when the number survives unchanged.
        above: Exclusive lower bound in the stored unit.
        least: Inclusive lower bound in the stored unit.
        most: Largest size in the stored unit; what is larger is a slip of the pen.
    """

    kind: str
    units: Mapping[str, float]
    offsets: Mapping[str, float] | None = None
    readable: tuple[str, ...] = ()
    above: float | None = None
    least: float | None = None
    most: float = 1e9

    @property
    def unit(self) -> str:
        """The stored unit, also that of a bare number."""
        return next(iter(self.units))

    def bounded(self, *, above: float | None = None, least: float | None = None) -> Self:
        """Return the same kind of quantity with a lower bound in the stored unit."""
        return replace(self, above=above, least=least)

    def parse(self, value: object) -> float:
        """Read a number or a text with a unit.

        Args:
            value: ``2``, ``"2 fs"``, ``"0.1ps"``.

        Returns:
            The number in the stored unit.

        Raises:
            PydanticCustomError: The text is no quantity of this kind, or it is out of bounds.
        """
        if isinstance(value, str):
            match = _QUANTITY.fullmatch(unicodedata.normalize("NFC", value).replace("−", "-"))
            if match is None:
                raise problem(self.describe())
            factor, offset = self.conversion(match[2] or self.unit)
            number = float(match[1]) * factor + offset
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise problem(self.describe())
        else:
            try:
                number = float(value)
            except OverflowError:
                raise problem(self.describe()) from None
        return self.checked(number)

    def conversion(self, unit: str) -> tuple[float, float]:
        """Return factor and offset that turn a number in a unit into one in the stored unit.

        Raises:
            PydanticCustomError: It is no unit of this kind.
        """
        plain = _plain_unit(unit)
        if plain not in self.units:
            word = nearest(unit, self.units)
            expected = f"a {self.kind} in one of: {', '.join(self.units)} (unit {unit!r} is not one)"
            raise problem(expected, f"Did you mean {word!r}?" if word else "")
        return self.units[plain], (self.offsets or {}).get(plain, 0.0)

    def checked(self, number: float) -> float:
        """Return a number in the stored unit, if it is within the bounds.

        Raises:
            PydanticCustomError: It is not finite, or out of bounds.
        """
        inside = (self.above is None or number > self.above) and (self.least is None or number >= self.least)
        if not (math.isfinite(number) and inside):
            raise problem(self.describe())
        if abs(number) > self.most:
            raise problem(f"a {self.kind} of at most {self.most:g} {self.unit}")
        return number

    def describe(self) -> str:
        """Return what is allowed, in words."""
        bound = ""
        if self.least is not None:
            bound = f" of at least {self.least:g} {self.unit}"
        elif self.above is not None:
            bound = f" above {self.above:g} {self.unit}"
        return f"a {self.kind}{bound} (a bare number is in {self.unit}; units: {', '.join(self.units)})"

    def write(self, value: float) -> str:
        """Return a text with a unit that reads back as exactly the same number."""
        for unit in self.readable:
            text = f"{value / self.units[unit]:g} {unit}"
            if value >= self.units[unit] and self.parse(text) == value:
                return text
        return f"{int(value) if value == int(value) else value!r} {self.unit}"

    def _serialize(self, value: float, info: SerializationInfo) -> float | str:
        context = info.context
        return self.write(value) if isinstance(context, dict) and context.get("units") else value

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        serializer = core_schema.plain_serializer_function_ser_schema(self._serialize, info_arg=True)
        return core_schema.no_info_plain_validator_function(self.parse, serialization=serializer)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        number: dict[str, Any] = {"type": "number"}
        if self.above is not None:
            number["exclusiveMinimum"] = self.above
        if self.least is not None:
            number["minimum"] = self.least
        text = {"type": "string", "description": f"number and unit: {', '.join(self.units)}"}
        return {"anyOf": [number, text], "x-unit": self.unit}


def _plain_unit(unit: str) -> str:
    """Bring the ways to write one unit to one: ``1/ps``, ``ps^-1`` and ``/ps``; ``A`` and ``Å``."""
    inverse = re.fullmatch(r"(?:1\s*/|/|)\s*(\w+?)\s*(\^-1|\*\*-1|⁻¹|-1|)", unit)
    if inverse and (inverse[2] or "/" in unit):
        return f"/{inverse[1]}"
    return re.sub(r"\s*/\s*", "/", unit)


TEMPERATURE = Dimension("temperature", {"K": 1.0, "°C": 1.0}, offsets={"°C": 273.15}, above=0.0, most=1e6)
PRESSURE = Dimension("pressure", {"GPa": 1.0, "MPa": 1e-3, "kbar": 0.1, "bar": 1e-4, "Pa": 1e-9}, most=1e4)
TIME = Dimension(
    "time", {"fs": 1.0, "ps": 1e3, "ns": 1e6}, readable=("ns", "ps"), above=0.0, least=1e-3, most=1e12
)
LENGTH = Dimension("length", {"Å": 1.0, "A": 1.0, "Ang": 1.0, "nm": 10.0, "bohr": _BOHR}, above=0.0, most=1e5)
ENERGY_PER_ATOM = Dimension(
    "energy per atom",
    {"meV/atom": 1.0, "eV/atom": 1e3, "kJ/mol/atom": _KJ_PER_MOL, "kJ/mol": _KJ_PER_MOL},
)
RATE = Dimension("rate", {"/ps": 1.0, "/fs": 1e3, "/ns": 1e-3}, above=0.0)

Temperature = Annotated[float, TEMPERATURE]
Pressure = Annotated[float, PRESSURE]
PositivePressure = Annotated[float, PRESSURE.bounded(above=0.0)]
Time = Annotated[float, TIME]
TimeOrZero = Annotated[float, TIME.bounded(least=0.0)]
Length = Annotated[float, LENGTH]
EnergyPerAtom = Annotated[float, ENERGY_PER_ATOM]
PositiveEnergyPerAtom = Annotated[float, ENERGY_PER_ATOM.bounded(above=0.0)]
Rate = Annotated[float, RATE]
