"""Differences of two phases: of free energies (DiffTTC), of enthalpies and of volumes.

Where ΔG is zero is the line of coexistence; its slope is dT/dP = ΔV/ΔS = T ΔV/ΔH (Clapeyron).
"""

from collections.abc import Mapping
from typing import ClassVar, Self

import torch

from mlip_refine.errors import InputError, MlipRefineError
from mlip_refine.losses.base import (
    PERFECT,
    EnsembleLoss,
    EnsembleSource,
    Frames,
    LossResult,
    Setting,
)
from mlip_refine.losses.options import (
    EnthalpyDifferenceOptions,
    FreeEnergyDifferenceOptions,
    TwoPhaseOptions,
    VolumeDifferenceOptions,
)
from mlip_refine.observables import Enthalpy, Observable, Volume, average, measure
from mlip_refine.quantities import MEV, Measured, Target
from mlip_refine.statistics import entropy_difference, exp_estimate


class FreeEnergyDifference(EnsembleLoss):
    """((ΔG_θ - target)/σ)² with ΔG_θ = ΔG_θ0 + ΔF^II - ΔF^I, all per atom of each phase's own cell.

    ΔF^α = F_θ - F_θ0 of phase α: the chain of references up to the one that drew the frames, then
    exponential reweighting to the current parameters (Zwanzig 1954). The gradient equals that of the dynamic
    targets of Fuchs and Zavadlav (arXiv 2512.03974), where each phase chases the other.
    """

    Options = FreeEnergyDifferenceOptions
    squares = True
    anchored = True

    def __init__(
        self,
        name: str,
        weight: float,
        options: FreeEnergyDifferenceOptions,
        initial: Measured | None = None,
    ) -> None:
        """Create the loss.

        Args:
            name: Name in results.
            weight: Factor in the total.
            options: Options of the config.
            initial: ΔG_θ0 of the initial model, meV/atom, G_to - G_from; needed before the first evaluation.
        """
        super().__init__(name, weight)
        self.options = options
        state = (options.temperature, options.pressure)
        self.phase_from = EnsembleSource(options.from_, *state)
        self.phase_to = EnsembleSource(options.to, *state)
        self.target = Target(options.target, options.uncertainty, "meV/atom", *state, source="config")
        self._initial = initial

    @property
    def sources(self) -> tuple[EnsembleSource, ...]:
        """Both phases at the state of the target."""
        return self.phase_from, self.phase_to

    def with_initial(self, initial: Measured) -> Self:
        """Return the same loss with ΔG_θ0 of the initial model, meV/atom, G_to - G_from."""
        return type(self)(self.name, self.weight, self.options, initial)

    @property
    def initial(self) -> Measured:
        """ΔG of the initial model, meV/atom."""
        if self._initial is None:
            raise MlipRefineError(f"loss {self.name!r} has no initial free-energy difference yet")
        return self._initial

    def evaluate(self, frames: Mapping[EnsembleSource, Frames]) -> LossResult:
        """The loss, with ΔG and the effective sizes as diagnostics."""
        one, two = frames[self.phase_from], frames[self.phase_to]
        change_one, change_two = (exp_estimate(f.work, f.inefficiency) for f in (one, two))
        # F_θ - F_θ0 of each cell per atom, meV. The cells may differ in size: a change of parameters changes
        # their finite-size terms little, and the anchor is what compares them.
        per_one, per_two = (1.0 / (MEV * f.n_atoms) for f in (one, two))
        of_one = (change_one.value / one.beta + one.shift.value) * per_one
        of_two = (change_two.value / two.beta + two.shift.value) * per_two
        delta_g = self.initial.value + (of_two - of_one)
        residual = (delta_g - self.target.value) / self.target.uncertainty
        value = residual.square()
        errors = (
            self.initial.se,
            *(s * per for s, per in ((one.shift.se, per_one), (two.shift.se, per_two))),
            change_one.se / one.beta * per_one,
            change_two.se / two.beta * per_two,
        )
        se = float(torch.tensor(errors, dtype=torch.float64).norm())
        measured = Measured(float(delta_g.detach()), se, "meV/atom")
        temperature = self.options.temperature
        diagnostics = {"delta_g": measured, "temperature": Measured(temperature, 0.0, "K")}
        if one.mean_enthalpy is not None and two.mean_enthalpy is not None:
            of_cells = ((one.mean_enthalpy, per_one), (two.mean_enthalpy, per_two))
            h_one, h_two = (enthalpy.scaled(per, "meV/atom") for enthalpy, per in of_cells)
            delta_h = h_two - h_one
            diagnostics["delta_s"] = entropy_difference(temperature, measured, delta_h)
        deviation = Measured(measured.value - self.target.value, measured.se, measured.unit)
        components = {self.name: float(value.detach())}
        resolved = measured.se <= self.target.uncertainty
        residuals = residual.reshape(1)
        return LossResult(value, components, diagnostics, deviation, resolved=resolved, residuals=residuals)


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
        """Create the loss.

        Args:
            name: Name in results.
            weight: Factor in the total.
            options: Options of the config: phases, state, target and uncertainty.
        """
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
                mine.require_free_cell(f"the target of loss {self.name!r}")
            averages.append(average(self.observable, mine, -mine.work)[0] * self.factor)
            inefficiency, log_weights = mine.inefficiency_of_values, -mine.work.detach()
            (value,) = measure(self.observable, mine.detached(), inefficiency, log_weights)
            found.append(value.scaled(self.factor, self.unit))
        residual = (averages[1] - averages[0] - self.target.value) / self.target.uncertainty
        squared = residual.square()
        measured = found[1] - found[0]
        deviation = self.target.deviation(measured)
        components = {self.name: float(squared.detach())}
        diagnostics, residuals = {self.symbol: measured}, residual.reshape(1)
        resolved = measured.se <= self.target.uncertainty
        return LossResult(squared, components, diagnostics, deviation, PERFECT, resolved, residuals)


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
