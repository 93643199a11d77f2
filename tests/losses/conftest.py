"""Frames with known averages, as a loss sees them, and losses as a config gives them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms

from mlip_refine import testing
from mlip_refine.losses import Frames, Loss
from mlip_refine.quantities import GPA, KB


@pytest.fixture(scope="session")
def made() -> Callable[..., Loss]:
    """Return a loss of a config, with its table read and its phases known."""

    def make(kind: str, crystal: Atoms | dict[str, Atoms] | None = None, **options: Any) -> Loss:
        node = {"type": kind, "phase": "one", "temperature": 300.0, **options}
        if "from" in node:
            del node["phase"]
        return testing.loss_of(node, Atoms("Ti") if crystal is None else crystal)

    return make


@pytest.fixture(scope="session")
def frames_of() -> Callable[..., Frames]:
    """Return frames of a reference with its energies `[n]`, and probes of the current model."""

    def build(
        probes: dict[str, torch.Tensor],
        reference: torch.Tensor,
        positions: torch.Tensor,
        cells: torch.Tensor,
        *,
        temperature: float = 300.0,
        pressure: float = 0.0,
        free_cell: bool = False,
        numbers: np.ndarray | None = None,
    ) -> Frames:
        n_atoms, pv = positions.shape[1], pressure * GPA * torch.linalg.det(cells).abs()
        return Frames(
            probes=probes,
            positions=positions,
            cells=cells,
            numbers=np.full(n_atoms, 22) if numbers is None else numbers,
            masses=torch.full((n_atoms,), 47.867, dtype=torch.float64),
            temperature=temperature,
            pressure=pressure,
            free_cell=free_cell,
            log_q=-(reference + pv) / (KB * temperature),
        )

    return build


@pytest.fixture(scope="session")
def gas(frames_of: Callable[..., Frames]) -> Callable[..., Frames]:
    """Return an ideal gas in npt under U = 0, seen by a model with U = excess · V.

    That model is the gas at P + excess: volumes have the density V^N exp(-β(P + excess)V).
    """

    def draw(seed: int, n: int, n_atoms: int, pressure: float, excess: float) -> Frames:
        generator = torch.Generator().manual_seed(seed)
        waits = -torch.rand(n, n_atoms + 1, generator=generator, dtype=torch.float64).log().sum(1)
        volumes = waits * KB * 300.0 / (pressure * GPA)
        eye = torch.eye(3, dtype=torch.float64)
        return frames_of(
            {"energy": excess * GPA * volumes},
            torch.zeros(n, dtype=torch.float64),
            torch.zeros(n, n_atoms, 3, dtype=torch.float64),
            volumes[:, None, None] ** (1 / 3) * eye,
            pressure=pressure,
            free_cell=True,
        )

    return draw
