"""Labelled frames from files, checked frame by frame.

A misspelt key must stop a run: silently absent forces or stresses are the most frequent way to train on
nothing. A frame that has only some of the labels counts for what it has, and that is said in a line.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from ase.stress import voigt_6_to_full_3x3_stress
from scipy.spatial import cKDTree

from mlip_refine.data.frame_formats import read_atoms
from mlip_refine.errors import InputError, nearest
from mlip_refine.progress import console

_MIN_VOLUME = 1e-3
"""Smallest volume of a cell, Å³, that is accepted."""

_MIN_DISTANCE = 0.1
"""Smallest distance of two atoms, Å, that is accepted."""

_SHOWN = 3
"""Reasons, and frames of each, that a refusal of many frames names."""

type LabelName = Literal["energy", "forces", "stress"]

EVEN: Mapping[LabelName, float] = MappingProxyType({"energy": 1.0, "forces": 1.0, "stress": 1.0})
"""Weights of a frame that gives none."""


@dataclass(frozen=True)
class Frame:
    """One configuration with those labels that it has.

    Attributes:
        numbers: Atomic numbers `[n_atoms]`.
        positions: Cartesian positions `[n_atoms, 3]`, Å.
        cell: Lattice vectors as rows `[3, 3]`, Å.
        pbc: Periodic directions; all three, or the frame is left out.
        energy: Energy of the whole cell, eV.
        forces: Forces on the atoms `[n_atoms, 3]`, eV/Å.
        stress: Stress of the cell `[3, 3]`, eV/Å³, tensile positive (ASE's sign).
        info: Other words and numbers of the comment line, such as `config_type`.
        source: File and frame, for messages.
        weights: Factors of the squared errors of energy, forces and stress, as MACE takes them from a frame:
            `config_weight` times `config_energy_weight`, `config_forces_weight`, `config_stress_weight`.
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
    weights: Mapping[LabelName, float] = EVEN

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


class _Keys(NamedTuple):
    """Names of the labels in a file; `None` reads none."""

    energy: str | None
    forces: str | None
    stress: str | None
    virials: str | None


def read_frames(
    path: Path | Sequence[Path],
    energy_key: str | None = "REF_energy",
    forces_key: str | None = "REF_forces",
    stress_key: str | None = "REF_stress",
    virials_key: str | None = "REF_virials",
    *,
    elements: AbstractSet[int] | None = None,
    head: str | None = None,
) -> list[Frame]:
    """Read labelled frames.

    Isolated atoms (`config_type=IsolatedAtom`) and frames that are not periodic in three dimensions are left
    out. A frame that lacks a label counts for those that it has. Both are said in a line for each file.

    Args:
        path: One file or several; the suffix tells the format, by the table `FORMATS` of `frame_formats`.
        energy_key: Name of the energy in the comment line, eV; None reads no energies.
        forces_key: Name of the forces' column, eV/Å; None reads no forces.
        stress_key: Name of the stress in the comment line, eV/Å³, tensile positive: nine numbers or six in
            Voigt order (xx yy zz yz xz xy); None reads no stresses.
        virials_key: Name of the virials W, eV, likewise, of frames without a stress, which is then -W/V as in
            MACE; None reads none.
        elements: Atomic numbers that the model knows; None admits all.
        head: Head of the model; frames whose `head` is another are left out. None takes all frames.

    Returns:
        The frames, in the order of the files.

    Raises:
        InputError: A file is missing, empty or damaged; a label that is asked for is in none of its frames,
            except a stress under its usual name; or there are frames with a label under a similar name, of
            the wrong shape or that is not finite, with two atoms on one place, or with an unknown element.
            The message names these frames, the first few of them with the reason.
    """
    if stress_key is not None and "virial" in stress_key.lower():
        raise InputError(
            f"{stress_key!r} sounds like virials, which are no stress: W = -σV, in eV",
            where="stress_key",
            expected=f"virials_key: {stress_key}, which are converted",
        )
    paths = [path] if isinstance(path, Path | str) else list(path)
    keys = _Keys(energy_key, forces_key, stress_key, virials_key if stress_key is not None else None)
    return [frame for one in map(Path, paths) for frame in _frames_of_file(one, keys, elements, head)]


def _frames_of_file(
    path: Path, keys: _Keys, elements: AbstractSet[int] | None, head: str | None
) -> list[Frame]:
    """Read one file: frames that can be used, after a line about those that cannot or lack something."""
    frames, left_out, names = list[Frame](), Counter[str](), set[str]()
    bad: list[tuple[int, InputError]] = []
    total = 0
    for i, atoms in enumerate(read_atoms(path)):
        total += 1
        reason = _reason_to_leave_out(atoms, head)
        if reason is not None:
            left_out[reason] += 1
            continue
        try:
            frames.append(_frame(atoms, keys, f"{path.name}, frame {i}", elements))
        except InputError as error:
            bad.append((i, error))
        names |= set(_info(atoms)) | set(_arrays(atoms))
    if bad:
        raise _refusal(bad, total, path)
    reasons = ", ".join(f"{n} {reason}" for reason, n in left_out.items())
    if not frames:
        raise InputError("no frame can be used", where=str(path), found=f"{total} frames: {reasons}")

    notes = [f"left out: {reasons}"] if left_out else []
    for quantity in ("energy", "forces", "stress"):
        key, count = getattr(keys, quantity), sum(getattr(f, quantity) is not None for f in frames)
        # Many files have no stress. What was asked for by another than the usual name should be there.
        if key is not None and count == 0 and key != "REF_stress":
            raise InputError(
                f"no {quantity} under the key {key!r}",
                where=f"{path.name}, all {len(frames)} frames",
                found=f"keys {', '.join(sorted(names))}" if names else "no labels at all",
                fix=f"Set {quantity}_key to the name in the file, or to null to do without.",
            )
        if key is not None and count < len(frames):
            notes.append(f"{quantity} of {count or 'none'}")
    if notes:
        console.print(f"{path.name}: {len(frames)} frames; {'; '.join(notes)}", soft_wrap=True, markup=False)
    return frames


def _reason_to_leave_out(atoms: Atoms, head: str | None) -> str | None:
    """Return what kind of frame it is, if it is of a kind that a crystal's potential is not replayed on."""
    of_frame = atoms.info.get("head")
    if head is not None and of_frame is not None and str(of_frame).lower() != head.lower():
        return f"of the head {of_frame}, not {head}"
    if len(atoms) == 1 and atoms.info.get("config_type") == "IsolatedAtom":
        return "IsolatedAtom"
    if not atoms.pbc.all():
        return "not periodic in three dimensions"
    return None


def _refusal(bad: Sequence[tuple[int, InputError]], total: int, path: Path) -> InputError:
    """Return one error for all bad frames of a file, the same reason once."""
    reasons: dict[str, list[int]] = {}
    for i, error in bad:
        reason = InputError(error.problem, found=error.found, expected=error.expected, fix=error.fix)
        reasons.setdefault(str(reason), []).append(i)
    if len(bad) == 1:
        return bad[0][1]

    def frames(which: Sequence[int]) -> str:
        more = f" and {len(which) - _SHOWN} more" if len(which) > _SHOWN else ""
        return f"frame{'s' if len(which) > 1 else ''} {', '.join(map(str, which[:_SHOWN]))}{more}"

    if len(reasons) == 1:
        return InputError(
            bad[0][1].problem,
            where=f"{path.name}, {frames([i for i, _ in bad])} of {total}",
            found=bad[0][1].found,
            expected=bad[0][1].expected,
            fix=bad[0][1].fix,
        )
    lines = [f"\n  {frames(which)}: {reason}" for reason, which in list(reasons.items())[:_SHOWN]]
    others = [i for which in list(reasons.values())[_SHOWN:] for i in which]
    if others:
        lines.append(f"\n  and, for other reasons, {frames(others)}")
    return InputError(f"{len(bad)} of {total} frames cannot be used:{''.join(lines)}", where=path.name)


def _frame(atoms: Atoms, keys: _Keys, where: str, elements: AbstractSet[int] | None) -> Frame:
    """Check a frame and take its labels out of it."""
    _check_structure(atoms, where, elements)
    info, arrays = _info(atoms), _arrays(atoms)
    energy = _label("energy", keys.energy, info, arrays, where)
    if energy is not None:
        if energy.size != 1:
            raise _wrong_shape("energy", keys.energy, energy, "one number", where)
        _check_finite(energy, f"energy {keys.energy!r}", where)
    forces = _label("forces", keys.forces, arrays, info, where)
    if forces is not None:
        if forces.shape != (len(atoms), 3):
            raise _wrong_shape("forces", keys.forces, forces, f"[{len(atoms)}, 3]", where)
        if not np.isfinite(forces).all():
            problem = f"forces {keys.forces!r} of {_first_atom(forces)} are not finite"
            raise InputError(problem, where=where)
    stress = _tensor("stress", keys.stress, info, arrays, where, other=keys.virials)
    virials = None
    if stress is None:
        virials = _tensor("virials", keys.virials, info, arrays, where)
        stress = None if virials is None else -virials / abs(atoms.cell.volume)
    if (keys.energy or keys.forces or keys.stress) and energy is None and forces is None and stress is None:
        present = sorted({*info, *arrays})
        raise InputError(
            f"no label under the keys {', '.join(repr(key) for key in keys if key)}",
            where=where,
            found=f"keys {', '.join(present)}" if present else "no labels at all",
        )
    used = {keys.energy, keys.stress, keys.virials}
    return Frame(
        numbers=atoms.numbers.copy(),
        positions=atoms.positions.copy(),
        cell=np.array(atoms.cell),
        pbc=(True, True, True),
        energy=None if energy is None else float(energy.reshape(())),
        forces=forces,
        stress=stress,
        info={
            k: v for k, v in info.items() if k not in used and isinstance(v, str | int | float | np.generic)
        },
        source=where,
        weights={
            "energy": _weight(info, "energy", where),
            "forces": _weight(info, "forces", where),
            "stress": _weight(info, "stress" if virials is None else "virials", where),
        },
    )


def _info(atoms: Atoms) -> dict[str, object]:
    """What the comment line of a frame has; ASE takes `energy` and `stress` away into a calculator."""
    results = {} if atoms.calc is None else atoms.calc.results
    return dict(atoms.info) | {k: v for k, v in results.items() if not _per_atom(k, v, atoms)}


def _arrays(atoms: Atoms) -> dict[str, object]:
    """What the atoms of a frame have; ASE takes `forces` and a few more away into a calculator."""
    arrays = {k: v for k, v in atoms.arrays.items() if k not in {"numbers", "positions"}}
    results = {} if atoms.calc is None else atoms.calc.results
    return arrays | {k: v for k, v in results.items() if _per_atom(k, v, atoms)}


def _per_atom(name: str, value: Any, atoms: Atoms) -> bool:
    return np.ndim(value) > 0 and len(np.atleast_1d(value)) == len(atoms) and name not in {"stress", "dipole"}


def _weight(info: Mapping[str, object], quantity: str, where: str) -> float:
    """Return the factor of the squared error of a label."""
    weight = 1.0
    for key in ("config_weight", f"config_{quantity}_weight"):
        try:
            factor = float(info.get(key, 1.0))  # type: ignore[arg-type]
        except (TypeError, ValueError):
            factor = np.nan
        if not np.isfinite(factor) or factor < 0:
            raise InputError(f"{key} is no weight", where=where, found=info[key], expected="0 or more")
        weight *= factor
    return weight


def _check_structure(atoms: Atoms, where: str, elements: AbstractSet[int] | None) -> None:
    if not np.isfinite(atoms.positions).all():
        raise InputError(f"positions of {_first_atom(atoms.positions)} are not finite", where=where)
    if not np.isfinite(np.array(atoms.cell)).all():
        raise InputError("the cell is not finite", where=where)
    if abs(atoms.cell.volume) < _MIN_VOLUME:
        raise InputError(
            "the cell has no volume",
            where=where,
            found=f"{abs(atoms.cell.volume):.3g} Å³",
            expected='a Lattice of three dimensions, or pbc="F F F"',
        )
    unknown = sorted(
        {int(z) for z in atoms.numbers} - (elements if elements is not None else set(range(1, 119)))
    )
    if unknown:
        known = "any element" if elements is None else _symbols(sorted(elements))
        raise InputError(
            "elements that the model does not know", where=where, found=_symbols(unknown), expected=known
        )
    together = atoms_on_one_place(atoms)
    if together is not None:
        i, j, distance = together
        raise InputError(
            "two atoms are on one place",
            where=where,
            found=f"atoms {i} and {j} at a distance of {distance:.2g} Å",
        )


def atoms_on_one_place(atoms: Atoms) -> tuple[int, int, float] | None:
    """Return the first two atoms that are too near to be meant, with their distance."""
    cell = np.array(atoms.cell)
    # In a periodic unit cube, where a distance of so much cannot be longer than this.
    scaled = np.linalg.solve(cell.T, atoms.positions.T).T % 1.0 % 1.0
    reach = min(_MIN_DISTANCE / np.linalg.svd(cell, compute_uv=False).min(), 0.49)
    for i, j in sorted(cKDTree(scaled, boxsize=1.0).query_pairs(reach)):
        apart = scaled[i] - scaled[j]
        distance = float(np.linalg.norm((apart - np.round(apart)) @ cell))
        if distance < _MIN_DISTANCE:
            return i, j, distance
    return None


def _symbols(numbers: Iterable[int]) -> str:
    return ", ".join(chemical_symbols[z] for z in numbers)


def _first_atom(values: np.ndarray) -> str:
    bad = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))
    return f"atom {int(bad[0])}"


