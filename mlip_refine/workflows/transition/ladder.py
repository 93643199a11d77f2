"""Ladders of NPT ensembles: the state points of both phases, their sampling, and what of it can be used."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mlip_refine.errors import StatisticsError
from mlip_refine.losses import EnsembleSource
from mlip_refine.potential import Potential
from mlip_refine.quantities import GPA
from mlip_refine.sampling import FrameStore, Length, MDSettings, StatePoint, Trajectory, sample
from mlip_refine.sampling.md.barostat import free_strains
from mlip_refine.sampling.sampler import PhaseLostError, Start
from mlip_refine.sampling.state_points import CellFreedom
from mlip_refine.statistics.exp_bar import MINIMUM_OVERLAP
from mlip_refine.statistics.gibbs_ladder import GibbsLadder, Rung, blocks_of

MINIMUM_SHARE = 0.5
"""Share of its frames that a rung must have kept to be used: a phase that soon becomes another is none."""


type Climbed = dict[EnsembleSource, Trajectory]
"""Trajectories of the rungs of both phases."""


@dataclass(frozen=True)
class LadderSettings:
    """How rungs are sampled.

    Attributes:
        md: Integrator settings.
        length: Length of every rung.
        seed: Random seed.
    """

    md: MDSettings
    length: Length
    seed: int


def sample_rungs(
    potential: Potential,
    points: Mapping[EnsembleSource, StatePoint],
    settings: LadderSettings,
    stage: str,
    store: FrameStore,
    start: Start | None = None,
) -> dict[EnsembleSource, Trajectory]:
    """Sample the rungs of both phases in one batch; those that became another phase are there too.

    Args:
        potential: A frozen copy.
        points: NPT state points.
        settings: How they are sampled.
        stage: Name of the sampling in the store.
        store: Where frames are kept.
        start: Positions and cells to start from by name of the point; by default the atoms of the points.
    """
    try:
        found = sample(
            potential,
            list(points.values()),
            settings.md,
            settings.length,
            seed=settings.seed,
            stage=stage,
            store=store,
            start=start,
        )
    except PhaseLostError as error:
        found = error.trajectories
    return {source: found[point.name] for source, point in points.items()}


def lost_rungs(rungs: Mapping[EnsembleSource, Trajectory]) -> dict[EnsembleSource, str]:
    """Return which rungs cannot be used, with the reason: the phase did not stay what it was."""
    lost = {}
    for source, run in rungs.items():
        share = run.n_kept / run.kept.numel()
        if share < MINIMUM_SHARE:
            last = run.verdicts[-1] if run.verdicts else "no frame counts"
            lost[source] = f"{run.point.name}: {1 - share:.0%} of the frames are lost ({last})"
    return lost


def join_rungs(phase: str, trajectories: Sequence[Trajectory]) -> GibbsLadder:
    """Join the rungs of one phase.

    Args:
        phase: Name of the phase, for messages.
        trajectories: NPT trajectories of one cell that can be used.

    Raises:
        StatisticsError: If rungs do not overlap, or are too short.
    """
    if not trajectories:
        raise StatisticsError(
            f"no rung of {phase} can be used", needed="temperatures and pressures at which the phase survives"
        )
    reference = torch.from_numpy(trajectories[0].point.atoms.cell.array.copy())
    ladder = GibbsLadder([_rung(run, reference) for run in trajectories], trajectories[0].n_atoms)
    reached = _connected(ladder.overlap)
    if not bool(reached.all()):
        first, apart = trajectories[0].point.name, trajectories[int((~reached).nonzero()[0])].point.name
        raise StatisticsError(
            f"the rungs of {phase} do not overlap: {apart} stands apart from {first}",
            needed="temperatures and pressures closer together, or a smaller cell (transition.temperature, "
            "transition.pressure)",
        )
    return ladder


def mean_cell(run: Trajectory) -> np.ndarray:
    """Return the cell, rows in Å, with the mean volume and the mean logarithmic strain of a trajectory."""
    reference = torch.from_numpy(run.point.atoms.cell.array.copy())
    cells = run.cells[run.kept].double()
    amounts = _free_strain_amounts(cells, reference, run.point.freedom).mean(0)
    return _strained(reference, amounts, run.point.freedom, torch.linalg.det(cells).abs().mean())


def mean_cell_at(ladder: GibbsLadder, start: StatePoint, temperature: float, pressure: float) -> np.ndarray:
    """Return the cell, rows in Å, with the mean volume and the mean logarithmic strain at any state.

    Args:
        ladder: Ladder of the phase.
        start: The point of the first trajectory of that ladder (see `join_rungs`).
        temperature: Temperature, K.
        pressure: Pressure, eV/Å³.
    """
    reference = torch.from_numpy(start.atoms.cell.array.copy())
    strains, volume = ladder.mean_shape(temperature, pressure)
    return _strained(reference, strains, start.freedom, volume)


def _strained(reference: Tensor, amounts: Tensor, freedom: CellFreedom, volume: Tensor) -> np.ndarray:
    """Return a reference cell with free logarithmic strains `[n_strains]`, scaled to a volume."""
    strain = (amounts[:, None, None] * free_strains(freedom)).sum(0)
    cell = reference @ torch.linalg.matrix_exp(strain)
    scaled: np.ndarray = (cell * (volume / torch.linalg.det(cell).abs()) ** (1 / 3)).numpy()
    return scaled


def _rung(run: Trajectory, reference: Tensor) -> Rung:
    """Return the frames of a trajectory that count, as a rung."""
    cells = run.cells[run.kept].double()
    volume = torch.linalg.det(cells).abs()
    energy, pressure = run.model_energy[run.kept].double(), run.point.pressure * GPA
    return Rung(
        temperature=run.point.temperature,
        pressure=pressure,
        energy=energy,
        volume=volume,
        strains=_free_strain_amounts(cells, reference, run.point.freedom),
        block=blocks_of(run.n_kept),
        inefficiency=max(run.inefficiency(energy + pressure * volume), run.inefficiency(volume)),
    )


def _free_strain_amounts(cells: Tensor, reference: Tensor, freedom: CellFreedom) -> Tensor:
    """Return the amounts of the free logarithmic strains of cells `[n, n_strains]` from a reference cell.

    With h = h_ref F the strain is ½ ln(FᵀF) in the axes that the cells have; rates of strain are symmetric,
    so that cells do not rotate.
    """
    deformation = torch.linalg.solve(reference, cells)
    values, vectors = torch.linalg.eigh(deformation.mT @ deformation)
    strain = vectors @ torch.diag_embed(values.log() / 2) @ vectors.mT
    basis = free_strains(freedom)
    return torch.einsum("nij,sij->ns", strain, basis) / basis.square().sum((1, 2))


def _connected(overlap: Tensor) -> Tensor:
    """Return which states can be reached from the first one over pairs that overlap `[n_states]`."""
    # Of a pair alone: in a dense ladder every sample may come from many states.
    diagonal = overlap.diagonal()
    pairwise = overlap / (overlap + diagonal[:, None]).clamp(min=1e-300)
    linked = (torch.minimum(pairwise, pairwise.T) >= MINIMUM_OVERLAP).double()
    reached = torch.zeros(len(overlap), dtype=torch.bool)
    reached[0] = True
    for _ in range(len(overlap)):
        reached |= linked @ reached.double() > 0
    return reached
