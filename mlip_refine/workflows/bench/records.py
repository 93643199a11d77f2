"""Results of a bench: pairs of measured numbers, their ratio and the goal of the ratio."""

from enum import StrEnum
from typing import Literal

from pydantic import Field, computed_field

from mlip_refine.workflows.records import MeasuredField, Record


class Goal(Record):
    """What a ratio should be.

    Attributes:
        relation: Side of the limit where the ratio should be.
        limit: The limit.
    """

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
    Topic.ENGINE: Goal(relation="at most", limit=1.05),
    Topic.ASE: Goal(relation="at least", limit=2.25),
    Topic.GRADIENT: Goal(relation="at most", limit=1.10),
    Topic.MEMORY: Goal(relation="at most", limit=1.05),
}


class Outcome(Record):
    """The numbers of one row.

    Attributes:
        ours: Speed or memory of this package: a median, or a number that was read once and has no error.
        reference: That of what it is measured against.
        ratio: Ratio of our time or memory to the reference's where the goal is at most something; of our
            speed to the reference's where it is at least something.
        details: Further numbers, by name.
        ran: How forces were really found: an acceleration that fails or does not pay is left for `none`.
    """

    ours: MeasuredField
    reference: MeasuredField
    ratio: MeasuredField
    details: dict[str, float] = Field(default_factory=dict)
    ran: str = "none"


class Comparison(Record):
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

    @computed_field  # type: ignore[prop-decorator]
    @property
    def goal(self) -> Goal:
        """What the ratio should be."""
        return GOALS[self.topic]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def met(self) -> bool | None:
        """Whether it is; `None` without numbers."""
        return None if self.outcome is None else self.goal.met(self.outcome.ratio.value)


class Machine(Record):
    """Where it was measured.

    Attributes:
        processor: Model of the CPU.
        cores: Number of cores that this process may use.
        threads: Number of threads of torch.
        load: Processes that were running on average in the minute before; `None` where it is not known.
        device: `cpu`, or the name of the GPU.
        python: Version of Python.
        torch: Version of torch.
        mace: Version of MACE.
        dtype: Precision of dynamics and gradients.
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


class BenchResult(Record):
    """All that a bench measured, in one run on one machine.

    Attributes:
        format: Name of the format.
        version: Version of the format; it changes when a key is renamed, removed or changes its meaning.
        machine: Where it was measured.
        rows: The comparisons.
    """

    format: Literal["mlip-refine bench"] = "mlip-refine bench"
    version: Literal[1] = 1
    machine: Machine
    rows: tuple[Comparison, ...]