def _tensor(
    quantity: str,
    key: str | None,
    info: Mapping[str, object],
    arrays: Mapping[str, object],
    where: str,
    other: str | None = None,
) -> np.ndarray | None:
    """Stress or virials `[3, 3]` from nine numbers, three rows, or six in Voigt order."""
    value = _label(quantity, key, info, arrays, where, other)
    if value is None:
        return None
    if value.shape not in {(9,), (3, 3), (6,)}:
        raise _wrong_shape(
            quantity, key, value, "9 numbers, 3x3, or 6 in Voigt order (xx yy zz yz xz xy)", where
        )
    _check_finite(value, f"{quantity} {key!r}", where)
    full = voigt_6_to_full_3x3_stress(value) if value.size == 6 else value.reshape(3, 3)
    if not np.allclose(full, full.T, atol=1e-6 + 1e-3 * np.abs(full).max()):
        raise InputError(f"{quantity} {key!r} is not symmetric", where=where, found=full.tolist())
    return np.array(0.5 * (full + full.T))


def _label(
    quantity: str,
    key: str | None,
    present: Mapping[str, object],
    elsewhere: Mapping[str, object],
    where: str,
    other: str | None = None,
) -> np.ndarray | None:
    """Numbers of the label that a frame has under a key; `None` if it has none, and nothing like it.

    Args:
        quantity: What it is.
        key: Its name.
        present: What the frame has in the place where the label belongs.
        elsewhere: What it has in another.
        where: File and frame.
        other: Name of what may stand in for it.

    Raises:
        InputError: It is in another place, has a similar name, or is not a number.
    """
    if key is None or (key not in present and other in present):
        return None
    if key in elsewhere and key not in present:
        shape = list(np.asarray(elsewhere[key]).shape)
        column = quantity == "forces"
        raise InputError(
            f"{quantity} {key!r} must be {'a column of the atoms' if column else 'in the comment line'}",
            where=where,
            found=f"{'in the comment line' if column else 'a column of the atoms'}, of shape {shape}",
            fix=f"Before writing with ASE: atoms.arrays[{key!r}] = np.array(atoms.info.pop({key!r}))."
            if column
            else f"Before writing with ASE: atoms.info[{key!r}] = atoms.arrays.pop({key!r}).",
        )
    if key not in present:
        names = sorted(str(name) for name in present)
        word = nearest(key, [name for name in names if not name.startswith("config_")])
        if word is None:
            return None
        raise InputError(
            f"no {quantity} under the key {key!r}",
            where=where,
            found=f"keys {', '.join(names)}",
            fix=f"Did you mean {quantity}_key: {word}? With {quantity}_key: null, none is read.",
        )
    try:
        value, numbers = np.asarray(present[key]), np.asarray(present[key], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{quantity} {key!r} is not a number", where=where, found=present[key]) from error
    if value.dtype.kind == "b":  # T, F, or a key without a value
        raise InputError(f"{quantity} {key!r} is not a number", where=where, found=value.tolist())
    return numbers


def _check_finite(value: np.ndarray, label: str, where: str) -> None:
    if not np.isfinite(value).all():
        raise InputError(f"{label} is not finite", where=where, found=value.tolist())


def _wrong_shape(quantity: str, key: str | None, value: np.ndarray, expected: str, where: str) -> InputError:
    found = f"shape {list(value.shape)}"
    return InputError(f"{quantity} {key!r} has the wrong shape", where=where, found=found, expected=expected)
