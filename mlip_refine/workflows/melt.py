"""Liquids from crystals: melted, cooled to their state, and looked at before anything is computed with them.

A crystal that is heated for a few picoseconds survives far above its melting point, and a liquid that is
cooled may freeze or become a glass. Three things tell: no Bragg peak is left among all wave vectors of the
cell where crystals have theirs, no more than a few atoms have the neighbourhood of a crystal (where OVITO is
installed), and the atoms diffuse.
"""

import math
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlip_refine.errors import SamplingError
from mlip_refine.losses import EnsembleSource
from mlip_refine.observables.dynamics import in_mean_cell, mean_square_displacement, without_drift
from mlip_refine.observables.structure import bragg_amplitudes, first_peak_vectors
from mlip_refine.potential import Acceleration, Potential
from mlip_refine.sampling import FrameStore, Length, MDSettings, StatePoint, Trajectory, last_frames, sample
from mlip_refine.sampling.monitoring.phase_identity import crystalline_share, has_ovito
from mlip_refine.training.tracker import stage_seed

MAX_BRAGG = 3.0
"""Largest time average of |ρ_q|/√N of a liquid in a small cell (see `bragg_limit`)."""

MOST_BRAGG = 4.5
"""The same in large cells: part of one that freezes has to show, but peaks of a short run scatter."""

MAX_CRYSTALLINE = 0.2
"""Largest share of atoms of a liquid whose neighbourhood is that of a crystal; titanium at 2500 K: 0.04."""

LEAST_ATOMS = 32
"""Atoms below which the Bragg peaks of a hot crystal do not stand out."""

MIN_DIFFUSION = 0.5
"""Root-mean-square displacement over a run, in distances of neighbours, below which nothing flows."""

NEIGHBOUR_DISTANCE = 1.1
"""Distance of neighbours in (V/N)^⅓: 1.09 in bcc, 1.12 in close packing."""

MAX_EXPANSION = 2.0
"""Volume over that of the crystal beyond which it boils."""

INTERVAL = 50.0
"""Time between frames, fs."""

AVERAGED = 4
"""Frames whose positions are averaged before neighbourhoods are looked at: 0.2 ps, as while sampling."""


@dataclass(frozen=True)
class MeltSettings:
    """How a liquid is made.

    Attributes:
        parent: Name of the crystal.
        temperature: Temperature at which it melts, K.
        duration: Time at that temperature, and again at the temperature of the state, fs.
    """

    parent: str
    temperature: float
    duration: float


@dataclass(frozen=True)
class Melting:
    """The liquids of a run that are made of crystals.

    Attributes:
        melts: How each is made, by source.
        md: Integrator settings.
        seed: Random seed of the run.
        dtype: Precision of the dynamics.
        accelerate: How forces are computed (see `Potential.frozen_copy`).
    """

    melts: Mapping[EnsembleSource, MeltSettings]
    md: MDSettings
    seed: int
    dtype: str
    accelerate: Acceleration

    def molten(
        self,
        potential: Potential,
        points: Mapping[EnsembleSource, StatePoint],
        store: FrameStore,
        besides: Collection[EnsembleSource] = (),
    ) -> dict[EnsembleSource, StatePoint]:
        """Return points of which those that are to be molten are liquids (see `melted`).

        Args:
            potential: The potential.
            points: State points.
            store: Where frames are kept.
            besides: Sources whose liquid is known from elsewhere.

        Raises:
            SamplingError: If a crystal does not melt, or its melt boils, freezes or does not flow.
        """
        melts = {source: melt for source, melt in self.melts.items() if source not in besides}
        if not melts:
            return dict(points)
        frozen = potential.frozen_copy(self.dtype, self.accelerate)
        return melted(frozen, points, melts, self.md, seed=self.seed, store=store)


