"""What a bench measured: pairs of numbers, their ratio and the goal of the ratio."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal

from mlip_refine.quantities import Measured

FORMAT_VERSION = 1
"""Of the JSON file; it changes when a key is renamed, removed or changes its meaning."""


@dataclass(frozen=True)
class Reading:
    """A number read off this machine.

    Attributes:
        value: The median, or the only reading.
        se: Its standard error; `None` where it was read once.
        unit: Of both; empty for a ratio.
    """

    value: float
    se: float | None
    unit: str

    def __str__(self) -> str:
        """Return the value with its error where it has one, without the unit."""
        if self.se is None or self.se <= 0:
            return f"{self.value:.4g}"
        return str(Measured(self.value, self.se, ""))


@dataclass(frozen=True)
class Goal:
    """What a ratio should be."""

    relation: Literal["at most", "at least"]
    limit: float

    def met(self, ratio: float) -> bool:
        """Tell whether a ratio is on the right side of the limit; its error does not count."""
        return ratio <= self.limit if self.relation == "at most" else ratio >= self.limit

    def __str__(self) -> str:
        """Return the goal as a table shows it."""
        return f"{'≤' if self.relation == 'at most' else '≥'} {self.limit:.2f}"


class Topic(StrEnum):
    """What is measured against what."""

    ENGINE = "engine step against the bare model"
    ASE = "engine against ASE, one system at a time"
    GRADIENT = "streamed gradient against its passes on ready batches"
    MEMORY = "peak memory of the streamed gradient"


GOALS = {
    Topic.ENGINE: Goal("at most", 1.05),
    Topic.ASE: Goal("at least", 2.25),
    Topic.GRADIENT: Goal("at most", 1.10),
    Topic.MEMORY: Goal("at most", 1.05),
}


@dataclass(frozen=True)
class Outcome:
    """The numbers of one row.

    Attributes:
        ours: Of this package.
        reference: Of what it is measured against.
        ratio: Of our time or memory to the reference's where the goal is at most something; of our speed to
            the reference's where it is at least something.
        details: Further numbers, by name.
        ran: How forces were really found: an acceleration that fails or does not pay is left for `none`.
    """

    ours: Reading
    reference: Reading
    ratio: Reading
    details: Mapping[str, float] = field(default_factory=dict)
    ran: str = "none"


@dataclass(frozen=True)
class Comparison:
    """One row.

    Attributes:
        topic: What is measured against what.
        model: Name of the potential.
        workload: Systems and ensemble, or frames.
        accelerate: How the potential was to be accelerated; `outcome.ran` is how it was.
        outcome: The numbers; `None` where there are none.
        failure: Why there are none; empty otherwise.
    """

    topic: Topic
    model: str
    workload: str
    accelerate: str = "none"
    outcome: Outcome | None = None
    failure: str = ""

    @property
    def goal(self) -> Goal:
        """What the ratio should be."""
        return GOALS[self.topic]

    @property
    def met(self) -> bool | None:
        """Whether it is; `None` without numbers."""
        return None if self.outcome is None else self.goal.met(self.outcome.ratio.value)

    def as_json(self) -> dict[str, Any]:
        """Return the row as plain data, with its goal and whether it is met."""
        return asdict(self) | {"goal": asdict(self.goal), "met": self.met}


@dataclass(frozen=True)
class Machine:
    """Where it was measured.

    Attributes:
        processor: Model of the CPU.
        cores: That this process may use.
        threads: Of torch.
        load: Processes that were running on average in the minute before; `None` where it is not known.
        device: `cpu`, or the name of the GPU.
        python: Version.
        torch: Version.
        mace: Version.
        dtype: Of dynamics and gradients.
    """

    processor: str
    cores: int
    threads: int
    load: float | None
    device: str
    python: str
    torch: str
    mace: str
    dtype: str


@dataclass(frozen=True)
class BenchResult:
    """All that a bench measured, in one run on one machine."""

    machine: Machine
    rows: Sequence[Comparison]

    def as_json(self) -> dict[str, Any]:
        """Return plain data for a JSON file."""
        return {
            "format": "mlip-refine bench",
            "version": FORMAT_VERSION,
            "machine": asdict(self.machine),
            "rows": [row.as_json() for row in self.rows],
        }
