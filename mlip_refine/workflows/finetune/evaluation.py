"""The verdict: both potentials sampled afresh, each in its own cell at the wanted pressure.

ΔG_after = ΔG_before + [G_θ - G_θ0] of phase II - [G_θ - G_θ0] of phase I, each change by BAR between fresh
ensembles. The two cells of a phase differ, so configurations are carried from one to the other affinely, with
the Jacobian N ln(V1/V0) in the work (targeted free-energy perturbation, Jarzynski 2002): exact for any pair
of cells.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlip_refine.config import Config
from mlip_refine.losses import EnsembleSource, FreeEnergyDifference
from mlip_refine.potential import Potential
from mlip_refine.quantities import GPA, KB, MEV, Measured
from mlip_refine.sampling import FrameStore, Length, StatePoint, Trajectory, sample
from mlip_refine.statistics import (
    FreeEnergyEstimate,
    bar_estimate,
    entropy_difference,
    require_estimate,
    transition_temperature,
)
from mlip_refine.training.ensembles.sampler import stage_seed
from mlip_refine.workflows.free_energy.cells import equilibrate_cells
from mlip_refine.workflows.free_energy.run import cell_interval, cell_length
from mlip_refine.workflows.from_config import md_settings


@dataclass(frozen=True)
class PhaseChange:
    """What refining did to one phase at one state.

    Attributes:
        change: G_θ - G_θ0, eV, whole cell.
        enthalpy_before: U + PV of the initial potential in its cell, eV, whole cell.
        enthalpy_after: The same of the refined one.
        overlap: Of the two ensembles, 1 if equal.
        cell_before: Rows, Å.
        cell_after: Rows, Å.
        verdicts: Replicas that were stopped.
    """

    change: Measured
    enthalpy_before: Measured
    enthalpy_after: Measured
    overlap: float
    cell_before: list[list[float]]
    cell_after: list[list[float]]
    verdicts: tuple[str, ...]


@dataclass(frozen=True)
class Transition:
    """ΔG = G_to - G_from before and after, with the transition temperature that it implies.

    A temperature is `None` where the statistics do not carry it; the note says why.
    """

    name: str
    from_: str
    to: str
    n_atoms: int
    temperature_K: float  # noqa: N815 - the unit's own case
    pressure_GPa: float  # noqa: N815 - the unit's own case
    target: float
    before: Measured
    after: Measured
    delta_h_before: Measured
    delta_h_after: Measured
    transition_before: Measured | None
    transition_after: Measured | None
    notes: tuple[str, ...]


def phase_changes(
    config: Config,
    before: Potential,
    after: Potential,
    points: Mapping[EnsembleSource, StatePoint],
    store: FrameStore,
) -> dict[EnsembleSource, PhaseChange]:
    """Sample both potentials with new seeds and measure G_θ - G_θ0 of every phase and state.

    Args:
        config: Sections `evaluation` and `sampling` say how long.
        before: The initial potential, frozen.
        after: The refined one, frozen.
        points: State points in the cells of the initial potential.
        store: Where frames are kept.

    Raises:
        StatisticsError: If the two ensembles of a phase overlap too little.
        SamplingError: If a phase does not survive under one of the potentials.
    """
    section = config.evaluation
    fresh = {s: replace(p, replicas=section.replicas, ensemble="nvt") for s, p in points.items()}
    seed = config.seed + section.seed_offset
    named = {"before": before, "after": after}
    how = config.sampling
    sampling_copy = {name: p.frozen_copy(how.dtype, how.accelerate) for name, p in named.items()}
    moved = equilibrate_cells(
        sampling_copy["after"],
        list(fresh.values()),
        md_settings(config, interval=cell_interval(config)),
        cell_length(config),
        iterations=section.cell_iterations,
        seed=stage_seed(seed, "cells-after"),
        stage="cells-after",
        store=store,
    )
    length = Length(section.equilibration, section.frames)
    runs = {
        name: sample(
            sampling_copy[name],
            list(at.values()),
            md_settings(config, interval=section.interval),
            length,
            seed=stage_seed(seed, name),
            stage=f"evaluation-{name}",
            store=store,
        )
        for name, at in (("before", {p.name: p for p in fresh.values()}), ("after", moved))
    }
    return {s: _change(before, after, runs["before"][s.name], runs["after"][s.name]) for s in points}


def _change(before: Potential, after: Potential, run0: Trajectory, run1: Trajectory) -> PhaseChange:
    cell0, cell1 = (torch.from_numpy(r.point.atoms.cell.array.copy()) for r in (run0, run1))
    own0, own1 = _energies(before, run0), _energies(after, run1)
    cross0 = _energies(after, run0, cell1)
    cross1 = _energies(before, run1, cell0)
    beta, n_atoms = run0.point.beta, run0.n_atoms
    pv = run0.point.pressure * GPA * (torch.linalg.det(cell1).abs() - torch.linalg.det(cell0).abs())
    jacobian = n_atoms * torch.log(torch.linalg.det(cell1).abs() / torch.linalg.det(cell0).abs())
    forward, reverse = beta * (cross0 - own0 + pv) - jacobian, beta * (own1 - cross1 + pv) - jacobian
    inefficiency = (run0.inefficiency(forward), run1.inefficiency(reverse))
    estimate = bar_estimate(forward, reverse, inefficiency)
    _require(estimate, run0.point.name)
    kt = KB * run0.point.temperature
    return PhaseChange(
        change=Measured(float(estimate.value) * kt, estimate.se * kt, "eV"),
        enthalpy_before=_enthalpy(own0, run0),
        enthalpy_after=_enthalpy(own1, run1),
        overlap=estimate.overlap,
        cell_before=cell0.tolist(),
        cell_after=cell1.tolist(),
        verdicts=run0.verdicts + run1.verdicts,
    )


def _require(estimate: FreeEnergyEstimate, name: str) -> None:
    require_estimate(estimate, f"G(refined) - G(initial) of {name}")


def _energies(potential: Potential, run: Trajectory, cell: Tensor | None = None) -> Tensor:
    """Energies `[n]`, eV, of a potential on the kept frames, carried affinely into `cell` if given."""
    positions, cells = run.positions[run.kept], run.cells[run.kept]
    if cell is not None:
        deformation = torch.linalg.solve(torch.from_numpy(run.point.atoms.cell.array.copy()), cell)
        positions, cells = positions @ deformation, cell.expand_as(cells)
    return potential.energies(potential.graphs.frames(positions, cells, run.point.atoms.numbers))


def _enthalpy(energy: Tensor, run: Trajectory) -> Measured:
    independent = run.n_kept / run.inefficiency(energy)
    return Measured(float(energy.mean()) + run.point.pv, float(energy.std()) / independent**0.5, "eV")


def transitions(
    losses: Sequence[FreeEnergyDifference],
    changes: Mapping[EnsembleSource, PhaseChange],
    n_atoms: Mapping[str, int],
) -> list[Transition]:
    """ΔG of every loss before and after, on the initial value as anchor."""
    return [_transition(loss, changes, n_atoms[loss.phase_from.name]) for loss in losses]


def _transition(
    loss: FreeEnergyDifference, changes: Mapping[EnsembleSource, PhaseChange], n_atoms: int
) -> Transition:
    one, two = (changes[s] for s in loss.sources)
    per_atom = 1 / (MEV * n_atoms)
    after = loss.initial + (two.change - one.change).scaled(per_atom, "meV/atom")
    h_before = (two.enthalpy_before - one.enthalpy_before).scaled(per_atom, "meV/atom")
    h_after = (two.enthalpy_after - one.enthalpy_after).scaled(per_atom, "meV/atom")
    temperature = loss.options.temperature
    t_before, note_before = transition_temperature(
        temperature, loss.initial, entropy_difference(temperature, loss.initial, h_before)
    )
    t_after, note_after = transition_temperature(
        temperature, after, entropy_difference(temperature, after, h_after)
    )
    notes = [f"{when}: {note}" for when, note in (("before", note_before), ("after", note_after)) if note]
    return Transition(
        name=loss.name,
        from_=loss.options.from_,
        to=loss.options.to,
        n_atoms=n_atoms,
        temperature_K=temperature,
        pressure_GPa=loss.options.pressure,
        target=loss.target.value,
        before=loss.initial,
        after=after,
        delta_h_before=h_before,
        delta_h_after=h_after,
        transition_before=t_before,
        transition_after=t_after,
        notes=(*notes, *one.verdicts, *two.verdicts),
    )
