"""Which materials are trained on and which are kept, so that nothing that is kept has been seen.

The same crystal comes under several ids, and crystals of one prototype are alike. Materials that belong
together go into one part together. The 103 compounds of the benchmark of thermal conductivity are a part of
their own.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.resources import files
from itertools import combinations
from typing import Literal

from mlip_refine.data.phonons.reference import PhononReference
from mlip_refine.errors import InputError

KAPPA = "kappa103"
"""Name of the part that the benchmark's compounds are."""

PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class SplitRule:
    """Rule that divides a set without a split of its own.

    Attributes:
        val: Expected fraction kept for validation.
        test: Expected fraction kept for the test.
        by: What stays together: `material`, calculations with one id or of one compound and prototype; or
            `prototype`, all compounds of one.
        seed: Random seed of the division.
    """

    val: float = 0.1
    test: float = 0.1
    by: Literal["material", "prototype"] = "material"
    seed: int = 0


def in_kappa103(reference: PhononReference) -> bool:
    """Whether a material is one of the 103: by its id, or by its formula and space group."""
    ids, compounds = _kappa103()
    metadata = reference.metadata
    return metadata.material in ids or (metadata.formula, metadata.space_group) in compounds


@cache
def _kappa103() -> tuple[frozenset[str], frozenset[tuple[str, int]]]:
    text = files("mlip_refine").joinpath("assets", "kappa103.tsv").read_text(encoding="utf-8")
    rows = [line.split("\t") for line in text.splitlines() if not line.startswith("#")]
    return frozenset(row[0] for row in rows), frozenset((row[1], int(row[2])) for row in rows)


def split_phonons(references: Sequence[PhononReference], rule: SplitRule) -> list[str]:
    """Divide a set.

    The part of a group is settled by the seed and the group's own name alone: it stays when other materials
    come or go, and the sizes of the parts are what chance makes of the fractions.

    Args:
        references: Materials of the set.
        rule: Fractions, seed, and what stays together.

    Returns:
        For every reference `train`, `val`, `test` or `kappa103`.

    Raises:
        InputError: The fractions are negative, or leave nothing for training.
    """
    if min(rule.val, rule.test) < 0 or rule.val + rule.test >= 1:
        found = f"val {rule.val:g}, test {rule.test:g}"
        raise InputError("no fractions", found=found, expected="not negative, and below 1 together")
    parts = [KAPPA if in_kappa103(reference) else "" for reference in references]
    free = [k for k, part in enumerate(parts) if not part]
    for group in _groups([references[k] for k in free], rule.by):
        key = min(key for k in group for key in _keys(references[free[k]], rule.by))
        drawn = int.from_bytes(sha256(f"{rule.seed} {key}".encode()).digest()[:8]) / 2**64
        part = "val" if drawn < rule.val else "test" if drawn < rule.val + rule.test else "train"
        for member in group:
            parts[free[member]] = part
    return parts


def check_parts(parts: Mapping[str, Iterable[PhononReference]]) -> None:
    """Refuse parts that share a material.

    Args:
        parts: Materials by the name of their part.

    Raises:
        InputError: A material, by its id or as a compound of one prototype, is in two parts; or one of the
            103 is trained on.
    """
    listed = {name: list(members) for name, members in parts.items()}
    trained = [r.name for r in listed.get("train", []) if in_kappa103(r)]
    if trained:
        raise InputError(
            "materials of the thermal conductivity benchmark are trained on",
            found=", ".join(trained[:5]),
            fix="They are a test of their own: leave them out.",
        )
    for (first, ours), (second, theirs) in combinations(listed.items(), 2):
        seen = {key: r.name for r in ours for key in _keys(r, "material")}
        for reference in theirs:
            shared = next((seen[key] for key in _keys(reference, "material") if key in seen), None)
            if shared is not None:
                raise InputError(
                    f"{first} and {second} share a material",
                    found=f"{shared} and {reference.name} ({reference.metadata.formula})",
                    expected="no material in two parts",
                )


def _keys(reference: PhononReference, by: str) -> tuple[str, ...]:
    """Names of the groups that a material belongs to."""
    metadata = reference.metadata
    if by == "prototype":
        return (metadata.prototype,)
    return metadata.material, f"{metadata.formula} {metadata.prototype}"


def _groups(references: Sequence[PhononReference], by: str) -> list[list[int]]:
    """Members of every group: what shares a key, directly or through others."""
    root = list(range(len(references)))

    def find(k: int) -> int:
        while root[k] != k:
            k = root[k]
        return k

    first: dict[str, int] = {}
    for k, reference in enumerate(references):
        for key in _keys(reference, by):
            root[find(k)] = find(first.setdefault(key, k))
    members: dict[int, list[int]] = {}
    for k in range(len(references)):
        members.setdefault(find(k), []).append(k)
    return list(members.values())
