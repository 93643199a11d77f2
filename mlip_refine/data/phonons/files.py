"""The files of a phonon calculation: by phonopy's names, compressed or not, in a folder or an archive."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from phonopy.file_IO import get_io_module_to_decompress, get_supported_file_extensions_for_compression

CELL_FILES = ("POSCAR-unitcell", "POSCAR")
CONF_FILES = ("phonopy.conf", "disp.conf")
INCAR_FILES = ("INCAR-force", "INCAR")
BORN_FILES = ("BORN",)

_COMPRESSIONS = get_supported_file_extensions_for_compression()

_FUNCTIONALS = {
    "PE": "PBE",
    "PS": "PBEsol",
    "91": "PW91",
    "CA": "LDA",
    "RP": "RPBE",
    "RE": "revPBE",
    "AM": "AM05",
    "SCAN": "SCAN",
    "RSCAN": "rSCAN",
    "R2SCAN": "r2SCAN",
    "TPSS": "TPSS",
}
"""VASP's words for GGA and METAGGA."""


def plain_name(path: Path) -> str:
    """Name of a file without the suffix of its compression."""
    return path.stem if path.suffix in _COMPRESSIONS else path.name


def is_archive(path: Path) -> bool:
    """Whether a path is named like a tar archive."""
    return path.is_file() and (path.suffix == ".tgz" or Path(plain_name(path)).suffix == ".tar")


def find(folder: Path, *names: str) -> Path | None:
    """Return the first of these files that is in a folder, under its name or with a compression's suffix."""
    candidates = (folder / f"{name}{suffix}" for name in names for suffix in _COMPRESSIONS)
    return next((path for path in candidates if path.is_file()), None)


def read_text(path: Path) -> str:
    """Read a text file, compressed or not."""
    with get_io_module_to_decompress(path).open(path, "rb") as stream:
        return bytes(stream.read()).decode()


@contextmanager
def decompressed(path: Path) -> Iterator[Path]:
    """Hold a file without its compression while the block runs, for parsers that want a plain file."""
    if plain_name(path) == path.name:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / plain_name(path)
        with get_io_module_to_decompress(path).open(path, "rb") as source, plain.open("wb") as copy:
            shutil.copyfileobj(source, copy)
        yield plain


def read_conf(folder: Path) -> dict[str, str]:
    """Read `phonopy.conf`: `KEY = value` in lines, keys in capitals; empty when there is none."""
    path = find(folder, *CONF_FILES)
    return {} if path is None else _assignments(read_text(path))


def read_incar(folder: Path) -> tuple[str | None, float | None]:
    """Return the functional and the cutoff in eV that VASP's input names, None where it names none."""
    path = find(folder, *INCAR_FILES)
    tags = {} if path is None else _assignments(read_text(path))
    word = tags.get("METAGGA", tags.get("GGA", "")).upper()
    functional = _FUNCTIONALS.get(word, word or None)
    if functional is not None and "T" in tags.get("LDAU", "").upper().strip(".")[:1]:
        functional += "+U"
    cutoff = tags.get("ENCUT", "").split()
    return functional, float(cutoff[0]) if cutoff else None


def _assignments(text: str) -> dict[str, str]:
    lines = (line.split("#")[0].split("!")[0].partition("=") for line in text.splitlines())
    return {key.strip().upper(): value.strip() for key, equals, value in lines if equals}


def matrix_of(text: str) -> NDArray[np.float64]:
    """Read three numbers, or nine, row by row; fractions such as 1/2 are numbers.

    Raises:
        ValueError: It is something else.
    """
    numbers = [float(Fraction(word)) for word in text.split()]
    return np.diag(numbers) if len(numbers) == 3 else np.reshape(numbers, (3, 3))
