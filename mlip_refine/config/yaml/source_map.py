"""Data that remember where they were written, so that a message can name the line."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from mlip_refine.config.units import problem

type Address = tuple[str | int, ...]
"""The way to a value: keys and list positions from the top."""

COMMON_LOSS_KEYS = ("type", "name", "weight")
"""Keys that every loss has beside its own options."""


def dotted(address: Address) -> str:
    """Write an address as a user would: ``losses[0].temperature``."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in address)
    return text.removeprefix(".")


@dataclass
class Places:
    """Where each value of a tree was written.

    Attributes:
        keys: Place of the key, by address.
        values: Place of the value, by address.
    """

    keys: dict[Address, str] = field(default_factory=dict)
    values: dict[Address, str] = field(default_factory=dict)

    def of_key(self, address: Address) -> str | None:
        """Return the place of a key, or of the nearest thing around it."""
        return self._nearest(self.keys, address)

    def of_value(self, address: Address) -> str | None:
        """Return the place of a value, or of the nearest thing around it."""
        return self._nearest(self.values, address)

    def mark(self, address: Address, place: str) -> None:
        """Give one place to a key and its value."""
        self.keys[address] = place
        self.values[address] = place

    def below(self, address: Address) -> "Places":
        """Return the places of one branch, by addresses that start there."""
        depth = len(address)
        return Places(
            {key[depth:]: place for key, place in self.keys.items() if key[:depth] == address},
            {key[depth:]: place for key, place in self.values.items() if key[:depth] == address},
        )

    @staticmethod
    def _nearest(known: Mapping[Address, str], address: Address) -> str | None:
        steps = range(len(address), -1, -1)
        return next((known[address[:n]] for n in steps if address[:n] in known), None)


class _LossHead(BaseModel):
    """The keys that every loss has; the others belong to the loss."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    type: str = Field(min_length=1, description="Registered name of the loss.")
    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name in results; default: type."
    )
    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="Factor on the loss, no unit.")


class LocatedNode(Mapping[str, Any]):
    """A raw mapping of a config, such as one loss, that knows the line of every key.

    Args:
        data: Plain keys and values.
        places: Where they were written; empty for a config built in code.
        label: How messages call the node, such as ``losses[0]``.
    """

    def __init__(self, data: Mapping[str, Any], places: Places | None = None, label: str = "loss") -> None:
        """Keep a copy of the mapping."""
        self._data = dict(data)
        self.places = places or Places()
        self.label = label

    @property
    def type(self) -> str:
        """Registered name of the loss."""
        return str(self._data["type"])

    @property
    def name(self) -> str:
        """Name in results: the one given, else the type."""
        return str(self._data.get("name") or self.type)

    @property
    def weight(self) -> float:
        """Factor on the loss."""
        return float(self._data.get("weight", 1.0))

    def where(self, *address: str | int) -> str:
        """Return ``file:line`` of a key (of the node itself without one), or its dotted name."""
        return self.places.of_value(address) or dotted((self.label, *address))

    def to_dict(self) -> dict[str, Any]:
        """Return the plain mapping."""
        return dict(self._data)

    def __getitem__(self, key: str) -> Any:
        return self._data[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LocatedNode) and self._data == other._data

    def __hash__(self) -> int:
        return hash((self.type, self.name))

    def __repr__(self) -> str:
        return f"LocatedNode({self._data!r})"

    @classmethod
    def _parse(cls, value: object) -> "LocatedNode":
        if not isinstance(value, Mapping):
            raise problem("a loss: a section with type, name, weight and its own options")
        _LossHead.model_validate(dict(value))
        return value if isinstance(value, LocatedNode) else cls(value)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        serializer = core_schema.plain_serializer_function_ser_schema(cls.to_dict)
        return core_schema.no_info_plain_validator_function(cls._parse, serialization=serializer)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return loss_head_schema()


def loss_head_schema() -> dict[str, Any]:
    """Return the JSON schema of the keys that every loss has."""
    return _LossHead.model_json_schema()
