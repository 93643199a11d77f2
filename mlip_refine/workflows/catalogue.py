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


def config_keys() -> CommandResult:
    """Return the JSON schema of a config, for editors that complete and check YAML files."""
    schemas = {name: loss.options.model_json_schema(by_alias=True) for name, loss in loss_types().items()}
    whole = config_schema(schemas)
    return CommandResult(whole, lambda _: print_json(whole))


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
    lines = [f"{name}: {cleandoc(loss.options.__doc__ or '')}", "", "Options"]
    for key, option in (common | schema.get("properties", {})).items():
        unit = _unit(option)
        parts = [type_in_words(option, schema.get("$defs", {}), quantity=unit is not None)]
        if unit is not None and unit != "1":
            parts.append(unit)
        default = option.get("default")
        if key in schema.get("required", ()):
            parts.append("required")
        else:
            written = default if isinstance(default, str) else json.dumps(default, ensure_ascii=False)
            parts.append(f"default {written}")
        lines += [f"  {key}: {', '.join(parts)}", *_indented(option.get("description", ""))]
    if issubclass(loss.options, ObservableOptions):
        lines += ["", "Columns of a table", *_indented(loss.options.table_columns())]
    return "\n".join(lines)


def type_in_words(schema: Any, definitions: Mapping[str, Any], *, quantity: bool = False) -> str:
    """Return what an option may be, such as `list[number] | null`.

    Args:
        schema: JSON schema of the option.
        definitions: Schemas that it refers to, by name.
        quantity: Whether numbers have a unit; text beside a number is then the same with its unit.
    """
    if "$ref" in schema:
        inner = definitions[schema["$ref"].rpartition("/")[2]]
        return f"section({', '.join(inner.get('properties', ()))})"
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


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent="      ", subsequent_indent="      ")


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
    help="Print the JSON schema of a config.",
    example="mlip-refine schema > config.schema.json",
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
