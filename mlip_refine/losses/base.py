"""What a loss is: it names its sources and probes, and is then a pure function of tensors."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ase import Atoms
from torch import Tensor

from mlip_refine.errors import InputError
from mlip_refine.observables.base import Sample, values_of
from mlip_refine.potential import Potential
from mlip_refine.quantities import GPA, Measured, Target

PERFECT = 1.0
"""Root mean square deviation, in standard uncertainties of the targets, at which a run may stop."""


UNSTRAINED = (0.0,) * 6
"""Strain of a cell that is held as it is."""


@dataclass(frozen=True, order=True)
class EnsembleSource:
    """Frames of one phase at one state. Losses that ask for the same one share its frames.

    Attributes:
        phase: Name of a phase of the config.
        temperature: Temperature, K.
        pressure: Pressure, GPa.
        lattice: Lattice constants (a,) or (a, c) of a fixed cell, Å; empty: the cell of the phase.
        strain: Strain of that fixed cell, six components (xx, yy, zz, yz, xz, xy) of a symmetric tensor.
    """

    phase: str
    temperature: float
    pressure: float
    lattice: tuple[float, ...] = ()
    strain: tuple[float, ...] = ()

    @property
    def fixed(self) -> bool:
        """Whether it prescribes the cell."""
        return bool(self.lattice or self.strain)

    @property
    def name(self) -> str:
        """Name in logs and stores; states that differ have names that differ."""
        lattice = "".join(f"-{axis}{length:.15g}" for axis, length in zip("ac", self.lattice, strict=False))
        strain = "".join(f"-e{i}{e:+.15g}" for i, e in enumerate(self.strain, 1) if e)
        held = "-fixed" if self.strain and not strain and not lattice else ""
        return f"{self.phase}-{self.temperature:.15g}K-{self.pressure:.15g}GPa{lattice}{strain}{held}"


@dataclass(frozen=True)
class Frames(Sample):
    """The frames of an ensemble as a loss sees them: a sample, and what reweighting it takes.

    Its probes are what the loss asked for, differentiable; `energy` `[n]`, eV, is among them.

    Attributes:
        log_q: Log-density that each frame was drawn from, up to a constant `[n]`.
        inefficiency: Statistical inefficiency of the frames, in frames.
        shift: Free energy of the reference that drew the frames minus that of the initial model, eV, whole
            cell.
        mean_enthalpy: Mean U + PV of the frames under the current model, eV, whole cell.
        inefficiency_of: Statistical inefficiency of values of the frames `[n]`, where it can be measured.
    """

    log_q: Tensor
    inefficiency: float = 1.0
    shift: Measured = field(default_factory=lambda: Measured(0.0, 0.0, "eV"))
    mean_enthalpy: Measured | None = None
    inefficiency_of: Callable[[Tensor], float] | None = None

    def inefficiency_of_values(self, values: Tensor) -> float:
        """Statistical inefficiency of values of the frames `[n]`; that of all if it cannot be measured."""
        return self.inefficiency if self.inefficiency_of is None else self.inefficiency_of(values)

    @property
    def beta(self) -> float:
        """1/kT, 1/eV."""
        return 1.0 / self.kt

    @property
    def work(self) -> Tensor:
        """Reduced potential of the current model minus that of the reference, per frame `[n]`."""
        pv = self.pressure * GPA * self.volumes
        return self.beta * (values_of(self.probes["energy"]) + pv) + self.log_q


@dataclass(frozen=True)
class LossResult:
    """A scalar with its parts.

    Attributes:
        value: Scalar, differentiable in the probes.
        components: Named parts, for the log.
        diagnostics: Measured quantities behind the value.
        deviation: Distance from the target, where the loss has one that a run can stop at.
        tolerance: Distance at which it may; `None`: that of the training, meV/atom, or the standard error of
            the deviation if that is smaller.
        resolved: Whether statistical errors are small enough to decide that the targets are met.
        residuals: For a loss on targets, deviations in their uncertainties `[k]`, differentiable: `value` is
            the mean of their squares.
    """

    value: Tensor
    components: Mapping[str, float] = field(default_factory=dict)
    diagnostics: Mapping[str, Measured] = field(default_factory=dict)
    deviation: Measured | None = None
    tolerance: float | None = None
    resolved: bool = True
    residuals: Tensor | None = None


@dataclass(frozen=True)
class Validation:
    """What is measured on held-out data now and then during a training, and of the delivered potential.

    Attributes:
        every: Updates of experiments from one measurement to the next.
        measured: Quantities of a potential by name.
    """

    every: int
    measured: Callable[[Potential], Mapping[str, Measured]]

    def measure(self, potential: Potential) -> dict[str, Measured]:
        """Return the quantities of a potential by their names in records."""
        return {f"validation, {name}": value for name, value in self.measured(potential).items()}


@dataclass(frozen=True)
class Setting:
    """What a run has that losses are bound to.

    Attributes:
        crystal: Ideal crystal of a source in its cell.
        cell_moves: Whether the cell of a source moves when it is sampled.
        resolve: Turns a path of the config into an absolute one.
        potential: The potential that is trained; `None` leaves out what is checked about it.
        replay_functional: Functional of the labelled frames of replay, where it is known.
    """

    crystal: Callable[[EnsembleSource], Atoms]
    cell_moves: Callable[[EnsembleSource], bool]
    resolve: Callable[[str], Path]
    potential: Potential | None = None
    replay_functional: str | None = None

    def require_cells(self, loss: str, sources: Iterable[EnsembleSource], *, moving: bool) -> None:
        """Refuse sources of a loss whose cells do not move where they should, or move where they should not.

        Raises:
            InputError: With what would do.
        """
        for source in sources:
            moves = self.cell_moves(source)
            if moves != moving:
                raise InputError(
                    f"loss {loss!r} needs a cell that {'moves' if moving else 'is held'}",
                    found=f"{source.name}, whose cell {'moves' if moves else 'is held'}",
                    fix="Set sampling.ensemble: npt, and a cell_freedom of the phase that is not fixed."
                    if moving
                    else "Set sampling.ensemble: nvt, cell_freedom: fixed, or a lattice.",
                )


class Loss:
    """Base of all losses.

    Attributes:
        name: Name in results.
        weight: Factor in the total.
        probes: What is evaluated on every frame or graph of the sources.
        strides: Probes that are evaluated on every so many frames only. For a probe `x` among them the frames
            get a `Probe`, whose mask says where it was evaluated.
        squares: Whether it is a mean of squared deviations, whose results have `residuals`; of a `BatchLoss`,
            whether it is a sum over outputs, each by itself, and convex. Gauss-Newton asks for it.
        anchored: Whether it needs the free energies of its sources from the initial model on, so that their
            chain of references may not break.
        validation: What is measured on held-out data, if anything.
    """

    probes: frozenset[str] = frozenset({"energy"})
    strides: Mapping[str, int] = MappingProxyType({})
    squares: bool = False
    anchored: bool = False
    validation: Validation | None = None

    def __init__(self, name: str, weight: float) -> None:
        """Keep the name and the weight."""
        self.name, self.weight = name, weight

    @classmethod
    def bind(cls, name: str, weight: float, options: Any, setting: Setting) -> "Loss":  # noqa: ARG003
        """Return the loss of a run, with everything that it needs from its files, crystals and potential.

        All that can be refused is refused here, before anything is sampled. By default nothing is needed.

        Args:
            name: Name in results.
            weight: Factor in the total.
            options: Checked options of the config.
            setting: What the run has.

        Raises:
            InputError: The loss does not suit the setting.
        """
        return cls(name, weight, options)  # type: ignore[call-arg]

    @property
    def sources(self) -> tuple[EnsembleSource, ...]:
        """Ensembles whose frames the loss needs; none by default."""
        return ()

    @property
    def crystals_at_rest(self) -> tuple[Atoms, ...]:
        """Crystals that the loss trains on beside those of its sources; none by default."""
        return ()

    @property
    def targets(self) -> Mapping[str, Target]:
        """What its diagnostics should be, by their names, for records; none by default."""
        return {}


class EnsembleLoss(Loss, ABC):
    """A loss on thermal averages. Its gradient is streamed over the frames in constant memory."""

    @property
    @abstractmethod
    def sources(self) -> tuple[EnsembleSource, ...]:
        """The ensembles that `evaluate` gets."""

    @abstractmethod
    def evaluate(self, frames: Mapping[EnsembleSource, Frames]) -> LossResult:
        """The loss from per-frame probes; pure, so that analytic ensembles test it."""


class BatchLoss(Loss, ABC):
    """A loss that is a mean over labelled graphs: back-propagated directly, batch by batch."""

    @abstractmethod
    def evaluate(self, outputs: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> LossResult:
        """The loss of one batch from the model's outputs and the labels."""


