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


@dataclass(frozen=True)
class _Keys:
    energy: str | None
    forces: str | None
    stress: str | None


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
        path: One file or several, `.xyz`, `.extxyz`, or either with `.gz`.
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
    keys = _Keys(energy_key, forces_key, stress_key)
    found = []
    for one in map(Path, paths):
        frames = [
            _frame(atoms, keys, f"{one.name}, frame {i}", elements)
            for i, atoms in enumerate(_read_atoms(one))
        ]
        if not frames:
            raise InputError("no frames", where=str(one), expected="an extended-XYZ file with at least one")
        found += frames
    return found


def _extended_xyz(path: Path) -> Iterator[Atoms]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as stream:
        yield from read_xyz(stream, index=slice(None))


FORMATS: dict[str, tuple[str, Callable[[Path], Iterator[Atoms]]]] = {
    ".xyz": ("extended XYZ", _extended_xyz),
    ".extxyz": ("extended XYZ", _extended_xyz),
}
"""Name and reader of a format by the suffix of its files without `.gz`; others are read as extended XYZ."""


def _read_atoms(path: Path) -> Iterator[Atoms]:
    """Yield the frames of a file as ASE reads them."""
    if not path.is_file():
        found = "a folder" if path.is_dir() else None
        raise InputError("no such file", where=str(path), found=found, expected="an extended-XYZ file")
    plain = Path(path.stem) if path.suffix == ".gz" else path
    name, read = FORMATS.get(plain.suffix.lower(), FORMATS[".xyz"])
    count = 0
    try:
        for atoms in read(path):
            yield atoms
            count += 1
    except (
        XYZError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AssertionError,
        StopIteration,
        RuntimeError,
    ) as error:
        raise InputError(
            f"cannot be read as {name} ({_one_line(error)})",
            where=f"{path.name}, frame {count}",
            expected="a complete frame: number of atoms, comment line, one line for every atom",
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"the file is damaged ({_one_line(error)})", where=str(path)) from error


def _one_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _frame(atoms: Atoms, keys: _Keys, where: str, elements: AbstractSet[int] | None) -> Frame:
    info, arrays = _labels(atoms)
    _check_structure(atoms, where, elements)
    energy = None if keys.energy is None else _energy(info, keys.energy, where)
    forces = None if keys.forces is None else _forces(arrays, keys.forces, len(atoms), where)
    stress = None if keys.stress is None else _stress(info, keys.stress, where)
    labels = {keys.energy, keys.stress}
    return Frame(
        numbers=atoms.numbers.copy(),
        positions=atoms.positions.copy(),
        cell=np.array(atoms.cell),
        pbc=(True, True, True),
        energy=energy,
        forces=forces,
        stress=stress,
        info={
            k: v for k, v in info.items() if k not in labels and isinstance(v, str | int | float | np.generic)
        },
        source=where,
    )


def _labels(atoms: Atoms) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """Collect the labels of a frame, also those that ASE has moved to a calculator.

    ASE takes `energy`, `forces`, `stress` and a few more away into a calculator.
    """
    info: dict[str, object] = dict(atoms.info)
    arrays = {k: v for k, v in atoms.arrays.items() if k not in {"numbers", "positions"}}
    results = {} if atoms.calc is None else atoms.calc.results
    for name, value in results.items():
        if np.ndim(value) and len(np.atleast_1d(value)) == len(atoms) and name not in {"stress", "dipole"}:
            arrays[name] = np.asarray(value)
        else:
            info[name] = value
    return info, arrays


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


def _energy(info: Mapping[str, object], key: str, where: str) -> float:
    value = _numbers(_find(info, key, "energy", where), f"energy {key!r}", where)
    if value.size != 1:
        raise _wrong_shape("energy", key, value, "one number", where)
    _check_finite(value, f"energy {key!r}", where)
    return float(value.reshape(()))


def _forces(arrays: Mapping[str, np.ndarray], key: str, n_atoms: int, where: str) -> np.ndarray:
    value = _numbers(_find(arrays, key, "forces", where), f"forces {key!r}", where)
    if value.shape != (n_atoms, 3):
        raise _wrong_shape("forces", key, value, f"[{n_atoms}, 3]", where)
    if not np.isfinite(value).all():
        raise InputError(f"forces {key!r} of {_first_atom(value)} are not finite", where=where)
    return value


def _stress(info: Mapping[str, object], key: str, where: str) -> np.ndarray:
    value = _numbers(_find(info, key, "stress", where), f"stress {key!r}", where)
    if value.shape not in {(9,), (3, 3), (6,)}:
        raise _wrong_shape(
            "stress", key, value, "9 numbers, 3x3, or 6 in Voigt order (xx yy zz yz xz xy)", where
        )
    _check_finite(value, f"stress {key!r}", where)
    full = voigt_6_to_full_3x3_stress(value) if value.size == 6 else value.reshape(3, 3)
    if not np.allclose(full, full.T, atol=1e-6 + 1e-3 * np.abs(full).max()):
        raise InputError(f"stress {key!r} is not symmetric", where=where, found=full.tolist())
    return np.array(0.5 * (full + full.T))


def _find(present: Mapping[str, object], key: str, quantity: str, where: str) -> object:
    if key in present:
        return present[key]
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


def _numbers(value: object, label: str, where: str) -> np.ndarray:
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{label} is not a number", where=where, found=value) from error


def _check_finite(value: np.ndarray, label: str, where: str) -> None:
    if not np.isfinite(value).all():
        raise InputError(f"{label} is not finite", where=where, found=value.tolist())


def _wrong_shape(quantity: str, key: str, value: np.ndarray, expected: str, where: str) -> InputError:
    found = f"shape {list(value.shape)}"
    return InputError(f"{quantity} {key!r} has the wrong shape", where=where, found=found, expected=expected)
