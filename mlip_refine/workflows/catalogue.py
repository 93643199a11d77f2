"""Verbs that print what a config may say, and the guide."""

import sys
from importlib.resources import files
from typing import Annotated

import typer
from rich.markdown import Markdown

from mlip_refine.config import config_schema
from mlip_refine.errors import InputError, nearest
from mlip_refine.losses.registry import loss_types
from mlip_refine.workflows.base import Command, print_json, terminal


def print_schema() -> None:
    """Print the JSON schema of a config, for editors that complete and check YAML files."""
    schemas = {name: loss.options.model_json_schema(by_alias=True) for name, loss in loss_types().items()}
    print_json(config_schema(schemas))


def print_losses() -> None:
    """List every type of loss and its options, with their units and defaults."""
    console = terminal()
    for name, loss in sorted(loss_types().items()):
        console.print(f"[bold]{name}[/bold]: {loss.description}")
        for field, info in loss.options.model_fields.items():
            default = "required" if info.is_required() else f"default {info.default}"
            console.print(f"  {info.alias or field}: {info.description} ({default})", markup=False)


def print_guide(
    page: Annotated[
        str, typer.Argument(metavar="[PAGE]", help="Name of a page; without one, the list.")
    ] = "index",
) -> None:
    """Print a page of the guide: formatted in a terminal, as Markdown elsewhere.

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
    if sys.stdout.isatty():
        terminal().print(Markdown(text))
    else:
        sys.stdout.write(text)


schema = Command(
    name="schema",
    help="Print the JSON schema of a config.",
    example="mlip-refine schema > config.schema.json",
    function=print_schema,
)
losses = Command(
    name="losses",
    help="List the losses and their options.",
    example="mlip-refine losses",
    function=print_losses,
)
guide = Command(
    name="guide",
    help="Show the guide: a page per verb, loss family and concept.",
    example="mlip-refine guide reweighting",
    function=print_guide,
)