class PotentialLoss(Loss, ABC):
    """A loss on properties of the model itself, such as static elastic constants: back-propagated directly.

    It may have sources, whose frames give what temperature adds. They are not reweighted but drawn anew.

    Attributes:
        every: Updates between two draws of the sources.
    """

    every: int = 1

    def at(self, step: int) -> None:
        """Set the number of the update, counted among those of experiments: it may choose a batch."""

    def follow(self, potential: Potential, frames: Mapping[EnsembleSource, Frames]) -> None:
        """Update the thermal part of the loss from frames of the sources that this potential drew."""

    @abstractmethod
    def evaluate(self, potential: Potential) -> LossResult:
        """The loss, differentiable in the parameters of the potential."""

    def measure(self, potential: Potential) -> LossResult:
        """Return the loss where derivatives are not needed."""
        return self.evaluate(potential)

    def linearise(self, potential: Potential, add: Callable[[Tensor], None]) -> LossResult:
        """Pass all residuals to `add`, which differentiates them, part by part where memory asks for it."""
        result = self.evaluate(potential)
        if result.residuals is not None:
            add(result.residuals)
        return result

    def backpropagate(self, potential: Potential) -> LossResult:
        """Add the weighted gradient to those of the parameters; a loss of many parts may go part by part."""
        result = self.evaluate(potential)
        (self.weight * result.value).backward()
        return result
