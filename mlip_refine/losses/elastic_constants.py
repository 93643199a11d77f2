"""Elastic constants of a crystal at temperatures, by one of three methods."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from ase import Atoms
from pydantic import Field, model_validator
from torch import Tensor

from mlip_refine.config import Count, Length, PositivePressure, Pressure, Section, Temperature, problem
from mlip_refine.data import Table, experimental_table, read_table
from mlip_refine.errors import InputError, MlipRefineError, nearest
from mlip_refine.losses.base import (
    PERFECT,
    EnsembleLoss,
    EnsembleSource,
    Frames,
    Loss,
    LossResult,
    PotentialLoss,
)
from mlip_refine.observables.base import average, measure
from mlip_refine.observables.crystal import INDEPENDENT, Symmetry, crystal_symmetry
from mlip_refine.observables.deformation import Deformation, deformation_constants
from mlip_refine.observables.elasticity import FluctuationElasticity
from mlip_refine.observables.static_elasticity import static_elasticity
from mlip_refine.observables.stress import Stress
from mlip_refine.observables.tensors import stress_to_voigt
from mlip_refine.potential import Potential
from mlip_refine.quantities import GPA, Measured
from mlip_refine.statistics import polynomial_fit

UNSTRAINED = (0.0,) * 6


class ElasticTarget(Section):
    """Elastic constants at one temperature."""

    temperature: Temperature = Field(description="K.")
    lattice: Annotated[tuple[Length, ...], Field(strict=False, max_length=2)] = Field(
        (), description="Lattice constants (a) or (a, c) of the cell, Å; empty: those of the phase."
    )
    constants: dict[str, Pressure] = Field(
        min_length=1, description="Wanted constants by name, in the standard axes, such as C11: 162 GPa."
    )
    uncertainty: PositivePressure = Field(1.0, description="Standard error of each constant, GPa.")


class ElasticConstantsOptions(Section):
    """Options of `elastic_constants`."""

    phase: str = Field(description="A crystal among phases.")
    method: Literal["static", "fluctuation", "deformation"] = Field(
        "fluctuation",
        description="fluctuation: of the stress, with the Born term, reweighted. deformation: stress of "
        "strained cells, reweighted. static: of the relaxed crystal, with what temperature adds from frames.",
    )
    kind: Literal["adiabatic", "isothermal"] = Field(
        "adiabatic", description="What the targets are; ultrasound measures adiabatic constants."
    )
    targets: Annotated[tuple[ElasticTarget, ...], Field(strict=False)] = Field(
        (), description="One entry per temperature."
    )
    table: str | None = Field(
        None,
        description="Instead of targets: an experimental table of the package, such as titanium-hcp-elastic, "
        "or a CSV file with columns temperature, C11, ... and, for the cell, a and c.",
    )
    temperatures: Annotated[tuple[Temperature, ...], Field(strict=False)] = Field(
        (), description="Temperatures that are taken from the table, K."
    )
    pressure: Pressure | None = Field(
        None, description="Pressure that the cells should be at, GPa; null: the stress is not matched."
    )
    pressure_uncertainty: PositivePressure = Field(0.05, description="Of every component of the stress, GPa.")
    thermal: bool = Field(True, description="static: add what temperature adds; false: compare at 0 K.")
    every: Count = Field(20, description="static: updates between two draws of frames.")
    smooth: bool = Field(
        True,
        description="static: describe what temperature adds by αT + βT² where there are three temperatures.",
    )
    born_every: Count = Field(10, description="Frames from one with a Born term to the next.")
    strain: float = Field(0.01, gt=0, lt=0.1, description="deformation: component of the strain tensor.")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.method == "deformation" and self.kind == "adiabatic":
            raise problem("kind: isothermal: strained cells at one temperature show these", key="kind")
        if (self.table is None) == (not self.targets) or (self.table is None) != (not self.temperatures):
            raise problem("either targets, or a table with temperatures", key="targets")
        states = [(t.temperature, t.lattice) for t in self.targets] or [(t, ()) for t in self.temperatures]
        if len(set(states)) < len(states):
            raise problem("every temperature once", key="targets" if self.targets else "temperatures")
        return self


@dataclass(frozen=True)
class _Wanted:
    """Targets at one temperature: K, Å, and values with uncertainties in GPa by name."""

    temperature: float
    lattice: tuple[float, ...]
    constants: Mapping[str, tuple[float, float]]

    @classmethod
    def of(cls, target: ElasticTarget) -> Self:
        constants = {name: (value, target.uncertainty) for name, value in target.constants.items()}
        return cls(target.temperature, target.lattice, constants)

    @classmethod
    def from_table(cls, table: Table, temperature: float) -> Self:
        found = {name: table.target(name, temperature) for name in table.columns if name != table.index.name}
        constants = {n: (t.value, t.uncertainty) for n, t in found.items() if t.unit == "GPa"}
        return cls(temperature, tuple(found[n].value for n in "ac" if n in found), constants)


class ElasticConstants(Loss):
    """Mean of ((C - target)/σ)² over constants and temperatures, and of ((stress + P)/σ_P)² where asked for.

    C are the independent constants in the Lagrangian strain, in the standard axes of the crystal, in a fixed
    cell. Without stress they are the stress-strain coefficients that experiments measure.
    """

    Options = ElasticConstantsOptions

    @classmethod
    def create(cls, name: str, weight: float, options: ElasticConstantsOptions) -> Loss:
        """The loss of the chosen method."""
        return _METHODS[options.method](name, weight, options)


class _Matched(Loss):
    """What all methods share: sources, crystals, targets, and the loss from values."""

    def __init__(self, name: str, weight: float, options: ElasticConstantsOptions) -> None:
        super().__init__(name, weight)
        self.options = options
        self.wanted = tuple(_Wanted.of(t) for t in options.targets)
        self._crystals: dict[EnsembleSource, Atoms] = {}
        self.symmetries: dict[EnsembleSource, Symmetry] = {}

    def prepare_files(self, resolve: Callable[[str], Path]) -> None:
        """Read the table, if there is one."""
        name = self.options.table
        if name is not None:
            path = resolve(name)
            table = read_table(path) if path.is_file() else experimental_table(name)
            self.wanted = tuple(_Wanted.from_table(table, t) for t in self.options.temperatures)

    @property
    def cells(self) -> tuple[EnsembleSource, ...]:
        """The states of the targets, in cells that are held whatever the ensemble of others."""
        phase, pressure = self.options.phase, self.options.pressure or 0.0
        return tuple(
            EnsembleSource(phase, w.temperature, pressure, w.lattice, () if w.lattice else UNSTRAINED)
            for w in self.wanted
        )

    @property
    def described(self) -> tuple[EnsembleSource, ...]:
        """The states of the targets."""
        return self.cells

    def prepare_crystals(self, crystals: Mapping[EnsembleSource, Atoms]) -> None:
        """Know the ideal crystals.

        Raises:
            InputError: For a constant that the crystal does not have.
        """
        for cell, target in zip(self.cells, self.wanted, strict=True):
            atoms = crystals[cell]
            self._crystals[cell] = atoms
            symmetry = crystal_symmetry(atoms.cell.array, atoms.positions, atoms.numbers)
            self.symmetries[cell] = symmetry
            _require_known(self.name, target.constants, INDEPENDENT[symmetry.laue])

    def crystal(self, cell: EnsembleSource) -> Atoms:
        """Ideal crystal in a cell."""
        if cell not in self._crystals:
            raise MlipRefineError(f"loss {self.name!r} does not know its crystals yet")
        return self._crystals[cell]

    def labels(self, cell: EnsembleSource) -> tuple[str, ...]:
        """Names of the independent constants."""
        return INDEPENDENT[self.symmetries[cell].laue]

    def result(
        self,
        constants: Sequence[Tensor],
        stresses: Sequence[Tensor],
        constant_errors: Sequence[Sequence[float]],
        stress_errors: Sequence[Sequence[float]],
    ) -> LossResult:
        """The loss from constants and total stresses of every cell, GPa, and their standard errors."""
        parts, diagnostics = [], dict[str, Measured]()
        for k, (cell, target) in enumerate(zip(self.cells, self.wanted, strict=True)):
            labels = self.labels(cell)
            for name, (wanted, uncertainty) in target.constants.items():
                i = labels.index(name)
                parts.append((constants[k][i] - wanted) / uncertainty)
                found = Measured(float(constants[k][i].detach()), constant_errors[k][i], "GPa")
                diagnostics[f"{name} {cell.temperature:g} K"] = found
            if self.options.pressure is not None:
                aim = torch.tensor([-self.options.pressure] * 3 + [0.0] * 3).to(stresses[k])
                # Shears come twice: the norm is that of the tensor, whatever the frame.
                counts = torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, 2.0]).to(stresses[k])
                excess = (stresses[k] - aim) / self.options.pressure_uncertainty * counts.sqrt()
                parts.extend(excess)
                diagnostics[f"P {cell.temperature:g} K"] = _pressure(stresses[k], stress_errors[k])
        total = torch.stack(parts).square().mean()
        size = float(total.detach())
        return LossResult(total, {self.name: size}, diagnostics, Measured(size**0.5, 0.0, "sigma"), PERFECT)


def _pressure(stress: Tensor, errors: Sequence[float]) -> Measured:
    return Measured(-float(stress[:3].detach().mean()), sum(e * e for e in errors[:3]) ** 0.5 / 3, "GPa")


def _require_known(loss: str, wanted: Iterable[str], known: Sequence[str]) -> None:
    for name in wanted:
        if name not in known:
            word = nearest(name, known)
            raise InputError(
                f"loss {loss!r}: {name!r} is no independent constant of this crystal",
                expected=f"some of {', '.join(known)}",
                fix=f"Did you mean {word!r}?" if word else None,
            )


class FluctuationElasticConstants(_Matched, EnsembleLoss):
    """By fluctuations of stress in fixed cells, reweighted to the current model."""

    probes = frozenset({"energy", "stress", "born"})

    def __init__(self, name: str, weight: float, options: ElasticConstantsOptions) -> None:
        """Keep the options."""
        super().__init__(name, weight, options)
        self.strides = {"born": options.born_every}

    @property
    def sources(self) -> tuple[EnsembleSource, ...]:
        """One ensemble for each temperature."""
        return self.cells

    def evaluate(self, frames: Mapping[EnsembleSource, Frames]) -> LossResult:
        """The loss, with the constants as diagnostics."""
        constants, stresses, errors, stress_errors = [], [], [], []
        adiabatic = self.options.kind == "adiabatic"
        for cell in self.cells:
            mine = frames[cell]
            observable = FluctuationElasticity(self.symmetries[cell], adiabatic=adiabatic)
            constants.append(average(observable, mine.sample, -mine.work))
            stresses.append(average(Stress(), mine.sample, -mine.work))
            errors.append(_errors(observable, mine))
            stress_errors.append(_errors(Stress(), mine))
        return self.result(constants, stresses, errors, stress_errors)


def _errors(observable: FluctuationElasticity | Stress, frames: Frames) -> list[float]:
    """Standard errors of an observable under the current model."""
    work = frames.work.detach()
    return [m.se for m in measure(observable, frames.detached_sample, frames.inefficiency_of_values, -work)]


class DeformedElasticConstants(_Matched, EnsembleLoss):
    """By the stress of strained cells, each reweighted by itself."""

    probes = frozenset({"energy", "stress"})

    def __init__(self, name: str, weight: float, options: ElasticConstantsOptions) -> None:
        """Keep the options; `prepare_crystals` chooses the strains."""
        super().__init__(name, weight, options)
        self._deformations: dict[EnsembleSource, Deformation] = {}

    def prepare_crystals(self, crystals: Mapping[EnsembleSource, Atoms]) -> None:
        """Choose the strains that the symmetry needs."""
        super().prepare_crystals(crystals)
        for cell in self.cells:
            self._deformations[cell] = Deformation.of(self.symmetries[cell], self.options.strain)

    @property
    def sources(self) -> tuple[EnsembleSource, ...]:
        """Both signs of every strain at every temperature."""
        return tuple(
            EnsembleSource(cell.phase, cell.temperature, cell.pressure, cell.lattice, strain)
            for cell in self.cells
            for strain in self._deformations[cell].strains
        )

    def evaluate(self, frames: Mapping[EnsembleSource, Frames]) -> LossResult:
        """The loss, with the constants as diagnostics."""
        constants, stresses, errors, stress_errors = [], [], [], []
        sources = iter(self.sources)
        for cell in self.cells:
            deformation = self._deformations[cell]
            mine = [frames[next(sources)] for _ in deformation.strains]
            stress = torch.stack([average(Stress(), f.sample, -f.work) for f in mine])
            spread = torch.tensor([_errors(Stress(), f) for f in mine], dtype=torch.float64)
            values, error = deformation_constants(deformation, stress, spread)
            constants.append(values)
            errors.append(error.tolist())
            stresses.append(stress.mean(0))
            stress_errors.append((spread.square().sum(0).sqrt() / len(mine)).tolist())
        return self.result(constants, stresses, errors, stress_errors)


class StaticElasticConstants(_Matched, PotentialLoss):
    """Of the crystal at rest, exact in the current model, and what temperature adds, from the last draw.

    C(T) = C_static(θ) + [C(T) - C_static] at the parameters that drew the frames. The difference is a
    small part of C and changes little with the model, so few draws bring it to its fixed point.
    """

    def __init__(self, name: str, weight: float, options: ElasticConstantsOptions) -> None:
        """Keep the options."""
        super().__init__(name, weight, options)
        self.every = options.every
        self.probes = frozenset({"energy", "stress", "born"}) if options.thermal else frozenset({"energy"})
        self.strides = {"born": options.born_every}
        self._added: list[tuple[Tensor, Tensor]] = []
        self._errors: list[tuple[list[float], list[float]]] = []

    @property
    def sources(self) -> tuple[EnsembleSource, ...]:
        """One ensemble for each temperature, if temperature adds anything."""
        return self.cells if self.options.thermal else ()

    def follow(self, potential: Potential, frames: Mapping[EnsembleSource, Frames]) -> None:
        """Learn what temperature adds from frames of the potential as it is."""
        adiabatic = self.options.kind == "adiabatic"
        added, errors = [], []
        for cell in self.cells:
            mine = frames[cell]
            observable = FluctuationElasticity(self.symmetries[cell], adiabatic=adiabatic)
            hot = [
                measure(o, mine.detached_sample, mine.inefficiency_of_values) for o in (observable, Stress())
            ]
            cold = [value.detach() for value in self._static(potential, cell, create_graph=False)]
            added.append([_values(h) - c for h, c in zip(hot, cold, strict=True)])
            errors.append([[m.se for m in h] for h in hot])
        self._added = [(c, s) for c, s in added]
        self._errors = [(c, s) for c, s in errors]
        if self.options.smooth and len(self.cells) > 2:
            self._smooth()

    def _smooth(self) -> None:
        """Replace what temperature adds to the constants by its fit αT + βT², which is 0 at 0 K."""
        temperatures = [cell.temperature for cell in self.cells]
        values = torch.stack([c for c, _ in self._added])
        errors = torch.tensor([e for e, _ in self._errors], dtype=torch.float64)
        pairs = zip(values.T, errors.T, strict=True)
        fits = [polynomial_fit(temperatures, v, e, (1, 2)) for v, e in pairs]
        constants = torch.stack([f.values for f in fits], dim=1)
        spread = torch.stack([f.errors for f in fits], dim=1)
        self._added = [(constants[k], s) for k, (_, s) in enumerate(self._added)]
        self._errors = [(spread[k].tolist(), s) for k, (_, s) in enumerate(self._errors)]

    def evaluate(self, potential: Potential) -> LossResult:
        """The loss, with the constants as diagnostics."""
        static = [self._static(potential, cell, create_graph=True) for cell in self.cells]
        if not self._added:
            self._added = [(torch.zeros_like(c), torch.zeros_like(s)) for c, s in static]
            self._errors = [([0.0] * len(c), [0.0] * 6) for c, _ in static]
        pairs = list(zip(static, self._added, strict=True))
        return self.result(
            [c + dc for (c, _), (dc, _) in pairs],
            [s + ds for (_, s), (_, ds) in pairs],
            [e for e, _ in self._errors],
            [e for _, e in self._errors],
        )

    def _static(
        self, potential: Potential, cell: EnsembleSource, *, create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        """Constants `[m]` and stress `[6]` of the crystal at rest, GPa, differentiable."""
        found = static_elasticity(potential, self.crystal(cell), create_graph=create_graph)
        constants = self.symmetries[cell].independent(found.constants)
        return torch.stack(list(constants.values())) / GPA, stress_to_voigt(found.stress) / GPA


def _values(measured: Sequence[Measured]) -> Tensor:
    return torch.tensor([m.value for m in measured], dtype=torch.float64)


_METHODS: Mapping[str, type[_Matched]] = {
    "fluctuation": FluctuationElasticConstants,
    "deformation": DeformedElasticConstants,
    "static": StaticElasticConstants,
}
