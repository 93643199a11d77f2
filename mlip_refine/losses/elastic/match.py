"""What all methods of `elastic_constants` share: crystals, and the loss from the values of every cell."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from ase import Atoms
from torch import Tensor

from mlip_refine.crystals.symmetry import INDEPENDENT, Symmetry, find_symmetry
from mlip_refine.crystals.tensors import stress_from_voigt, stress_to_voigt
from mlip_refine.data import find_table
from mlip_refine.errors import InputError, nearest
from mlip_refine.losses.base import PERFECT, UNSTRAINED, EnsembleSource, Loss, LossResult, Setting
from mlip_refine.losses.elastic.targets import CellTargets
from mlip_refine.losses.options import ElasticConstantsOptions
from mlip_refine.observables.base import Observable, Sample
from mlip_refine.observables.cell import Pressure, Stress
from mlip_refine.observables.elasticity import FluctuationElasticity
from mlip_refine.quantities import Measured, Target


class SymmetricStress(Observable):
    """Total stress in the standard axes of a crystal, GPa: the components that symmetry leaves independent.

    One of a cubic crystal, xx and zz of a hexagonal one. The others are noise or follow from these, and would
    count too little or too often in a mean.
    """

    probes: ClassVar[frozenset[str]] = Stress.probes
    unit = "GPa"

    def __init__(self, symmetry: Symmetry) -> None:
        """Choose the components for a symmetry.

        Args:
            symmetry: Symmetry of the ideal crystal, in the axes of the frames.
        """
        turns, standard = symmetry.rotations, symmetry.to_standard
        units = stress_from_voigt(torch.eye(6, dtype=torch.float64))
        mean = torch.einsum("rij,kjl,rml->kim", turns, units, turns) / len(turns)
        rows = stress_to_voigt(standard @ mean @ standard.T).T
        chosen: list[int] = []
        for i in range(len(rows)):
            if int(torch.linalg.matrix_rank(rows[[*chosen, i]], rtol=1e-8)) > len(chosen):
                chosen.append(i)
        self.labels = tuple(Stress.labels[i] for i in chosen)
        self.rows = rows[chosen]
        """From the six components in the frame of the crystal `[k, 6]`."""

    def columns(self, sample: Sample) -> Tensor:
        """Six components of every frame, in the frame of the crystal `[n, 6]`."""
        return Stress().columns(sample)

    def derive(self, means: Tensor, sample: Sample) -> Tensor:  # noqa: ARG002 - others need the state
        """The components `[k]`."""
        return self.of(means)

    def of(self, stress: Tensor) -> Tensor:
        """The components `[k]` of a stress in Voigt order `[6]`, in the frame of the crystal."""
        return self.rows.to(stress) @ stress

    def under(self, pressure: float) -> Tensor:
        """The components `[k]` at a pressure."""
        return torch.tensor([-pressure if label in {"xx", "yy", "zz"} else 0.0 for label in self.labels])


@dataclass(frozen=True)
class CellValues:
    """What a model has in one cell, GPa.

    Attributes:
        constants: Independent stress-strain coefficients `[m]`.
        stress: Total stress, the components of `SymmetricStress` `[k]`.
        pressure: `[1]`.
        errors: Standard errors of the three.
    """

    constants: Tensor
    stress: Tensor
    pressure: Tensor
    errors: tuple[Sequence[float], Sequence[float], Sequence[float]]

    @classmethod
    def exact(cls, constants: Tensor, stress: Tensor, pressure: Tensor) -> Self:
        """Values without errors."""
        none = [0.0] * len(constants), [0.0] * len(stress), [0.0]
        return cls(constants, stress, pressure, none)

    def plus(self, other: Self, sign: float = 1.0) -> Self:
        """The sum with independent values, or the difference."""
        mine, others = self.errors, other.errors
        errors = [list(map(math.hypot, a, b)) for a, b in zip(mine, others, strict=True)]
        return replace(
            self,
            constants=self.constants + sign * other.constants,
            stress=self.stress + sign * other.stress,
            pressure=self.pressure + sign * other.pressure,
            errors=(errors[0], errors[1], errors[2]),
        )


@dataclass(frozen=True)
class Score:
    """Deviations of one cell from its targets, in their uncertainties.

    Attributes:
        deviations: `[n]`, differentiable.
        errors: Their standard errors.
        labels: What they are of.
        diagnostics: The quantities themselves.
    """

    deviations: Tensor
    errors: Sequence[float]
    labels: Sequence[str]
    diagnostics: Mapping[str, Measured]

    def detached(self) -> Self:
        """The same without derivatives."""
        return replace(self, deviations=self.deviations.detach())


class ElasticMatch(Loss):
    """Sources, crystals, targets, and the loss from values, whatever the method."""

    squares = True

    def __init__(
        self,
        name: str,
        weight: float,
        options: ElasticConstantsOptions,
        wanted: Sequence[CellTargets],
        crystals: Sequence[Atoms],
    ) -> None:
        """Create the loss.

        Args:
            name: Name in results.
            weight: Factor in the total.
            options: Options of the config.
            wanted: Targets of every cell.
            crystals: Ideal crystal in every cell.

        Raises:
            InputError: A target of a constant that the crystal does not have.
        """
        super().__init__(name, weight)
        self.options, self.wanted = options, tuple(wanted)
        self.cells = cells_of(options, wanted)
        self.crystals = dict(zip(self.cells, crystals, strict=True))
        self.symmetries = {
            cell: find_symmetry(atoms.cell.array, atoms.positions, atoms.numbers)
            for cell, atoms in self.crystals.items()
        }
        self.stresses = {cell: SymmetricStress(symmetry) for cell, symmetry in self.symmetries.items()}
        self.strides = {"born": options.born_every}
        self._warned = False
        for symmetry, target in zip(self.symmetries.values(), wanted, strict=True):
            known = INDEPENDENT[symmetry.laue]
            for constant in target.constants:
                if constant not in known:
                    word = nearest(constant, known)
                    raise InputError(
                        f"loss {name!r}: {constant!r} is no independent constant of this crystal",
                        expected=f"some of {', '.join(known)}",
                        fix=f"Did you mean {word!r}?" if word else None,
                    )

    @classmethod
    def bind(cls, name: str, weight: float, options: ElasticConstantsOptions, setting: Setting) -> Self:
        """Return the loss of a run: read the table, if there is one, and take the crystals.

        Raises:
            InputError: A table without these constants, or a constant that the crystal does not have.
        """
        if options.table is None:
            wanted = [CellTargets.of(t) for t in options.targets]
        else:
            table = find_table(options.table, setting.resolve)
            wanted = [CellTargets.from_table(table, t, options.uncertainty) for t in options.temperatures]
        crystals = [setting.crystal(cell) for cell in cells_of(options, wanted)]
        return cls(name, weight, options, wanted, crystals)

    def observables(self, cell: EnsembleSource) -> tuple[FluctuationElasticity, SymmetricStress, Pressure]:
        """Estimates from the frames of a cell: the coefficients of the wanted kind, stress and pressure."""
        adiabatic = self.options.kind == "adiabatic"
        elasticity = FluctuationElasticity(self.symmetries[cell], adiabatic=adiabatic, stress_strain=True)
        return elasticity, self.stresses[cell], Pressure()

    @property
    def distinct(self) -> bool:
        """Whether every cell has a temperature of its own."""
        return len({w.temperature for w in self.wanted}) == len(self.wanted)

    @property
    def targets(self) -> Mapping[str, Target]:
        """Targets of the constants of every cell, and of its stress and pressure where they are matched."""
        found = {}
        for cell, wanted in zip(self.cells, self.wanted, strict=True):
            state, at = self._state(cell), (cell.temperature, cell.pressure)
            for name, (value, uncertainty) in wanted.constants.items():
                found[f"{name} {state}"] = Target(value, uncertainty, "GPa", *at)
            if self.options.pressure is not None:
                aim = Target(self.options.pressure, self.options.pressure_uncertainty, "GPa", *at)
                found[f"P {state}"] = aim
                stress = self.stresses[cell]
                wished = stress.under(self.options.pressure).tolist()
                for label, value in zip(stress.labels, wished, strict=True):
                    found[f"stress {label} {state}"] = replace(aim, value=value)
        return found

    def _state(self, cell: EnsembleSource) -> str:
        """Label that distinguishes a cell from the others."""
        return f"{cell.temperature:g} K" if self.distinct else cell.name

    def count(self, cell: EnsembleSource) -> int:
        """Number of deviations of a cell."""
        constants = len(self.wanted[self.cells.index(cell)].constants)
        stress = self.stresses[cell].labels if self.options.pressure is not None else ()
        return constants + len(stress)

    def score(self, cell: EnsembleSource, values: CellValues) -> Score:
        """How far the values of a cell are from its targets."""
        target = self.wanted[self.cells.index(cell)]
        labels = INDEPENDENT[self.symmetries[cell].laue]
        state = self._state(cell)
        parts, errors, diagnostics = [], [], dict[str, Measured]()
        for name, (wanted, uncertainty) in target.constants.items():
            i = labels.index(name)
            parts.append((values.constants[i] - wanted) / uncertainty)
            errors.append(values.errors[0][i] / uncertainty)
            found = Measured(float(values.constants[i].detach()), values.errors[0][i], "GPa")
            diagnostics[f"{name} {state}"] = found
        if self.options.pressure is not None:
            aim = self.stresses[cell].under(self.options.pressure).to(values.stress)
            parts.extend((values.stress - aim) / self.options.pressure_uncertainty)
            errors.extend(e / self.options.pressure_uncertainty for e in values.errors[1])
            stress = zip(
                self.stresses[cell].labels, values.stress.detach().tolist(), values.errors[1], strict=True
            )
            diagnostics |= {f"stress {label} {state}": Measured(v, e, "GPa") for label, v, e in stress}
        names = list(diagnostics)
        if self.options.pressure is not None:
            # The mean of what is matched already: reported, but not a deviation of its own.
            pressure = Measured(float(values.pressure.detach()), values.errors[2][0], "GPa")
            diagnostics[f"P {state}"] = pressure
        return Score(torch.stack(parts), errors, names, diagnostics)

    def result(self, scores: Sequence[Score]) -> LossResult:
        """The loss from the deviations of every cell. What is not known to its uncertainty is not met."""
        deviations = torch.cat([s.deviations for s in scores])
        errors = torch.tensor([e for s in scores for e in s.errors], dtype=deviations.dtype)
        total = deviations.square().mean()
        size = float(total.detach())
        resolved = bool((errors <= 1.0).all())
        if not resolved and not self._warned:
            self._warned = True
            worst, label = max((e, name) for s in scores for e, name in zip(s.errors, s.labels, strict=True))
            warnings.warn(
                f"loss {self.name!r}: the standard error of {label} is {worst:.1f} times the uncertainty of "
                "its target, so that the target does not count as met; more frames or larger uncertainties "
                "would do",
                stacklevel=2,
            )
        # d = √(mean z²), so that ∂d/∂z_i = z_i/(n d).
        spread = float((deviations.detach() * errors).norm()) / (len(errors) * max(size, 1e-300) ** 0.5)
        deviation = Measured(size**0.5, spread, "sigma")
        diagnostics = {name: m for s in scores for name, m in s.diagnostics.items()}
        return LossResult(total, {self.name: size}, diagnostics, deviation, PERFECT, resolved, deviations)


def cells_of(options: ElasticConstantsOptions, wanted: Iterable[CellTargets]) -> tuple[EnsembleSource, ...]:
    """Return the states of the targets, in cells that are held whatever the ensemble of other losses."""
    phase, pressure = options.phase, options.pressure or 0.0
    return tuple(
        EnsembleSource(phase, w.temperature, pressure, w.lattice, () if w.lattice else UNSTRAINED)
        for w in wanted
    )
