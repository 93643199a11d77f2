"""Verbs that print what a config may say, and the guide."""

import json
import sys
import textwrap
from collections.abc import Mapping
from importlib.resources import files
from inspect import cleandoc
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown

from mlip_refine.config import config_schema
from mlip_refine.config.yaml.source_map import loss_head_schema
from mlip_refine.errors import InputError, nearest
from mlip_refine.losses.ensemble.observable_options import ObservableOptions
from mlip_refine.losses.registry import LossType, loss_types
from mlip_refine.workflows.base import Command, CommandResult, print_json


def config_keys(
    section: Annotated[
        str | None,
        typer.Argument(metavar="SECTION", help="A section or key, such as md or md.dynamics, as text."),
    ] = None,
) -> CommandResult:
    """Return the JSON schema of a config, for editors that complete and check YAML files, or explain a part.

    Raises:
        InputError: There is no such section or key.
    """
    types = loss_types()
    schemas = {name: loss.options.model_json_schema(by_alias=True) for name, loss in types.items()}
    whole = config_schema(schemas)
    if section is None:
        return CommandResult(whole, lambda _: print_json(whole))
    definitions = whole["$defs"]
    found: Mapping[str, Any] = whole
    known, passed = found, list[str]()
    for word in section.split("."):
        known = _section_in(found, definitions) or {}
        branches = found.get("items", {}).get("oneOf", ())
        keys = {one["properties"]["type"]["const"]: one for one in branches} or known.get("properties", {})
        if word not in keys:
            place, near = ".".join(passed), nearest(word, keys)
            raise InputError(
                f"no key {word!r} in {place}" if passed else f"a config has no section {word!r}",
                expected=f"one of {', '.join(keys)}"
                if keys
                else f"nothing after {place}, which is no section",
                fix=f"Did you mean {'.'.join([*passed, near])}?" if near else None,
            )
        found = keys[word]
        passed.append(word)

    def show(console: Console) -> None:
        if passed[0] == "losses" and len(passed) == 2:
            text = describe_loss(passed[1], types[passed[1]])
        elif passed == ["losses"]:
            names = textwrap.fill(", ".join(types), 100, initial_indent="  ", subsequent_indent="  ")
            text = f"losses: {found['description']}\n\n{names}"
        else:
            inner = _section_in(found, definitions)
            required = passed[-1] in known.get("required", ())
            head = "\n".join(describe_key(section, found, definitions, required=required))
            keys = [] if inner is None else ["", "Keys", *describe_keys(inner, definitions)]
            text = "\n".join([head, *keys])
        console.print(text, markup=False, soft_wrap=True)

    return CommandResult({**found, "$defs": definitions}, show)


def list_losses(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="One loss, with the types of its options.")
    ] = None,
) -> CommandResult:
    """List every type of loss and its options, with their units and defaults, or explain one.

    Raises:
        InputError: There is no such loss.
    """
    known = loss_types()
    if name is not None and name not in known:
        word = nearest(name, known)
        raise InputError(
            f"unknown loss {name!r}",
            expected=f"one of {', '.join(sorted(known))}",
            fix=f"Did you mean {word!r}?" if word else None,
        )
    chosen = sorted(known) if name is None else [name]

    def show(console: Console) -> None:
        if name is not None:
            console.print(describe_loss(name, known[name]), markup=False, soft_wrap=True)
            return
        for each in chosen:
            console.print(f"[bold]{each}[/bold]: {known[each].description}")
            for field, info in known[each].options.model_fields.items():
                default = "required" if info.is_required() else f"default {info.default}"
                console.print(f"  {info.alias or field}: {info.description} ({default})", markup=False)

    return CommandResult(
        {each: known[each].options.model_json_schema(by_alias=True) for each in chosen}, show
    )


def describe_loss(name: str, loss: LossType) -> str:
    """Return the options of a loss with types, units and defaults, and the columns of its tables, as text."""
    schema = loss.options.model_json_schema(by_alias=True)
    common = {key: each for key, each in loss_head_schema()["properties"].items() if key != "type"}
    every = schema | {"properties": common | schema.get("properties", {})}
    lines = [f"{name}: {cleandoc(loss.options.__doc__ or '')}", "", "Options"]
    lines += describe_keys(every, schema.get("$defs", {}))
    if issubclass(loss.options, ObservableOptions):
        lines += ["", "Columns of a table", *_indented(loss.options.table_columns())]
    return "\n".join(lines)


def describe_keys(section: Mapping[str, Any], definitions: Mapping[str, Any], depth: int = 1) -> list[str]:
    """Return a line or more for every key of a section: type, unit, default, meaning; then its own keys.

    Args:
        section: JSON schema of the section.
        definitions: Schemas that it refers to, by name.
        depth: Level of the indentation.
    """
    lines = []
    for key, option in section.get("properties", {}).items():
        if key == "type" and "const" in option:
            continue
        required = key in section.get("required", ())
        described = describe_key(key, option, definitions, required=required)
        lines += [f"{'  ' * depth}{line}" for line in described]
        inner = _section_in(option, definitions)
        if inner is not None:
            lines += describe_keys(inner, definitions, depth + 2)
    return lines


