"""Are labels what they are taken for? They are held against the initial model before anything is trained.

A wrong unit, sign, order of components or zero of energy is larger than any error of a model that is worth
refining, and it has a shape: one factor, order or shift makes nearly all of the difference go away. A single
broken frame stands out among good ones. What is only inaccurate has no such shape, and is not judged.
"""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase import units
from ase.data import chemical_symbols
from ase.stress import full_3x3_to_voigt_6_stress

from mlip_refine.errors import InputError
from mlip_refine.potential import Graphs, Potential, Work
from mlip_refine.progress import console
from mlip_refine.training.replay import LabelledFrame

type Pair = tuple[np.ndarray, np.ndarray]
"""A label and what the model says."""

MOST = 2000
"""Most frames of a set that are judged, evenly spaced."""

FITS, ABSURD = 0.5, 0.8
"""Mismatch (see `_mismatch`) below which labels fit, and above which they fit not at all."""

FEW = 5
"""Frames that a factor of stress or energy, or an order of components, needs to be found."""

LEAST_ERRORS = {"energy": 1e-3, "forces": 5e-3, "stress": 0.02 * units.GPa}
"""Errors below which nothing is resolved: eV/atom, eV/Å, eV/Å³."""

_SHOWN = 3

_KCAL, _KJ = units.kcal / units.mol, units.kJ / units.mol

ENERGY_UNITS = {
    "Hartree": units.Hartree,
    "Rydberg": units.Rydberg,
    "kcal/mol": _KCAL,
    "kJ/mol": _KJ,
    "meV": 1e-3,
}

FORCE_UNITS = {
    "the opposite sign": -1.0,
    "Hartree/bohr": units.Hartree / units.Bohr,
    "Rydberg/bohr": units.Rydberg / units.Bohr,
    "eV/bohr": 1 / units.Bohr,
    "kcal/mol/Å": _KCAL,
    "kJ/mol/Å": _KJ,
    "meV/Å or kJ/mol/nm": 1e-3,
}

STRESS_UNITS = {
    "GPa": units.GPa,
    "kbar": 0.1 * units.GPa,
    "MPa": 1e-3 * units.GPa,
    "Hartree/bohr³": units.Hartree / units.Bohr**3,
    "Rydberg/bohr³": units.Rydberg / units.Bohr**3,
}

ORDERS = {
    "xx yy zz yz xz xy": (0, 1, 2, 3, 4, 5),
    "xx yy zz xy yz zx": (0, 1, 2, 4, 5, 3),
    "xx yy zz xy xz yz": (0, 1, 2, 5, 4, 3),
    "xx yy zz yz xy xz": (0, 1, 2, 3, 5, 4),
    "xx yy zz xz yz xy": (0, 1, 2, 4, 3, 5),
    "xx yy zz xz xy yz": (0, 1, 2, 5, 3, 4),
    "xx xy xz yy yz zz": (0, 3, 5, 4, 2, 1),
}
"""Orders of six components in a file, and where the components xx yy zz yz xz xy are in each."""


@dataclass(frozen=True)
class Compared:
    """A frame with its labels beside what a model says; `None` for what it lacks or what weighs nothing.

    Attributes:
        source: File and frame.
        elements: Atoms by atomic number.
        volume: Å³.
        energy: eV, each of shape `[]`.
        forces: eV/Å, each `[n_atoms, 3]`.
        stress: eV/Å³, each `[6]` in the order xx yy zz yz xz xy.
    """

    source: str
    elements: Mapping[int, int]
    volume: float
    energy: Pair | None = None
    forces: Pair | None = None
    stress: Pair | None = None

    @property
    def n_atoms(self) -> int:
        """Number of atoms."""
        return sum(self.elements.values())


