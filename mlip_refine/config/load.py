"""Reading a config (file, overrides, every problem of both in one error) and writing it with all defaults."""

from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML

from mlip_refine.config.root import Config
from mlip_refine.config.yaml.diagnostics import combine, explain, keys_by_section
from mlip_refine.config.yaml.reader import Tree, apply_overrides, parse_overrides, read_tree
from mlip_refine.config.yaml.source_map import COMMON_LOSS_KEYS, LocatedNode, Places
from mlip_refine.errors import InputError
from mlip_refine.files import user_path


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file.

    Args:
        path: The YAML file.
        overrides: Values that replace those of the file: ``training.steps=5``.

    Returns:
        The config; relative input paths start from the folder of the file.

    Raises:
        InputError: The file cannot be read, or it has problems: all of them, one line each.
    """
    path = Path(path)
    tree = read_tree(path)
    if tree.data is None and not overrides:
        raise InputError("the config is empty", where=str(path), expected="at least name and potential")
    if not isinstance(tree.data, dict | None):
        raise InputError("the config is no section", where=str(path), expected="key: value on every line")
    apply_overrides(tree, parse_overrides(overrides))
    tree.places.values.setdefault((), f"{path}:1")
    tree.places.keys.setdefault((), f"{path}:1")
    return _validate(tree, str(path), path.parent)


def config_from_dict(data: Mapping[str, Any], base: str | Path = ".") -> Config:
    """Build a config from plain data; like `load_config`, with `InputError` for what is wrong."""
    return _validate(Tree(dict(data), Places()), "the config", Path(base))


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


def validate_node[Options: BaseModel](model: type[Options], node: LocatedNode) -> Options:
    """Read the options of a loss.

    Args:
        model: The options; ``type``, ``name`` and ``weight`` reach it only where it has such fields.
        node: The loss as the config gives it.

    Returns:
        The options.

    Raises:
        InputError: Unknown keys or wrong values, each with its line.
    """
    known = {field.alias or name for name, field in model.model_fields.items()}
    data = {key: value for key, value in node.items() if key in known or key not in COMMON_LOSS_KEYS}
    try:
        return model.model_validate(data)
    except ValidationError as error:
        extra = [key for key in COMMON_LOSS_KEYS if key not in known]
        problems = explain(
            error,
            model,
            node.places,
            label=node.label,
            data=data,
            elsewhere=keys_by_section(Config),
            extra_keys=extra,
        )
    for problem in problems:
        if problem.where is None and node.places.values:
            problem.where = node.where()
    raise combine(problems, node.where())


def _validate(tree: Tree, label: str, base: Path) -> Config:
    data = dict(tree.data)
    given, folder, losses = data.get("base"), base.absolute(), data.get("losses")
    # A relative base starts from the folder of the config file.
    if given is None:
        data["base"] = folder
    elif isinstance(given, str) and given:
        data["base"] = str(folder / user_path(given))
    if isinstance(losses, list | tuple):
        data["losses"] = [
            LocatedNode(loss, tree.places.below(("losses", k)), f"losses[{k}]")
            if isinstance(loss, dict)
            else loss
            for k, loss in enumerate(losses)
        ]
    problems = list(tree.problems)
    config = None
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        problems += explain(error, Config, tree.places, data=data, elsewhere=keys_by_section(Config))
    if problems or config is None:
        raise combine(sorted(problems, key=_line), label)
    return config._placed(tree.places)


def _line(problem: InputError) -> tuple[int, str]:
    """Sort by line; overrides come last."""
    line = (problem.where or "").rpartition(":")[2]
    return (int(line), "") if line.isdecimal() else (10**9, problem.where or "")


def _plain(value: Any) -> Any:
    """Turn tuples and paths into what YAML knows."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
