"""Absolute free energies of liquids along the path U_λ = (1 - λ) U + λ U_UF to a Uhlenbeck-Ford fluid.

The fluid repels softly where the liquid has its cores, and has a ladder of its own down to the ideal gas,
without the potential (`uhlenbeck_ford`). Its length σ is chosen so that both have their atoms at the same
distances: a pilot takes the one of several with the smallest dissipation J of the path in one step,
J = [⟨U_UF - U⟩ at λ = 0 minus that at λ = 1]/kT, which is never negative. All windows, liquids and replicas
are systems of one batch; MBAR over the ladder gives F and its error.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations_with_replacement

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor

from mlip_refine.config.sections.sampling import EVERY_PAIR
from mlip_refine.errors import InputError, SamplingError, StatisticsError
from mlip_refine.observables import RadialDistribution, average, sample_of
from mlip_refine.potential import Potential
from mlip_refine.quantities import KB, Measured
from mlip_refine.sampling import (
    FrameStore,
    Hamiltonian,
    Length,
    MDSettings,
    StatePoint,
    Trajectory,
    UhlenbeckFord,
    last_frames,
    sample,
)
from mlip_refine.statistics import require_overlap
from mlip_refine.workflows.free_energy.cells import LiquidCell
from mlip_refine.workflows.free_energy.finite_size import liquid_size_term
from mlip_refine.workflows.free_energy.frenkel_ladd import AbsoluteFreeEnergy, JoinedWindows, join_windows
from mlip_refine.workflows.free_energy.uhlenbeck_ford import (
    FluidFreeEnergy,
    FluidSettings,
    uhlenbeck_ford_free_energy,
)
from mlip_refine.workflows.melt import bragg_limit, bragg_peak, require_liquid

SIGMA_PER_PEAK = 0.51
"""σ over the distance of the first peak of g(r), to start from: at a strength of 100 pairs of the fluid then
are as close as those of a Lennard-Jones liquid."""

FACTORS = (0.85, 0.925, 1.0, 1.075, 1.15)
"""What the pilot multiplies σ by."""

LARGEST_PACKING = 1.0
"""Reduced density x beyond which no fluid of a strength of 25 or more is tried: it freezes."""

LENGTH_PER_GAP = 2.0
"""Thermodynamic length ∫ √var(βΔU) dλ of a gap between windows, which makes overlaps of about 0.15."""

MOST_WINDOWS = 100
"""Windows beyond which a path is refused: another σ or strength makes it shorter."""

LOOKED_AT = 40
"""Frames of a window in which closest pairs and Bragg peaks are looked for."""


@dataclass(frozen=True)
class LiquidPathSettings:
    """How the path of a liquid is sampled.

    Attributes:
        strength: Strength p of the Uhlenbeck-Ford fluid.
        sigma: Lengths σ, Å, by pair of elements such as `Ti-O`, `*` for all others; none: by a pilot.
        windows: Number of values of λ; `None`: as many as the pilot finds necessary.
        fit: Length of the run of the liquid that distances are taken from, and of every fluid of the pilot.
        ladder: Length of the run of every window.
        fluid: How the fluid's own ladder is sampled.
    """

    strength: float
    sigma: Mapping[str, float]
    windows: int | None
    fit: Length
    ladder: Length
    fluid: FluidSettings = field(default_factory=FluidSettings)


@dataclass(frozen=True)
class Fluid:
    """The fluid that a liquid is joined to, and how far from it the liquid is.

    Attributes:
        bias: The fluid at its full strength.
        packing: Reduced density x = ½ ρ (πσ²)^(3/2).
        dissipation: J of the path in one step, kT per atom.
        lambdas: Windows of the ladder, from 0 to 1.
        start: Positions `[replicas, n_atoms, 3]` and cells `[replicas, 3, 3]` of the fluid, Å.
    """

    bias: UhlenbeckFord
    packing: float
    dissipation: float
    lambdas: tuple[float, ...]
    start: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LiquidPath:
    """What the path of a liquid went through.

    Attributes:
        strength: Strength p of the fluid.
        sigma: Its lengths σ `[n_species, n_species]`, Å, in the order of the atomic numbers.
        packing: Reduced density x.
        dissipation: J of the path in one step, kT per atom.
        lambdas: Windows.
        closest: Shortest distance between two atoms in every window, Å.
        closest_in_liquid: The same in the liquid.
    """

    strength: float
    sigma: list[list[float]]
    packing: float
    dissipation: float
    lambdas: tuple[float, ...]
    closest: tuple[float, ...]
    closest_in_liquid: float


@dataclass(frozen=True)
class LiquidFreeEnergy(AbsoluteFreeEnergy):
    """Gibbs energy of a liquid; its reference is the Uhlenbeck-Ford fluid with that of the ideal gas.

    Attributes:
        path: What the path went through.
        fluid: Free energy of the fluid.
    """

    path: LiquidPath = field(kw_only=True)
    fluid: FluidFreeEnergy = field(kw_only=True)


def fluid_lengths(run: Trajectory, sigma: Mapping[str, float]) -> tuple[Tensor, Tensor, list[str]]:
    """Return the lengths σ of all pairs of species in a liquid: given, or from its first peaks.

    Args:
        run: Frames of the liquid.
        sigma: Lengths by pair such as `Ti-O`, `*` for all others; none for 0.51 times the first peak of g(r).

    Returns:
        Species of every atom `[n_atoms]`, lengths `[n_species, n_species]`, Å, and symbols of the species.

    Raises:
        InputError: For a pair without a length, or one of elements that are not there.
    """
    elements, species = torch.unique(torch.from_numpy(run.point.atoms.numbers.copy()), return_inverse=True)
    symbols = [chemical_symbols[z] for z in elements.tolist()]
    lengths = torch.zeros(len(symbols), len(symbols), dtype=torch.float64)
    given = dict(sigma)
    other = given.pop(EVERY_PAIR, None)
    frames = None if sigma else sample_of(_thinned(run))
    for i, j in combinations_with_replacement(range(len(symbols)), 2):
        if frames is not None:
            spacing = float(frames.volumes.mean() / frames.n_atoms) ** (1 / 3)
            # 300 shells of 0.7 % of the distance of neighbours, up to second ones.
            g = RadialDistribution(2 * spacing, 300, (symbols[i], symbols[j]))
            found = SIGMA_PER_PEAK * first_peak(g.radii, average(g, frames))
        else:
            names = f"{symbols[i]}-{symbols[j]}", f"{symbols[j]}-{symbols[i]}"
            value = next((given.pop(name) for name in names if name in given), other)
            if value is None:
                raise InputError(
                    f"free_energy.liquid.sigma has no length for {names[0]}",
                    found=", ".join(sigma) or "none",
                    expected=f"a length for every pair of elements, or {EVERY_PAIR!r} for all others",
                )
            found = value
        lengths[i, j] = lengths[j, i] = found
    if given:
        raise InputError(
            "free_energy.liquid.sigma names a pair of elements that the liquid does not have",
            found=", ".join(given),
            expected=f"pairs of {', '.join(symbols)}",
        )
    return species, lengths, symbols


def first_peak(radii: Tensor, density: Tensor) -> float:
    """Return the distance of the highest point of g(r), Å, by a parabola through smoothed shells around it.

    Args:
        radii: Distances `[n]`, Å, evenly spaced.
        density: g(r) at them `[n]`.
    """
    window = torch.hann_window(11, periodic=False, dtype=density.dtype)
    smooth = torch.nn.functional.conv1d(density[None, None], (window / window.sum())[None, None], padding=5)
    values = smooth[0, 0]
    top = int(values.argmax().clamp(1, len(values) - 2))
    low, high = float(values[top - 1] - values[top]), float(values[top + 1] - values[top])
    shift = 0.0 if low + high == 0 else 0.5 * (low - high) / (low + high)
    return float(radii[top]) + shift * float(radii[1] - radii[0])


def spaced_windows(
    variances: tuple[float, float], dissipation: float, windows: int | None
) -> tuple[float, ...]:
    """Return the values of λ that divide a path into gaps of equal thermodynamic length.

    The second derivative of βF in λ is -var(βΔU): its integral is the dissipation in one step. Between the
    ends the variance is taken for v₀ + (v₁ - v₀) λ^q, with q such that the integral is right.

    Args:
        variances: Variance of βΔU at λ = 0 and at λ = 1.
        dissipation: ⟨βΔU⟩ at λ = 0 minus that at λ = 1.
        windows: Number of windows, or `None` for gaps of length `LENGTH_PER_GAP`.

    Raises:
        StatisticsError: If that makes more than `MOST_WINDOWS`.
    """
    v0, v1 = (max(v, 1e-6) for v in variances)
    rest = dissipation - v0
    q = (v1 - v0) / rest - 1 if rest * (v1 - v0) > 0 else 1.0
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)
    speed = (v0 + (v1 - v0) * grid ** min(max(q, 0.2), 20.0)).sqrt()
    passed = torch.cat([grid.new_zeros(1), torch.cumulative_trapezoid(speed, grid)])
    needed = 1 + max(2, math.ceil(float(passed[-1]) / LENGTH_PER_GAP))
    if windows is None and needed > MOST_WINDOWS:
        raise StatisticsError(
            f"the path to the Uhlenbeck-Ford fluid needs {needed} windows",
            needed=f"at most {MOST_WINDOWS}: another free_energy.liquid.sigma or strength",
        )
    n = windows or needed
    wanted = torch.linspace(0, float(passed[-1]), n, dtype=torch.float64)[1:-1]
    places = torch.searchsorted(passed, wanted).clamp(1, len(grid) - 1)
    low, high = passed[places - 1], passed[places]
    inner = grid[places - 1] + (grid[1] - grid[0]) * (wanted - low) / (high - low)
    return (0.0, *inner.tolist(), 1.0)


def _thinned(run: Trajectory, most: int = LOOKED_AT) -> Trajectory:
    """Return a trajectory of which no more than so many frames of every replica are kept."""
    each = max(1, -(-run.kept.shape[1] // most))
    some = torch.zeros_like(run.kept)
    some[:, ::each] = True
    return replace(run, kept=run.kept & some)


def closest_pair(run: Trajectory, fluid: UhlenbeckFord) -> float:
    """Return the shortest distance between two atoms in frames of a run, Å."""
    thin = _thinned(run)
    return float(fluid.closest(run.positions[thin.kept], run.cells[thin.kept]).min())


def find_fluids(
    potential: Potential,
    points: Sequence[StatePoint],
    runs: Mapping[str, Trajectory],
    md: MDSettings,
    settings: LiquidPathSettings,
    *,
    seed: int,
    stage: str,
    store: FrameStore | None = None,
) -> dict[str, Fluid]:
    """Choose a fluid for every liquid, and the windows of the path to it.

    Every candidate is sampled without the potential, which looks at its frames alone.

    Args:
        potential: A frozen copy.
        points: The liquids in `nvt`.
        runs: Their frames, by name.
        md: Integrator settings.
        settings: Strength, lengths and windows.
        seed: Random seed of the sampling.
        stage: Name of the sampling in the store.
        store: Where frames are kept.

    Returns:
        A fluid per point name.

    Raises:
        InputError: For lengths that do not go with the elements, or too large ones.
        SamplingError: If the fluid is a crystal with every length.
    """
    candidates: dict[str, tuple[StatePoint, UhlenbeckFord]] = {}
    for point in points:
        species, lengths, symbols = fluid_lengths(runs[point.name], settings.sigma)
        for i, factor in enumerate((1.0,) if settings.sigma else FACTORS):
            kt, strength = KB * point.temperature, settings.strength
            bias = UhlenbeckFord(species, factor * lengths, kt, strength)
            if settings.sigma:
                _require_fluid(bias, point, symbols)
            elif bias.packing(point.atoms.cell.volume) > LARGEST_PACKING:
                continue
            name = f"{point.name}~σ{i}"
            pilot = replace(point, name=name, hamiltonian=Hamiltonian(0.0, 1.0, bias), identity="molten")
            candidates[name] = pilot, bias
    first = last_frames(runs)
    pilots = sample(
        potential,
        [point for point, _ in candidates.values()],
        md,
        settings.fit,
        seed=seed,
        stage=stage,
        store=store,
        start={name: first[name.rsplit("~", 1)[0]] for name in candidates},
    )
    found: dict[str, Fluid] = {}
    for point in points:
        mine = {n: run for n, run in pilots.items() if n.rsplit("~", 1)[0] == point.name}
        fluid = [n for n, run in mine.items() if bragg_peak(_thinned(run)) <= bragg_limit(run.n_atoms)]
        if not fluid:
            raise SamplingError(
                f"the Uhlenbeck-Ford fluid of {point.name} freezes at a strength of {settings.strength:g} "
                "with every length that was tried: lower free_energy.liquid.strength or sigma"
            )
        judged = [_judged(runs[point.name], mine[n], candidates[n][1], settings.windows) for n in fluid]
        found[point.name] = min(judged, key=lambda chosen: chosen.dissipation)
    return found


def _require_fluid(bias: UhlenbeckFord, point: StatePoint, symbols: Sequence[str]) -> None:
    """Refuse lengths of a config that make a crystal of the fluid."""
    packing = bias.packing(point.atoms.cell.volume)
    if packing > LARGEST_PACKING:
        lengths = ", ".join(
            f"{symbols[i]}-{symbols[j]} {float(bias.sigma[i, j]):.3g} Å"
            for i, j in combinations_with_replacement(range(len(symbols)), 2)
        )
        raise InputError(
            f"the Uhlenbeck-Ford fluid of {point.name} is too dense: it would freeze",
            where="free_energy.liquid.sigma",
            found=f"{lengths}, a reduced density of {packing:.2f}",
            expected=f"at most {LARGEST_PACKING:g}",
            fix=f"About {SIGMA_PER_PEAK:g} of the distance of neighbours is right.",
        )


def _judged(liquid: Trajectory, fluid: Trajectory, bias: UhlenbeckFord, windows: int | None) -> Fluid:
    """Return a fluid with the dissipation of its path, and the windows that this needs.

    Medians and quantiles stand for means and variances: a few pairs of the fluid may be far inside the cores
    of the liquid.
    """
    beta, kept = liquid.point.beta, liquid.kept
    of_liquid = bias.energy(liquid.positions[kept], liquid.cells[kept]) - liquid.model_energy[kept]
    of_fluid = (fluid.bias_energy - fluid.model_energy)[fluid.kept]
    quantiles = torch.tensor([0.159, 0.5, 0.841], dtype=torch.float64)
    ends = [torch.quantile(beta * values.double(), quantiles).tolist() for values in (of_liquid, of_fluid)]
    (low0, middle0, high0), (low1, middle1, high1) = ends
    variances = ((high0 - low0) / 2) ** 2, ((high1 - low1) / 2) ** 2
    total = middle0 - middle1
    return Fluid(
        bias,
        bias.packing(liquid.point.atoms.cell.volume),
        total / liquid.n_atoms,
        spaced_windows(variances, total, windows),
        fluid.last(),
    )


def liquid_free_energies(
    potential: Potential,
    cells: Sequence[LiquidCell],
    md: MDSettings,
    settings: LiquidPathSettings,
    *,
    seed: int,
    stage: str = "liquid",
    store: FrameStore | None = None,
) -> dict[str, LiquidFreeEnergy]:
    """Compute absolute free energies of liquids in their cells, with the size term of a periodic liquid.

    G = F_id + F_UF + (F - F_UF) + PV, with F_id of N_i indistinguishable atoms of every species, so that the
    entropy of ideal mixing is in it.

    Args:
        potential: A frozen copy.
        cells: The liquids in their cells (see `liquid_cells`); `replicas` of their points is the number of
            copies per window.
        md: Integrator settings.
        settings: The fluid, and lengths.
        seed: Random seed of all sampling.
        stage: Name of the sampling in the store.
        store: Where frames are kept; an interrupted calculation continues from it.

    Returns:
        A free energy per point name.

    Raises:
        InputError: For lengths σ that do not go with the liquid.
        StatisticsError: If neighbouring windows do not overlap, or too many are needed.
        SamplingError: If a liquid crystallises or does not flow, or the fluid does.
    """
    points = [replace(cell.point, thermostat="langevin") for cell in cells]
    runs = sample(potential, points, md, settings.fit, seed=seed, stage=f"{stage}-fit", store=store)
    for run in runs.values():
        require_liquid(run, md.interval)
    fluids = find_fluids(
        potential, points, runs, md, settings, seed=seed + 1, stage=f"{stage}-pilot", store=store
    )
    first = last_frames(runs)
    windows = {
        p.name: [
            replace(p, name=f"{p.name}~{i:02d}", hamiltonian=Hamiltonian(1 - x, x, fluids[p.name].bias))
            for i, x in enumerate(fluids[p.name].lambdas)
        ]
        for p in points
    }
    ladder = sample(
        potential,
        [window for mine in windows.values() for window in mine],
        md,
        settings.ladder,
        seed=seed + 2,
        stage=f"{stage}-ladder",
        store=store,
        start={
            window.name: first[name] if window.hamiltonian.scale > 0.5 else fluids[name].start
            for name, mine in windows.items()
            for window in mine
        },
    )
    joined = {
        p.name: _joined(runs[p.name], [ladder[w.name] for w in windows[p.name]], fluids[p.name])
        for p in points
    }
    found = {}
    for cell, point in zip(cells, points, strict=True):
        known = uhlenbeck_ford_free_energy(
            fluids[point.name].bias,
            point.atoms,
            settings.fluid,
            seed=seed + 3,
            stage=f"{stage}-fluid-{point.name}",
            store=store,
        )
        found[point.name] = _free_energy(point, cell.s0, known, *joined[point.name])
    return found


def _joined(liquid: Trajectory, runs: Sequence[Trajectory], fluid: Fluid) -> tuple[JoinedWindows, LiquidPath]:
    """Join the windows of a liquid by MBAR, from λ = 0 (the potential) to 1 (the fluid).

    Raises:
        StatisticsError: If neighbouring windows do not overlap.
        SamplingError: If a window froze.
    """
    point, bias = liquid.point, fluid.bias
    within = closest_pair(liquid, bias)
    closest = tuple(closest_pair(run, bias) for run in runs)
    for x, run in zip(fluid.lambdas, runs, strict=True):
        peak = bragg_peak(_thinned(run))
        if peak > (limit := bragg_limit(run.n_atoms)):
            raise SamplingError(
                f"the path of {point.name} froze at λ = {x:.3g}, with a Bragg peak of {peak:.1f} (a liquid: "
                f"below {limit:.2g}): take another temperature, or a lower free_energy.liquid.sigma"
            )
    joined = join_windows(runs)
    for i, overlap in enumerate(joined.overlaps):
        low, high = fluid.lambdas[i : i + 2]
        require_overlap(
            overlap,
            f"the path of {point.name} between λ = {low:.3g} and {high:.3g} (free_energy.liquid.windows is "
            f"{len(runs)}; atoms come as close as {min(closest):.2f} Å there, {within:.2f} Å in the liquid: "
            "a greater strength keeps them apart)",
        )
    path = LiquidPath(
        strength=bias.strength,
        sigma=bias.sigma.tolist(),
        packing=fluid.packing,
        dissipation=fluid.dissipation,
        lambdas=fluid.lambdas,
        closest=closest,
        closest_in_liquid=within,
    )
    return joined, path


def _free_energy(
    point: StatePoint, s0: Measured, fluid: FluidFreeEnergy, joined: JoinedWindows, path: LiquidPath
) -> LiquidFreeEnergy:
    """Return G of a liquid from the free energy of its fluid and that of the path between them."""
    kt, free = KB * point.temperature, fluid.free_energy
    _, counts = np.unique(point.atoms.numbers, return_counts=True)
    term = liquid_size_term(counts.tolist(), s0).scaled(kt, "eV")
    return LiquidFreeEnergy(
        point=point,
        gibbs=free + joined.to_model.scaled(kt, "eV") + Measured(point.pv, 0.0, "eV"),
        reference=free.value,
        overlap=min(*joined.overlaps, *fluid.overlaps),
        inefficiency=max(joined.inefficiencies),
        size_term=term.value,
        size_term_se=term.se,
        path=path,
        fluid=fluid,
    )