def compare(potential: Potential, frames: Sequence[LabelledFrame]) -> list[Compared]:
    """Evaluate a potential on labelled frames, or on `MOST` of them.

    Raises:
        MlipRefineError: If memory runs out for a single system.
    """
    chosen = [frames[i] for i in sorted(set(np.linspace(0, len(frames) - 1, MOST).round().astype(int)))]
    numbers = np.array(potential.graphs.atomic_numbers)

    def compared(part: slice, graphs: Graphs) -> list[Compared]:
        with torch.no_grad():
            out = potential.evaluate(graphs, ("energy", "forces", "stress"))
        energy, forces, stress = (
            out[k].detach().cpu().double().numpy() for k in ("energy", "forces", "stress")
        )
        found, start = [], 0
        for i, frame in enumerate(chosen[part]):
            kinds, counts = np.unique(numbers[frame.structure.species.cpu().numpy()], return_counts=True)
            atoms = slice(start, start := start + int(counts.sum()))
            labels: dict[str, Pair] = {}
            if frame.energy is not None and frame.weights["energy"] > 0:
                labels["energy"] = (np.array(frame.energy), energy[i])
            if frame.forces is not None and frame.weights["forces"] > 0:
                labels["forces"] = (frame.forces.cpu().double().numpy(), forces[atoms])
            if frame.stress is not None and frame.weights["stress"] > 0:
                label = full_3x3_to_voigt_6_stress(frame.stress.cpu().double().numpy())
                labels["stress"] = (label, full_3x3_to_voigt_6_stress(stress[i]))
            found.append(
                Compared(
                    source=frame.source,
                    elements=dict(zip(kinds.tolist(), counts.tolist(), strict=True)),
                    volume=abs(float(torch.linalg.det(frame.structure.cell))),
                    **labels,
                )
            )
        return found

    return list(itertools.chain(*potential.in_chunks(Work.FORCES, [f.structure for f in chosen], compared)))


def require_sound_labels(frames: Sequence[Compared], *, trusted: bool = False) -> None:
    """Refuse labels that are not what they are taken for, or warn of them if they are trusted.

    Each file is judged by itself: one of several may be in other units.

    Raises:
        InputError: With what was found in each file, and what would make its labels fit.
    """
    files: dict[str, list[Compared]] = defaultdict(list)
    for frame in frames:
        files[frame.source.rpartition(", frame ")[0]].append(frame)
    lines = [f"\n  {file or 'frames'}: {x}" for file, mine in files.items() for x in complaints(mine)]
    if lines and trusted:
        console.print(f"warning: labels do not fit the initial model:{''.join(lines)}", markup=False)
    elif lines:
        raise InputError(
            f"labels do not fit the initial model:{''.join(lines)}",
            where="replay",
            fix="\nCorrect the labels, or give frames the weight 0 (config_weight, config_energy_weight). "
            "With replay.trust_labels: true they are trained on as they are.",
        )


def error_scales(frames: Sequence[Compared]) -> dict[str, float]:
    """Return root mean square errors of the model by label: eV/atom, eV/Å, eV/Å³.

    None is smaller than 2 % of the spread of the labels, or than what nobody resolves: labels that the model
    made itself have no error.
    """
    found = {}
    for name, least in LEAST_ERRORS.items():
        pairs = [(f, *pair) for f in frames if (pair := getattr(f, name)) is not None]
        if not pairs:
            continue
        # As the loss counts them: energies per atom, the components of shear twice.
        if name == "energy":
            pairs = [(f, label / f.n_atoms, model / f.n_atoms) for f, label, model in pairs]
        elif name == "stress":
            pairs = [(f, *(x[[0, 1, 2, 3, 3, 4, 4, 5, 5]] for x in pair)) for f, *pair in pairs]
        label, model = (np.concatenate([np.ravel(pair[k]) for pair in pairs]) for k in (1, 2))
        spread = label - _of_composition([f for f, *_ in pairs], label) if name == "energy" else label
        found[name] = max(_rms(label - model), 0.02 * _rms(spread), least)
    return found


def complaints(frames: Sequence[Compared]) -> list[str]:
    """Return what is wrong with the labels of a file, in sentences; nothing for labels that may be right."""
    found = []
    for name, judge in (("energies", _energies), ("forces", _forces), ("stresses", _stresses)):
        found += [f"{name} {what}" for what in judge(frames)]
    return found