def describe_key(
    key: str, schema: Mapping[str, Any], definitions: Mapping[str, Any], *, required: bool
) -> list[str]:
    """Return type, unit and default of a key in a line, and its meaning below it.

    Args:
        key: Name of the key.
        schema: Its JSON schema.
        definitions: Schemas that it refers to, by name.
        required: Whether a config must give the key.
    """
    unit = _unit(schema)
    parts = [type_in_words(schema, definitions, quantity=unit is not None)]
    if unit is not None and unit != "1":
        parts.append(unit)
    default = schema.get("default")
    if required:
        parts.append("required")
    elif "default" in schema:
        written = default if isinstance(default, str) else json.dumps(default, ensure_ascii=False)
        parts.append(f"default {written}")
    return [f"{key}: {', '.join(parts)}", *_indented(schema.get("description", ""), 4)]


def _section_in(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Schema of the section that a key is, or that entries of its list or mapping are; None for others."""
    if "$ref" in schema:
        inner: Mapping[str, Any] = definitions[schema["$ref"].rpartition("/")[2]]
        return inner if "properties" in inner else None
    if "properties" in schema:
        return schema
    inside = [schema.get("items"), schema.get("additionalProperties"), *schema.get("anyOf", ())]
    found = (_section_in(each, definitions) for each in inside if isinstance(each, Mapping))
    return next((each for each in found if each is not None), None)


def type_in_words(schema: Any, definitions: Mapping[str, Any], *, quantity: bool = False) -> str:
    """Return what an option may be, such as `list[number] | null`.

    Args:
        schema: JSON schema of the option.
        definitions: Schemas that it refers to, by name.
        quantity: Whether numbers have a unit; text beside a number is then the same with its unit.
    """
    if "$ref" in schema:
        inner = definitions[schema["$ref"].rpartition("/")[2]]
        return "section" if "properties" in inner else type_in_words(inner, definitions)
    if "anyOf" in schema:
        parts = [part for part in schema["anyOf"] if not (quantity and part.get("type") == "string")]
        return " | ".join(
            dict.fromkeys(type_in_words(each, definitions, quantity=quantity) for each in parts)
        )
    kind = schema.get("type", "anything")
    inside = schema.get("items") or schema.get("prefixItems", [{}])[0]
    if kind == "object":
        inside = schema.get("additionalProperties")
    if kind in ("array", "object") and isinstance(inside, Mapping):
        outer = "list" if kind == "array" else "mapping"
        return f"{outer}[{type_in_words(inside, definitions, quantity=quantity)}]"
    words = {"string": "text", "integer": "whole number", "boolean": "true | false", "object": "mapping"}
    return " | ".join(map(str, schema.get("enum", [words.get(kind, kind)])))


def _unit(schema: Any) -> str | None:
    """Unit of the numbers of an option: the first that its schema names."""
    if isinstance(schema, list):
        return next(filter(None, map(_unit, schema)), None)
    if not isinstance(schema, Mapping):
        return None
    found: str | None = schema.get("x-unit")
    return found or _unit(list(schema.values()))


def _indented(text: str, by: int = 6) -> list[str]:
    return textwrap.wrap(text, 94 + by, initial_indent=" " * by, subsequent_indent=" " * by)


def open_guide(
    page: Annotated[
        str, typer.Argument(metavar="PAGE", help="Name of a page; without one, the list.")
    ] = "index",
) -> CommandResult:
    """Find a page of the guide; it is shown formatted in a terminal, as Markdown elsewhere.

    Raises:
        InputError: There is no such page.
    """
    pages = {path.name.removesuffix(".md"): path for path in (files("mlip_refine") / "guide").iterdir()}
    if page not in pages:
        word = nearest(page, pages)
        raise InputError(
            f"the guide has no page {page!r}",
            expected=f"one of {', '.join(sorted(pages))}",
            fix=f"Did you mean {word!r}?" if word else None,
        )
    text = pages[page].read_text(encoding="utf-8")

    def show(console: Console) -> None:
        if sys.stdout.isatty():
            console.print(Markdown(text))
        else:
            sys.stdout.write(text)

    return CommandResult({"page": page, "text": text}, show)


schema = Command(
    name="schema",
    help="Print the JSON schema of a config, or explain a section or key.",
    example="mlip-refine schema md.dynamics",
    function=config_keys,
)
losses = Command(
    name="losses",
    help="List the losses and their options, or explain one.",
    example="mlip-refine losses pressure",
    function=list_losses,
)
guide = Command(
    name="guide",
    help="Show the guide: a page per verb, loss family and concept.",
    example="mlip-refine guide reweighting",
    function=open_guide,
)
