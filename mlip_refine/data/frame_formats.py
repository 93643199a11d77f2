"""File formats of labelled frames.

To read another one, write a function that yields the frames of a file as `ase.Atoms`, labels in `info`,
`arrays` or a calculator, and put it into `FORMATS`.
"""

import gzip
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.io.extxyz import XYZError, read_xyz
from ase.io.trajectory import TrajectoryReader
from numpy.typing import NDArray

from mlip_refine.data.bounded import BoundedLines
from mlip_refine.data.hdf5 import foreign_hdf5
from mlip_refine.errors import InputError
from mlip_refine.files import most_unpacked, unpack, user_path


def _extended_xyz(path: Path) -> Iterator[Atoms]:
    packed = path.suffix == ".gz"
    opened: Callable[..., Any] = gzip.open if packed else open
    if packed:
        with opened(path, "rb") as content, Path(os.devnull).open("wb") as nowhere:
            unpack(content, nowhere, path, most_unpacked(path))
    with opened(path, "rb") as content, BoundedLines(content, encoding="utf-8") as stream:
        yield from read_xyz(stream, index=slice(None))


def _ase_trajectory(path: Path) -> Iterator[Atoms]:
    with TrajectoryReader(path) as frames:
        yield from frames


def _mace_hdf5(path: Path) -> Iterator[Atoms]:
    """Frames as MACE's `preprocess_data` writes them, with labels under the names that are its defaults."""
    for place, items in groupby(foreign_hdf5(path), lambda item: item.name.split("/")[:2]):
        if len(place) == 1:
            # The file, and batches: what is numbered otherwise is no file of MACE.
            _number_at_the_end(place[0] or "0")
            continue
        _number_at_the_end(place[1])
        prefix = f"{'/'.join(place)}/"
        found = {item.name.removeprefix(prefix): item.value for item in items}
        labels = {key: _mace_value(found, f"properties/{key}") for key in _inside(found, "properties")}
        atoms = Atoms(
            numbers=_mace_value(found, "atomic_numbers"),
            positions=_mace_value(found, "positions"),
            cell=_mace_value(found, "cell"),
            pbc=_mace_value(found, "pbc"),
        )
        if (forces := labels.pop("forces", None)) is not None:
            atoms.arrays["REF_forces"] = np.asarray(forces)
        for key in ("energy", "stress", "virials"):
            if (label := labels.pop(key, None)) is not None:
                atoms.info[f"REF_{key}"] = label
        atoms.info |= {key: label for key, label in labels.items() if label is not None}
        for key, name_in_xyz in {"weight": "config_weight", "config_type": "config_type"}.items():
            if (value := _mace_value(found, key)) is not None:
                atoms.info[name_in_xyz] = value
        for key in _inside(found, "property_weights"):
            atoms.info[f"config_{key}_weight"] = _mace_value(found, f"property_weights/{key}")
        yield atoms


def _inside(found: Mapping[str, object], group: str) -> list[str]:
    if group not in found:
        raise KeyError(f"no group {group!r}")
    return [name.removeprefix(f"{group}/") for name in found if name.startswith(f"{group}/")]


def _mace_value(found: Mapping[str, NDArray[Any] | None], key: str) -> Any:
    value = found.get(key)
    plain = None if value is None else value[()]
    plain = plain.decode() if isinstance(plain, bytes) else plain
    # MACE writes what is missing as this word.
    return None if isinstance(plain, str) and plain == "None" else plain


def _number_at_the_end(name: str) -> int:
    return int(name.rpartition("_")[2])


FORMATS: dict[str, tuple[str, Callable[[Path], Iterator[Atoms]]]] = {
    ".xyz": ("extended XYZ", _extended_xyz),
    ".extxyz": ("extended XYZ", _extended_xyz),
    ".traj": ("an ASE trajectory", _ase_trajectory),
    ".h5": ("HDF5 of MACE", _mace_hdf5),
    ".hdf5": ("HDF5 of MACE", _mace_hdf5),
}
"""Name and reader of a format by the suffix of its files, in lower case and without `.gz`.

Files with another suffix are read as extended XYZ.
"""


def read_atoms(path: Path) -> Iterator[Atoms]:
    """Yield the frames of a file, in the format that its suffix names.

    Raises:
        InputError: The file is missing, empty or damaged, or is of another format than its suffix says.
    """
    suffixes, path = f"{', '.join(FORMATS)}; extended XYZ also with .gz", user_path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else None
        raise InputError(
            "no such file", where=str(path), found=found, expected=f"a file of frames ({suffixes})"
        )
    suffix = (Path(path.stem) if path.suffix == ".gz" else path).suffix.lower()
    name, read = FORMATS.get(suffix, FORMATS[".xyz"])
    complete = f"a complete frame of {name}"
    if read is _extended_xyz:
        complete = "a complete frame: number of atoms, comment line, one line for every atom"
    fix = None
    if suffix not in FORMATS:
        unknown = f"The suffix {suffix} is not known" if suffix else "The name has no suffix"
        fix = f"{unknown}, so that {name} was tried; known are {suffixes}."
    count = 0
    try:
        for atoms in read(path):
            yield atoms
            count += 1
    except Exception as error:  # parsers of ASE raise whatever a strange file makes them
        if isinstance(error, OSError | EOFError | zlib.error) and not isinstance(error, XYZError):
            raise InputError(f"the file is damaged ({_one_line(error)})", where=str(path), fix=fix) from error
        raise InputError(
            f"cannot be read as {name} ({_one_line(error)})",
            where=f"{path.name}, frame {count}",
            expected=complete,
            fix=fix,
        ) from error
    if count == 0:
        raise InputError("no frames", where=str(path), expected=f"at least one, as {name}", fix=fix)


def _one_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