def melted[Key: Hashable](
    potential: Potential,
    points: Mapping[Key, StatePoint],
    melts: Mapping[Key, MeltSettings],
    md: MDSettings,
    *,
    seed: int,
    store: FrameStore | None = None,
) -> dict[Key, StatePoint]:
    """Return points of which those that are to be molten are liquids, all made in one batch.

    A liquid starts as the crystal of its point, runs at the temperature of melting and then at that of the
    state, both at the pressure of the state (in the cell of the point, if that is fixed). It ends with the
    last frame, carried into the mean cell of the last two thirds.

    Args:
        potential: A frozen copy.
        points: State points; the atoms of those in `melts` are crystals.
        melts: How the liquids among them are made.
        md: Integrator settings.
        seed: Random seed of the run.
        store: Where frames are kept; a run that was interrupted goes on.

    Raises:
        SamplingError: If a crystal does not melt, or its melt boils, freezes or does not flow.
    """
    if not melts:
        return dict(points)
    solids = {points[key].name: _unjudged(points[key]) for key in melts}
    settings = {points[key].name: melt for key, melt in melts.items()}
    hot, start = dict[str, Trajectory](), dict[str, tuple[Tensor, Tensor]]()
    # Points of one batch run equally long: there is a batch for every duration.
    for duration in sorted({melt.duration for melt in settings.values()}):
        some = [name for name, melt in settings.items() if melt.duration == duration]
        spaced = replace(md, interval=min(INTERVAL, duration / 60))
        heated = [replace(solids[name], temperature=settings[name].temperature) for name in some]
        length = Length(duration / 3, max(1, round(2 * duration / 3 / spaced.interval)))
        stage = f"melt-{duration:g}fs"
        hot = sample(
            potential,
            heated,
            spaced,
            length,
            seed=stage_seed(seed, "melt-hot"),
            stage=f"{stage}-hot",
            store=store,
        )
        for name in some:
            _require_molten(hot[name], solids[name], settings[name])
        cooled = sample(
            potential,
            [solids[name] for name in some],
            spaced,
            length,
            seed=stage_seed(seed, "melt-cool"),
            stage=f"{stage}-cool",
            store=store,
            start=last_frames(hot),
        )
        for name, run in cooled.items():
            require_liquid(run, spaced.interval)
            start[name] = _in_mean_cell(run)
    result = dict(points)
    for key in melts:
        positions, cell = start[points[key].name]
        atoms = points[key].atoms.copy()
        atoms.set_cell(cell.numpy())
        atoms.positions = positions.numpy()
        result[key] = replace(points[key], atoms=atoms)
    return result


def _unjudged(point: StatePoint) -> StatePoint:
    """Return a point as it is melted: one copy, at constant pressure unless its cell is fixed."""
    free = point.cell_freedom != "fixed"
    return replace(
        point,
        ensemble="npt" if free else "nvt",
        cell_freedom="isotropic" if free else "fixed",
        thermostat="langevin",
        identity="molten",
        replicas=1,
    )


def _require_molten(run: Trajectory, solid: StatePoint, melt: MeltSettings) -> None:
    """Refuse a crystal that outlived the heat, or a melt that boiled."""
    expansion = float(torch.linalg.det(run.cells[run.kept]).abs().max()) / solid.atoms.cell.volume
    if expansion > MAX_EXPANSION:
        raise SamplingError(
            f"{run.point.name}: {melt.parent} boiled at {melt.temperature:g} K, to {expansion:.1f} times its "
            "volume: lower melt.temperature, or raise the pressure"
        )
    peak = bragg_peak(run, second_half)
    if peak > (limit := bragg_limit(run.n_atoms)):
        raise SamplingError(
            f"{run.point.name}: {melt.parent} did not melt in {melt.duration / 1e3:g} ps at "
            f"{melt.temperature:g} K, it has a Bragg peak of {peak:.1f} (a liquid: below {limit:.2g}): "
            "raise melt.temperature, or melt.duration"
        )


def require_liquid(run: Trajectory, interval: float) -> None:
    """Refuse a run that is not liquid: a crystal, or a glass.

    Args:
        run: Frames of a liquid.
        interval: Time between frames, fs.

    Raises:
        SamplingError: With what was found.
    """
    point, peak, share = run.point, bragg_peak(run), crystalline(run)
    limit = bragg_limit(run.n_atoms)
    if peak > limit or share > MAX_CRYSTALLINE:
        found = [f"a Bragg peak of {peak:.1f} (a liquid: below {limit:.2g})"]
        if share > MAX_CRYSTALLINE:
            found.append(f"{share:.0%} of its atoms in crystalline neighbourhoods")
        raise SamplingError(
            f"{point.name}: it froze at {point.temperature:g} K, with {' and '.join(found)}: take a higher "
            "temperature; near the melting point, another seed or a larger cell"
        )
    distance, time = diffusion_distance(run), _diffusion_lag(run) * interval
    if distance < MIN_DIFFUSION:
        raise SamplingError(
            f"{point.name}: it does not flow at {point.temperature:g} K: in {time / 1e3:.3g} ps its atoms "
            f"moved by {distance:.2f} distances of neighbours (a liquid: {MIN_DIFFUSION:g} or more). It is a "
            "glass, or slow: take a higher temperature, or raise melt.duration"
        )


