"""The JSON schema of a config, for editors and for people."""

from collections.abc import Mapping
from typing import Any

from mlip_refine.config.root import Config
from mlip_refine.config.yaml.source_map import loss_head_schema


def config_schema(loss_schemas: Mapping[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """Assemble the schema of the whole file.

    Args:
        loss_schemas: JSON schema of the options of every loss type, by type.

    Returns:
        A JSON schema (draft 2020-12) whose ``losses`` accept exactly the given types.
    """
    schema = Config.model_json_schema(by_alias=True)
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    if loss_schemas:
        definitions = schema.setdefault("$defs", {})
        branches = [_loss(kind, options, definitions) for kind, options in sorted(loss_schemas.items())]
        schema["properties"]["losses"]["items"] = {"oneOf": branches}
    return schema


def _loss(kind: str, options: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Join the keys of every loss with the options of one, and move its definitions to the top."""
    prefix = f"{kind}."
    for name, inner in options.get("$defs", {}).items():
        definitions[f"{prefix}{name}"] = _renamed(inner, prefix)
    head = loss_head_schema()["properties"]
    own = _renamed({key: value for key, value in options.items() if key != "$defs"}, prefix)
    return {
        **own,
        "type": "object",
        "properties": {
            **head,
            **own.get("properties", {}),
            "type": {"const": kind, "description": "This loss."},
        },
        "required": ["type", *(key for key in own.get("required", []) if key != "type")],
        "additionalProperties": False,
    }


def _renamed(schema: Any, prefix: str) -> Any:
    """Point references at the definitions' new names."""
    if isinstance(schema, list):
        return [_renamed(item, prefix) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: value.replace("#/$defs/", f"#/$defs/{prefix}") if key == "$ref" else _renamed(value, prefix)
        for key, value in schema.items()
    }
