"""Paths as people write them, and files that appear whole or not at all, or say that there is no room."""

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from mlip_refine.errors import InputError, StorageError, bytes_in_words

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors of the system for a full disk, a full quota, a limit on files, and a disk that may only be read."""

_LONGEST = 255
"""Bytes of the longest name that file systems have."""

_LEAST_UNPACKED = 1 << 26
_MOST_UNPACKED = 1 << 33
_MOST_RATIO = 100
"""Numbers and text are compressed to a tenth or so, never to a hundredth."""

_LONG = 300
"""Characters of a path that a message shows."""

_SPECIAL = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def require_regular(path: Path) -> Path:
    """Return a path of somebody else, unless no file can have it, or it is one whose end may never come.

    What is not there is left to who opens it.

    Raises:
        InputError: It is a pipe, a device or a socket, or no name of a file.
    """
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except ValueError as error:
        raise InputError("no name of a file", where=ascii(str(path))[1:-1], found=str(error)) from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            where = str(path) if len(str(path)) < _LONG else f"{str(path)[:_LONG]}..."
            raise InputError("no such file", where=where, found=os.strerror(error.errno)) from error
        return path
    if kind in _SPECIAL:
        fix = "Write what it gives into a file first."
        raise InputError("this is no file", where=str(path), found=_SPECIAL[kind], fix=fix)
    return path


def most_unpacked(path: Path) -> int:
    """Return the bytes that a compressed file may unpack to: far more than data do, far less than a bomb."""
    return min(max(_LEAST_UNPACKED, _MOST_RATIO * path.stat().st_size), _MOST_UNPACKED)


def unpack(source: IO[bytes], target: IO[bytes], path: Path, most: int) -> int:
    """Copy what a compressed file or archive unpacks to, and return its size.

    Args:
        source: Its plain content.
        target: Where to copy that.
        path: Path of the compressed file.
        most: Bytes that there may be.

    Raises:
        InputError: There are more.
    """
    copied = 0
    while chunk := source.read(1 << 20):
        copied += len(chunk)
        if copied > most:
            raise InputError(
                "it unpacks to more than data do",
                where=str(path),
                found=f"more than {bytes_in_words(most)} in a file of {bytes_in_words(path.stat().st_size)}",
                fix="If that is right, unpack it first.",
            )
        target.write(chunk)
    return copied


def user_path(path: str | Path) -> Path:
    """Return a path that somebody wrote, with `~` replaced by the home folder.

    Raises:
        InputError: There is no such home folder, no file system has such a name, or it is a pipe, a device
            or a socket, whose end may never come.
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
    return require_regular(found)


@contextmanager
def written(path: Path, *, shared: bool = False, needed: int | None = None) -> Iterator[Path]:
    """Give a name to write to; what is there at the end without an error becomes the file.

    Args:
        path: Path of the file.
        shared: Whether other processes may write the same file at the same time: the name is then of this
            process alone. Otherwise the next process overwrites what a killed one left.
        needed: Bytes of the file, where they are known before.

    Raises:
        StorageError: If there is no room for the file, or the file system may only be read.
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
        with partial.open("rb+") as stream:
            # Without this a power cut may leave the name of a file without its content.
            os.fsync(stream.fileno())
        partial.replace(path)
    except Exception as error:
        if reason := _lack_of_room(error, partial):
            so_far = partial.stat().st_size if partial.exists() else None
            raise StorageError(str(path), reason, needed=needed or so_far, free=_free(partial)) from error
        raise
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _lack_of_room(error: Exception, partial: Path) -> str | None:
    """Return why there was no room for a file, if that is what the error comes from.

    Libraries that write by themselves say so in many ways: whether another MB can be written tells.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno) if error.errno in NO_ROOM else None
    probe = partial.with_name(f"{partial.name}.probe")
    try:
        probe.write_bytes(bytes(1 << 20))
    except OSError as found:
        return os.strerror(found.errno) if found.errno in NO_ROOM else None
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    return None


def _free(partial: Path) -> int | None:
    """Return the bytes that a user may still write beside an unfinished file, which is removed first."""
    with suppress(OSError):
        partial.unlink(missing_ok=True)
        return shutil.disk_usage(partial.parent).free
    return None


@contextmanager
def room_named(folder: Path) -> Iterator[None]:
    """Say by path what could not be written for lack of room, also where this module does not write.

    Raises:
        StorageError: If a file of this block could not be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        path = Path(error.filename) if isinstance(error.filename, str) else folder
        free = _free(folder / ".nothing.partial")
        raise StorageError(str(path), os.strerror(error.errno), free=free) from error


def write_bytes(path: Path, *content: bytes | memoryview) -> None:
    """Write bytes, one part after the other, atomically.

    Raises:
        StorageError: If there is no room for them.
    """
    with written(path, needed=sum(map(len, content))) as partial, partial.open("wb") as stream:
        stream.writelines(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically, indented."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
