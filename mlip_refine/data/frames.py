"""Labelled frames from files, checked frame by frame.

To read another format, write a function that yields the frames of a file as `ase.Atoms`, labels in `info`,
`arrays` or a calculator, and put it into `FORMATS`.

A misspelt key must stop a run: silently absent forces or stresses are the most frequent way to train on
nothing.
"""

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from ase.io.extxyz import XYZError, read_xyz
from ase.stress import voigt_6_to_full_3x3_stress

from mlip_refine.errors import InputError, nearest

_MIN_VOLUME = 1e-3
"""Smallest volume of a cell, Å³, that is accepted."""


@dataclass(frozen=True)
class Frame:
    """One configuration with its labels.

    Attributes:
        numbers: Atomic numbers `[n_atoms]`.
        positions: Cartesian positions `[n_atoms, 3]`, Å.
        cell: Lattice vectors as rows `[3, 3]`, Å.
        pbc: Periodic directions; all three, or the frame is refused.
        energy: Energy of the whole cell, eV.
        forces: Forces on the atoms `[n_atoms, 3]`, eV/Å.
        stress: Stress of the cell `[3, 3]`, eV/Å³, tensile positive (ASE's sign).
        info: Other words and numbers of the comment line, such as `config_type`.
        source: File and frame, for messages.
    """

    numbers: np.ndarray
    positions: np.ndarray
    cell: np.ndarray
    pbc: tuple[bool, bool, bool]
    energy: float | None
    forces: np.ndarray | None
    stress: np.ndarray | None
    info: Mapping[str, object] = field(default_factory=dict)
    source: str = ""

    @property
    def n_atoms(self) -> int:
        """Number of atoms."""
        return len(self.numbers)

    @property
    def volume(self) -> float:
        """Volume of the cell, Å³."""
        return abs(float(np.linalg.det(self.cell)))

    def to_atoms(self) -> Atoms:
        """Return the configuration without its labels."""
        return Atoms(numbers=self.numbers, positions=self.positions, cell=self.cell, pbc=self.pbc)


def read_frames(
    path: Path | Sequence[Path],
    energy_key: str | None = "REF_energy",
    forces_key: str | None = "REF_forces",
    stress_key: str | None = "REF_stress",
    *,
    elements: AbstractSet[int] | None = None,
) -> list[Frame]:
    """Read labelled frames.

    Args:
        path: One file or several; the suffix tells the format, by the table `FORMATS`.
        energy_key: Name of the energy in the comment line, eV; None reads no energies.
        forces_key: Name of the forces' column, eV/Å; None reads no forces.
        stress_key: Name of the stress in the comment line, eV/Å³, tensile positive: nine numbers or six in
            Voigt order (xx yy zz yz xz xy); None reads no stresses.
        elements: Atomic numbers that the model knows; None admits all.

    Returns:
        The frames, in the order of the files.

    Raises:
        InputError: A file is missing, empty or damaged; or a frame lacks a label, has one of the wrong shape
            or that is not finite, is not periodic, or contains an unknown element. The message names the
            frame.
    """
    paths = [path] if isinstance(path, Path | str) else list(path)
    keys = (energy_key, forces_key, stress_key)
    found = []
    for one in map(Path, paths):
        found += [
            _frame(atoms, *keys, f"{one.name}, frame {i}", elements)
            for i, atoms in enumerate(_read_atoms(one))
        ]
    return found


def _extended_xyz(path: Path) -> Iterator[Atoms]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as stream:
        yield from read_xyz(stream, index=slice(None))


FORMATS: dict[str, tuple[str, Callable[[Path], Iterator[Atoms]]]] = {
    ".xyz": ("extended XYZ", _extended_xyz),
    ".extxyz": ("extended XYZ", _extended_xyz),
}
"""Name and reader of a format by the suffix of its files, in lower case and without `.gz`.

Files with another suffix are read as extended XYZ.
"""


def _read_atoms(path: Path) -> Iterator[Atoms]:
    """Yield the frames of a file, in the format that its suffix names."""
    suffixes = f"{', '.join(FORMATS)}, each also with .gz"
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


