"""HDF5 files: our own appear whole, with a seal; those of others are read by a process of its own.

HDF5's library does not survive every damaged file: it may crash, or never return. No such file reaches it in
this process. What this package writes and reads again begins with a seal, the SHA-256 of everything after it,
which is compared before the library sees the file. Files of others have none; they are read by another
process, which may come to any end.

A file may also name other files whose bytes HDF5 then reads as if they were its own: external storage,
virtual datasets and external links. None of that is what phonopy, MACE or this package write; it is refused.
"""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import h5py
import numpy as np

from mlip_refine.data import hdf5_contents
from mlip_refine.data.hdf5_contents import Item, OutsideDataError, contents
from mlip_refine.errors import InputError
from mlip_refine.files import write_bytes

UNREADABLE_HDF5 = hdf5_contents.UNREADABLE
"""What the functions here raise for a damaged file, beside `InputError`."""

SEAL_BYTES = 512
"""Length of the seal, the smallest block before its own content that HDF5 skips (its user block)."""

_SEAL = b"mlip_refine: SHA-256 of what follows these 512 bytes\n"
_CHUNK = 1 << 20


@contextmanager
def new_hdf5(path: Path, *, sealed: bool = False) -> Iterator[h5py.File]:
    """Give a file in memory that is written atomically at the end: HDF5 itself does not survive a full disk.

    Args:
        path: Path of the file.
        sealed: Whether the file begins with a seal, its SHA-256 in 512 bytes, as `sealed_hdf5` needs it.

    Raises:
        StorageError: If there is no room for it.
    """
    size = SEAL_BYTES if sealed else 0
    with h5py.File(path.name, "w", driver="core", backing_store=False, userblock_size=size) as file:
        yield file
        file.flush()
        # The image leaves out the user block, but all addresses in it count from there.
        content = file.id.get_file_image()
    write_bytes(path, *([_seal(hashlib.sha256(content).hexdigest())] if sealed else []), content)


def is_sealed(path: Path) -> bool:
    """Whether a file has a seal, read without HDF5; memory does not grow with the file.

    Raises:
        OSError: It cannot be read.
        ValueError: It has one, but not that of its content.
    """
    with path.open("rb") as stream:
        found = stream.read(SEAL_BYTES)
        if not found.startswith(_SEAL):
            return False
        state = hashlib.sha256()
        while chunk := stream.read(_CHUNK):
            state.update(chunk)
    if found != _seal(state.hexdigest()):
        raise ValueError("its checksum is another one")
    return True


def _seal(digest: str) -> bytes:
    return (_SEAL + digest.encode() + b"\n").ljust(SEAL_BYTES, b"\0")


def sealed_hdf5(path: Path, under: Sequence[str] | None = None) -> Generator[Item, None, None]:
    """Yield what a file holds whose seal was found to be right by `is_sealed`.

    Args:
        path: Path of the file.
        under: Names of the datasets to read, or of groups whose datasets to read; `None` reads all.

    Raises:
        InputError: It takes data from elsewhere.
        OSError: It is not what was sealed; any of `UNREADABLE_HDF5` may come.
    """
    try:
        yield from contents(path, under)
    except OutsideDataError as error:
        raise _outside(path, str(error)) from error


def foreign_hdf5(path: Path, under: Sequence[str] | None = None) -> Generator[Item, None, None]:
    """Yield what a file of somebody else holds, read by a process of its own.

    The process has 20 s of processor time for each object, and more for its data. Starting it takes a fifth
    of a second.

    Args:
        path: Path of the file.
        under: Names of the datasets to read, or of groups whose datasets to read; `None` reads all.

    Raises:
        InputError: It takes data from elsewhere.
        OSError: It is no HDF5 file, or damaged.
    """
    # It finds the libraries that are loaded here, whatever lies beside the program (`-P`).
    command = [sys.executable, "-P", hdf5_contents.__file__, os.fspath(path.absolute()), json.dumps(under)]
    libraries = os.pathsep.join(folder for folder in sys.path if folder)
    environment = os.environ | {"PYTHONPATH": libraries, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(  # noqa: S603 - the program is this package's own
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=environment
        ) as process,
    ):
        try:
            last = yield from _received(process.stdout)
            status = process.wait() if last is None else 0
        finally:
            process.kill()
        if last is None:
            errors.seek(0)
            raise OSError(_end_in_words(status, errors.read().decode(errors="replace")))
    if last["end"] == "outside":
        raise _outside(path, last["name"])
    if last["end"] == "damaged":
        raise OSError(last["reason"])


def _received(stream: IO[bytes] | None) -> Generator[Item, None, dict[str, str] | None]:
    """Yield what the process says, and return its last message; `None` where it ended before that."""
    while stream is not None and (line := stream.readline()).endswith(b"\n"):
        message = json.loads(line)
        if "end" in message:
            return dict(message)
        value = None
        if "dtype" in message:
            dtype, shape = np.dtype(message["dtype"]), tuple(message["shape"])
            content = bytearray(dtype.itemsize * math.prod(shape))
            if stream.readinto(content) < len(content):  # type: ignore[attr-defined]
                return None
            value = np.ndarray(shape, dtype, content)
        yield Item(message["name"], message["attributes"], value)
    return None


def _end_in_words(status: int, errors: str) -> str:
    """Return why a process ended before it had said everything."""
    if status == -signal.SIGXCPU:
        return "HDF5's library does not come to an end with it"
    if status < 0:
        return f"HDF5's library crashes on it ({signal.strsignal(-status)})"
    return (errors.strip().splitlines() or [f"the process that reads it ended with status {status}"])[-1]


def _outside(path: Path, name: str) -> InputError:
    return InputError(
        "the HDF5 file takes data from elsewhere",
        where=str(path),
        found=f"a link or external storage at {name!a}",
        expected="data in the file itself",
    )
