"""File formats of labelled frames.

To read another one, write a function that yields the frames of a file as `ase.Atoms`, labels in `info`,
`arrays` or a calculator, and put it into `FORMATS`.
"""

import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from ase import Atoms
from ase.io.extxyz import XYZError, read_xyz
from ase.io.trajectory import TrajectoryReader

from mlip_refine.data.bounded import BoundedLines
from mlip_refine.data.hdf5 import refuse_outside_data
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
    refuse_outside_data(path)
    with h5py.File(path, "r") as file:
        for batch in sorted(file, key=_number_at_the_end):
            for name in sorted(file[batch], key=_number_at_the_end):
                group = file[batch][name]

                def value(key: str, group: h5py.Group = group) -> object:
                    found = group[key][()] if key in group else None
                    found = found.decode() if isinstance(found, bytes) else found
                    # MACE writes what is missing as this word.
                    return None if isinstance(found, str) and found == "None" else found

                atoms = Atoms(
                    numbers=value("atomic_numbers"),
                    positions=value("positions"),
                    cell=value("cell"),
                    pbc=value("pbc"),
                )
                labels = {key: value(f"properties/{key}") for key in group["properties"]}
                if (forces := labels.pop("forces", None)) is not None:
                    atoms.arrays["REF_forces"] = np.asarray(forces)
                for key in ("energy", "stress", "virials"):
                    if (found := labels.pop(key, None)) is not None:
                        atoms.info[f"REF_{key}"] = found
                atoms.info |= {key: found for key, found in labels.items() if found is not None}
                for key, name_in_xyz in {"weight": "config_weight", "config_type": "config_type"}.items():
                    if (found := value(key)) is not None:
                        atoms.info[name_in_xyz] = found
                for key in group["property_weights"]:
                    atoms.info[f"config_{key}_weight"] = value(f"property_weights/{key}")
                yield atoms


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
