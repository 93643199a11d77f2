"""Absolute free energy of an Uhlenbeck-Ford fluid along a ladder of its strength, from the ideal gas.

At strength p = 0 the fluid is the ideal gas, whose free energy is known and whose configurations are drawn
exactly. With βU = p S (see `sampling.pair_reference`) the excess free energy obeys d(βF)/dp = ⟨S⟩, and MBAR
takes it from one number per frame of all strengths together. So any strength, density and mixture has its
reference: no table is needed, and the number of atoms and its finite-size terms are those of the cell.

No model has a part in this: the masses are chosen for the dynamics, since they do not change the excess, and
times are in units of τ = σ √(m/kT).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from mlip_refine.errors import SamplingError
from mlip_refine.quantities import HBAR, KB, Measured
from mlip_refine.sampling import (
    FrameStore,
    Hamiltonian,
    Length,
    MDSettings,
    NoPotential,
    StatePoint,
    Trajectory,
    UhlenbeckFord,
    sample,
)
from mlip_refine.sampling.references import AMU_A2_FS2
from mlip_refine.statistics import exp_estimate, mbar, require_overlap
from mlip_refine.workflows.melt import (
    LEAST_ATOMS,
    MIN_DIFFUSION,
    bragg_limit,
    bragg_peak,
    diffusion_distance,
    second_half,
)

TIMESTEP = 1.0
"""Time step, fs; the masses are such that it is `FluidSettings.step` of τ."""

PILOT_WINDOWS = 9
"""Strengths of the pilot beside zero, evenly spaced in ln(1 + p)."""

PILOT_DRAWS = 2_000
"""Configurations of the ideal gas of the pilot."""

DESCENT = 150
"""Steps in which random positions are spread before the dynamics starts."""

SAMPLED_CUTOFF = 3.5
"""Range in σ of the fluid that is sampled: the rest is p kT 4.8e-6 per pair, and an exponential average."""

NEAR_ZERO = 0.3
"""Strengths are spaced as if √var S ∝ 1/(p + this) where the pilot does not say: var S stays finite at 0."""


@dataclass(frozen=True)
class FluidSettings:
    """How the free energy of a fluid is computed.

    Attributes:
        steps: Steps of every window that are measured; `None` takes what the pilot says that `error` needs.
        error: Standard error of βF_ex/N that is aimed at, kT per atom, where `steps` is not given: 0.0015 is
            0.25 meV per atom at 1940 K.
        equilibration: Steps of every window before that.
        interval: Steps between frames; S decorrelates in about 0.7 τ.
        pilot: Steps of every window of the pilot that are measured.
        replicas: Independent copies of every window.
        gap: Distance of neighbouring windows, in the thermodynamic length ∫ √(var S) dp.
        step: Time step in τ. An error of 0.1 % in S is one of 0.1 % in the excess, 0.01 kT per atom at
            p = 100 and x = 0.4. With steps of 0.12, S is 0.14(7) % above that of steps of 0.05 (p = 10,
            32 atoms, x = 0.42); the error falls at least with the square of the step.
        friction: Friction of the thermostat in 1/τ.
    """

    steps: int | None = None
    error: float = 0.0015
    equilibration: int = 1_500
    interval: int = 24
    pilot: int = 1_600
    replicas: int = 1
    gap: float = 2.0
    step: float = 0.025
    friction: float = 2.0


@dataclass(frozen=True)
class FluidFreeEnergy:
    """Helmholtz energy of a fluid in its cell.

    Attributes:
        fluid: The fluid.
        excess: Excess over the ideal gas of the same cell, eV.
        ideal: Helmholtz energy of the ideal gas, eV (see `ideal_gas_free_energy`).
        packing: Reduced density x (see `UhlenbeckFord.packing`).
        strengths: Strengths p of the windows, from 0 to that of the fluid.
        sums: Mean of S in every window.
        overlaps: Overlap of neighbouring windows, one less.
        inefficiencies: Statistical inefficiency of S in every window, in frames.
        closest: Shortest distance between two atoms in every window, Å.
    """

    fluid: UhlenbeckFord
    excess: Measured
    ideal: float
    packing: float
    strengths: tuple[float, ...]
    sums: tuple[float, ...]
    overlaps: tuple[float, ...]
    inefficiencies: tuple[float, ...]
    closest: tuple[float, ...]

    @property
    def free_energy(self) -> Measured:
        """Helmholtz energy of the cell, eV."""
        return Measured(self.excess.value + self.ideal, self.excess.se, "eV")

    @property
    def reduced_excess(self) -> Measured:
        """Excess per atom in kT, βF_ex/N: a function of p and x alone for atoms of one length."""
        return self.excess.scaled(1 / (self.fluid.kt * len(self.fluid.species)), "kT")


def ideal_gas_free_energy(atoms: Atoms, temperature: float) -> float:
    """Return the Helmholtz energy of the ideal gas of atoms in their cell, eV.

    F = kT [Σ_s ln N_s! - N ln V + Σ_i 3 ln Λ_i] with Λ_i = h / √(2π m_i kT) and N_s atoms of element s. The
    logarithm is that of the factorial itself: Stirling's formula without ½ ln(2πN) is that of endless cells.

    Args:
        atoms: Numbers, masses and cell.
        temperature: Temperature, K.
    """
    kt, n = KB * temperature, len(atoms)
    _, counts = np.unique(atoms.numbers, return_counts=True)
    wavelengths = 2 * math.pi * HBAR / np.sqrt(2 * math.pi * atoms.get_masses() * AMU_A2_FS2 * kt)
    identical = sum(math.lgamma(count + 1) for count in counts.tolist())
    return float(kt * (identical - n * math.log(atoms.cell.volume) + 3 * np.log(wavelengths).sum()))


def uhlenbeck_ford_free_energy(
    fluid: UhlenbeckFord,
    atoms: Atoms,
    settings: FluidSettings | None = None,
    *,
    seed: int,
    stage: str = "uhlenbeck-ford",
    store: FrameStore | None = None,
    device: torch.device | None = None,
) -> FluidFreeEnergy:
    """Compute the free energy of a fluid in a cell, at the temperature that its kT says.

    A pilot measures var S at some strengths; windows are then spaced by equal thermodynamic length, and all
    of them and their replicas are one batch. Each replica starts from random positions that were spread.

    Args:
        fluid: The fluid; its `strength` is the end of the ladder.
        atoms: Elements, masses and cell; positions do not matter.
        settings: Lengths and steps; the defaults if not given.
        seed: Random seed of all sampling.
        stage: Name of the sampling in the store.
        store: Where frames are kept; an interrupted calculation continues from it.
        device: Where the dynamics runs; the CPU by default.

    Raises:
        StatisticsError: If neighbouring windows do not overlap; the gap is named.
        SamplingError: If a window froze or does not flow, or no replica of it ran through.
    """
    settings = settings or FluidSettings()
    if len(atoms) != len(fluid.species):
        raise SamplingError(f"{stage}: a fluid of {len(fluid.species)} atoms in a cell of {len(atoms)}")
    ladder = _Ladder(fluid, atoms, settings, device or torch.device("cpu"), stage, store)
    grid = _pilot_strengths(fluid.strength)
    runs = ladder.run(grid, settings.pilot, max(settings.pilot // 2, 1), seed, "pilot")
    gas, _ = ladder.ideal_gas(PILOT_DRAWS, seed)
    series = [ladder.sums(run) for run in runs]
    strengths, length = spaced_strengths(
        [0.0, *grid], [float(gas.std()), *(float(s.std()) for s in series)], settings.gap
    )
    windows, steps = strengths[1:], settings.steps
    if steps is None:
        # Independent samples at equal distances, n in all, give a standard error of length / √n.
        inefficiency = sum(run.inefficiency(s) for run, s in zip(runs, series, strict=True)) / len(runs)
        independent = (length / (settings.error * len(atoms))) ** 2
        each = inefficiency * independent / (len(windows) * settings.replicas)
        steps = max(settings.pilot, math.ceil(each) * settings.interval)
    runs = ladder.run(windows, steps, settings.equilibration, seed + 1, "ladder")
    for p, run in zip(windows, runs, strict=True):
        require_fluid(run, fluid, p)
    gas, closest = ladder.ideal_gas(max(1, steps // settings.interval) * settings.replicas, seed + 1)
    return _result(ladder, strengths, runs, gas, closest)


def _result(
    ladder: "_Ladder", strengths: list[float], runs: Sequence[Trajectory], gas: Tensor, closest: float
) -> FluidFreeEnergy:
    """Return the free energy by MBAR over the ideal gas and all windows."""
    fluid, atoms = ladder.fluid, ladder.atoms
    series = [gas, *(ladder.sums(run) for run in runs)]
    inefficiencies = [1.0, *(run.inefficiency(s) for run, s in zip(runs, series[1:], strict=True))]
    reduced = torch.tensor(strengths, dtype=torch.float64)[:, None] * torch.cat(series)
    result = mbar(reduced, [len(s) for s in series], inefficiencies)
    overlaps = [float(result.overlap[i, i + 1]) for i in range(len(strengths) - 1)]
    for lower, upper, overlap in zip(strengths, strengths[1:], overlaps, strict=False):
        gap = f"the Uhlenbeck-Ford ladder of {ladder.stage} between p = {lower:g} and p = {upper:g}"
        require_overlap(overlap, gap)
    excess, se = result.difference(0, len(strengths) - 1)
    tail, tail_se = ladder.tail(runs[-1])
    distances = [ladder.closest(run) for run in runs]
    return FluidFreeEnergy(
        fluid=fluid,
        excess=Measured(excess + tail, math.hypot(se, tail_se), "kT").scaled(fluid.kt, "eV"),
        ideal=ideal_gas_free_energy(atoms, fluid.kt / KB),
        packing=fluid.packing(atoms.cell.volume),
        strengths=tuple(strengths),
        sums=tuple(float(s.mean()) for s in series),
        overlaps=tuple(overlaps),
        inefficiencies=tuple(inefficiencies),
        closest=(closest, *distances),
    )


class _Ladder:
    """Samples windows of one fluid."""

    def __init__(
        self,
        fluid: UhlenbeckFord,
        atoms: Atoms,
        settings: FluidSettings,
        device: torch.device,
        stage: str,
        store: FrameStore | None,
    ) -> None:
        self.fluid, self.settings, self.stage, self.store = fluid, settings, stage, store
        self.atoms, self.unit = (
            atoms,
            replace(fluid, strength=1.0, cutoff=min(fluid.cutoff, SAMPLED_CUTOFF)),
        )
        self.potential = NoPotential(atoms.numbers, device)
        # σ and m of the fastest pairs set the time.
        time = TIMESTEP / settings.step
        mass = fluid.kt / AMU_A2_FS2 * (time / float(fluid.sigma.min())) ** 2
        self._dynamic = atoms.copy()
        self._dynamic.set_masses(np.full(len(atoms), mass))
        self._md = MDSettings(
            timestep=TIMESTEP,
            friction=1e3 * settings.friction / time,
            interval=settings.interval * TIMESTEP,
        )

    def run(
        self, strengths: Sequence[float], steps: int, equilibration: int, seed: int, part: str
    ) -> list[Trajectory]:
        """Return trajectories at strengths above zero, in their order."""
        settings, points = self.settings, []
        for i, p in enumerate(strengths):
            points.append(
                StatePoint(
                    name=f"{self.stage}~{i:02d}",
                    atoms=self._dynamic,
                    temperature=self.fluid.kt / KB,
                    replicas=settings.replicas,
                    hamiltonian=Hamiltonian(0.0, p, self.unit),
                    identity="none",
                )
            )
        positions, cells = self._spread(len(points) * settings.replicas, seed)
        runs = sample(
            self.potential,
            points,
            self._md,
            Length(equilibration * TIMESTEP, max(1, steps // settings.interval)),
            seed=seed,
            stage=f"{self.stage}-{part}",
            store=self.store,
            start={
                point.name: (positions[first : first + settings.replicas], cells[: settings.replicas])
                for first, point in zip(range(0, len(positions), settings.replicas), points, strict=True)
            },
        )
        return [runs[point.name] for point in points]

    def sums(self, run: Trajectory) -> Tensor:
        """Return S of the kept frames of a run `[n_kept]`: the bias is that of strength 1."""
        return run.bias_energy[run.kept] / self.fluid.kt

    def tail(self, run: Trajectory) -> tuple[float, float]:
        """Return the reduced free energy of the pairs beyond the sampled range, and its standard error.

        Exponential average over the last window; the energy hardly varies.
        """
        if self.unit.cutoff == self.fluid.cutoff:
            return 0.0, 0.0
        positions, cells = run.positions[run.kept], run.cells[run.kept]
        whole = replace(self.unit, cutoff=self.fluid.cutoff).sums(positions, cells)
        work = self.fluid.strength * (whole - self.sums(run))
        estimate = exp_estimate(work, run.inefficiency(work))
        return float(estimate.value), estimate.se

    def closest(self, run: Trajectory) -> float:
        """Return the shortest distance in a run, Å."""
        return float(self.unit.closest(run.positions[run.kept], run.cells[run.kept]).min())

    def ideal_gas(self, n: int, seed: int) -> tuple[Tensor, float]:
        """Return S of n configurations of the ideal gas `[n]`, and the shortest distance in them, Å."""
        positions, cells = self._uniform(n, np.random.default_rng([seed, 0]))
        return self.unit.sums(positions, cells), float(self.unit.closest(positions, cells).min())

    def _uniform(self, n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        cells = torch.from_numpy(self.atoms.cell.array.copy()).expand(n, 3, 3)
        return torch.from_numpy(rng.uniform(size=(n, len(self.atoms), 3))) @ cells, cells.contiguous()

    def _spread(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return n configurations whose atoms keep apart: random ones, moved downhill on S in short steps."""
        x, cells = self._uniform(n, np.random.default_rng([seed, 1]))
        device, short = self.potential.device, 0.1 * float(self.fluid.sigma.min())
        batch = self.unit.on(device, torch.float64)
        x, h = x.to(device), cells.to(device)
        for _ in range(DESCENT):
            if not batch.holds(x, h):
                batch.find(x, h)
            pull = batch.energy_forces(x, h).forces * (short / self.fluid.kt * float(self.fluid.sigma.min()))
            x = x + pull * (short / pull.norm(dim=-1, keepdim=True).clamp(min=short))
        return x.cpu(), cells


