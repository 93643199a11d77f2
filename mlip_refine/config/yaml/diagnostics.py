"""From pydantic's findings to one line per problem: place, key, found, allowed, nearest word."""

import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Union

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mlip_refine.config.yaml.source_map import Address, Places, dotted
from mlip_refine.errors import InputError, nearest

_EXPECTED = {
    "string_type": "a text",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "dict_type": "a section (key: value)",
    "model_type": "a section (key: value)",
    "model_attributes_type": "a section (key: value)",
    "list_type": "a list",
    "tuple_type": "a list",
}
_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "of at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "of at most"),
}
_LONGEST = 80


def explain(
    error: ValidationError,
    model: type[BaseModel],
    places: Places,
    *,
    label: str = "",
    data: Any = None,
    elsewhere: Mapping[str, Sequence[str]] | None = None,
    extra_keys: Sequence[str] = (),
) -> list[InputError]:
    """Turn the findings of a validation into messages.

    Args:
        error: What pydantic found.
        model: The model that was validated against.
        places: Where each value was written.
        label: Name of the validated branch in the whole config, such as ``losses[0]``.
        data: What was validated; settles how much of an address is real.
        elsewhere: Sections by the keys that they know, for "belongs to section".
        extra_keys: Keys of the branch that the model itself does not know.

    Returns:
        One error for each finding, in the order of the file where that is known.
    """
    printer = _Printer(model, places, label, data, elsewhere or {}, extra_keys)
    details = error.errors(include_url=False)
    return [printer.message(detail) for detail in details if detail["type"] != "default_factory_not_called"]


def combine(problems: Sequence[InputError], label: str) -> InputError:
    """Put the problems of one file into one error, one line each."""
    if len(problems) == 1:
        return problems[0]
    lines = "\n".join(f"  {problem}" for problem in problems)
    return InputError(f"{label} has {len(problems)} problems:\n{lines}")


def keys_by_section(model: type[BaseModel], address: Address = ()) -> dict[str, list[str]]:
    """Return, for every key of a model and its sections, the sections that know it."""
    index: dict[str, list[str]] = {}
    for name, field in model.model_fields.items():
        key = field.alias or name
        index.setdefault(key, []).append(dotted(address))
        # Sections in the values of a dict are left out: those have free names.
        inner = _plain(field.annotation)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            for word, sections in keys_by_section(inner, (*address, key)).items():
                index.setdefault(word, []).extend(sections)
    return index


