"""The potential that a bench times, and how long it takes over it."""

from dataclasses import dataclass
from pathlib import Path

from mlip_refine.potential import Acceleration, Potential


@dataclass(frozen=True)
class Subject:
    """A potential in all the forms that a bench needs.

    Attributes:
        name: In tables.
        potential: As training has it.
        file: As it is saved for ASE: a plain MACE.
    """

    name: str
    potential: Potential
    file: Path

    @property
    def dtype(self) -> str:
        """Name of the floating type."""
        return dtype_name(self.potential)

    def frozen(self, accelerate: Acceleration = "none") -> Potential:
        """What sampling gets."""
        return self.potential.frozen_copy(accelerate=accelerate)


def dtype_name(potential: Potential) -> str:
    """`float32` or `float64`."""
    return str(potential.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Effort:
    """How much is timed.

    Attributes:
        sizes: Systems and atoms per system of the engine's workloads.
        rounds: Pairs of blocks, at least.
        most_rounds: And at most, while there is time.
        duration: That the pairs of a row may take if they are no fewer than `rounds`, s.
        block: Least duration of a block, s.
        steps: Least steps of the engine in a block: several neighbour lists must fall into it.
        equilibration: Steps before anything is timed.
        cells: Systems of the comparison with ASE, and atoms of each.
        frames: Of the gradient.
        memory_frames: Of the two processes whose memory is compared.
    """

    sizes: tuple[tuple[int, int], ...]
    rounds: int
    most_rounds: int
    duration: float
    block: float
    steps: int
    equilibration: int
    cells: tuple[int, int]
    frames: int
    memory_frames: tuple[int, int]


FULL = Effort(
    sizes=((4, 54), (8, 128)),
    rounds=6,
    most_rounds=24,
    duration=12.0,
    block=0.3,
    steps=16,
    equilibration=40,
    cells=(16, 54),
    frames=100,
    memory_frames=(200, 2000),
)
QUICK = Effort(
    sizes=((4, 54),),
    rounds=3,
    most_rounds=12,
    duration=1.5,
    block=0.1,
    steps=6,
    equilibration=10,
    cells=(4, 54),
    frames=30,
    memory_frames=(50, 200),
)
