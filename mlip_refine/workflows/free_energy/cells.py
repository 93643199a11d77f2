"""The cell in which a phase has the wanted pressure, found from the mean stress of NVT runs.

Newton's method on the few strains that the crystal's symmetry leaves free. The tangent is that of the static
lattice; a few iterations absorb the difference. Unlike a barostat, this cannot carry a phase over a low
mechanical barrier into another one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mlip_refine.errors import SamplingError
from mlip_refine.potential import Potential
from mlip_refine.quantities import GPA
from mlip_refine.sampling import FrameStore, Length, MDSettings, StatePoint, Trajectory, last_frames, sample
from mlip_refine.sampling.md.barostat import free_strains

STATIC_STRAIN = 0.005
"""Amplitude of the finite differences of the static stress."""

MAX_STRAIN = 0.02
"""Largest strain of one Newton step."""

MAX_LAST_GAIN = 5e-4
"""Free energy that the last Newton step may still gain, eV/atom; what remains after it is far less."""


@dataclass(frozen=True)
class CellSettings:
    """How the cell at a pressure is searched.

    Attributes:
        md: Integrator settings; frames are as far apart as `md.interval`.
        length: Length of the run of each iteration.
        iterations: Number of Newton steps.
    """

    md: MDSettings
    length: Length
    iterations: int


def equilibrate_cells(
    potential: Potential,
    points: Sequence[StatePoint],
    settings: CellSettings,
    *,
    seed: int,
    stage: str,
    store: FrameStore | None = None,
) -> dict[str, StatePoint]:
    """Find for every point the cell in which the mean total stress is minus the pressure.

    Args:
        potential: A frozen copy.
        points: State points with starting cells; points whose cell is `fixed` keep theirs.
        settings: How to search.
        seed: Random seed of the sampling.
        stage: Name of the sampling in the store.
        store: Where frames are kept.

    Returns:
        The points by name, in `nvt` and in their new cells.

    Raises:
        SamplingError: If a cell was still far from its pressure before the last step.
    """
    current = {p.name: replace(p, ensemble="nvt") for p in points}
    strains = {name: varied_strains(p) for name, p in current.items() if p.cell_freedom != "fixed"}
    tangents = {name: _static_tangent(potential, current[name], free) for name, free in strains.items()}
    excess: dict[str, Tensor] = {}
    steps: dict[str, Tensor] = {}
    runs: dict[str, Trajectory] = {}
    start = None
    for i in range(settings.iterations if strains else 0):
        runs = sample(
            potential,
            [current[name] for name in strains],
            settings.md,
            settings.length,
            seed=seed + i,
            stage=f"{stage}-{i}",
            store=store,
            start=start,
        )
        start = {}
        for name, (positions, cells) in last_frames(runs).items():
            wanted = -current[name].pressure * GPA * torch.eye(3, dtype=torch.float64)
            excess[name] = _along(runs[name].total_stress() - wanted, strains[name])
            full = torch.linalg.solve(tangents[name], -excess[name])
            steps[name] = full.clamp(-MAX_STRAIN, MAX_STRAIN)
            current[name] = _strained(current[name], steps[name], strains[name])
            # The next run starts from the last frames, carried affinely into the new cell.
            cell = torch.from_numpy(current[name].atoms.cell.array.copy()).expand_as(cells)
            start[name] = (torch.bmm(positions, torch.linalg.solve(cells, cell)), cell.contiguous())
    for name, run in runs.items():
        # The last step, of strain ε against the excess stress σ, lowers the free energy by ½ V ε σ.
        squares, step = strains[name].square().sum((1, 2)), steps[name]
        gain = -0.5 * run.point.atoms.cell.volume * float((squares * step * excess[name]).sum())
        if gain > MAX_LAST_GAIN * run.n_atoms or bool((step.abs() >= MAX_STRAIN).any()):
            raise SamplingError(
                f"the cell of {name} has not settled: iteration {settings.iterations} still strained it by "
                f"{float(step.abs().max()):.3f}; give better lattice constants, or raise cell_iterations"
            )
    return current


def varied_strains(point: StatePoint) -> Tensor:
    """Return the strains that Newton's method varies, symmetric `[n_strains, 3, 3]` (see `free_strains`).

    Where all axes are free, x and y of a hexagonal, tetragonal or rhombohedral lattice still strain together.
    """
    if point.cell_freedom == "anisotropic":
        lattice = point.atoms.cell.get_bravais_lattice().name
        return free_strains("hexagonal" if lattice in ("HEX", "TET", "RHL") else "anisotropic")
    return free_strains(point.cell_freedom)


def _static_tangent(potential: Potential, point: StatePoint, strains: Tensor) -> Tensor:
    """Return d(stress along g)/d(amount of h) of the static lattice `[n_strains, n_strains]`, eV/Å³."""

    def stress(amounts: Tensor) -> Tensor:
        strained = _strained(point, amounts, strains)
        graphs = potential.graphs.collate([potential.graphs.from_atoms(strained.atoms)])
        return _along(potential.evaluate(graphs, ["stress"])["stress"][0].detach().double().cpu(), strains)

    unit = STATIC_STRAIN * torch.eye(len(strains), dtype=torch.float64)
    return torch.stack([(stress(a) - stress(-a)) / (2 * STATIC_STRAIN) for a in unit], dim=1)


def _along(stress: Tensor, strains: Tensor) -> Tensor:
    """Return the components of a stress along strains `[n_strains]`: the mean over the axes of each."""
    return (strains * stress).sum((1, 2)) / strains.square().sum((1, 2))


def _strained(point: StatePoint, amounts: Tensor, strains: Tensor) -> StatePoint:
    """Return a point whose cell is strained by given amounts `[n_strains]` of the free strains."""
    strain = (amounts[:, None, None] * strains).sum(0).numpy()
    return point.with_cell(np.asarray(point.atoms.cell.array @ (np.eye(3) + strain)))
