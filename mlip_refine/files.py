"""Paths as people write them, and files that appear whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mlip_refine.errors import InputError

_LONGEST = 255
"""Bytes of the longest name that file systems have."""


def user_path(path: str | Path) -> Path:
    """Return a path that somebody wrote, with `~` replaced by the home folder.

    Raises:
        InputError: There is no such home folder, or no file system has such a name.
    """
    try:
        found = Path(path).expanduser()
        longest = max((len(os.fsencode(part)) for part in found.parts), default=0)
    except (RuntimeError, UnicodeEncodeError) as error:
        raise InputError("no such path", where=ascii(str(path)), found=str(error)) from error
    if longest > _LONGEST:
        raise InputError(
            "no such path: a name in it is too long",
            where=f"{str(path)[:60]}...",
            found=f"{longest} bytes",
            expected=f"at most {_LONGEST}",
        )
    return found


@contextmanager
def written(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Give a name to write to; what is there at the end without an error becomes the file.

    Args:
        path: Path of the file.
        shared: Whether other processes may write the same file at the same time: the name is then of this
            process alone. Otherwise the next process overwrites what a killed one left.
    """
    owner = f".{os.getpid()}" if shared else ""
    partial = path.with_name(f".{path.name}{owner}.partial")
    try:
        yield partial
        # safetensors writes for the owner alone; results are shared like any other file. The mask can only be
        # read by setting it.
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with written(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically, indented."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
