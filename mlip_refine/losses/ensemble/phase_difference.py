"""Differences of two phases that give the slope of their line: dT/dP = ΔV/ΔS = T ΔV/ΔH (Clapeyron)."""

from collections.abc import Mapping
from typing import ClassVar, Self

from mlip_refine.errors import InputError
from mlip_refine.losses.base import (
    PERFECT,
    EnsembleLoss,
    EnsembleSource,
    Frames,
    LossResult,
    Setting,
)
from mlip_refine.losses.options import EnthalpyDifferenceOptions, TwoPhaseOptions, VolumeDifferenceOptions
from mlip_refine.observables import Enthalpy, Observable, Volume, average, measure
from mlip_refine.quantities import MEV, Measured, Target


class PhaseDifference(EnsembleLoss):
    """((Δ - target)/σ)², Δ the difference of an observable between two phases, both reweighted.

    A subclass has an observable with a single value, the factor to its unit, the name of the difference in
    results, and whether the cells must move.
    """

    Options: ClassVar[type[TwoPhaseOptions]]
    squares = True
    observable: ClassVar[Observable]
    factor: ClassVar[float] = 1.0
    unit: ClassVar[str]
    symbol: ClassVar[str]
    free_cell: ClassVar[bool] = False

    def __init__(self, name: str, weight: float, options: TwoPhaseOptions) -> None:
        """Keep the options."""
        super().__init__(name, weight)
        state = (options.temperature, options.pressure)
        self.phase_from = EnsembleSource(options.from_, *state)
        self.phase_to = EnsembleSource(options.to, *state)
        self.target = Target(options.target, options.uncertainty, self.unit, *state, source="config")

    @classmethod
    def bind(cls, name: str, weight: float, options: TwoPhaseOptions, setting: Setting) -> Self:
        """Return the loss of a run.

        Raises:
            InputError: The phases differ in composition, so that nothing per atom can be compared, or a cell
                is fixed that should move.
        """
        loss = cls(name, weight, options)
        formulas = [setting.crystal(s).symbols.formula.reduce()[0].format("hill") for s in loss.sources]
        if formulas[0] != formulas[1]:
            raise InputError(
                f"loss {name!r} compares phases of different composition",
                found=f"{formulas[0]} and {formulas[1]}",
            )
        if cls.free_cell:
            setting.require_cells(name, loss.sources, moving=True)
        return loss

    @property
    def sources(self) -> tuple[EnsembleSource, ...]:
        """Both phases at the state of the target."""
        return self.phase_from, self.phase_to

    @property
    def targets(self) -> Mapping[str, Target]:
        """That of the difference."""
        return {self.symbol: self.target}

    def evaluate(self, frames: Mapping[EnsembleSource, Frames]) -> LossResult:
        """The loss, with the difference as diagnostic."""
        one, two = (frames[s] for s in self.sources)
        averages, found = [], []
        for mine in (one, two):
            if self.free_cell:
                mine.sample.require_free_cell(f"the target of loss {self.name!r}")
            averages.append(average(self.observable, mine.sample, -mine.work)[0] * self.factor)
            found.append(self._measured(mine))
        residual = (averages[1] - averages[0] - self.target.value) / self.target.uncertainty
        value = residual.square()
        measured = found[1] - found[0]
        deviation = self.target.deviation(measured)
        components = {self.name: float(value.detach())}
        diagnostics = {self.symbol: measured}
        return LossResult(value, components, diagnostics, deviation, PERFECT, residuals=residual.reshape(1))

    def _measured(self, frames: Frames) -> Measured:
        """Value of one phase under the current model."""
        sample, inefficiency = frames.detached_sample, frames.inefficiency_of_values
        (found,) = measure(self.observable, sample, inefficiency, -frames.work.detach())
        return found.scaled(self.factor, self.unit)


class EnthalpyDifference(PhaseDifference):
    """((ΔH - target)/σ)², ΔH = ⟨U + PV⟩_II - ⟨U + PV⟩_I per atom; at coexistence the latent heat.

    The kinetic parts cancel. In a fixed cell it is the enthalpy at P as far as P is its pressure.
    """

    Options = EnthalpyDifferenceOptions
    observable = Enthalpy()
    factor = 1 / MEV
    unit = "meV/atom"
    symbol = "delta_h"


class VolumeDifference(PhaseDifference):
    """((ΔV - target)/σ)², ΔV = ⟨V⟩_II - ⟨V⟩_I per atom, of cells that move."""

    Options = VolumeDifferenceOptions
    observable = Volume()
    unit = "Å³/atom"
    symbol = "delta_v"
    free_cell = True
