"""Crystal and liquid in one box: the melting temperature without any free energy, as an independent check.

A long box of the crystal is melted on one side, while tethers hold the other; both then come to the pressure
at the temperature of the start, and run on at constant pressure and enthalpy. The interface moves until the
heat that it takes or gives has brought the box to the melting temperature (Morris, Wang, Ho and Chan, Phys.
Rev. B 49, 3109 (1994); Morris and Song, J. Chem. Phys. 116, 9352 (2002)). Boxes that start at several
temperatures are one batch. A box that melts or freezes whole has no temperature of coexistence, but tells on
which side of it it ended.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from mlip_refine.errors import InputError, SamplingError
from mlip_refine.potential import Potential
from mlip_refine.quantities import KB, Measured
from mlip_refine.sampling import (
    FrameStore,
    Hamiltonian,
    Length,
    MDSettings,
    StatePoint,
    Trajectory,
    last_frames,
    sample,
)
from mlip_refine.sampling.monitoring.guards import nearest_neighbour_distance
from mlip_refine.sampling.monitoring.phase_identity import share_like
from mlip_refine.sampling.sampler import Start
from mlip_refine.sampling.tethers import Tethers
from mlip_refine.statistics import detect_equilibration, statistical_inefficiency
from mlip_refine.training.tracker import stage_seed
from mlip_refine.workflows.melt import AVERAGED, INTERVAL, averaged_frame
from mlip_refine.workflows.transition.ladder import mean_cell

ASPECT = 4.0
"""Length of the box over its width that is aimed at."""

TETHER = 0.1
"""Thermal amplitude of a tethered atom at the temperature of melting, in distances of neighbours."""

EXPANSION = 0.1
"""Volume that the half which melts is given beyond that of the crystal, as a share of it."""

SEGMENT = 2000.0
"""Time between two writes of a box on its own to disk, fs."""

JUDGED = 100
"""Averages of a run, at most, whose neighbourhoods are looked at: matching templates takes time."""

SHARES = (0.15, 0.8)
"""Share of atoms in the crystal's neighbourhoods between which both phases are there.