def _energies(frames: Sequence[Compared]) -> list[str]:
    mine = [f for f in frames if f.energy is not None]
    if len(mine) < 2:
        return []
    n_atoms = np.array([f.n_atoms for f in mine])
    label, model = (np.array([float(f.energy[k]) for f in mine if f.energy]) / n_atoms for k in (0, 1))
    kinds, shares = _shares(mine)
    off = float(np.median(np.abs(label - model)))

    def without_zeros(values: np.ndarray) -> np.ndarray:
        return np.asarray(values - _of_composition(mine, values))

    def fit(factor: float | np.ndarray) -> tuple[float, float]:
        """Median distance, eV/atom, and mismatch of what does not depend on the zero of energy."""
        spread = _mismatch(without_zeros(factor * label), without_zeros(model))
        return float(np.median(np.abs(factor * label - model))), spread

    enough = len(mine) >= FEW + len(kinds) and without_zeros(model).std() > 2e-3
    candidates: dict[str, float | np.ndarray] = {**ENERGY_UNITS, "energies per atom": n_atoms}
    fits = {name: fit(factor) for name, factor in candidates.items()}
    nearest = min(fits, key=lambda name: fits[name][0])
    exact = off > 0.5 and fits[nearest][0] < 0.05 * off
    name = nearest if exact else min(fits, key=lambda name: fits[name][1])
    if exact or (enough and off > 0.5 and _better(fit(1.0)[1], fits[name][1])):
        factor = candidates[name]
        times = "the number of atoms" if np.ndim(factor) else f"{float(np.mean(factor)):.6g}"
        shift = "" if exact else ", after a shift of the zero of energy, too"
        near = f"{fits[name][0]:.3g} eV/atom from the model, as they are {off:.3g}"
        return [f"look like {name}: times {times} they are {near}{shift}"]

    difference = label - model
    middle = float(np.median(difference))
    distance = np.abs(difference - middle)
    odd = distance > max(0.3, 25 * 1.48 * float(np.median(distance)))
    if 0 < odd.sum() <= 1 + len(mine) // 10:
        worst = [f"{mine[i].source.rpartition(', ')[2]}: {difference[i] - middle:+.3g}" for i in _first(odd)]
        what = [f"of {odd.sum()} frames are far off, by eV/atom beside the others ({', '.join(worst)})"]
        rest = ~odd
    else:
        what, rest = [], np.ones(len(mine), bool)

    per_element = rest.sum() >= np.linalg.matrix_rank(shares[rest]) + 2
    matrix = shares if per_element else np.ones((len(mine), 1))
    zeros = np.linalg.lstsq(matrix[rest], difference[rest], rcond=None)[0]
    left = float(np.sqrt(np.mean((difference - matrix @ zeros)[rest] ** 2)))
    size = float(np.median(np.abs(difference[rest])))
    if size > 0.1 and left < 0.2 * size:
        names = [chemical_symbols[z] for z in kinds] if per_element else ["atom"]
        added = ", ".join(f"{-x:+.4g} eV per {name}" for name, x in zip(names, zeros, strict=True))
        what.append(
            f"have another zero: {size:.3g} eV/atom from the model, {left:.2g} after a shift of {added}"
        )
    elif size > 1.0:
        what.append(f"are {size:.3g} eV/atom from the model (median), which no unit or shift explains")
    return what


def _forces(frames: Sequence[Compared]) -> list[str]:
    pairs = [(f, *f.forces) for f in frames if f.forces is not None]
    # Forces that vanish by symmetry say nothing of units.
    sizes = np.array([_rms(model) for _, _, model in pairs])
    typical = float(np.median(sizes)) if len(sizes) else 0.0
    mine = [pair for pair, size in zip(pairs, sizes, strict=True) if size > max(0.3 * typical, 1e-3)]
    if not mine:
        return []

    def fit(factor: float) -> float:
        return float(np.median([_mismatch(factor * label, model) for _, label, model in mine]))

    best = min(FORCE_UNITS, key=lambda name: fit(FORCE_UNITS[name]))
    factor = FORCE_UNITS[best]
    if _better(fit(1.0), fit(factor)):
        off, near = (np.median([_rms(f * label - model) for _, label, model in mine]) for f in (1.0, factor))
        return [
            f"look like {best}: times {factor:.6g} they are {near:.3g} eV/Å from the model, as they are "
            f"{off:.3g}"
        ]
    return _odd_frames(pairs, "eV/Å", 1.0, largest=5.0) or _beyond(mine, "eV/Å", 1.0, largest=10.0)