def bragg_limit(n_atoms: int) -> float:
    """Return the largest time average of |ρ_q|/√N that passes for a liquid.

    It has 1.5 at the peak of S(q), to which a run of a few relaxation times adds up to 1.7 in one of many
    wave vectors. A crystal has 0.75 √N at its melting point: half of √N is between them, as far as that is
    not so high that a cell that is frozen in part would pass.

    Args:
        n_atoms: Atoms of the cell.
    """
    return min(max(0.5 * math.sqrt(n_atoms), MAX_BRAGG), MOST_BRAGG)


def bragg_peak(run: Trajectory, chosen: Callable[[Tensor], Tensor] = lambda kept: kept) -> float:
    """Return the largest time average of |ρ_q|/√N of a run, of the replica that has the largest.

    Wave vectors are all of the cell where crystals have their first peaks (see `first_peak_vectors`), so
    that a crystal of any orientation shows.

    Args:
        run: Frames.
        chosen: Returns which of the kept frames of a replica `[n_frames]` are averaged; all by default.
    """
    peaks = []
    for positions, cells, kept in zip(run.positions, run.cells, run.kept, strict=True):
        frames = chosen(kept)
        if bool(frames.any()):
            vectors = first_peak_vectors(cells[frames].mean(0), run.n_atoms)
            amplitudes = bragg_amplitudes(positions[frames], cells[frames], vectors)
            peaks.append(float(amplitudes.mean(0).max()))
    return max(peaks, default=0.0)


def crystalline(run: Trajectory) -> float:
    """Return the mean share of atoms in crystalline neighbourhoods, second half; 0 where OVITO is missing.

    Of the replica that has the most.
    """
    if not has_ovito():
        return 0.0
    shares = []
    for positions, cells, kept in zip(run.positions, run.cells, run.kept, strict=True):
        late = second_half(kept).nonzero().flatten()
        blocks = late[len(late) % AVERAGED :].view(-1, AVERAGED)
        # A few tell as much as all: frames are correlated, and matching templates takes time.
        some = blocks[:: max(1, len(blocks) // 5)]
        found = []
        for frames in some:
            mean, cell = averaged_frame(positions[frames], cells[frames])
            found.append(crystalline_share(mean.numpy(), cell.numpy(), run.point.atoms.numbers))
        if found:
            shares.append(sum(found) / len(found))
    return max(shares, default=0.0)


def averaged_frame(positions: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Return positions `[n_atoms, 3]`, carried along with the cells, and the cell, averaged over frames, Å.

    Args:
        positions: Positions `[n_frames, n_atoms, 3]`, Å, unwrapped.
        cells: Cells (rows) `[n_frames, 3, 3]`, Å.
    """
    fractional, cell = torch.linalg.solve(cells, positions, left=False).mean(0), cells.mean(0)
    return fractional @ cell, cell


def diffusion_distance(run: Trajectory) -> float:
    """Return the root-mean-square displacement over three quarters of a run, in distances of neighbours.

    Over all origins, and over the replicas that ran without a gap; of the replica that moved least.

    Raises:
        SamplingError: If every replica has a gap.
    """
    whole = run.kept.all(1)
    if not bool(whole.any()):
        raise SamplingError(f"{run.point.name}: no replica ran without a fault: {'; '.join(run.verdicts)}")
    positions, cells = run.positions[whole], run.cells[whole]
    still = without_drift(in_mean_cell(positions, cells), torch.from_numpy(run.point.atoms.get_masses()))
    squares = mean_square_displacement(still, _diffusion_lag(run))[:, -1]
    volumes = torch.linalg.det(cells).abs().mean(1) / run.n_atoms
    distances: Tensor = squares.clamp(min=0).sqrt() / (NEIGHBOUR_DISTANCE * volumes ** (1 / 3))
    return float(distances.min())


def _diffusion_lag(run: Trajectory) -> int:
    """Return three quarters of the frames of a run."""
    return 3 * run.kept.shape[1] // 4


def second_half(kept: Tensor) -> Tensor:
    """Return the kept frames of the second half `[n_frames]`."""
    late = kept.clone()
    late[: len(late) // 2] = False
    return late


def _in_mean_cell(run: Trajectory) -> tuple[Tensor, Tensor]:
    """Return positions `[n_atoms, 3]` of the last frame in the mean cell of a run, wrapped, and the cell."""
    positions, cells = run.last()
    cell = run.cells[run.kept].mean(0)
    fractional = torch.linalg.solve(cells[0], positions[0], left=False)
    return (fractional - fractional.floor()) @ cell, cell