It is 0.9 in bcc titanium."""

DRIFT = 0.02
"""Change of that share from the first half of a run to the second that is no drift."""

SIGMAS = 3.0
"""Standard errors by which the share may change too."""

FIRST = 3
"""Averages at the beginning of a run in which both phases must be there for it to say anything."""

Outcome = Literal["coexists", "drifts", "molten", "frozen", "unmixed", "stopped"]


@dataclass(frozen=True)
class CoexistenceSettings:
    """How boxes of crystal and liquid are made and run.

    Attributes:
        n_atoms: Atoms of a box, about.
        starts: Temperatures at which boxes start, K.
        pressures: Pressures, GPa.
        heat: Temperature at which one side melts, K.
        preparation: Time of each of three steps before a box is on its own, fs.
        duration: Time at constant pressure and enthalpy, fs.
        md: Integrator settings.
        seed: Random seed.
    """

    n_atoms: int
    starts: tuple[float, ...]
    pressures: tuple[float, ...]
    heat: float
    preparation: float
    duration: float
    md: MDSettings
    seed: int

    @property
    def spaced(self) -> MDSettings:
        """Integrator settings with frames `INTERVAL` apart."""
        return replace(self.md, interval=INTERVAL)

    @property
    def prepared_for(self) -> Length:
        """Length of each step before a box is on its own; its first third has no frames."""
        return Length(self.preparation / 3, max(1, round(2 * self.preparation / 3 / INTERVAL)))

    @property
    def free_for(self) -> Length:
        """Length at constant pressure and enthalpy."""
        return Length(0.0, max(1, round(self.duration / INTERVAL)), max(1, round(SEGMENT / INTERVAL)))


@dataclass(frozen=True)
class CoexistenceRun:
    """One box.

    Attributes:
        start: Temperature at which it started, K.
        n_atoms: Atoms of the box.
        outcome: What became of it: both phases stayed (`coexists`), the interface still moved (`drifts`),
            one was lost (`molten`, `frozen`) or there was one alone from the beginning (`unmixed`), or
            the run failed (`stopped`).
        temperature: Mean temperature of the part that counts, K.
        crystal_share: Mean share of atoms in neighbourhoods of the crystal, in the same part.
        equilibration: Time that was left out, fs.
        times: Times of the averages, fs.
        temperatures: Temperatures over them, K.
        shares: Shares of the crystal at the same times.
    """

    start: float
    n_atoms: int
    outcome: Outcome
    temperature: Measured
    crystal_share: Measured
    equilibration: float
    times: tuple[float, ...]
    temperatures: tuple[float, ...]
    shares: tuple[float, ...]


def coexistence_runs(
    potential: Potential, crystal: StatePoint, settings: CoexistenceSettings, store: FrameStore
) -> list[CoexistenceRun]:
    """Make and run a box for every start, all in one batch.

    Args:
        potential: A frozen copy.
        crystal: The crystal at the pressure, in a cell to start from.
        settings: How boxes are made and run.
        store: Where frames are kept; an interrupted calculation goes on.

    Raises:
        InputError: If a box would be shorter than four cutoffs or narrower than two.
        SamplingError: If the crystal does not survive by itself, or its half does not melt.
    """

    def run(
        points: Sequence[StatePoint], part: str, start: Start | None, length: Length
    ) -> dict[str, Trajectory]:
        stage = f"coexistence-{crystal.pressure:g}GPa-{part}"
        return sample(
            potential,
            points,
            settings.spaced,
            length,
            seed=stage_seed(settings.seed, stage),
            stage=stage,
            store=store,
            start=start,
        )

    bulk = [
        replace(
            crystal, name=f"bulk-{t:g}K", temperature=t, ensemble="npt", thermostat="langevin", replicas=1
        )
        for t in settings.starts
    ]
    short = settings.prepared_for
    lattices = run(bulk, "lattice", None, short)
    boxes, held = [], []
    for point in bulk:
        atoms = box_of(crystal.atoms, mean_cell(lattices[point.name]), settings.n_atoms)
        require_room(atoms, potential.graphs.cutoff, None)
        box = replace(point, name=f"box-{point.temperature:g}K", atoms=atoms, identity="none")
        boxes.append(box)
        roomy = with_room_to_melt(atoms)
        bound = Hamiltonian(1.0, 1.0, tethers(roomy, lower_half(atoms), settings.heat))
        held.append(replace(box, atoms=roomy, ensemble="nvt", hamiltonian=bound))
    hot = run([replace(box, temperature=settings.heat) for box in held], "melt", None, short)
    for box in held:
        _require_half_molten(hot[box.name], crystal.atoms, settings)
    pressed = [replace(box, ensemble="npt", cell_freedom="anisotropic") for box in boxes]
    settled = run(pressed, "settle", last_frames(hot), short)
    free = [replace(box, ensemble="nph") for box in pressed]
    found = run(free, "free", last_frames(settled), settings.free_for)
    return [judged(found[box.name], crystal.atoms) for box in free]


def box_of(crystal: Atoms, cell: np.ndarray, n_atoms: int) -> Atoms:
    """Return a box of the crystal about four times as long, along the third axis, as it is wide.

    Args:
        crystal: Ideal crystal.
        cell: Cell, rows in Å, that it has at temperature and pressure.
        n_atoms: Atoms of the box, about.
    """
    strained = crystal.copy()
    strained.set_cell(cell, scale_atoms=True)
    unit = smallest_block(strained)
    lengths = unit.cell.lengths()
    width = (n_atoms / len(unit) * lengths.prod() / ASPECT) ** (1 / 3)
    across = [max(1, round(width / length)) for length in lengths[:2]]
    along = max(2, round(n_atoms / (len(unit) * across[0] * across[1])))
    box: Atoms = unit.repeat((*across, along))
    return box


def smallest_block(crystal: Atoms) -> Atoms:
    """Return the smallest part of a crystal that repeats along its three lattice vectors."""
    block: Atoms = crystal.copy()
    for axis in range(3):
        for parts in range(len(block), 1, -1):
            if len(block) % parts:
                continue
            scaled = block.get_scaled_positions()
            shifted = scaled.copy()
            shifted[:, axis] += 1.0 / parts
            delta = shifted[:, None] - scaled[None]
            distances = np.linalg.norm((delta - np.round(delta)) @ block.cell.array, axis=-1)
            nearest = distances.argmin(1)
            same = bool((block.numbers[nearest] == block.numbers).all())
            if same and float(distances.min(1).max()) < 1e-3:
                # Atoms just below the edge are at the edge.
                inside = np.mod(scaled[:, axis] + 1e-6, 1.0) < 1.0 / parts
                cell = block.cell.array.copy()
                cell[axis] /= parts
                block = block[inside]
                block.set_cell(cell)
                break
    return block


def require_room(box: Atoms, cutoff: float, where: str | None) -> None:
    """Refuse a box whose halves, or whose width, are shorter than two cutoffs.

    Args:
        box: The box.
        cutoff: Cutoff of the model, Å.
        where: Place of its size in the config.

    Raises:
        InputError: With the size that would do.
    """
    heights = 1 / np.linalg.norm(box.cell.reciprocal(), axis=1)
    needed = 2 * cutoff * np.array([1.0, 1.0, 2.0])
    if bool((heights < needed).any()):
        factor = float(np.prod(np.maximum(needed / heights, 1.0)))
        raise InputError(
            "the box is too small for a crystal beside a liquid",
            where=where or "transition.coexistence.n_atoms",
            found=f"{len(box)} atoms, {' x '.join(f'{h:.1f}' for h in heights)} Å",
            expected=f"at least two cutoffs ({2 * cutoff:g} Å) across, and four along",
            fix=f"Take about {math.ceil(factor * len(box) * 1.1):,} atoms.",
        )


def _require_half_molten(run: Trajectory, crystal: Atoms, settings: CoexistenceSettings) -> None:
    """Refuse a box whose free half is still a crystal."""
    frames = torch.arange(run.kept.shape[1])[-AVERAGED:]
    share = _share(run, frames, crystal)
    if share > SHARES[1]:
        raise SamplingError(
            f"{run.point.name}: half of the box did not melt at {settings.heat:g} K, {share:.0%} of its "
            "atoms are crystalline: raise melt.temperature, or transition.coexistence.preparation"
        )


def lower_half(box: Atoms) -> np.ndarray:
    """Return which atoms are in the lower half along the third axis `[n_atoms]`."""
    half: np.ndarray = box.get_scaled_positions()[:, 2] < 0.5
    return half


def with_room_to_melt(box: Atoms) -> Atoms:
    """Return a box whose upper half along the third axis is longer by `EXPANSION`: a melt takes more room.

    Held at the density of the crystal, it would be under a pressure at which it freezes.
    """
    roomy: Atoms = box.copy()
    upper = ~lower_half(box)
    scaled = box.get_scaled_positions()[upper, 2]
    moved = roomy.positions
    moved[upper] += ((scaled - 0.5) * EXPANSION)[:, None] * box.cell.array[2]
    roomy.positions = moved
    cell = box.cell.array.copy()
    cell[2] *= 1.0 + EXPANSION / 2
    roomy.set_cell(cell)
    return roomy


def tethers(box: Atoms, held: np.ndarray, heat: float) -> Tethers:
    """Return springs on some atoms of a box.

    Args:
        box: The box.
        held: Which atoms are held `[n_atoms]`.
        heat: Temperature of melting, K.
    """
    spring = 3 * KB * heat / (TETHER * nearest_neighbour_distance(box)) ** 2
    return Tethers(torch.from_numpy(box.positions.copy()), torch.from_numpy(np.where(held, spring, 0.0)))


def judged(run: Trajectory, crystal: Atoms) -> CoexistenceRun:
    """Return what became of a box.

    Args:
        run: Frames at constant pressure and enthalpy, `INTERVAL` apart.
        crystal: The ideal crystal.
    """
    point, n_frames = run.point, run.kept.shape[1]
    dof = point.degrees_of_freedom
    kept = run.kept[0]
    groups = torch.arange(n_frames - n_frames % AVERAGED).view(-1, AVERAGED)
    groups = groups[kept[groups].all(1)]
    temperatures = (2 * run.kinetic_energy[0].double() / (KB * dof))[groups].mean(1)
    times = tuple(((groups[:, -1] + 1) * INTERVAL).tolist())
    every = max(1, -(-len(groups) // JUDGED))
    shares = torch.tensor([_share(run, frames, crystal) for frames in groups[::every]], dtype=torch.float64)
    if len(shares) < 8 or not bool(kept.all()):
        nothing = Measured(math.nan, math.nan, "K")
        return CoexistenceRun(
            point.temperature,
            len(point.atoms),
            "stopped",
            nothing,
            Measured(math.nan, math.nan, ""),
            0.0,
            times[::every],
            tuple(temperatures[::every].tolist()),
            tuple(shares.tolist()),
        )
    begin = max(
        detect_equilibration(temperatures).t0, every * detect_equilibration(shares).t0, len(temperatures) // 5
    )
    begin = min(begin, len(temperatures) // 2)
    late, share = temperatures[begin:], shares[-(-begin // every) :]
    return CoexistenceRun(
        start=point.temperature,
        n_atoms=len(point.atoms),
        outcome=_outcome(share, float(shares[:FIRST].mean())),
        temperature=_mean(late, "K"),
        crystal_share=_mean(share, ""),
        equilibration=begin * AVERAGED * INTERVAL,
        times=times[::every],
        temperatures=tuple(temperatures[::every].tolist()),
        shares=tuple(shares.tolist()),
    )


def combined(runs: Sequence[CoexistenceRun]) -> tuple[Measured | None, str]:
    """Return the temperature of coexistence from the boxes in which both phases stayed, K.

    Their weighted mean; where they scatter by more than their errors, its error is enlarged by that.

    Returns:
        The temperature and an empty note, or None and the reason.
    """
    good = [run.temperature for run in runs if run.outcome == "coexists" and run.temperature.se > 0]
    if not good:
        ends = ", ".join(f"{run.start:g} K: {run.outcome}" for run in runs)
        molten = [run.temperature.value for run in runs if run.outcome == "molten"]
        frozen = [run.temperature.value for run in runs if run.outcome == "frozen"]
        bounds = [
            *([f"above {max(frozen):.0f} K"] if frozen else []),
            *([f"below {min(molten):.0f} K"] if molten else []),
        ]
        lies = f"; the melting temperature lies {' and '.join(bounds)}" if bounds else ""
        return None, f"no box kept both phases ({ends}){lies}: start nearer to it, or take larger boxes"
    weights = [1 / each.se**2 for each in good]
    mean = sum(w * each.value for w, each in zip(weights, good, strict=True)) / sum(weights)
    chi = sum(w * (each.value - mean) ** 2 for w, each in zip(weights, good, strict=True))
    scatter = max(1.0, chi / (len(good) - 1)) if len(good) > 1 else 1.0
    return Measured(mean, math.sqrt(scatter / sum(weights)), "K"), ""


def _outcome(shares: Tensor, first: float) -> Outcome:
    """Return what became of a box from the shares of the crystal that count, and that of its beginning."""
    if not SHARES[0] < first < SHARES[1]:
        return "unmixed"
    end = float(shares[-max(1, len(shares) // 5) :].mean())
    if end < SHARES[0]:
        return "molten"
    if end > SHARES[1]:
        return "frozen"
    halves = [_mean(half, "") for half in shares.tensor_split(2)]
    change = halves[1] - halves[0]
    inside = SHARES[0] < float(shares.min()) and float(shares.max()) < SHARES[1]
    still = abs(change.value) < max(DRIFT, SIGMAS * change.se)
    return "coexists" if inside and still else "drifts"


def _mean(values: Tensor, unit: str) -> Measured:
    """Return the mean of a series with its standard error."""
    independent = len(values) / statistical_inefficiency(values)
    return Measured(float(values.mean()), float(values.std()) / math.sqrt(max(independent, 1.0)), unit)


def _share(run: Trajectory, frames: Tensor, crystal: Atoms) -> float:
    """Return the share of atoms in neighbourhoods of the crystal, in the average of some frames."""
    mean, cell = averaged_frame(run.positions[0, frames].double(), run.cells[0, frames].double())
    return share_like(crystal, mean.numpy(), cell.numpy(), run.point.atoms.numbers)
