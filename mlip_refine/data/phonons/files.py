"""The files of a phonon calculation: by phonopy's names, compressed or not, in a folder or an archive."""

import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from phonopy.file_IO import get_io_module_to_decompress, get_supported_file_extensions_for_compression

from mlip_refine.errors import InputError

WHOLE_PATTERNS = ("*.yaml", "*.yml")
"""Names of files that hold a whole calculation; WHOLE_FILES are those that are looked for in a folder."""

WHOLE_FILES = (
    *("phonopy_params.yaml", "phono3py_params.yaml", "phonopy.yaml", "phono3py.yaml"),
    *("phonopy_disp.yaml", "phono3py_disp.yaml"),
)
FORCES_FILES = ("FORCE_SETS", "FORCES_FC2", "FORCES_FC3")
FORCE_CONSTANTS_FILES = ("FORCE_CONSTANTS", "force_constants.hdf5", "fc2.hdf5")
CELL_FILES = ("POSCAR-unitcell", "POSCAR")
CONF_FILES = ("phonopy.conf", "disp.conf")
INCAR_FILES = ("INCAR-force", "INCAR")
BORN_FILES = ("BORN",)

_KNOWN = {
    *(*WHOLE_FILES, *FORCES_FILES, *FORCE_CONSTANTS_FILES),
    *(*CELL_FILES, *CONF_FILES, *INCAR_FILES, *BORN_FILES),
}
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


def is_whole(path: Path) -> bool:
    """Whether a path is named like a file that holds a whole calculation."""
    return path.is_file() and any(fnmatch(plain_name(path), pattern) for pattern in WHOLE_PATTERNS)


def is_calculation(path: Path) -> bool:
    """Whether a path may be a phonon calculation: archive, YAML file, or folder with what one is made of."""
    if path.is_dir():
        return find(path, *WHOLE_FILES, *FORCES_FILES, *FORCE_CONSTANTS_FILES) is not None
    return is_archive(path) or is_whole(path)


def find(folder: Path, *names: str) -> Path | None:
    """Return the first of these files that is in a folder, under its name or with a compression's suffix."""
    candidates = (folder / f"{name}{suffix}" for name in names for suffix in _COMPRESSIONS)
    return next((path for path in candidates if path.is_file()), None)


def files_of(path: Path) -> list[Path]:
    """Files that a calculation may be read from: an archive; a file and its neighbours; those of a folder."""
    if is_archive(path):
        return [path]
    folder = path if path.is_dir() else path.parent
    known = [file for file in sorted(folder.iterdir()) if file.is_file() and plain_name(file) in _KNOWN]
    return known if path.is_dir() else [path, *(file for file in known if file != path)]


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Hold the files of an archive in a folder while the block runs; anything else stays where it is."""
    if not is_archive(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with tarfile.open(path, "r:*") as archive:
            # Known files alone, under their last names: no path of an archive leads out of the folder.
            for member in archive:
                name = Path(member.name).name
                if not member.isfile() or plain_name(Path(name)) not in _KNOWN:
                    continue
                if (folder / name).exists():
                    raise InputError(
                        "the archive holds several calculations", where=str(path), found=f"{name} twice"
                    )
                source = archive.extractfile(member)
                if source is not None:
                    with (folder / name).open("wb") as copy:
                        shutil.copyfileobj(source, copy)
        yield folder


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
