"""Elastic constants of a crystal at temperatures, by one of three methods."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Self

import torch
from ase import Atoms
from torch import Tensor

from mlip_refine.crystals.elasticity import static_elasticity
from mlip_refine.crystals.tensors import stress_to_voigt
from mlip_refine.errors import InputError
from mlip_refine.losses.base import (
    EnsembleLoss,
    EnsembleSource,
    Frames,
    Loss,
    LossResult,
    PotentialLoss,
    Setting,
)
from mlip_refine.losses.elastic.match import CellValues, ElasticMatch
from mlip_refine.losses.elastic.targets import CellTargets
from mlip_refine.losses.options import ElasticConstantsOptions
from mlip_refine.observables.base import Observable, average, measure
from mlip_refine.observables.cell import Stress
from mlip_refine.observables.elasticity import Deformation, deformation_constants, errors_of_stresses
from mlip_refine.potential import Potential
from mlip_refine.quantities import GPA
from mlip_refine.statistics import polynomial_fit


class ElasticConstants(Loss):
    """Mean of ((B - target)/σ)² over constants and temperatures, and of ((stress + P)/σ_P)² where asked for.

    B are the stress-strain coefficients at the total stress of a fixed cell, which sound and strained cells
    show: the independent ones of (B + Bᵀ)/2 in the standard axes of the crystal. Without stress they are the
    elastic constants C. Of the stress those components count, once each, that symmetry leaves independent.
    """

    Options = ElasticConstantsOptions
    squares = True

    @classmethod
    def bind(cls, name: str, weight: float, options: ElasticConstantsOptions, setting: Setting) -> Loss:
        """Return the loss of the chosen method (see `ElasticMatch.bind`)."""
        return _METHODS[options.method].bind(name, weight, options, setting)


class FluctuationElasticConstants(ElasticMatch, EnsembleLoss):
    """By fluctuations of stress in fixed cells, reweighted to the current model."""

    probes = frozenset({"energy", "stress", "born"})

    @property
    def sources(self) -> tuple[EnsembleSource, ...]:
        """One ensemble for each temperature."""
        return self.cells

    def evaluate(self, frames: Mapping[EnsembleSource, Frames]) -> LossResult:
        """The loss, with the constants as diagnostics."""
        return self.result([self.score(cell, self._values(cell, frames[cell])) for cell in self.cells])

    def _values(self, cell: EnsembleSource, frames: Frames) -> CellValues:
        observables = self.observables(cell)
        constants, stress, pressure = (average(o, frames, -frames.work) for o in observables)
        errors = [_errors(o, frames) for o in observables]
        return CellValues(constants, stress, pressure, (errors[0], errors[1], errors[2]))


def _errors(observable: Observable, frames: Frames) -> list[float]:
    """Standard errors of an observable under the current model."""
    work = frames.work.detach()
    return [m.se for m in measure(observable, frames.detached(), frames.inefficiency_of_values, -work)]


class DeformedElasticConstants(ElasticMatch, EnsembleLoss):
    """By the stress of strained cells, each reweighted by itself."""

    probes = frozenset({"energy", "stress"})

    @cached_property
    def deformations(self) -> dict[EnsembleSource, Deformation]:
        """The strains that the symmetry of every cell needs."""
        return {cell: Deformation.of(s, self.options.strain) for cell, s in self.symmetries.items()}

    @property
    def sources(self) -> tuple[EnsembleSource, ...]:
        """At every temperature the cell itself, and both signs of every strain."""
        return tuple(s for cell in self.cells for s in self._sampled(cell))

    def _sampled(self, cell: EnsembleSource) -> tuple[EnsembleSource, ...]:
        return cell, *(replace(cell, strain=strain) for strain in self.deformations[cell].strains)

    def evaluate(self, frames: Mapping[EnsembleSource, Frames]) -> LossResult:
        """The loss, with the constants as diagnostics."""
        return self.result(
            [
                self.score(cell, self._values(cell, [frames[s] for s in self._sampled(cell)]))
                for cell in self.cells
            ]
        )

    def _values(self, cell: EnsembleSource, frames: Sequence[Frames]) -> CellValues:
        """Of a cell and its strained ones."""
        function = partial(self._of_stresses, cell)
        stress = torch.stack([average(Stress(), f, -f.work) for f in frames])
        errors = errors_of_stresses(function, stress, [partial(_errors, frames=f) for f in frames])
        values, m = function(stress), len(self.deformations[cell].basis)
        return CellValues(values[:m], values[m:-1], values[-1:], (errors[:m], errors[m:-1], errors[-1:]))

    def _of_stresses(self, cell: EnsembleSource, stress: Tensor) -> Tensor:
        """Coefficients, components of the stress, and the pressure, one after the other."""
        coefficients = deformation_constants(self.deformations[cell], stress, stress_strain=True)
        own = stress[0]
        return torch.cat([coefficients, self.stresses[cell].of(own), -own[:3].mean(0, keepdim=True)])


class StaticElasticConstants(ElasticMatch, PotentialLoss):
    """Constants at rest, exact in the current model, plus a thermal part from the last draw.

    B(T) = B_static(θ) + [B(T) - B_static] at the parameters that drew the frames. The difference is a
    small part of B and changes little with the model, so few draws will do. Its gradient is left out: where
    all targets can be met they are met as by the other methods, where they conflict it settles elsewhere.
    """

    def __init__(
        self,
        name: str,
        weight: float,
        options: ElasticConstantsOptions,
        wanted: Sequence[CellTargets],
        crystals: Sequence[Atoms],
    ) -> None:
        """Create the loss, as yet without a thermal part (see `ElasticMatch`)."""
        super().__init__(name, weight, options, wanted, crystals)
        self.every = options.every
        self.probes = frozenset({"energy", "stress", "born"}) if options.thermal else frozenset({"energy"})
        self._added: dict[EnsembleSource, CellValues] = {}

    @classmethod
    def bind(cls, name: str, weight: float, options: ElasticConstantsOptions, setting: Setting) -> Self:
        """Return the loss of a run.

        Raises:
            InputError: As of the other methods, or a potential in single precision: second derivatives need
                float64.
        """
        if setting.potential is not None and setting.potential.dtype != torch.float64:
            raise InputError(
                f"loss {name!r}: method static needs second derivatives in double precision",
                found=f"default_dtype: {str(setting.potential.dtype).removeprefix('torch.')}",
                expected="float64",
                fix="Set potential.default_dtype: float64.",
            )
        return super().bind(name, weight, options, setting)

    @property
    def sources(self) -> tuple[EnsembleSource, ...]:
        """One ensemble for each temperature, if temperature adds anything."""
        return self.cells if self.options.thermal else ()

    def follow(self, potential: Potential, frames: Mapping[EnsembleSource, Frames]) -> None:
        """Learn what temperature adds from frames of the potential as it is."""
        self._added = {cell: self._difference(potential, cell, frames[cell]) for cell in self.cells}
        if self.options.smooth and self.distinct and len(self.cells) > 2:
            self._smooth()

    def _difference(self, potential: Potential, cell: EnsembleSource, frames: Frames) -> CellValues:
        """Values of frames minus those of the crystal at rest, both of this potential."""
        hot = frames.detached()
        measured = [measure(o, hot, hot.inefficiency_of_values) for o in self.observables(cell)]
        constants, stress, pressure = (
            torch.tensor([m.value for m in values], dtype=torch.float64) for values in measured
        )
        errors = tuple([m.se for m in values] for values in measured)
        found = CellValues(constants, stress, pressure, (errors[0], errors[1], errors[2]))
        return found.plus(self._static(potential, cell, create_graph=False), -1.0)

    def _smooth(self) -> None:
        """Replace what temperature adds to the constants by its fit αT + βT², which is 0 at 0 K.

        Where the fit misses by more than the errors, these grow to match.
        """
        temperatures = [cell.temperature for cell in self.cells]
        added = [self._added[cell] for cell in self.cells]
        values = torch.stack([a.constants for a in added])
        errors = torch.tensor([a.errors[0] for a in added], dtype=torch.float64)
        fits = [polynomial_fit(temperatures, v, e, (1, 2)) for v, e in zip(values.T, errors.T, strict=True)]
        constants = torch.stack([f.values for f in fits], dim=1)
        spread = torch.stack([f.errors * max(1.0, f.chi_squared / f.freedom) ** 0.5 for f in fits], dim=1)
        self._added = {
            cell: CellValues(c, a.stress, a.pressure, (e.tolist(), *a.errors[1:]))
            for cell, a, c, e in zip(self.cells, added, constants, spread, strict=True)
        }

    def evaluate(self, potential: Potential) -> LossResult:
        """The loss, with the constants as diagnostics."""
        return self.result(
            [self.score(cell, self._values(potential, cell, create_graph=True)) for cell in self.cells]
        )

    def measure(self, potential: Potential) -> LossResult:
        """The loss without derivatives."""
        return self.result(
            [self.score(cell, self._values(potential, cell, create_graph=False)) for cell in self.cells]
        )

    def backpropagate(self, potential: Potential) -> LossResult:
        """As of any loss, but the graphs of one cell are gone before those of the next are made."""
        count = sum(self.count(cell) for cell in self.cells)

        def add(deviations: Tensor) -> None:
            (self.weight * deviations.square().sum() / count).backward()

        return self.linearise(potential, add)

    def linearise(self, potential: Potential, add: Callable[[Tensor], None]) -> LossResult:
        """As of any loss, cell by cell."""
        scores = []
        for cell in self.cells:
            score = self.score(cell, self._values(potential, cell, create_graph=True))
            add(score.deviations)
            scores.append(score.detached())
        return self.result(scores)

    def _values(self, potential: Potential, cell: EnsembleSource, *, create_graph: bool) -> CellValues:
        static = self._static(potential, cell, create_graph=create_graph)
        return static.plus(self._added[cell]) if cell in self._added else static

    def _static(self, potential: Potential, cell: EnsembleSource, *, create_graph: bool) -> CellValues:
        """Return the values of the crystal at rest, differentiable if asked for, without errors."""
        found = static_elasticity(potential, self.crystals[cell], create_graph=create_graph)
        symmetry = self.symmetries[cell]
        constants = symmetry.constants_of(found.coefficients) / GPA
        stress = stress_to_voigt(found.stress) / GPA
        components = self.stresses[cell].of(stress)
        pressure = -stress[:3].mean(0, keepdim=True)
        return CellValues.exact(constants, components, pressure)


_METHODS: Mapping[str, type[ElasticMatch]] = {
    "fluctuation": FluctuationElasticConstants,
    "deformation": DeformedElasticConstants,
    "static": StaticElasticConstants,
}
