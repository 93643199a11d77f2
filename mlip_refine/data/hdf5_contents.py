"""What an HDF5 file holds, one group or dataset after the other; as a program, it says so to another process.

    python -P hdf5_contents.py PATH UNDER

HDF5's library loops or crashes on some damaged files, which nothing in Python can stop or catch: a file that
nobody has checked is read by a process of its own (see `mlip_refine.data.hdf5.foreign_hdf5`). Each message to
standard output is a line of JSON, followed by the bytes of an array where there is one. This module stands
alone, so that such a process starts in a fifth of a second.
"""

import json
import re
import resource
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

UNREADABLE = (OSError, KeyError, ValueError, TypeError, RuntimeError, ArithmeticError, MemoryError)
"""What h5py and the conversion of its data raise for a damaged file."""

_MOST_RATIO = 1100
"""Deflate, the strongest filter of HDF5, packs at most 1032 bytes into one."""

_LEAST_BYTES = 1 << 26

_CPU_SECONDS = 20
"""Processor time for one object beside its data; the slowest takes milliseconds."""

_CPU_BYTES_PER_SECOND = 1e7
"""A tenth of what the slowest filter does."""


class OutsideDataError(Exception):
    """A file takes data from elsewhere; the only argument is the name of the object."""


class Item(NamedTuple):
    """A group or a dataset.

    Attributes:
        name: Its path in the file, such as `points/hcp`, without a slash before it; empty for the file.
        attributes: Its attributes that are text.
        value: The array of a dataset, `None` for a group and for data that were not asked for. Text is an
            array of bytes.
    """

    name: str
    attributes: dict[str, str]
    value: NDArray[Any] | None


def contents(
    path: Path, under: Sequence[str] | None = None, before: Callable[[int], None] | None = None
) -> Generator[Item, None, None]:
    """Yield the file, its groups and its datasets: a group before what is in it, `a_9` before `a_10`.

    Args:
        path: Path of the file.
        under: Names of the datasets to read, or of groups whose datasets to read; `None` reads all.
        before: Called before each object is read, with the bytes of its data.

    Raises:
        OutsideDataError: The file has an external or soft link, a virtual dataset, or external storage.
        OSError: It is no HDF5 file, or damaged; a damaged file may as well raise any of `UNREADABLE`.
    """
    room = _LEAST_BYTES + _MOST_RATIO * path.stat().st_size
    allow = before or (lambda _: None)
    allow(0)
    with h5py.File(path, "r") as file:
        seen, waiting = set(), [""]
        while waiting:
            name = waiting.pop()
            allow(0)
            found = file[name or "/"]
            value = None
            if isinstance(found, h5py.Group):
                place = h5py.h5o.get_info(found.id).addr
                if place in seen:
                    # A group that contains itself; links other than hard ones are not followed.
                    continue
                seen.add(place)
                waiting += [f"{name}/{key}".lstrip("/") for key in reversed(_plain_links(found, name, allow))]
            elif isinstance(found, h5py.Dataset):
                if found.external or found.is_virtual:
                    raise OutsideDataError(name)
                if under is None or any(f"{name}/".startswith(f"{part}/") for part in under):
                    room -= found.nbytes
                    if room < 0:
                        raise ValueError(f"{name} has more data than the file can hold")
                    allow(found.nbytes)
                    value = _value(found)
            texts = {key: text for key, text in found.attrs.items() if isinstance(text, str)}
            yield Item(name, texts, value)


def _plain_links(group: h5py.Group, name: str, allow: Callable[[int], None]) -> list[str]:
    keys = sorted(group, key=_natural)
    for key in keys:
        allow(0)
        if not isinstance(group.get(key, getlink=True), h5py.HardLink):
            raise OutsideDataError(f"{name}/{key}".lstrip("/"))
    return keys


def _natural(name: str) -> list[str | int]:
    parts = re.split("([0-9]+)", name)
    return [int(part) if k % 2 else part for k, part in enumerate(parts)]


def _value(found: h5py.Dataset) -> NDArray[Any] | None:
    """Return the data of a dataset, `None` where they are neither numbers nor text."""
    value = found[()]
    if h5py.check_string_dtype(found.dtype) is not None and found.dtype.hasobject:
        value = np.array(np.asarray(value, dtype=object).tolist(), dtype=np.bytes_)
    if isinstance(value, h5py.Empty) or np.asarray(value).dtype.hasobject:
        return None
    return np.asarray(value)


def _allow(n_bytes: int) -> None:
    """Let the system end this process if what comes next takes far longer than it can."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = used.ru_utime + used.ru_stime + _CPU_SECONDS + n_bytes / _CPU_BYTES_PER_SECOND
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (min(int(seconds), hard) if hard >= 0 else int(seconds), hard))


def _say(**message: object) -> None:
    sys.stdout.buffer.write(json.dumps(message).encode() + b"\n")


def main(path: str, under: str) -> None:
    """Write the contents of a file to standard output, and at the end how they ended."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        for item in contents(Path(path), json.loads(under), _allow):
            value = None if item.value is None else np.ascontiguousarray(item.value).reshape(item.value.shape)
            array = {} if value is None else {"dtype": value.dtype.str, "shape": value.shape}
            _say(name=item.name, attributes=item.attributes, **array)
            if value is not None:
                sys.stdout.buffer.write(value.data if value.nbytes else b"")
        _say(end="whole")
    except OutsideDataError as error:
        _say(end="outside", name=str(error))
    except UNREADABLE as error:
        _say(end="damaged", reason=f"{error}" or type(error).__name__)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
