"""Every observable as a loss: the mean of ((value - target)/σ)² over its values."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import ClassVar, Self

import torch
from ase import Atoms
from torch import Tensor

from mlip_refine.data import Table, find_table
from mlip_refine.errors import MlipRefineError
from mlip_refine.losses.base import (
    PERFECT,
    EnsembleLoss,
    EnsembleSource,
    Frames,
    LossResult,
    require_cells,
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

    A subclass has the `Options` of its observable; nothing else depends on which it is.
    """

    Options: ClassVar[type[ObservableOptions]]
    squares = True

    def __init__(self, name: str, weight: float, options: ObservableOptions) -> None:
        """Keep the options; the observable is made once the phase is known."""
        super().__init__(name, weight)
        self.options = options
        self.source = EnsembleSource(
            options.phase, options.temperature, options.pressure, options.lattice_constants
        )
        self._table: Table | None = None
        self._matched: tuple[Observable, TargetValues] | None = None

    @property
    def sources(self) -> tuple[EnsembleSource, ...]:
        """One ensemble."""
        return (self.source,)

    @property
    def described(self) -> tuple[EnsembleSource, ...]:
        """The same: box and symmetry of the phase are known before."""
        return self.sources

    @property
    def targets(self) -> Mapping[str, Target]:
        """Of the values; a curve has too many to tell each."""
        if self._matched is None or self.options.structural:
            return {}
        observable, wanted = self._matched
        values = zip(wanted.values.tolist(), wanted.uncertainties.tolist(), strict=True)
        state = (self.source.temperature, self.source.pressure)
        return {
            label: Target(value, uncertainty, observable.unit, *state)
            for label, (value, uncertainty) in zip(wanted.labels, values, strict=True)
        }

    def prepare_files(self, resolve: Callable[[str], Path]) -> None:
        """Read the table, if there is one."""
        if self.options.table is not None:
            self._table = find_table(self.options.table, resolve)

    def prepare_crystals(self, crystals: Mapping[EnsembleSource, Atoms]) -> None:
        """Make the observable of the phase and find the targets of its values.

        Raises:
            InputError: Targets that do not fit the observable, or an observable that the phase does not have.
        """
        observable = self.options.observable(crystals[self.source], self._table)
        targets = self.options.targets(self.name, observable.labels, self._table)
        wanted = TargetValues.of(observable.labels, targets)
        self.probes = frozenset({"energy"}) | observable.probes
        self._matched = (_Kept(observable) if self.options.structural else observable, wanted)

    def prepare_cells(self, free: Mapping[EnsembleSource, bool]) -> None:
        """Refuse a cell that moves where it should be fixed, or the other way round.

        Raises:
            InputError: With what would do.
        """
        if self.options.cell in ("free", "fixed"):
            require_cells(self.name, free, moving=self.options.cell == "free")

    def evaluate(self, frames: Mapping[EnsembleSource, Frames]) -> LossResult:
        """The loss, with the values as diagnostics; of a curve, with what remains of its deviations.

        Raises:
            InputError: The cell moves where it should be fixed, or the other way round.
        """
        if self._matched is None:
            raise MlipRefineError(f"loss {self.name!r} does not know its phase yet")
        observable, wanted = self._matched
        mine = frames[self.source]
        self._require_cell(mine.sample)
        residuals = wanted.deviations(average(observable, mine.sample, -mine.work))
        value = residuals.square().mean()
        rms, largest = _measured(_Deviations(observable, wanted), mine)
        diagnostics = {"rms": rms, "largest": largest}
        if not self.options.structural:
            found = dict(zip(observable.labels, _measured(observable, mine), strict=True))
            diagnostics = {label: found[label] for label in wanted.labels}
        components = {self.name: float(value.detach())}
        return LossResult(value, components, diagnostics, rms, PERFECT, residuals=residuals)

    def _require_cell(self, sample: Sample) -> None:
        if self.options.cell == "free":
            sample.require_free_cell(f"the target of loss {self.name!r}")
        elif self.options.cell == "fixed":
            sample.require_fixed_cell(f"the target of loss {self.name!r}")


def _measured(observable: Observable, frames: Frames) -> tuple[Measured, ...]:
    """Values and standard errors under the current model."""
    sample, inefficiency = frames.detached_sample, frames.inefficiency_of_values
    return measure(observable, sample, inefficiency, -frames.work.detach())


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
