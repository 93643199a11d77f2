"""Writing a config as YAML that reads back as the same config."""

from io import StringIO
from typing import Any

from ruamel.yaml import YAML

from mlip_refine.config.root import Config


def dump_config(config: Config) -> str:
    """Write a config with every default and unit visible.

    Args:
        config: The config.

    Returns:
        YAML that `load_config` reads as an equal config from any folder: ``base`` is written as an
        absolute path.
    """
    data = config.model_dump(mode="python", by_alias=True, context={"units": True})
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.allow_unicode = True
    yaml.width = 110
    stream = StringIO()
    yaml.dump(_plain(data), stream)
    return stream.getvalue()


def _plain(value: Any) -> Any:
    """Turn tuples and paths into what YAML knows."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
