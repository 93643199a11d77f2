"""The cell in which a phase has the wanted pressure, found from the mean stress of NVT runs.

Newton's method on the few strains that the crystal's symmetry leaves free. The tangent is that of the static
lattice; a few iterations absorb the difference. Unlike a barostat, this cannot carry a phase over a low
mechanical barrier into another one. A liquid has no lattice and no barrier: its cell is the mean of a run at
constant pressure.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mlip_refine.errors import SamplingError
from mlip_refine.observables import BulkModulus, Volume, measure, sample_of
from mlip_refine.potential import Potential
from mlip_refine.quantities import GPA, KB, Measured
from mlip_refine.sampling import FrameStore, Length, MDSettings, StatePoint, Trajectory, last_frames, sample
from mlip_refine.sampling.md.barostat import free_strains

STATIC_STRAIN = 0.005
"""Amplitude of the finite differences of the static stress."""

MAX_STRAIN = 0.02
"""Largest strain of one Newton step."""

MAX_LAST_GAIN = 5e-4
"""Free energy that the last Newton step may still gain, eV/atom; what remains after it is far less.

Also the largest that the error of a liquid's volume may cost."""


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

    Liquids get theirs from `liquid_cells`, in runs as long as all iterations together.

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
        SamplingError: If a cell was still far from its pressure before the last step, or the volume of a
            liquid is not known well enough.
    """
    current = {p.name: replace(p, ensemble="nvt") for p in points}
    free = {name: p for name, p in current.items() if p.cell_freedom != "fixed"}
    if liquids := [p for p in free.values() if p.is_liquid]:
        length = replace(settings.length, frames=settings.length.frames * settings.iterations)
        found = liquid_cells(
            potential, liquids, settings.md, length, seed=seed, stage=f"{stage}-liquid", store=store
        )
        current |= {name: cell.point for name, cell in found.items()}
    strains = {name: varied_strains(p) for name, p in free.items() if not p.is_liquid}
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


@dataclass(frozen=True)
class LiquidCell:
    """The cell of a liquid at its pressure.

    Attributes:
        point: The liquid in `nvt` in its mean cell, with the last frame as start.
        volume: Mean volume of the cell, Å³.
        s0: Structure factor at zero wave number, N kT/(V K_T): the variance of N over N in an open part of
            the liquid, of the compressibility (Hansen and McDonald 2013, eq. 2.6.12), no unit.
    """

    point: StatePoint
    volume: Measured
    s0: Measured


def liquid_cells(
    potential: Potential,
    points: Sequence[StatePoint],
    md: MDSettings,
    length: Length,
    *,
    seed: int,
    stage: str,
    store: FrameStore | None = None,
) -> dict[str, LiquidCell]:
    """Find the cells of liquids at their pressures, and their compressibilities, by runs in isotropic NPT.

    Args:
        potential: A frozen copy.
        points: Liquids, in cells to start from.
        md: Integrator settings.
        length: Length of the run of every replica.
        seed: Random seed of the sampling.
        stage: Name of the sampling in the store.
        store: Where frames are kept.

    Returns:
        A cell per point name.

    Raises:
        SamplingError: If a phase does not stay what it is, or its volume is not known well enough.
    """
    moving = [replace(p, ensemble="npt", cell_freedom="isotropic", thermostat="langevin") for p in points]
    runs = sample(potential, moving, md, length, seed=seed, stage=stage, store=store)
    return {p.name: liquid_cell(p, runs[p.name]) for p in points}


def liquid_cell(point: StatePoint, run: Trajectory) -> LiquidCell:
    """Return the cell and the compressibility of a liquid from its frames in isotropic NPT.

    Args:
        point: The liquid.
        run: Its frames.

    Raises:
        SamplingError: If its volume is not known well enough.
    """
    frames, n_atoms = sample_of(run), run.n_atoms
    (per_atom,) = measure(Volume(), frames, run.inefficiency)
    (stiffness,) = measure(BulkModulus(), frames, run.inefficiency)
    volume, modulus = per_atom.scaled(n_atoms, "Å³"), stiffness.value * GPA
    cost = 0.5 * modulus * volume.se**2 / volume.value
    if not cost < MAX_LAST_GAIN * n_atoms:
        raise SamplingError(
            f"the volume of {point.name} is not known well enough: {per_atom}; raise "
            "cell_equilibration, or sampling.cell_iterations"
        )
    s0 = n_atoms * KB * point.temperature / (volume.value * modulus)
    positions, cells = run.last()
    # Isotropic cells differ in their size alone.
    cell = cells[0] * (volume.value / torch.linalg.det(cells[0]).abs()) ** (1 / 3)
    fractional = torch.linalg.solve(cells[0], positions[0], left=False)
    atoms = point.atoms.copy()
    atoms.set_cell(cell.numpy())
    atoms.positions = ((fractional - fractional.floor()) @ cell).numpy()
    settled = replace(point, atoms=atoms, ensemble="nvt")
    return LiquidCell(settled, volume, Measured(s0, s0 * stiffness.se / stiffness.value, "1"))


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