class _Printer:
    def __init__(
        self,
        model: type[BaseModel],
        places: Places,
        label: str,
        data: Any,
        elsewhere: Mapping[str, Sequence[str]],
        extra_keys: Sequence[str],
    ) -> None:
        self.model = model
        self.places = places
        self.label = label
        self.data = data
        self.elsewhere = elsewhere
        self.extra_keys = extra_keys

    def message(self, detail: ErrorDetails) -> InputError:
        """Return the message for one finding."""
        address = self._real(detail["loc"])
        context = detail.get("ctx", {})
        if detail["type"] == "extra_forbidden":
            return self._unknown(address)
        if detail["type"] == "missing":
            return self._missing(address)
        if key := context.get("key"):
            address = (*address, *((key,) if isinstance(key, str) else key))
        value, annotation, fix = self._value(address), self._model_type(address), context.get("fix")
        if not fix and isinstance(value, str) and typing.get_origin(annotation) is typing.Literal:
            word = nearest(value, [str(word) for word in typing.get_args(annotation)])
            fix = f"Did you mean {word!r}?" if word else None
        return InputError(
            f"{self._name(address)} cannot be used" if address or self.label else "the config cannot be used",
            where=self.places.of_value(address),
            found=self._found(address, detail),
            expected=_expected(detail),
            fix=fix or None,
        )

    def _unknown(self, address: Address) -> InputError:
        key, section = str(address[-1]), self._name(address[:-1])
        known = [*self._keys(address[:-1]), *(self.extra_keys if len(address) == 1 else ())]
        homes = [home for home in self.elsewhere.get(key, ()) if home != section]
        fix = None
        if homes:
            fix = f"{key!r} belongs to {' and '.join(_quoted_section(home) for home in homes)}."
        elif word := nearest(key, known):
            fix = f"Did you mean {word!r}?"
        elif word := nearest(key, self.elsewhere):
            fix = f"Did you mean {word!r} of {_quoted_section(self.elsewhere[word][0])}?"
        return InputError(
            f"unknown key {key!r} {_in_section(section)}",
            where=self.places.of_key(address),
            expected=f"one of: {', '.join(known)}" if known else None,
            fix=fix,
        )

    def _missing(self, address: Address) -> InputError:
        key = str(address[-1])
        section = self._model_type(address[:-1])
        fields = section.model_fields if isinstance(section, type) and issubclass(section, BaseModel) else {}
        field = next((f.description for name, f in fields.items() if key in (name, f.alias)), None)
        given = self._value(address[:-1])
        if not isinstance(given, Mapping):
            return InputError(
                f"{self._name(address[:-1])} cannot be used",
                where=self.places.of_value(address[:-1]),
                found=_shown(given),
                expected="more entries",
            )
        word = nearest(key, [str(word) for word in given if word not in self._keys(address[:-1])])
        return InputError(
            f"missing key {key!r} {_in_section(self._name(address[:-1]))}",
            where=self.places.of_key(address[:-1]),
            expected=f"{field[0].lower()}{field[1:].rstrip('.')}" if field else None,
            fix=f"Is {word!r} meant to be it?" if word else None,
        )

    def _name(self, address: Address) -> str:
        return dotted((self.label, *address)) if self.label else dotted(address)

    def _keys(self, address: Address) -> list[str]:
        model = self._model_type(address)
        if isinstance(model, type) and issubclass(model, BaseModel):
            return [field.alias or name for name, field in model.model_fields.items()]
        return []

    def _model_type(self, address: Address) -> Any:
        """Return the annotation at an address; a section is given as its class."""
        current: Any = _plain(self.model)
        for step in address:
            arguments = typing.get_args(current)
            if isinstance(current, type) and issubclass(current, BaseModel):
                fields = current.model_fields.items()
                current = next((f.annotation for name, f in fields if step in (name, f.alias)), None)
            elif typing.get_origin(current) is dict:
                current = arguments[1]
            else:
                current = arguments[0] if arguments else None
            current = _plain(current)
        return current

    def _real(self, loc: Sequence[str | int]) -> Address:
        """Drop the steps that name a branch of a union or the key of a dict, not a value."""
        address: Address = ()
        for step in loc:
            value = self._value(address)
            if isinstance(value, Mapping):  # the last step may be a missing key
                real = step in value or len(address) == len(loc) - 1
            else:
                real = isinstance(value, list | tuple) and isinstance(step, int)
            if step != "[key]" and (real or self.data is None):
                address = (*address, step)
        return address

    def _value(self, address: Address) -> Any:
        value = self.data
        for step in address:
            try:
                value = value[step]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def _found(self, address: Address, detail: ErrorDetails) -> str | None:
        context = detail.get("ctx", {})
        whole_section = isinstance(detail["input"], BaseModel | Mapping) and not context.get("key")
        if whole_section and detail["type"] in ("mlip_refine", "value_error"):
            return None
        value = self._value(address) if context.get("key") or self.data is not None else detail["input"]
        if value is None and context.get("key"):
            return None
        return _shown(address[-1] if detail["loc"][-1:] == ("[key]",) else value)


def _shown(value: object) -> str:
    """Write a value as a config would, cut to a line."""
    words = {None: "nothing", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _expected(detail: ErrorDetails) -> str:
    context = detail.get("ctx", {})
    if detail["type"] == "mlip_refine":
        return str(context["expected"])
    if detail["type"] in _BOUNDS:
        key, words = _BOUNDS[detail["type"]]
        return f"a number {words} {context[key]:g}"
    if detail["type"] == "string_pattern_mismatch":
        return f"a text like {context['pattern']}"
    if detail["type"] in _EXPECTED:
        return _EXPECTED[detail["type"]]
    return (
        detail["msg"]
        .removeprefix("Value error, ")
        .removeprefix("Input should be ")
        .removeprefix("Input should ")
    )


def _in_section(section: str) -> str:
    return f"in section {section!r}" if section else "at the top level"


def _quoted_section(section: str) -> str:
    return f"section {section!r}" if section else "the top level"


def _plain(annotation: Any) -> Any:
    """Take away ``Annotated`` and ``| None``."""
    if isinstance(annotation, typing.TypeAliasType):
        return _plain(annotation.__value__)
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _plain(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        rest = [part for part in typing.get_args(annotation) if part is not type(None)]
        return _plain(rest[0]) if len(rest) == 1 else annotation
    return annotation