def _pilot_strengths(strength: float) -> list[float]:
    """Return strengths above zero, evenly spaced in ln(1 + p / NEAR_ZERO) up to the given one."""
    fractions = np.linspace(0, 1, PILOT_WINDOWS + 1)[1:]
    return [float(f"{NEAR_ZERO * math.expm1(f * math.log1p(strength / NEAR_ZERO)):.6g}") for f in fractions]


def spaced_strengths(
    strengths: Sequence[float], spread: Sequence[float], gap: float
) -> tuple[list[float], float]:
    """Return strengths at equal distances in the thermodynamic length ∫ √(var S) dp.

    √var S falls about as 1/p: its logarithm is taken as linear in ln(p + c) between the given strengths.

    Args:
        strengths: Strengths of a pilot, ascending from 0.
        spread: √var S at them.
        gap: Largest distance of two neighbours.

    Returns:
        Strengths from 0 to the last one, rounded to four digits between them, and the whole length.
    """
    y = np.log(np.asarray(strengths) + NEAR_ZERO)
    fine = np.linspace(y[0], y[-1], 2000)
    integrand = np.exp(np.interp(fine, y, np.log(spread)) + fine)
    length = np.concatenate([[0.0], np.cumsum((integrand[1:] + integrand[:-1]) / 2 * np.diff(fine))])
    gaps = max(1, math.ceil(length[-1] / gap))
    inner = np.interp(length[-1] * np.arange(1, gaps) / gaps, length, fine)
    rounded = [float(f"{math.exp(v) - NEAR_ZERO:.4g}") for v in inner]
    return [0.0, *rounded, float(strengths[-1])], float(length[-1])


def require_fluid(run: Trajectory, fluid: UhlenbeckFord, strength: float) -> None:
    """Refuse a window that froze, or does not flow.

    Raises:
        SamplingError: With the reduced density, and what would do.
    """
    x = fluid.packing(run.point.atoms.cell.volume)
    what = f"{run.point.name}: the Uhlenbeck-Ford fluid of p = {strength:g} and x = {x:.3g}"
    cure = "take shorter lengths σ: x falls with their cube"

    peak = bragg_peak(run, second_half) if run.n_atoms >= LEAST_ATOMS else 0.0
    if peak > (limit := bragg_limit(run.n_atoms)):
        raise SamplingError(
            f"{what} froze, with a Bragg peak of {peak:.1f} (a fluid: below {limit:.2g}): {cure}"
        )
    distance = diffusion_distance(run)
    if distance < MIN_DIFFUSION:
        raise SamplingError(
            f"{what} does not flow: its atoms moved by {distance:.2f} distances of neighbours (a fluid: "
            f"{MIN_DIFFUSION:g} or more): {cure}, or sample for longer"
        )
