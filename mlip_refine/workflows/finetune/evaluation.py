"""The evaluation: both potentials are sampled afresh, each in its own cell at the wanted pressure.

ΔG_after = ΔG_before + [G_θ - G_θ0] of phase II - [G_θ - G_θ0] of phase I, each change by BAR between fresh
ensembles. The two cells of a phase differ, so configurations are carried from one to the other affinely, with
the Jacobian N ln(V1/V0) in the work (targeted free-energy perturbation, Jarzynski 2002): exact for any pair
of cells.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlip_refine.losses import EnsembleSource, FreeEnergyDifference
from mlip_refine.potential import Acceleration, Potential
from mlip_refine.quantities import GPA, KB, MEV, Measured
from mlip_refine.sampling import FrameStore, Length, MDSettings, StatePoint, Trajectory, sample
from mlip_refine.statistics import (
    bar_estimate,
    entropy_difference,
    require_estimate,
    transition_temperature,
)
from mlip_refine.training.tracker import stage_seed
from mlip_refine.workflows.finetune.records import Transition
from mlip_refine.workflows.free_energy.cells import CellSettings, equilibrate_cells


@dataclass(frozen=True)
class EvaluationSettings:
    """How both potentials are sampled afresh.

    Attributes:
        replicas: Independent copies of every phase.
        md: Integrator settings.
        length: Length of each run.
        cells: How the cell of each phase is found under the refined potential.
        seed: Random seed, another than that of the training.
        dtype: Precision of the dynamics.
        accelerate: How forces are computed (see `Potential.frozen_copy`).
    """

    replicas: int
    md: MDSettings
    length: Length
    cells: CellSettings
    seed: int
    dtype: str
    accelerate: Acceleration


@dataclass(frozen=True)
class PhaseChange:
    """What the refinement changed for one phase at one state.

    Attributes:
        change: G_θ - G_θ0 of the whole cell, eV.
        enthalpy_before: U + PV of the whole cell under the initial potential, eV.
        enthalpy_after: U + PV of the whole cell under the refined potential, eV.
        overlap: Overlap of the two ensembles, 1 if they are equal.
        cell_before: Cell under the initial potential, rows in Å.
        cell_after: Cell under the refined potential, rows in Å.
        verdicts: Reports of replicas that were stopped.
    """

    change: Measured
    enthalpy_before: Measured
    enthalpy_after: Measured
    overlap: float
    cell_before: list[list[float]]
    cell_after: list[list[float]]
    verdicts: tuple[str, ...]


def phase_changes(
    before: Potential,
    after: Potential,
    points: Mapping[EnsembleSource, StatePoint],
    settings: EvaluationSettings,
    store: FrameStore,
) -> dict[EnsembleSource, PhaseChange]:
    """Sample both potentials with new seeds and measure G_θ - G_θ0 of every phase and state.

    Args:
        before: The initial potential, frozen.
        after: The refined potential, frozen.
        points: State points in the cells of the initial potential.
        settings: How to sample.
        store: Where frames are kept.

    Raises:
        StatisticsError: If the two ensembles of a phase overlap too little.
        SamplingError: If a phase does not survive under one of the potentials.
    """
    starting = {p.name: replace(p, replicas=settings.replicas, ensemble="nvt") for p in points.values()}
    copies = {
        name: potential.frozen_copy(settings.dtype, settings.accelerate)
        for name, potential in (("before", before), ("after", after))
    }
    moved = equilibrate_cells(
        copies["after"],
        list(starting.values()),
        settings.cells,
        seed=stage_seed(settings.seed, "cells-after"),
        stage="cells-after",
        store=store,
    )
    runs = {
        name: sample(
            copies[name],
            list(own.values()),
            settings.md,
            settings.length,
            seed=stage_seed(settings.seed, name),
            stage=f"evaluation-{name}",
            store=store,
        )
        for name, own in (("before", starting), ("after", moved))
    }
    return {s: phase_change(before, after, *(runs[k][s.name] for k in ("before", "after"))) for s in points}


def phase_change(before: Potential, after: Potential, run0: Trajectory, run1: Trajectory) -> PhaseChange:
    """Return G_θ - G_θ0 of a phase by BAR, between its cell under one potential and under the other.

    Args:
        before: The initial potential.
        after: The refined one.
        run0: Frames of the initial potential.
        run1: Frames of the refined potential.

    Raises:
        StatisticsError: If the two ensembles overlap too little.
    """
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
    require_estimate(estimate, f"G(refined) - G(initial) of {run0.point.name}")
    enthalpies = []
    for energy, run in ((own0, run0), (own1, run1)):
        se = float(energy.std()) / (run.n_kept / run.inefficiency(energy)) ** 0.5
        enthalpies.append(Measured(float(energy.mean()) + run.point.pv, se, "eV"))
    kt = KB * run0.point.temperature
    return PhaseChange(
        change=Measured(float(estimate.value) * kt, estimate.se * kt, "eV"),
        enthalpy_before=enthalpies[0],
        enthalpy_after=enthalpies[1],
        overlap=estimate.overlap,
        cell_before=cell0.tolist(),
        cell_after=cell1.tolist(),
        verdicts=run0.verdicts + run1.verdicts,
    )


def _energies(potential: Potential, run: Trajectory, cell: Tensor | None = None) -> Tensor:
    """Return the energies `[n]`, eV, of the kept frames, carried affinely into `cell` if it is given."""
    positions, cells = run.positions[run.kept], run.cells[run.kept]
    if cell is not None:
        deformation = torch.linalg.solve(torch.from_numpy(run.point.atoms.cell.array.copy()), cell)
        positions, cells = positions @ deformation, cell.expand_as(cells)
    return potential.energies(potential.graphs.frames(positions, cells, run.point.atoms.numbers))


def transition(
    loss: FreeEnergyDifference,
    changes: Mapping[EnsembleSource, PhaseChange],
    n_atoms: Sequence[int],
    convention: str,
) -> Transition:
    """Return ΔG of a loss before and after, on its initial value as anchor.

    Args:
        loss: The loss.
        changes: G_θ - G_θ0 of its sources.
        n_atoms: Atoms of the cells of both phases; changes per atom are those of large systems as far as the
            finite-size terms stay what they are.
        convention: What its initial value is of.
    """
    one, two = (changes[s] for s in loss.sources)
    n_one, n_two = n_atoms

    def per_atom(of_one: Measured, of_two: Measured) -> Measured:
        """Return the difference of two cells, eV, per atom."""
        mine, other = (x.scaled(1 / (MEV * n), "meV/atom") for x, n in ((of_one, n_one), (of_two, n_two)))
        return other - mine

    after = loss.initial + per_atom(one.change, two.change)
    h_before = per_atom(one.enthalpy_before, two.enthalpy_before)
    h_after = per_atom(one.enthalpy_after, two.enthalpy_after)
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
        n_atoms=n_one,
        n_atoms_to=n_two,
        convention=convention,
        temperature_K=temperature,
        pressure_GPa=loss.options.pressure,
        target=Measured(loss.target.value, loss.target.uncertainty, loss.target.unit),
        before=loss.initial,
        after=after,
        delta_h_before=h_before,
        delta_h_after=h_after,
        transition_before=t_before,
        transition_after=t_after,
        notes=(*notes, *one.verdicts, *two.verdicts),
    )