def _stresses(frames: Sequence[Compared]) -> list[str]:
    pairs = [(f, *f.stress) for f in frames if f.stress is not None]
    if len(pairs) < FEW:
        return _odd_frames(pairs, "GPa", units.GPa, largest=20.0)
    label, model = (np.array([pair[k] for pair in pairs]) for k in (1, 2))
    volumes = np.array([[f.volume] for f, *_ in pairs])
    found = _odd_frames(pairs, "GPa", units.GPa, largest=20.0)

    def fit(factor: float | np.ndarray, order: Sequence[int]) -> float:
        """Mismatch beside the mean stress, which other settings of DFT shift; of shear by itself, too."""
        a, b = (x - np.median(x, 0) for x in ((factor * label)[:, order], model))
        worst = 0.0
        for part in (slice(0, 6), slice(3, 6)):
            size = np.linalg.norm(b[:, part], axis=1)
            kept = size > max(0.3 * float(np.median(size)), 0.1 * units.GPa)
            if kept.sum() >= FEW:
                found = [_mismatch(x, y) for x, y in zip(a[kept, part], b[kept, part], strict=True)]
                worst = max(worst, float(np.median(found)))
        return worst

    factors: dict[str, float | np.ndarray] = {"": 1.0, "the opposite sign": -1.0}
    for unit, size in STRESS_UNITS.items():
        factors |= {unit: size, f"{unit}, compressive positive": -size}
    factors |= {"stress times volume": 1 / volumes, "virials": -1 / volumes}
    scores = {(name, order): fit(factors[name], ORDERS[order]) for name in factors for order in ORDERS}
    usual = next(iter(ORDERS))
    before, (name, order) = scores["", usual], min(scores, key=lambda k: scores[k])
    if not _better(before, scores[name, order]):
        return found or _beyond(pairs, "GPa", units.GPa, largest=50.0)
    factor = factors[name]
    off = float(np.median(np.abs(label - model))) / units.GPa
    near = float(np.median(np.abs((factor * label)[:, ORDERS[order]] - model))) / units.GPa
    what = [name] if name else []
    if order != usual:
        what.append(f"in the order {order}")
    number = f"{'-' if name == 'virials' else ''}1/V" if np.ndim(factor) else f"{float(np.mean(factor)):.6g}"
    times = f"times {number}" if name else "so read"
    return [
        f"look like {', '.join(what)}: {times} they are {near:.3g} GPa from the model (median), as they are "
        f"{off:.3g} GPa"
    ]


def _shares(frames: Sequence[Compared]) -> tuple[list[int], np.ndarray]:
    """Return the elements of some frames, and their shares in each `[n_frames, n_elements]`."""
    kinds = sorted({z for f in frames for z in f.elements})
    return kinds, np.array([[f.elements.get(z, 0) / f.n_atoms for z in kinds] for f in frames])


def _of_composition(frames: Sequence[Compared], values: np.ndarray) -> np.ndarray:
    """Return what of energies per atom depends on composition alone, such as the zero of energy."""
    _, shares = _shares(frames)
    return np.asarray(shares @ np.linalg.lstsq(shares, values, rcond=None)[0])


def _mismatch(label: np.ndarray, model: np.ndarray) -> float:
    """|a - b| / (|a| + |b|): 0 if equal, 0.7 if unrelated, 1 if opposite or of another scale."""
    total = float(np.linalg.norm(label) + np.linalg.norm(model))
    return float(np.linalg.norm(label - model)) / total if total > 0 else 0.0


def _better(before: float, after: float) -> bool:
    """Whether labels fit after a change, and did not before."""
    return (after < FITS and before > ABSURD) or (after < 0.2 and before > max(0.3, 2.4 * after))


def _odd_frames(
    pairs: Sequence[tuple[Compared, np.ndarray, np.ndarray]], unit: str, size: float, largest: float
) -> list[str]:
    """Say which few frames differ much more than the others, and have little to do with the model.

    Labels that are all zero may stand for missing ones: they are odd much earlier.
    """
    if len(pairs) < 2:
        return []
    errors = np.array([_rms(label - model) / size for _, label, model in pairs])
    unrelated = np.array([_mismatch(label, model) > 0.6 for _, label, model in pairs])
    limits = np.array([largest if label.any() else largest / 50 for _, label, _ in pairs])
    odd = unrelated & (errors > np.maximum(limits, 20 * float(np.median(errors))))
    if not 0 < odd.sum() <= 1 + len(pairs) // 10:
        return []
    worst = [f"{pairs[i][0].source.rpartition(', ')[2]}: {errors[i]:.3g}" for i in _first(odd)]
    return [f"of {odd.sum()} frames are far from the model, in {unit} ({', '.join(worst)})"]


def _beyond(
    pairs: Sequence[tuple[Compared, np.ndarray, np.ndarray]], unit: str, size: float, largest: float
) -> list[str]:
    """Say that labels are far from the model, if they are further than the model is from zero."""
    off, own = (
        float(np.median([_rms(x) for x in values])) / size
        for values in ([label - model for _, label, model in pairs], [model for _, _, model in pairs])
    )
    if off < max(largest, 3 * own):
        return []
    return [f"are {off:.3g} {unit} from the model (median), which no unit or sign explains"]


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _first(chosen: np.ndarray) -> list[int]:
    return [int(i) for i in np.flatnonzero(chosen)[:_SHOWN]]
