"""The cell in which a phase has the wanted pressure, found from the mean stress of NVT runs.

Newton's method on the few strains that the crystal's symmetry leaves free. The tangent is that of the static
lattice; a few iterations absorb the difference. Unlike a barostat, this cannot carry a phase over a low
mechanical barrier into another one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mlip_refine.errors import SamplingError
from mlip_refine.potential import Potential
from mlip_refine.quantities import GPA
from mlip_refine.sampling import FrameStore, Length, MDSettings, StatePoint, Trajectory, last_frames, sample

STATIC_STRAIN = 0.005
MAX_STRAIN = 0.02

# The last Newton step may still lower the free energy by at most this, eV/atom; what remains is far less.
MAX_LAST_GAIN = 5e-4


def equilibrate_cells(
    potential: Potential,
    points: Sequence[StatePoint],
    settings: MDSettings,
    length: Length,
    *,
    iterations: int,
    seed: int,
    stage: str,
    store: FrameStore | None = None,
) -> dict[str, StatePoint]:
    """Give every point the cell in which its mean total stress is minus its pressure.

    Args:
        potential: A frozen copy.
        points: NVT points with starting cells; points whose cell is `fixed` are left alone.
        settings: How to integrate.
        length: Of each iteration.
        iterations: Newton steps.
        seed: Of the sampling.
        stage: Name in the store.
        store: Where frames are kept.

    Returns:
        The points, by name, in their new cells.

    Raises:
        SamplingError: If a cell was still far from its pressure before the last step.
    """
    current = {p.name: replace(p, ensemble="nvt") for p in points}
    free = [name for name, p in current.items() if p.cell_freedom != "fixed"]
    tangents = {name: _static_tangent(potential, current[name]) for name in free}
    start = None
    for i in range(iterations if free else 0):
        moving = [current[name] for name in free]
        runs = sample(
            potential, moving, settings, length, seed=seed + i, stage=f"{stage}-{i}", store=store, start=start
        )
        steps = {name: _newton_step(run, tangents[name]) for name, run in runs.items()}
        for name, strain in steps.items():
            current[name] = current[name].with_cell(_strained(current[name], strain))
        start = _carried(runs, current)
    for name in free if iterations else []:
        _require_converged(name, runs[name], steps[name], iterations)
    return current


def strain_groups(point: StatePoint) -> list[list[int]]:
    """Cartesian axes that strain together: all of them, or x with y where freedom or lattice want it."""
    if point.cell_freedom == "isotropic":
        return [[0, 1, 2]]
    if point.cell_freedom == "hexagonal":
        return [[0, 1], [2]]
    lattice = point.atoms.cell.get_bravais_lattice().name
    if point.cell_freedom == "anisotropic" and lattice in ("HEX", "TET", "RHL"):
        return [[0, 1], [2]]
    return [[0], [1], [2]]


def free_strains(point: StatePoint) -> Tensor:
    """The strains that Newton's method varies, symmetric `[n_strains, 3, 3]`; triclinic cells shear too."""
    axes = [[float(i in group) for i in range(3)] for group in strain_groups(point)]
    strains = torch.diag_embed(torch.tensor(axes, dtype=torch.float64))
    if point.cell_freedom != "triclinic":
        return strains
    shears = torch.zeros(3, 3, 3, dtype=torch.float64)
    for shear, (i, j) in zip(shears, ((1, 2), (0, 2), (0, 1)), strict=True):
        shear[i, j] = shear[j, i] = 1.0
    return torch.cat([strains, shears])


def _newton_step(run: Trajectory, tangent: Tensor) -> Tensor:
    """Amounts of the free strains that one Newton step from the mean stress of a run takes."""
    full: Tensor = torch.linalg.solve(tangent, -_excess(run))
    return full.clamp(-MAX_STRAIN, MAX_STRAIN)


def _excess(run: Trajectory) -> Tensor:
    """Mean stress along every free strain beyond the wanted one, eV/Å³."""
    wanted = -run.point.pressure * GPA * torch.eye(3, dtype=torch.float64)
    return _along(run.total_stress() - wanted, free_strains(run.point))


def _require_converged(name: str, run: Trajectory, strain: Tensor, iterations: int) -> None:
    """Refuse a cell that was still far from the wanted pressure before its last step.

    A step of strain ε against the excess stress σ lowers the free energy by ½ V ε σ.
    """
    squares = free_strains(run.point).square().sum((1, 2))
    gain = -0.5 * run.point.atoms.cell.volume * float((squares * strain * _excess(run)).sum())
    if gain > MAX_LAST_GAIN * run.n_atoms or bool((strain.abs() >= MAX_STRAIN).any()):
        raise SamplingError(
            f"the cell of {name} has not settled: iteration {iterations} still strained it by "
            f"{float(strain.abs().max()):.3f}; give better lattice constants, or raise cell_iterations"
        )


def _static_tangent(potential: Potential, point: StatePoint) -> Tensor:
    """d(stress along g)/d(amount of h) of the static lattice `[n_strains, n_strains]`, eV/Å³."""
    strains = free_strains(point)
    columns = []
    for amounts in STATIC_STRAIN * torch.eye(len(strains), dtype=torch.float64):
        plus, minus = (_static_stress(potential, point, a, strains) for a in (amounts, -amounts))
        columns.append((plus - minus) / (2 * STATIC_STRAIN))
    return torch.stack(columns, dim=1)


def _static_stress(potential: Potential, point: StatePoint, amounts: Tensor, strains: Tensor) -> Tensor:
    strained = point.with_cell(_strained(point, amounts))
    graphs = potential.graphs.collate([potential.graphs.from_atoms(strained.atoms)])
    return _along(potential.evaluate(graphs, ["stress"])["stress"][0].detach().double().cpu(), strains)


def _along(stress: Tensor, strains: Tensor) -> Tensor:
    """Components of a stress along strains: the mean of the axes that one stretches."""
    return (strains * stress).sum((1, 2)) / strains.square().sum((1, 2))


def _strained(point: StatePoint, amounts: Tensor) -> np.ndarray:
    """The cell of a point with so much of its free strains."""
    strain = (amounts[:, None, None] * free_strains(point)).sum(0).numpy()
    return np.asarray(point.atoms.cell.array @ (np.eye(3) + strain))


def _carried(
    runs: Mapping[str, Trajectory], points: Mapping[str, StatePoint]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Last frames, carried affinely into the new cells."""
    carried = {}
    for name, (positions, cells) in last_frames(runs).items():
        new = torch.from_numpy(points[name].atoms.cell.array.copy())
        deformation = torch.linalg.solve(cells, new.expand_as(cells))
        carried[name] = (torch.bmm(positions, deformation), new.expand_as(cells).contiguous())
    return carried
