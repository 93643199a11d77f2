"""Absolute free energies of solids along the path U_λ = (1 - λ) U + λ U_ref (Frenkel and Ladd 1984).

All windows, phases and replicas are systems of one batch; MBAR over the ladder gives F and its error.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from mlip_refine.crystals.phonons.size_limit import sampled_size_term
from mlip_refine.errors import MlipRefineError, StatisticsError
from mlip_refine.potential import Potential
from mlip_refine.quantities import KB, MEV, Measured
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
from mlip_refine.statistics import mbar, require_overlap
from mlip_refine.workflows.free_energy.records import LIMIT

FITS = {"einstein": fit_einstein, "harmonic": fit_harmonic}


@dataclass(frozen=True)
class LadderSettings:
    """How a Frenkel-Ladd path is sampled.

    Attributes:
        reference: `einstein` (one spring per species) or `harmonic` (the sampled covariance, a shorter path).
        windows: Number of values of λ, evenly spaced over [0, 1].
        fit: Length of the run that the reference is fitted to.
        ladder: Length of the run of every window.
    """

    reference: str
    windows: int
    fit: Length
    ladder: Length


@dataclass(frozen=True)
class AbsoluteFreeEnergy:
    """Gibbs energy of one phase, G = F + PV of its cell.

    Attributes:
        point: State point of the phase.
        gibbs: Gibbs energy of the whole cell, eV.
        reference: Free energy of the harmonic reference, eV.
        overlap: Smallest overlap between neighbouring windows.
        inefficiency: Largest statistical inefficiency among the windows, in frames.
        size_term: Finite-size term kT δ_N of the whole cell, eV: what is to be subtracted from `gibbs` for N
            atoms of a large system; `None` where it was not asked for.
        size_term_se: Standard error of that term, eV.
    """

    point: StatePoint
    gibbs: Measured
    reference: float
    overlap: float
    inefficiency: float
    size_term: float | None = None
    size_term_se: float = 0.0

    def per_atom(self, convention: str) -> Measured:
        """Return G per atom, meV/atom, of the cell (`CELLS`) or of a large system (`LIMIT`)."""
        n_atoms, gibbs = len(self.point.atoms), self.gibbs
        if convention == LIMIT:
            if self.size_term is None:
                raise MlipRefineError(f"the finite-size term of {self.point.name} was not computed")
            gibbs = gibbs - Measured(self.size_term, self.size_term_se, gibbs.unit)
        return gibbs.scaled(1 / (MEV * n_atoms), "meV/atom")


def absolute_free_energies(
    potential: Potential,
    points: Sequence[StatePoint],
    settings: MDSettings,
    ladder: LadderSettings,
    *,
    seed: int,
    stage: str = "free-energy",
    store: FrameStore | None = None,
    limit: Collection[str] = (),
) -> dict[str, AbsoluteFreeEnergy]:
    """Compute absolute free energies of crystals in their given cells.

    Args:
        potential: A frozen copy.
        points: NVT points; `replicas` is the number of copies per window.
        settings: Integrator settings.
        ladder: Reference, windows and lengths.
        seed: Random seed of all sampling.
        stage: Name of the sampling in the store.
        store: Where frames are kept; an interrupted calculation continues from it.
        limit: Names of the points whose finite-size term is computed (`sampled_size_term`), from the frames
            of the fit and of the window of the model alone, whatever the reference.

    Returns:
        A free energy per point name.

    Raises:
        StatisticsError: If neighbouring windows do not overlap, or the frames do not determine a size term.
        SamplingError: If a phase does not stay what it is, or the reference cannot be fitted.
    """
    # The reference is bound to the very sites: it cannot describe a crystal that slipped to equivalent ones.
    # Its modes are uncoupled: only noise reaches every one of them.
    points = [replace(p, identity="sites", thermostat="langevin") for p in points]
    fits = sample(potential, points, settings, ladder.fit, seed=seed, stage=f"{stage}-fit", store=store)
    first = last_frames(fits)
    references: dict[str, HarmonicReference] = {}
    windows: dict[str, list[StatePoint]] = {}
    for p in points:
        fit = fits[p.name]
        reference = FITS[ladder.reference](fit.point.atoms, fit.positions[fit.kept], p.temperature)
        references[p.name] = reference
        windows[p.name] = [
            replace(p, name=f"{p.name}~{i:02d}", hamiltonian=Hamiltonian(1 - x, x, reference))
            for i, x in enumerate(torch.linspace(0, 1, ladder.windows).tolist())
        ]
    runs = sample(
        potential,
        [w for of_point in windows.values() for w in of_point],
        settings,
        ladder.ladder,
        seed=seed + 1,
        stage=f"{stage}-ladder",
        store=store,
        start={w.name: first[name] for name, of_point in windows.items() for w in of_point},
    )
    terms = {
        p.name: _size_term(p, fits[p.name], runs[windows[p.name][0].name]) for p in points if p.name in limit
    }
    return {
        p.name: _free_energy(
            p, references[p.name], [runs[w.name] for w in windows[p.name]], terms.get(p.name)
        )
        for p in points
    }


def _size_term(point: StatePoint, fit: Trajectory, unmixed: Trajectory) -> Measured:
    """Return the finite-size term kT δ_N of a point's whole cell, eV, from all frames of the model alone."""
    positions = torch.cat([run.positions[run.kept] for run in (fit, unmixed)])
    try:
        term = sampled_size_term(point.atoms, positions, point.temperature)
    except StatisticsError as error:
        raise StatisticsError(f"{point.name}: {error.problem}", needed=error.needed) from error
    return term.scaled(KB * point.temperature, "eV")


