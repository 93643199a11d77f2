"""The files of a phonon calculation: by phonopy's names, compressed or not, in a folder or an archive."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from phonopy.file_IO import get_io_module_to_decompress, get_supported_file_extensions_for_compression

from mlip_refine.errors import InputError, nearest
from mlip_refine.files import most_unpacked, unpack

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
    if plain_name(path) == path.name:
        return path.read_bytes().decode()
    text = BytesIO()
    with get_io_module_to_decompress(path).open(path, "rb") as stream:
        unpack(stream, text, path, most_unpacked(path))
    return text.getvalue().decode()


@contextmanager
def decompressed(path: Path) -> Iterator[Path]:
    """Hold a file without its compression while the block runs, for parsers that want a plain file."""
    if plain_name(path) == path.name:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / plain_name(path)
        with get_io_module_to_decompress(path).open(path, "rb") as source, plain.open("wb") as copy:
            unpack(source, copy, path, most_unpacked(path))
        yield plain


def read_conf(folder: Path) -> dict[str, str]:
    """Read `phonopy.conf`: `KEY = value` in lines, keys in capitals; empty when there is none.

    Raises:
        InputError: A tag is not known, but nearly one that counts here.
    """
    path = find(folder, *CONF_FILES)
    tags = {} if path is None else _assignments(read_text(path))
    for tag in tags:
        word = (
            None if tag in USED_TAGS or tag in _IGNORED_TAGS else nearest(tag, (*USED_TAGS, *_IGNORED_TAGS))
        )
        if word in USED_TAGS:
            raise InputError("unknown tag", where=str(path), found=tag[:80], fix=f"Did you mean {word!r}?")
    return tags


USED_TAGS = (
    *("DIM", "PRIMITIVE_AXES", "PRIMITIVE_AXIS", "CELL_FILENAME", "ATOM_NAME", "MASS", "MAGMOM"),
    *("CALCULATOR", "SITE_MIXTURE"),
)
"""Tags of `phonopy.conf` that say which crystal was calculated."""

_IGNORED_TAGS = (
    *("ANIME", "ANIME_TYPE", "BAND", "BAND_CONNECTION", "BAND_CONST_INTERVAL", "BAND_FORMAT", "BAND_INDICES"),
    *("BAND_LABELS", "BAND_POINTS", "CREATE_DISPLACEMENTS", "CUTOFF_FREQUENCY", "CUTOFF_RADIUS"),
    *("DEBYE_MODEL", "DIAG", "DISPLACEMENT_DISTANCE", "DM_DECIMALS", "DOS", "DOS_RANGE", "EIGENVECTORS"),
    *("FC_CALCULATOR", "FC_CALCULATOR_OPTIONS", "FC_DECIMALS", "FC_FORMAT", "FC_SPG_SYMMETRY", "FC_SYMMETRY"),
    *("FMAX", "FMIN", "FORCE_CONSTANTS", "FPITCH", "FREQUENCY_CONVERSION_FACTOR", "FREQUENCY_SCALE_FACTOR"),
    *("FULL_FORCE_CONSTANTS", "GAMMA_CENTER", "GROUP_VELOCITY", "GV_DELTA_Q", "HDF5", "IRREPS"),
    *("LITTLE_COGROUP", "MESH", "MESH_FORMAT", "MESH_NUMBERS", "MESH_SYMMETRY", "MODULATION", "MOMENT"),
    *("MOMENT_ORDER", "MP", "MP_SHIFT", "NAC", "NAC_METHOD", "NUM_FREQUENCY_POINTS", "PDOS", "PM"),
    *("PRETEND_REAL", "PROJECTION_DIRECTION", "Q_DIRECTION", "QPOINTS", "QPOINTS_FORMAT"),
    *("RANDOM_DISPLACEMENTS", "RANDOM_SEED", "READ_FORCE_CONSTANTS", "READ_QPOINTS", "SAVE_PARAMS"),
    *("SHOW_IRREPS", "SIGMA", "SYMMETRY", "SYMMETRY_TOLERANCE", "TDISP", "TDISPMAT", "TDISPMAT_CIF"),
    *("TETRAHEDRON", "TIME_REVERSAL_SYMMETRY", "TMAX", "TMIN", "TOLERANCE", "TPROP", "TRIGONAL", "TSTEP"),
    *("WRITE_FORCE_CONSTANTS", "WRITE_MESH", "WRITEDM", "WRITEFC_FORMAT", "READFC_FORMAT", "XYZ_DIRECTION"),
    *("XYZ_PROJECTION",),
)
"""Tags of phonopy that say what to do with a calculation: they are named, and nothing follows from them."""


def conf_cell(folder: Path) -> str | None:
    """Return the name of the cell's file that `phonopy.conf` has as CELL_FILENAME.

    Raises:
        InputError: It is not the name of a file in the same folder.
    """
    name = read_conf(folder).get("CELL_FILENAME")
    if name is not None and (not name or name in {".", ".."} or Path(name).name != name):
        raise InputError(
            "CELL_FILENAME is not a file beside it",
            where=str(find(folder, *CONF_FILES)),
            found=name[:80],
            fix="Copy the cell into the folder of the calculation.",
        )
    return name


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
    try:
        numbers = [float(Fraction(word)) for word in text.split()]
    except (ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"{text[:80]!r} are no numbers") from error
    return np.diag(numbers) if len(numbers) == 3 else np.reshape(numbers, (3, 3))
