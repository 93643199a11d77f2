"""Dotted overrides of the command line: ``training.steps=5``, ``losses[0].temperature=900 K``."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlip_refine.config.yaml.reader import Tree, parse_scalar
from mlip_refine.config.yaml.source_map import Address
from mlip_refine.errors import InputError

_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")
_ADDRESS = re.compile(r"[^.\[\]=]+(\[\d+\])*(\.[^.\[\]=]+(\[\d+\])*)*")


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
    return [_parse(item) for item in items]


def _parse(item: str) -> Override:
    place = f"override {item!r}"
    key, equals, value = item.partition("=")
    if not equals or not _ADDRESS.fullmatch(key.strip()):
        raise InputError("no override", where=place, expected="key.key=value, for example training.steps=5")
    address = tuple(word or int(index) for word, index in _STEP.findall(key.strip()))
    return Override(address, parse_scalar(value.strip(), place), place)


def apply_overrides(tree: Tree, overrides: Sequence[Override]) -> None:
    """Put overrides into a document, in place; what cannot be placed joins ``tree.problems``."""
    if tree.data is None:
        tree.data = {}
    for override in overrides:
        try:
            _apply(tree, override)
        except InputError as error:
            tree.problems.append(error)


def _apply(tree: Tree, override: Override) -> None:
    container: Any = tree.data
    walked: Address = ()
    for step in override.address[:-1]:
        position = _position(container, step, override)
        walked = (*walked, position)
        if isinstance(container, dict) and container.get(position) is None:
            container[position] = {}
            tree.places.mark(walked, override.place)
        container = container[position]
    position = _position(container, override.address[-1], override)
    container[position] = override.value
    _mark(tree, (*walked, position), override)


def _position(container: Any, step: str | int, override: Override) -> Any:
    """Find a step of an address in a section, or in a list by its number or name."""
    if isinstance(container, list):
        return _list_position(container, step, override)
    if isinstance(container, dict):
        return str(step)
    raise InputError(f"there is nothing below a plain value to set {str(step)!r} in", where=override.place)


def _list_position(items: list[Any], step: str | int, override: Override) -> int:
    names = [item.get("name") or item.get("type") if isinstance(item, dict) else None for item in items]
    if isinstance(step, str) and not step.isdigit():
        if names.count(step) == 1:
            return names.index(step)
        listed = ", ".join(str(name) for name in names)
        raise InputError(
            f"no single entry is named {step!r}", where=override.place, expected=f"one of: {listed}"
        )
    if int(step) >= len(items):
        raise InputError(f"the list has {len(items)} entries, counted from 0", where=override.place)
    return int(step)


def _mark(tree: Tree, address: Address, override: Override) -> None:
    """Give the new value its place, and forget the places of what it replaced."""
    depth = len(address)
    for known in (tree.places.keys, tree.places.values):
        for old in [old for old in known if old[:depth] == address]:
            del known[old]
    tree.places.mark(address, override.place)
