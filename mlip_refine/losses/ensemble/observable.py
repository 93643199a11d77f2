"""Every observable as a loss: the mean of ((value - target)/σ)² over its values.

To add an observable and its loss:

1. Write the observable, a subclass of `Observable`, in a file of `mlip_refine/observables/`, and export it
   in the `__init__.py` there.
2. In `mlip_refine/losses/ensemble/observable_options.py` write its options, a subclass of `ScalarOptions`
   (one value or a few), `InCellOptions` (also in a cell with given lattice constants) or `CurveOptions`
   (bins), and add them to the table `OBSERVABLES` at the end. The name there is the type of the loss in a
   config; schema, command line and `mlip-refine losses` follow from it.

`mlip-refine guide observables` has an example.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar, Self

import torch
from torch import Tensor

from mlip_refine.data import find_table
from mlip_refine.losses.base import (
    PERFECT,
    EnsembleLoss,
    EnsembleSource,
    Frames,
    LossResult,
    Setting,
)
from mlip_refine.losses.ensemble.observable_options import ObservableOptions
from mlip_refine.observables import HeatCapacityP, HeatCapacityV, Observable, Sample, average, measure
from mlip_refine.quantities import Measured, Target


@dataclass(frozen=True)
class TargetValues:
    """Targets of some of the values of an observable, in its unit.

    Attributes:
        labels: Labels of these values.
        places: Their indices among all values of the observable `[k]`.
        values: Targets `[k]`, float64.
        uncertainties: Standard uncertainties of the targets `[k]`, float64.
    """

    labels: tuple[str, ...]
    places: Tensor
    values: Tensor
    uncertainties: Tensor

    @classmethod
    def of(cls, known: Sequence[str], targets: Mapping[str, tuple[float, float]]) -> Self:
        """Collect targets with uncertainties by label; `known` are the labels of all outputs."""
        values, uncertainties = torch.tensor(list(targets.values()), dtype=torch.float64).unbind(1)
        places = torch.tensor([known.index(label) for label in targets])
        return cls(tuple(targets), places, values, uncertainties)

    def deviations(self, outputs: Tensor) -> Tensor:
        """Outputs `[m]` minus targets, in standard uncertainties `[k]`."""
        chosen = outputs[self.places.to(outputs.device)]
        return (chosen - self.values.to(outputs)) / self.uncertainties.to(outputs)


class ObservableLoss(EnsembleLoss):
    """Mean of ((value - target)/σ)² over the values of an observable, reweighted to the current model.

    The options make the observable; a loss of another package is a subclass with its own `Options`.
    """

    Options: ClassVar[type[ObservableOptions]]
    squares = True

    def __init__(
        self,
        name: str,
        weight: float,
        options: ObservableOptions,
        observable: Observable,
        wanted: TargetValues,
    ) -> None:
        """Create the loss.

        Args:
            name: Name in results.
            weight: Factor in the total.
            options: Options of the config.
            observable: What is averaged over the frames.
            wanted: Targets of some of its values, or of all.
        """
        super().__init__(name, weight)
        self.options, self.wanted = options, wanted
        self.observable = _Kept(observable) if options.columns_kept else observable
        self.source = _source_of(options)
        self.probes = frozenset({"energy"}) | observable.probes

    @classmethod
    def bind(cls, name: str, weight: float, options: ObservableOptions, setting: Setting) -> Self:
        """Return the loss of a run: read the table, make the observable of the phase, and find its targets.

        Raises:
            InputError: Targets that do not fit the observable, an observable that the phase does not have, or
                a cell that moves where it should be fixed, or the other way round.
        """
        table = None if options.table is None else find_table(options.table, setting.resolve)
        source = _source_of(options)
        observable = options.observable(setting.crystal(source), table)
        targets = options.targets(name, observable.labels, table)
        if options.cell != "any":
            setting.require_cells(name, [source], moving=options.cell == "free")
        return cls(name, weight, options, observable, TargetValues.of(observable.labels, targets))

    @property
    def sources(self) -> tuple[EnsembleSource, ...]:
        """One ensemble."""
        return (self.source,)

    @property
    def targets(self) -> Mapping[str, Target]:
        """Targets by label; none for a curve, which has too many."""
        if self.options.is_curve:
            return {}
        values = zip(self.wanted.values.tolist(), self.wanted.uncertainties.tolist(), strict=True)
        state = (self.source.temperature, self.source.pressure)
        return {
            label: Target(value, uncertainty, self.observable.unit, *state)
            for label, (value, uncertainty) in zip(self.wanted.labels, values, strict=True)
        }

    def evaluate(self, frames: Mapping[EnsembleSource, Frames]) -> LossResult:
        """The loss, with the values as diagnostics; of a curve, with what remains of its deviations.

        Raises:
            InputError: The cell moves where it should be fixed, or the other way round.
        """
        observable, wanted, mine = self.observable, self.wanted, frames[self.source]
        if self.options.cell == "free":
            mine.require_free_cell(f"the target of loss {self.name!r}")
        elif self.options.cell == "fixed":
            mine.require_fixed_cell(f"the target of loss {self.name!r}")
        residuals = wanted.deviations(average(observable, mine, -mine.work))
        value = residuals.square().mean()
        rms, largest = _measured(_Deviations(observable, wanted), mine)
        diagnostics, resolved = {"rms": rms, "largest": largest}, rms.se <= PERFECT
        if not self.options.is_curve:
            found = dict(zip(observable.labels, _measured(observable, mine), strict=True))
            diagnostics = {label: found[label] for label in wanted.labels}
            errors = torch.tensor([found[label].se for label in wanted.labels], dtype=torch.float64)
            resolved = bool((errors <= wanted.uncertainties).all())
        components = {self.name: float(value.detach())}
        return LossResult(value, components, diagnostics, rms, PERFECT, resolved, residuals)


def _source_of(options: ObservableOptions) -> EnsembleSource:
    return EnsembleSource(options.phase, options.temperature, options.pressure, options.lattice_constants)


def _measured(observable: Observable, frames: Frames) -> tuple[Measured, ...]:
    """Values and standard errors under the current model."""
    inefficiency, log_weights = frames.inefficiency_of_values, -frames.work.detach()
    return measure(observable, frames.detached(), inefficiency, log_weights)


class _Deviations(Observable):
    """Root mean square and largest of the deviations of an observable from its targets, in σ."""

    labels = ("rms", "largest")
    unit = "sigma"

    def __init__(self, observable: Observable, wanted: TargetValues) -> None:
        self.observable, self.wanted = observable, wanted

    def columns(self, sample: Sample) -> Tensor:
        return self.observable.columns(sample)

    def derive(self, means: Tensor, sample: Sample) -> Tensor:
        deviations = self.wanted.deviations(self.observable.derive(means, sample))
        return torch.stack([deviations.norm() / sqrt(len(deviations)), deviations[deviations.abs().argmax()]])


class _Kept(Observable):
    """An observable of positions and cells alone: columns are found once for the frames of an ensemble."""

    def __init__(self, observable: Observable) -> None:
        self.observable = observable
        self.labels, self.unit = observable.labels, observable.unit
        self._known: tuple[Tensor, Tensor] | None = None

    def columns(self, sample: Sample) -> Tensor:
        # An ensemble holds one tensor of positions as long as its frames are the same.
        if self._known is None or self._known[0] is not sample.positions:
            self._known = (sample.positions, self.observable.columns(sample))
        return self._known[1]

    def derive(self, means: Tensor, sample: Sample) -> Tensor:
        return self.observable.derive(means, sample)


class HeatCapacity(Observable):
    """C_P where the cell moves, C_V where it is fixed, per atom in k_B."""

    labels = ("heat_capacity",)
    unit = "k_B"

    def columns(self, sample: Sample) -> Tensor:
        """First two moments of enthalpy or energy of every frame `[n, 2]`."""
        return (HeatCapacityP() if sample.free_cell else HeatCapacityV()).columns(sample)

    def derive(self, means: Tensor, sample: Sample) -> Tensor:
        """Heat capacity `[1]`."""
        return (HeatCapacityP() if sample.free_cell else HeatCapacityV()).derive(means, sample)
