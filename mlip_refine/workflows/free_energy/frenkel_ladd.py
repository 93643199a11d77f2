"""Absolute free energies of solids along U_λ = (1 - λ) U + λ U_ref (Frenkel and Ladd 1984).

All windows, phases and replicas are systems of one batch; MBAR over the ladder gives F and its error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from mlip_refine.potential import Potential
from mlip_refine.quantities import KB, Measured
from mlip_refine.sampling import (
    FrameStore,
    Hamiltonian,
    HarmonicReference,
    Length,
    MDSettings,
    StatePoint,
    Trajectory,
    fit_einstein,
    fit_harmonic,
    last_frames,
    sample,
)
from mlip_refine.statistics import MbarResult, mbar, require_overlap

FITS = {"einstein": fit_einstein, "harmonic": fit_harmonic}


@dataclass(frozen=True)
class LadderSettings:
    """How a Frenkel-Ladd path is sampled.

    Attributes:
        reference: `einstein` (one spring per species) or `harmonic` (the sampled covariance, a shorter path).
        windows: Values of λ, evenly spaced over [0, 1].
        fit: Length of the run that fits the reference; its equilibration and its frames.
        ladder: Length of every window.
    """

    reference: str
    windows: int
    fit: Length
    ladder: Length


@dataclass(frozen=True)
class AbsoluteFreeEnergy:
    """Gibbs energy of one phase, G = F + PV of its cell.

    Attributes:
        point: The phase and its state.
        gibbs: Whole cell, eV, with standard error.
        reference: Free energy of the harmonic reference, eV.
        overlap: Smallest overlap between neighbouring windows.
        inefficiency: Largest statistical inefficiency among the windows, in frames.
    """

    point: StatePoint
    gibbs: Measured
    reference: float
    overlap: float
    inefficiency: float


def absolute_free_energies(
    potential: Potential,
    points: Sequence[StatePoint],
    settings: MDSettings,
    ladder: LadderSettings,
    *,
    seed: int,
    stage: str = "free-energy",
    store: FrameStore | None = None,
) -> dict[str, AbsoluteFreeEnergy]:
    """Absolute free energies of crystals in their given cells.

    Args:
        potential: A frozen copy.
        points: NVT points; `replicas` is the number of copies per window.
        settings: How to integrate.
        ladder: Reference, windows and lengths.
        seed: Of all sampling.
        stage: Name in the store.
        store: Where frames are kept; an interrupted calculation continues from it.

    Returns:
        A free energy per point name.

    Raises:
        StatisticsError: If neighbouring windows do not overlap.
        SamplingError: If a phase does not stay what it is, or the reference cannot be fitted.
    """
    # The reference is bound to the very sites: a crystal that slipped to equivalent ones is lost to it.
    # And its modes are uncoupled: only noise reaches every one of them.
    points = [replace(p, identity="sites", thermostat="langevin") for p in points]
    fits = sample(potential, points, settings, ladder.fit, seed=seed, stage=f"{stage}-fit", store=store)
    references = {name: _fit(run, ladder.reference) for name, run in fits.items()}
    windows = [w for p in points for w in _windows(p, references[p.name], ladder.windows)]
    first = last_frames(fits)
    start = {w.name: first[p.name] for p in points for w in _windows(p, references[p.name], ladder.windows)}
    runs = sample(
        potential,
        windows,
        settings,
        ladder.ladder,
        seed=seed + 1,
        stage=f"{stage}-ladder",
        store=store,
        start=start,
    )
    return {p.name: _estimate(p, references[p.name], _of(runs, p, ladder.windows)) for p in points}


def _fit(run: Trajectory, kind: str) -> HarmonicReference:
    return FITS[kind](run.point.atoms, run.positions[run.kept], run.point.temperature)


def _windows(point: StatePoint, reference: HarmonicReference, n: int) -> list[StatePoint]:
    lambdas = torch.linspace(0, 1, n).tolist()
    return [
        replace(point, name=_name(point, i), hamiltonian=Hamiltonian(1 - x, x, reference))
        for i, x in enumerate(lambdas)
    ]


def _name(point: StatePoint, window: int) -> str:
    return f"{point.name}~{window:02d}"


def _of(runs: Mapping[str, Trajectory], point: StatePoint, n: int) -> list[Trajectory]:
    return [runs[_name(point, i)] for i in range(n)]


def _estimate(
    point: StatePoint, reference: HarmonicReference, runs: Sequence[Trajectory]
) -> AbsoluteFreeEnergy:
    inefficiency = [run.inefficiency((run.bias_energy - run.model_energy)[run.kept]) for run in runs]
    result = ladder_mbar(runs, inefficiency)
    overlap = min(float(result.overlap[i, i + 1]) for i in range(len(runs) - 1))
    require_overlap(overlap, f"the Frenkel-Ladd path of {point.name}")
    kt = KB * point.temperature
    to_model, se = result.difference(len(runs) - 1, 0)
    free = reference.free_energy(point.temperature, point.atoms.cell.volume)
    gibbs = Measured(free + kt * to_model + point.pv, kt * se, "eV")
    return AbsoluteFreeEnergy(point, gibbs, free, overlap, max(inefficiency))


def ladder_mbar(runs: Sequence[Trajectory], inefficiency: Sequence[float]) -> MbarResult:
    """MBAR over windows that mix a model and a bias, frames of all replicas pooled."""
    model = torch.cat([run.model_energy[run.kept] for run in runs])
    bias = torch.cat([run.bias_energy[run.kept] for run in runs])
    mixed = [(run.point.beta, run.point.hamiltonian) for run in runs]
    reduced = torch.stack([beta * (h.scale * model + h.bias_scale * bias) for beta, h in mixed])
    return mbar(reduced, [run.n_kept for run in runs], inefficiency)
