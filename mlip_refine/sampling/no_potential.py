"""No potential: what samples systems whose whole energy is a bias, without any model."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from mlip_refine.potential import GraphBuilder, Graphs, Potential


class NoPotential(Potential):
    """Stands where a potential does, for batches in which no Hamiltonian has a share of a model.

    Stages that are sampled with it depend on no model: `hash` is the same for all. Energies, forces and
    stresses are zero; the dynamics does not even ask for them.
    """

    def __init__(
        self,
        numbers: Iterable[int] | np.ndarray,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        """Set the elements that occur, and where and how precisely the dynamics runs.

        Args:
            numbers: Atomic numbers; repetitions do not matter.
            device: Device of the batch; the CPU by default.
            dtype: Floating type of the batch.
        """
        elements = tuple(sorted({int(z) for z in numbers}))
        graphs = GraphBuilder(elements, 0.0, dtype, device or torch.device("cpu"))
        super().__init__(torch.nn.Module(), ["none"], "none", graphs)

    @property
    def hash(self) -> str:
        """The same for every batch without a model."""
        return "no model"

    def evaluate(
        self,
        graphs: Graphs,
        probes: Iterable[str] = ("energy",),
        *,
        create_graph: bool = False,  # noqa: ARG002 - as a Potential has it
    ) -> dict[str, Tensor]:
        """Return zeros for `energy`, `forces`, `stress` and `born` (shapes as `Potential.evaluate`)."""
        n, zeros = graphs.n_graphs, graphs.cell.new_zeros
        found = {
            "energy": zeros(n),
            "forces": torch.zeros_like(graphs.positions),
            "stress": zeros(n, 3, 3),
            "born": zeros(n, 6, 6),
        }
        return {name: found[name] for name in probes}