def _free_energy(
    point: StatePoint, reference: HarmonicReference, runs: Sequence[Trajectory], size_term: Measured | None
) -> AbsoluteFreeEnergy:
    """Return G of a point by MBAR over its windows, from λ = 0 (the model) to 1 (the reference).

    The frames of all replicas of a window are pooled.
    """
    joined = join_windows(runs)
    overlap = min(joined.overlaps)
    require_overlap(overlap, f"the Frenkel-Ladd path of {point.name}")
    kt = KB * point.temperature
    free = reference.free_energy(point.temperature, point.atoms.cell.volume)
    gibbs = Measured(free + kt * joined.to_model.value + point.pv, kt * joined.to_model.se, "eV")
    found = AbsoluteFreeEnergy(point, gibbs, free, overlap, max(joined.inefficiencies))
    if size_term is None:
        return found
    return replace(found, size_term=size_term.value, size_term_se=size_term.se)


@dataclass(frozen=True)
class JoinedWindows:
    """The free energy along a path.

    Attributes:
        to_model: Free energy of the potential less that of the reference, kT.
        overlaps: Overlap of neighbouring windows, one less than these.
        inefficiencies: Statistical inefficiency of every window, in frames.
    """

    to_model: Measured
    overlaps: tuple[float, ...]
    inefficiencies: tuple[float, ...]


def join_windows(runs: Sequence[Trajectory]) -> JoinedWindows:
    """Join the windows of a path by MBAR; the frames of all replicas of a window are pooled.

    Args:
        runs: Windows from λ = 0 (the potential) to 1 (the reference).
    """
    inefficiency = [run.inefficiency((run.bias_energy - run.model_energy)[run.kept]) for run in runs]
    model = torch.cat([run.model_energy[run.kept] for run in runs])
    bias = torch.cat([run.bias_energy[run.kept] for run in runs])
    mixed = [(run.point.beta, run.point.hamiltonian) for run in runs]
    reduced = torch.stack([beta * (h.scale * model + h.bias_scale * bias) for beta, h in mixed])
    result = mbar(reduced, [run.n_kept for run in runs], inefficiency)
    overlaps = tuple(float(result.overlap[i, i + 1]) for i in range(len(runs) - 1))
    to_model = Measured(*result.difference(len(runs) - 1, 0), "kT")
    return JoinedWindows(to_model, overlaps, tuple(inefficiency))
