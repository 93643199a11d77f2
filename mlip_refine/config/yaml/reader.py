"""Reading YAML, and dotted overrides (``training.steps=5``), into plain data with the place of every key.

ruamel's round-trip data know lines, too, but only of keys; they stop at the first duplicate key, and merge
anchors into views. Here its composer does the parsing, and every scalar and list item keeps its own line.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

from mlip_refine.config.yaml.source_map import Address, Places, dotted
from mlip_refine.errors import InputError
from mlip_refine.files import user_path

_TAG = "tag:yaml.org,2002:"
_CONSTRUCTED = {f"{_TAG}{kind}" for kind in ("null", "bool", "int", "float")}
_TEXT = {f"{_TAG}{kind}" for kind in ("str", "timestamp", "binary", "value")}
_COLLECTIONS = {f"{_TAG}{kind}" for kind in ("map", "seq", "set", "omap", "pairs")}
_MOST_NODES = 100_000
# Far below Python's limit of recursion, which composing would reach and which other libraries raise.
_MOST_LEVELS = 100
# No config of people comes near; what is longer takes minutes to parse.
_MOST_CHARACTERS = 100_000
_STEP = re.compile(r"([^.\[\]]+)|\[([0-9]{1,9})\]")
_ADDRESS = re.compile(r"[^.\[\]=]+(\[[0-9]{1,9}\])*(\.[^.\[\]=]+(\[[0-9]{1,9}\])*)*")


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
    label, path = str(path), user_path(path)
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
    if len(text) > _MOST_CHARACTERS:
        expected = f"at most {_MOST_CHARACTERS:,} characters"
        raise InputError("too long for a config", where=label, found=f"{len(text):,}", expected=expected)
    yaml = YAML(typ="safe", pure=True)
    try:
        level = 0
        for event in YAML(typ="safe", pure=True).parse(text):
            level += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
            if level > _MOST_LEVELS:
                raise InputError("no config: too many levels", where=label)
        node = yaml.compose(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(
            f"no valid YAML: {error.problem or error.context}", where=f"{label}:{line}"
        ) from error
    except YAMLError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"no valid YAML: {reason}", where=label) from error
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
        """Return the plain data of a node, and note its place and those of all below it."""
        self._count += 1
        if id(node) in self._open or self._count > _MOST_NODES:
            raise InputError("an anchor unfolds without end", where=self._place(node))
        self.places.values[address] = self._place(node)
        if isinstance(node, ScalarNode):
            if node.tag in _CONSTRUCTED:
                try:
                    return self.yaml.constructor.construct_object(node)
                except (ValueError, LookupError, ArithmeticError) as error:
                    # Such as `!!int abc`, or a number of more digits than Python reads.
                    self._report(node, f"no value of the kind {node.tag.removeprefix(_TAG)} ({error})")
                    return None
            if node.tag not in _TEXT:
                self._refuse_tag(node)
            return node.value
        if node.tag not in _COLLECTIONS:
            self._refuse_tag(node)
        if len(self._open) == _MOST_LEVELS:
            raise InputError("no config: too many levels", where=self._place(node))
        self._open.append(id(node))
        try:
            if isinstance(node, MappingNode):
                return self._mapping(node, address)
            for index, item in enumerate(node.value):
                self.places.keys[(*address, index)] = self._place(item)
            return [self.read(item, (*address, index)) for index, item in enumerate(node.value)]
        finally:
            self._open.pop()

    def _refuse_tag(self, node: Node) -> None:
        self._report(node, f"the YAML tag {node.tag!r} is not allowed here")

    def _mapping(self, node: MappingNode, address: Address) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == f"{_TAG}merge":
                # `<<: *anchor`, or a list of anchors of which the first wins.
                value = self.read(value_node, address)
                parts = value if isinstance(value, list) else [value]
                if all(isinstance(part, dict) for part in parts):
                    merged.update({k: item for part in reversed(parts) for k, item in part.items()})
                else:
                    self._report(value_node, "'<<' brings in something that is no section")
                continue
            key = str(key_node.value) if isinstance(key_node, ScalarNode) else "?"
            if not isinstance(key_node, ScalarNode):
                self._report(key_node, "a key must be a word")
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

    def _place(self, node: Node) -> str:
        return f"{self.label}:{node.start_mark.line + 1}"

    def _report(self, node: Node, text: str) -> None:
        self.problems.append(InputError(text, where=self._place(node)))


@dataclass(frozen=True)
class Override:
    """One value to put into a config.

    Attributes:
        address: Keys and list positions, as written.
        value: The new value.
        place: How messages call it.
    """

    address: Address
    value: Any
    place: str


def parse_overrides(items: Sequence[str]) -> list[Override]:
    """Read overrides.

    Args:
        items: Texts ``key.key=value``; the value is read as YAML.

    Returns:
        The overrides in their order; a later one wins.

    Raises:
        InputError: An item has no ``=``, no key, or a value that is no YAML.
    """
    found = []
    for item in items:
        place = f"override {item!r}" if len(item) < 200 else f"override {item[:60]!r}..."
        key, equals, value = item.partition("=")
        if not equals or not _ADDRESS.fullmatch(key.strip()):
            raise InputError(
                "no override", where=place, expected="key.key=value, for example training.steps=5"
            )
        address = tuple(word or int(index) for word, index in _STEP.findall(key.strip()))
        found.append(Override(address, parse_scalar(value.strip(), place), place))
    return found


def apply_overrides(tree: Tree, overrides: Sequence[Override]) -> None:
    """Put overrides into a document, in place; what cannot be placed joins ``tree.problems``."""
    if tree.data is None:
        tree.data = {}
    for override in overrides:
        container: Any = tree.data
        address: Address = ()
        try:
            for step in override.address[:-1]:
                position = _position(container, step, override)
                address = (*address, position)
                if isinstance(container, dict) and container.get(position) is None:
                    container[position] = {}
                    tree.places.mark(address, override.place)
                container = container[position]
            position = _position(container, override.address[-1], override)
        except InputError as error:
            tree.problems.append(error)
            continue
        container[position] = override.value
        # The new value has the override for its place; the places of what it replaces are dropped.
        address = (*address, position)
        for known in (tree.places.keys, tree.places.values):
            for old in [old for old in known if old[: len(address)] == address]:
                del known[old]
        tree.places.mark(address, override.place)


def _position(container: Any, step: str | int, override: Override) -> Any:
    """Find a step of an address in a section, or in a list by its number or name."""
    if isinstance(container, dict):
        return str(step)
    if not isinstance(container, list):
        raise InputError(
            f"there is nothing below a plain value to set {str(step)!r} in", where=override.place
        )
    if isinstance(step, str) and not (step.isascii() and step.isdecimal() and len(step) < 10):
        names = [
            item.get("name") or item.get("type") if isinstance(item, dict) else None for item in container
        ]
        if names.count(step) == 1:
            return names.index(step)
        listed = ", ".join(str(name) for name in names)
        raise InputError(
            f"no single entry is named {step!r}", where=override.place, expected=f"one of: {listed}"
        )
    if int(step) >= len(container):
        raise InputError(f"the list has {len(container)} entries, counted from 0", where=override.place)
    return int(step)
