"""Verbs that print what a config may say: its schema, and the losses."""

from mlip_refine.config import config_schema
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
