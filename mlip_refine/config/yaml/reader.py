"""Reading YAML into plain data and the place of every key and value."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from mlip_refine.config.yaml.source_map import Address, Places, dotted
from mlip_refine.errors import InputError

_TAG = "tag:yaml.org,2002:"
_CONSTRUCTED = {f"{_TAG}{kind}" for kind in ("null", "bool", "int", "float")}
_TEXT = {f"{_TAG}{kind}" for kind in ("str", "timestamp", "binary", "value")}
_MOST_NODES = 100_000


@dataclass
class Tree:
    """A YAML document.

    Attributes:
        data: Plain dicts, lists and scalars.
        places: ``file:line`` of every key and value.
        problems: What is wrong already: duplicate keys, unknown tags.
    """

    data: Any
    places: Places
    problems: list[InputError] = field(default_factory=list)


def read_tree(path: Path) -> Tree:
    """Read a YAML file.

    Args:
        path: The file; messages name it as given here.

    Returns:
        The data and where each was written.

    Raises:
        InputError: The file cannot be read or is no YAML.
    """
    label = str(path)
    if path.is_dir():
        raise InputError("a folder is no config", where=label, expected="a YAML file")
    if not path.exists():
        near = sorted(path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        beside = f"The folder has {', '.join(file.name for file in near[:5])}." if near else None
        raise InputError("the config does not exist", where=label, fix=beside)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the config cannot be read ({error})", where=label, expected="YAML in UTF-8"
        ) from error
    return parse_tree(text, label)


def parse_tree(text: str, label: str) -> Tree:
    """Read YAML from text; see `read_tree`."""
    yaml = YAML(typ="safe", pure=True)
    try:
        node = yaml.compose(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(
            f"no valid YAML: {error.problem or error.context}", where=f"{label}:{line}"
        ) from error
    except YAMLError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"no valid YAML: {reason}", where=label) from error
    except RecursionError as error:
        raise InputError("no config: too many levels", where=label) from error
    reader = _Reader(label, yaml)
    data = None if node is None else reader.read(node, ())
    return Tree(data, reader.places, reader.problems)


def parse_scalar(text: str, label: str) -> Any:
    """Read one YAML value, as an override gives it."""
    return parse_tree(text, label).data


class _Reader:
    """Turns the nodes of one document into plain data."""

    def __init__(self, label: str, yaml: YAML) -> None:
        self.label = label
        self.yaml = yaml
        self.places = Places()
        self.problems: list[InputError] = []
        self._open: list[int] = []
        self._count = 0

    def read(self, node: Node, address: Address) -> Any:
        self._guard(node)
        self.places.values[address] = self._place(node)
        self._open.append(id(node))
        try:
            if isinstance(node, MappingNode):
                return self._mapping(node, address)
            if isinstance(node, SequenceNode):
                return self._sequence(node, address)
            return self._scalar(node)
        finally:
            self._open.pop()

    def _guard(self, node: Node) -> None:
        """Refuse anchors that contain themselves or unfold without end."""
        self._count += 1
        if id(node) in self._open or self._count > _MOST_NODES:
            raise InputError("an anchor unfolds without end", where=self._place(node))

    def _mapping(self, node: MappingNode, address: Address) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == f"{_TAG}merge":
                merged.update(self._merge(value_node, address))
                continue
            key = self._key(key_node)
            inner = (*address, key)
            if key in data:
                first = self.places.keys[inner]
                self._report(key_node, f"key {dotted(inner)!r} is given twice, first at {first}")
                continue
            self.places.keys[inner] = self._place(key_node)
            data[key] = self.read(value_node, inner)
            if not isinstance(value_node, ScalarNode):
                self.places.values[inner] = self._place(key_node)
        return {**merged, **data}

    def _sequence(self, node: SequenceNode, address: Address) -> list[Any]:
        for index, item in enumerate(node.value):
            self.places.keys[(*address, index)] = self._place(item)
        return [self.read(item, (*address, index)) for index, item in enumerate(node.value)]

    def _merge(self, node: Node, address: Address) -> dict[str, Any]:
        """Return the keys that ``<<: *anchor`` brings in."""
        value = self.read(node, address)
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, dict) for part in parts):
            self._report(node, "'<<' brings in something that is no section")
            return {}
        return {key: item for part in reversed(parts) for key, item in part.items()}

    def _key(self, node: Node) -> str:
        if not isinstance(node, ScalarNode):
            self._report(node, "a key must be a word")
            return "?"
        return str(node.value)

    def _scalar(self, node: Node) -> Any:
        if node.tag in _CONSTRUCTED:
            return self.yaml.constructor.construct_object(node)
        if node.tag not in _TEXT:
            self._report(node, f"the YAML tag {node.tag!r} is not allowed here")
        return node.value

    def _place(self, node: Node) -> str:
        return f"{self.label}:{node.start_mark.line + 1}"

    def _report(self, node: Node, text: str) -> None:
        self.problems.append(InputError(text, where=self._place(node)))
