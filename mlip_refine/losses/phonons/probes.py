"""Directions in which Hessians are compared.

All kinds but the thermal one have the same expectation: with unit vectors, the mean square of a component of
(H - Φ) v is ‖H - Φ‖²/(3N)² for random axes of random atoms and for random signs alike. Random signs spread
least (relative 0.13 beside 0.71 over 400 materials); the irreducible columns with their weights have no
spread at all.

There ω² of every mode counts alike, and what is soft, which thermodynamics is most about, hardly at all.
Thermal directions v = Φ^(-1/2) ξ/c, ξ random signs and c² = tr Φ⁻¹, are displacements of a classical harmonic
crystal. Their expectation is tr[(H - Φ) Φ⁻¹ (H - Φ)]/(3N c²): a mode whose eigenvalue λ = mω² is off by δλ
adds δλ²/λ = 4 m δω² to first order, so with mass weights the loss is that of frequencies, at the price of one
product, whatever the number of modes.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from mlip_refine.data.phonons.reference import PhononReference
from mlip_refine.losses.options import ProbeKind

SOFTEST = 0.1
"""Frequency, of the root mean square one, below which thermal displacements grow no further."""


@dataclass(frozen=True)
class Probe:
    """A direction of one material, and what the reference says of it.

    Attributes:
        direction: v `[n_atoms, 3]`, Å, float64.
        product: Φ v `[n_atoms, 3]`, eV/Å².
        scale: Factor on the components of an atom `[n_atoms, 1]`.
        weight: Among the probes of a batch.
        length: Displacement that a unit of the direction stands for where differences are taken, Å.
        size: What differences are divided by: 1 eV/Å², or their scale in the material.
    """

    direction: Tensor
    product: Tensor
    scale: Tensor
    weight: float
    length: float
    size: float = 1.0


def drawn_probes(
    reference: PhononReference,
    kind: ProbeKind,
    count: int,
    scale: Tensor,
    step: float,
    random: np.random.Generator,
) -> list[Probe]:
    """Draw directions of a material.

    Args:
        reference: The material, with force constants.
        kind: `one_hot`: one atom along one axis. `irreducible`: the same among the columns that differ
            by symmetry, as often as they occur. `rademacher`: all atoms along all axes, with random
            signs. `full`: every irreducible column, with its weight. Those of `thermal` are drawn by
            `thermal_probes`.
        count: How many; not for `full`.
        scale: Factors s on rows and columns of the Hessian `[n_atoms, 1]` (see `mass_scale`).
        step: Largest component of a displacement where differences are taken, Å.
        random: Generator.
    """
    if kind == "rademacher":
        n = len(scale)
        return _of_directions(reference, _signs(count, n, random) / math.sqrt(3 * n), scale, step)
    columns = _columns(reference, kind)
    if kind != "full":
        # Columns that are drawn several times come once.
        weights = np.array([weight for _, weight in columns])
        often = Counter(random.choice(len(columns), size=count, p=weights / weights.sum()).tolist())
        columns = [(columns[i][0], float(times)) for i, times in sorted(often.items())]
    probes = []
    for (atom, axis), weight in columns:
        direction = torch.zeros(len(scale), 3, dtype=scale.dtype)
        direction[atom, axis] = scale[atom, 0]
        product = scale[atom, 0] * reference.columns(atom, axis)
        probes.append(_probe(direction, product, scale, weight, step))
    return probes


def most_probes(reference: PhononReference, kind: ProbeKind, count: int) -> int:
    """How many directions `drawn_probes` finds at most.

    Args:
        reference: The material.
        kind: As in `drawn_probes`.
        count: As in `drawn_probes`.
    """
    if kind in ("rademacher", "thermal"):
        return count
    n_columns = len(_columns(reference, kind))
    return n_columns if kind == "full" else min(count, n_columns)


@dataclass(frozen=True)
class ThermalSpread:
    """How the atoms of a harmonic crystal are displaced.

    Attributes:
        root: D^(-1/2)/c, D the scaled Hessian, `[3 N, 3 N]` in single precision, without uniform
            translations: times random signs it is a direction with unit mean square. Soft and
            unstable modes are taken as if they had `SOFTEST` of the root mean square frequency. 100 atoms
            take 0.36 MB.
        size: Root mean square of a component of D v, eV/Å².
    """

    root: Tensor
    size: float

    @classmethod
    def of(cls, reference: PhononReference, scale: Tensor) -> Self:
        """That of a material.

        Args:
            reference: With force constants.
            scale: As in `drawn_probes`.

        Raises:
            InputError: There are no force constants.
        """
        n = len(scale)
        hessian = (scale[:, :, None, None] * reference.dense() * scale[:, 0, None]).reshape(3 * n, 3 * n)
        values, modes = torch.linalg.eigh((hessian + hessian.T) / 2)
        stiffness = values.clamp(min=SOFTEST**2 * float(values.abs().mean()))
        uniform = (torch.eye(3, dtype=scale.dtype) / scale[:, :, None]).reshape(3 * n, 3)
        uniform = uniform / uniform.norm(dim=0)
        root = (modes * stiffness.rsqrt()) @ modes.T
        root = root - uniform @ (uniform.T @ root)
        root = root / root.norm()
        return cls(root.float(), float((hessian @ root).norm()) / math.sqrt(3 * n))


def thermal_probes(
    reference: PhononReference,
    spread: ThermalSpread,
    count: int,
    scale: Tensor,
    step: float,
    random: np.random.Generator,
) -> list[Probe]:
    """Draw displacements of the harmonic crystal; see `drawn_probes` for what the arguments are."""
    signs = _signs(count, len(scale), random).flatten(1)
    directions = (signs @ spread.root.T.to(signs)).reshape(count, -1, 3)
    return _of_directions(reference, directions, scale, step)


def displaced_probes(
    reference: PhononReference, count: int, scale: Tensor, random: np.random.Generator
) -> list[Probe]:
    """Draw displacements whose forces are known, none twice; all of them if there are no more than `count`.

    Args:
        reference: The material, with displacements.
        count: How many.
        scale: As in `drawn_probes`.
        random: Generator.
    """
    known = reference.displacements
    chosen = list(range(len(known)))
    if count < len(known):
        chosen = sorted(random.permutation(len(known))[:count].tolist())
    probes = []
    for displacement, forces in ((known[i].displacement, known[i].forces) for i in chosen):
        length = float((displacement / scale).norm())
        probes.append(Probe(displacement / length, -forces / length, scale, 1.0, length))
    return probes


def mass_scale(reference: PhononReference, *, mass_weighted: bool) -> Tensor:
    """Factors √(m̄/m) `[n_atoms, 1]`, m̄ the mean mass, or 1.

    On rows and columns they make a Hessian a dynamical matrix times m̄: the unit stays eV/Å², and nothing
    changes where all masses are equal.
    """
    masses = torch.from_numpy(reference.supercell.get_masses())[:, None]
    return (masses.mean() / masses).sqrt() if mass_weighted else torch.ones_like(masses)


def reference_size(reference: PhononReference, scale: Tensor) -> float:
    """Root mean square of a component of Φ v, v unit vectors, eV/Å²: of scaled rows and columns.

    With force constants it is ‖Φ‖/(3N) from the irreducible columns; without, it is from the forces of the
    displacements.

    Args:
        reference: The material.
        scale: As in `drawn_probes`.
    """
    if reference.force_constants is not None:
        columns = [
            (c.weight, scale[c.atom, 0] * scale * reference.columns(c.atom, c.axis))
            for c in reference.irreducible()
        ]
    else:
        columns = [(1.0, scale * d.forces / (d.displacement / scale).norm()) for d in reference.displacements]
    total = sum(weight for weight, _ in columns)
    return math.sqrt(sum(weight * float(column.square().mean()) for weight, column in columns) / total)


def normalised(probes: Sequence[Probe], share: float) -> list[Probe]:
    """The same with weights that add up to a share."""
    total = sum(probe.weight for probe in probes)
    return [replace(probe, weight=share * probe.weight / total) for probe in probes]


def _signs(count: int, n_atoms: int, random: np.random.Generator) -> Tensor:
    """`[count, n_atoms, 3]`."""
    return torch.from_numpy(random.choice([-1.0, 1.0], size=(count, n_atoms, 3)))


def _of_directions(reference: PhononReference, v: Tensor, scale: Tensor, step: float) -> list[Probe]:
    """Probes of directions `[count, n_atoms, 3]` of the scaled Hessian."""
    pairs = zip(v * scale, reference.product(v * scale), strict=True)
    return [_probe(direction, product, scale, 1.0, step) for direction, product in pairs]


def _columns(reference: PhononReference, kind: ProbeKind) -> list[tuple[tuple[int, int], float]]:
    """Atoms and axes that are drawn from, with weights."""
    if kind == "one_hot":
        return [((atom, axis), 1.0) for atom in reference.primitive_atoms for axis in range(3)]
    return [((c.atom, c.axis), c.weight) for c in reference.irreducible()]


def _probe(direction: Tensor, product: Tensor, scale: Tensor, weight: float, step: float) -> Probe:
    return Probe(direction, product, scale, weight, step / float(direction.abs().max()))
