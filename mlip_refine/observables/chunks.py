"""Frames in portions that fit into memory."""

from collections.abc import Iterator

# Float64 numbers of the largest temporary: 64 MB, a few of which every machine has.
_NUMBERS = 2**23


def portions(n: int, each: int) -> Iterator[slice]:
    """Slices that cover n things, each of which needs `each` numbers; at least one thing at a time."""
    size = max(1, _NUMBERS // max(each, 1))
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
