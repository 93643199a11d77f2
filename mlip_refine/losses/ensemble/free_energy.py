"""Free-energy matching of two phases: ((ΔG_θ - target)/σ)² per atom (DiffTTC)."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from mlip_refine.errors import InputError, MlipRefineError
from mlip_refine.losses.base import EnsembleLoss, EnsembleSource, Frames, LossResult
from mlip_refine.losses.options import FreeEnergyDifferenceOptions
from mlip_refine.quantities import MEV, Measured, Target
from mlip_refine.statistics import FreeEnergyEstimate, entropy_difference, exp_estimate


class FreeEnergyDifference(EnsembleLoss):
    """((ΔG_θ - target)/σ)² with ΔG_θ = ΔG_θ0 + ΔF^II - ΔF^I, all per atom.

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
        """The loss, with ΔG and the effective sizes as diagnostics.

        Raises:
            InputError: If the two phases have different numbers of atoms.
        """
        one, two = frames[self.phase_from], frames[self.phase_to]
        if one.n_atoms != two.n_atoms:
            raise InputError(
                f"loss {self.name!r} compares phases of different size",
                found=f"{one.n_atoms} and {two.n_atoms} atoms",
                expected="equal numbers: the finite-size errors of ΔG cancel only then",
            )
        change_one, change_two = (exp_estimate(f.work, f.inefficiency) for f in (one, two))
        per_atom = 1.0 / (MEV * one.n_atoms)
        change = (_change(two, change_two) - _change(one, change_one)) * per_atom
        delta_g = self.initial.value + change
        residual = (delta_g - self.target.value) / self.target.uncertainty
        value = residual.square()
        errors = (
            self.initial.se,
            *(s * per_atom for s in (one.shift.se, two.shift.se)),
            *(e.se / f.beta * per_atom for e, f in ((change_one, one), (change_two, two))),
        )
        se = float(torch.tensor(errors, dtype=torch.float64).norm())
        measured = Measured(float(delta_g.detach()), se, "meV/atom")
        state = Measured(self.options.temperature, 0.0, "K")
        diagnostics = {"delta_g": measured, "temperature": state}
        entropy = _entropy(one, two, measured, self.options.temperature, per_atom)
        if entropy is not None:
            diagnostics["delta_s"] = entropy
        deviation = Measured(measured.value - self.target.value, measured.se, measured.unit)
        components = {self.name: float(value.detach())}
        return LossResult(value, components, diagnostics, deviation, residuals=residual.reshape(1))


def _change(frames: Frames, estimate: FreeEnergyEstimate) -> Tensor:
    """F_θ - F_θ0 of the cell, eV."""
    return estimate.value / frames.beta + frames.shift.value


def _entropy(
    one: Frames, two: Frames, delta_g: Measured, temperature: float, per_atom: float
) -> Measured | None:
    """ΔS, meV/atom/K, from the enthalpies of the references."""
    if one.enthalpy is None or two.enthalpy is None:
        return None
    delta_h = (two.enthalpy - one.enthalpy).scaled(per_atom, "meV/atom")
    return entropy_difference(temperature, delta_g, delta_h)
