"""The potential that a bench times, and how long it takes over it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlip_refine.potential import Potential


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
        return str(self.potential.dtype).removeprefix("torch.")

    def frozen(self, accelerate: str = "none") -> Potential:
        """What sampling gets.

        Raises:
            InputError: If it cannot be accelerated that way here.
        """
        options: dict[str, Any] = {} if accelerate == "none" else {"accelerate": accelerate}
        return self.potential.frozen_copy(**options)


@dataclass(frozen=True)
class Effort:
    """How much is timed.

    Attributes:
        sizes: Systems and atoms per system of the engine's workloads.
        rounds: Pairs of blocks.
        block: Least duration of a block, s.
        steps: Least steps of the engine in a block: several neighbour lists must fall into it.
        equilibration: Steps before anything is timed.
        cells: Systems of the comparison with ASE, and atoms of each.
        frames: Of the gradient.
        memory_frames: Of the two processes whose memory is compared.
    """

    sizes: tuple[tuple[int, int], ...]
    rounds: int
    block: float
    steps: int
    equilibration: int
    cells: tuple[int, int]
    frames: int
    memory_frames: tuple[int, int]


FULL = Effort(
    sizes=((4, 54), (8, 128)),
    rounds=8,
    block=0.3,
    steps=24,
    equilibration=40,
    cells=(16, 54),
    frames=100,
    memory_frames=(200, 2000),
)
QUICK = Effort(
    sizes=((4, 54),),
    rounds=4,
    block=0.1,
    steps=6,
    equilibration=10,
    cells=(4, 54),
    frames=30,
    memory_frames=(50, 200),
)