def _frame(
    atoms: Atoms,
    energy_key: str | None,
    forces_key: str | None,
    stress_key: str | None,
    where: str,
    elements: AbstractSet[int] | None,
) -> Frame:
    """Check a frame and take its labels out of it."""
    _check_structure(atoms, where, elements)
    info: dict[str, object] = dict(atoms.info)
    arrays = {k: v for k, v in atoms.arrays.items() if k not in {"numbers", "positions"}}
    # ASE takes `energy`, `forces`, `stress` and a few more away into a calculator.
    for name, value in ({} if atoms.calc is None else atoms.calc.results).items():
        if np.ndim(value) and len(np.atleast_1d(value)) == len(atoms) and name not in {"stress", "dipole"}:
            arrays[name] = np.asarray(value)
        else:
            info[name] = value

    energy = forces = stress = None
    if energy_key is not None:
        value = _label(info, energy_key, "energy", where)
        if value.size != 1:
            raise _wrong_shape("energy", energy_key, value, "one number", where)
        _check_finite(value, f"energy {energy_key!r}", where)
        energy = float(value.reshape(()))
    if forces_key is not None:
        forces = _label(arrays, forces_key, "forces", where)
        if forces.shape != (len(atoms), 3):
            raise _wrong_shape("forces", forces_key, forces, f"[{len(atoms)}, 3]", where)
        if not np.isfinite(forces).all():
            raise InputError(f"forces {forces_key!r} of {_first_atom(forces)} are not finite", where=where)
    if stress_key is not None:
        stress = _stress(info, stress_key, where)
    others = {k: v for k, v in info.items() if k not in {energy_key, stress_key}}
    return Frame(
        numbers=atoms.numbers.copy(),
        positions=atoms.positions.copy(),
        cell=np.array(atoms.cell),
        pbc=(True, True, True),
        energy=energy,
        forces=forces,
        stress=stress,
        info={k: v for k, v in others.items() if isinstance(v, str | int | float | np.generic)},
        source=where,
    )


def _check_structure(atoms: Atoms, where: str, elements: AbstractSet[int] | None) -> None:
    if not np.isfinite(atoms.positions).all():
        raise InputError(f"positions of {_first_atom(atoms.positions)} are not finite", where=where)
    if not np.isfinite(np.array(atoms.cell)).all():
        raise InputError("the cell is not finite", where=where)
    if not atoms.pbc.all() or abs(atoms.cell.volume) < _MIN_VOLUME:
        raise InputError(
            "not periodic in three dimensions",
            where=where,
            found=f"pbc {atoms.pbc.tolist()}, volume {abs(atoms.cell.volume):.3g} Å³",
            expected='a Lattice and pbc="T T T"',
        )
    unknown = sorted(
        {int(z) for z in atoms.numbers} - (elements if elements is not None else set(range(1, 119)))
    )
    if unknown:
        known = "any element" if elements is None else _symbols(sorted(elements))
        raise InputError(
            "elements that the model does not know", where=where, found=_symbols(unknown), expected=known
        )


def _symbols(numbers: Iterable[int]) -> str:
    return ", ".join(chemical_symbols[z] for z in numbers)


def _first_atom(values: np.ndarray) -> str:
    bad = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))
    return f"atom {int(bad[0])}"


def _stress(info: Mapping[str, object], key: str, where: str) -> np.ndarray:
    """Stress `[3, 3]` from nine numbers, three rows, or six in Voigt order."""
    value = _label(info, key, "stress", where)
    if value.shape not in {(9,), (3, 3), (6,)}:
        raise _wrong_shape(
            "stress", key, value, "9 numbers, 3x3, or 6 in Voigt order (xx yy zz yz xz xy)", where
        )
    _check_finite(value, f"stress {key!r}", where)
    full = voigt_6_to_full_3x3_stress(value) if value.size == 6 else value.reshape(3, 3)
    if not np.allclose(full, full.T, atol=1e-6 + 1e-3 * np.abs(full).max()):
        raise InputError(f"stress {key!r} is not symmetric", where=where, found=full.tolist())
    return np.array(0.5 * (full + full.T))


def _label(present: Mapping[str, object], key: str, quantity: str, where: str) -> np.ndarray:
    """Numbers of the label that a frame has under a key."""
    if key not in present:
        names = sorted(str(name) for name in present)
        word = nearest(key, names)
        raise InputError(
            f"no {quantity} under the key {key!r}",
            where=where,
            found=f"keys {', '.join(names)}" if names else "no labels at all",
            fix=f"Did you mean {quantity}_key: {word}?"
            if word
            else f"Set {quantity}_key to the name in the file.",
        )
    try:
        return np.asarray(present[key], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{quantity} {key!r} is not a number", where=where, found=present[key]) from error


def _check_finite(value: np.ndarray, label: str, where: str) -> None:
    if not np.isfinite(value).all():
        raise InputError(f"{label} is not finite", where=where, found=value.tolist())


def _wrong_shape(quantity: str, key: str, value: np.ndarray, expected: str, where: str) -> InputError:
    found = f"shape {list(value.shape)}"
    return InputError(f"{quantity} {key!r} has the wrong shape", where=where, found=found, expected=expected)
