"""Ways in which a file of somebody else goes wrong: cut, flipped, pasted, or filled with absurd values."""

import re
from collections.abc import Callable

import numpy as np

ABSURD = [
    *("nan", "NaN", ".nan", "inf", "-inf", ".inf", "1e300", "-1e300", "1e-300", "0", "-1", "1e5"),
    *("100000000000", "9" * 400, "0x10", "1_000", "1/0", "--5", "1.2.3", "T", "null", "~", "[]", "{}"),
    *("[1, 2, 3]", "{a: 1}", "''", '"', "'", "\\", "x" * 300, "../../../etc/passwd", "~nouser/x", "${HOME}"),
    *("µ²²", "\u202e", "\x1b[31m", "\x00", "%s", "$\\foo$", "!!int abc", "&a [*a]", "<<: 1", "- - -", ": :"),
    *("=1+1", "1 GPa", "°C", "eV", "-0.0"),
]
"""What takes the place of a word or a number of a text."""

_WORD = re.compile(r"[^\s,;:|=\[\]{}()\"']+")
_NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:[eE][-+]?\d+)?")


def mutate_text(text: str, random: np.random.Generator) -> tuple[str, str]:
    """Return a text with one to three faults, and their names."""
    return _mutated(text, _TEXT, random)


def mutate_bytes(content: bytes, random: np.random.Generator) -> tuple[bytes, str]:
    """Return bytes with one to three faults, and their names."""
    return _mutated(content, _BYTES, random)


def _mutated[T: (str, bytes)](
    content: T, faults: dict[str, Callable[[T, np.random.Generator], T]], random: np.random.Generator
) -> tuple[T, str]:
    names = []
    for _ in range(int(random.integers(1, 4))):
        names.append(str(random.choice(list(faults))))
        content = faults[names[-1]](content, random)
    return content, " + ".join(names)


def _replaced(pattern: re.Pattern[str], text: str, random: np.random.Generator) -> str:
    found = list(pattern.finditer(text))
    if not found:
        return text
    one = found[int(random.integers(len(found)))]
    return text[: one.start()] + ABSURD[int(random.integers(len(ABSURD)))] + text[one.end() :]


def _number(text: str, random: np.random.Generator) -> str:
    return _replaced(_NUMBER, text, random)


def _word(text: str, random: np.random.Generator) -> str:
    return _replaced(_WORD, text, random)


def _line(change: Callable[[list[str], int, np.random.Generator], None]) -> Callable[..., str]:
    def changed(text: str, random: np.random.Generator) -> str:
        lines = text.split("\n")
        change(lines, int(random.integers(len(lines))), random)
        return "\n".join(lines)

    return changed


def _drop(lines: list[str], at: int, random: np.random.Generator) -> None:
    del lines[at : at + int(random.integers(1, 4))]


def _repeat(lines: list[str], at: int, random: np.random.Generator) -> None:
    lines.insert(at, lines[at])


def _swap(lines: list[str], at: int, random: np.random.Generator) -> None:
    other = int(random.integers(len(lines)))
    lines[at], lines[other] = lines[other], lines[at]


def _garbage(lines: list[str], at: int, random: np.random.Generator) -> None:
    lines.insert(at, ABSURD[int(random.integers(len(ABSURD)))])


def _blank(lines: list[str], at: int, random: np.random.Generator) -> None:
    lines.insert(at, "")


def _indent(lines: list[str], at: int, random: np.random.Generator) -> None:
    lines[at] = " " * int(random.integers(1, 5)) + lines[at]


def _word_less(lines: list[str], at: int, random: np.random.Generator) -> None:
    words = lines[at].split(" ")
    del words[int(random.integers(len(words)))]
    lines[at] = " ".join(words)


def _cut_text(text: str, random: np.random.Generator) -> str:
    return text[: int(random.integers(len(text) + 1))]


def _flip_character(text: str, random: np.random.Generator) -> str:
    if not text:
        return text
    at = int(random.integers(len(text)))
    return text[:at] + chr(int(random.integers(32, 127))) + text[at + 1 :]


def _windows(text: str, random: np.random.Generator) -> str:
    return "\ufeff" + text.replace("\n", "\r\n")


_TEXT: dict[str, Callable[[str, np.random.Generator], str]] = {
    "number": _number,
    "another number": _number,
    "word": _word,
    "line dropped": _line(_drop),
    "line repeated": _line(_repeat),
    "lines swapped": _line(_swap),
    "garbage": _line(_garbage),
    "blank line": _line(_blank),
    "indented": _line(_indent),
    "word dropped": _line(_word_less),
    "cut": _cut_text,
    "character": _flip_character,
    "windows": _windows,
}


def _bits(content: bytes, random: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for _ in range(int(random.integers(1, 9))):
        if changed:
            changed[int(random.integers(len(changed)))] ^= 1 << int(random.integers(8))
    return bytes(changed)


def _cut(content: bytes, random: np.random.Generator) -> bytes:
    return content[: int(random.integers(len(content) + 1))]


def _zeros(content: bytes, random: np.random.Generator) -> bytes:
    at, length = int(random.integers(len(content) + 1)), int(random.integers(1, 200))
    return content[:at] + b"\x00" * len(content[at : at + length]) + content[at + length :]


def _removed(content: bytes, random: np.random.Generator) -> bytes:
    at = int(random.integers(len(content) + 1))
    return content[:at] + content[at + int(random.integers(1, 100)) :]


def _inserted(content: bytes, random: np.random.Generator) -> bytes:
    at = int(random.integers(len(content) + 1))
    return content[:at] + random.bytes(int(random.integers(1, 100))) + content[at:]


def _header(content: bytes, random: np.random.Generator) -> bytes:
    return random.bytes(min(len(content), 16)) + content[16:]


_BYTES: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "bits": _bits,
    "cut": _cut,
    "zeros": _zeros,
    "bytes removed": _removed,
    "bytes inserted": _inserted,
    "header": _header,
}
