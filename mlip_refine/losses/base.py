"""What a loss is: it names its sources and probes, and is then a pure function of tensors."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from mlip_refine.quantities import Measured


@dataclass(frozen=True, order=True)
class EnsembleSource:
    """Frames of one phase at one state. Losses that ask for the same one share its frames.

    Attributes:
        phase: Name of a phase of the config.
        temperature: K.
        pressure: GPa.
    """

    phase: str
    temperature: float
    pressure: float

    @property
    def name(self) -> str:
        """Name in logs and stores."""
        return f"{self.phase}-{self.temperature:g}K-{self.pressure:g}GPa"


@dataclass(frozen=True)
class Frames:
    """The frames of an ensemble as a loss sees them.

    Attributes:
        probes: What the loss asked for, per frame: `energy` `[n]`, eV, differentiable.
        log_q: Log-density that each frame was drawn from, up to a constant `[n]`.
        pv: Pressure times volume of each frame `[n]`, eV.
        beta: 1/kT, 1/eV.
        n_atoms: Atoms per frame.
        inefficiency: Statistical inefficiency of the frames, in frames.
        shift: Free energy of the reference that drew the frames minus that of the initial model, eV, whole
            cell.
        enthalpy: Mean U + PV of the frames under their reference, eV, whole cell.
    """

    probes: Mapping[str, Tensor]
    log_q: Tensor
    pv: Tensor
    beta: float
    n_atoms: int
    inefficiency: float = 1.0
    shift: Measured = field(default_factory=lambda: Measured(0.0, 0.0, "eV"))
    enthalpy: Measured | None = None

    @property
    def work(self) -> Tensor:
        """Reduced potential of the current model minus that of the reference, per frame `[n]`."""
        return self.beta * (self.probes["energy"] + self.pv) + self.log_q


@dataclass(frozen=True)
class LossResult:
    """A scalar with its parts.

    Attributes:
        value: Scalar, differentiable in the probes.
        components: Named parts, for the log.
        diagnostics: Measured quantities behind the value.
        deviation: Distance from the target, where the loss has one that a run can stop at, meV/atom.
    """

    value: Tensor
    components: Mapping[str, float] = field(default_factory=dict)
    diagnostics: Mapping[str, Measured] = field(default_factory=dict)
    deviation: Measured | None = None


class Loss:
    """Base of all losses.

    Attributes:
        name: Name in results.
        weight: Factor in the total.
        probes: What is evaluated on every frame or graph of the sources.
    """

    probes: frozenset[str] = frozenset({"energy"})

    def __init__(self, name: str, weight: float) -> None:
        """Keep the name and the weight."""
        self.name, self.weight = name, weight


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
