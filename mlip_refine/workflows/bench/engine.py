"""The engine against the bare model, which it cannot do without, and against ASE, system after system."""

import numpy as np
import torch
from ase import Atoms, units
from ase.md.langevin import Langevin

from mlip_refine.potential import Acceleration, Graphs, Potential, ase_calculator
from mlip_refine.sampling import MolecularDynamics
from mlip_refine.workflows.bench.records import Outcome
from mlip_refine.workflows.bench.timing import Side, compare, repeat, repetitions
from mlip_refine.workflows.bench.workloads import Effort, Subject, Workload

SEED = 1
UNIT = "atom·steps/s"

# Where the engine chooses its own for every phase, fs and 1/ps.
TIMESTEP, FRICTION = 2.0, 5.0

# Steps of either side in a block, at least.
_STEPS = 2


def engine_against_model(
    subject: Subject, workload: Workload, effort: Effort, accelerate: Acceleration = "none"
) -> Outcome:
    """Time steps of the engine against energies and forces alone of the same systems.

    The bare model has its neighbours given: the exact ones of the engine's frame at the start of every pair
    of blocks. In NPT it computes the stress as well, as every step needs it.
    """
    frozen, n_atoms = subject.frozen(accelerate), workload.n_atoms
    dynamics = MolecularDynamics.prepare(frozen, workload.points, workload.settings, SEED)
    dynamics.advance(effort.equilibration)
    npt = workload.points[0].ensemble == "npt"
    probes = ("energy", "forces", "stress") if npt else ("energy", "forces")
    graphs = current_graphs(frozen, workload, dynamics)

    def refresh() -> None:
        nonlocal graphs
        graphs = current_graphs(frozen, workload, dynamics)
        frozen.evaluate_chunked(graphs, probes)

    def evaluate() -> None:
        frozen.evaluate_chunked(graphs, probes)

    steps = repetitions(lambda: dynamics.advance(1), frozen.device, effort.block, effort.steps)
    pairs = compare(
        Side(lambda: dynamics.advance(steps), steps * n_atoms),
        Side(lambda: repeat(evaluate, steps), steps * n_atoms),
        effort,
        frozen.device,
        UNIT,
        prepare=refresh,
    )
    details = {"edges": graphs.edge_index.shape[1], "steps_per_block": steps}
    return pairs.outcome(pairs.time_ratio, details).model_copy(update={"ran": frozen.backend})


def current_frames(workload: Workload, dynamics: MolecularDynamics) -> list[Atoms]:
    """The engine's systems as they are now."""
    crystals = workload.crystals
    frames = dynamics.state.positions.double().cpu().split([len(a) for a in crystals])
    cells = dynamics.state.row_vector_cell.double().cpu()
    return [
        Atoms(crystal.numbers, positions.numpy(), cell=cell.numpy(), pbc=True)
        for crystal, positions, cell in zip(crystals, frames, cells, strict=True)
    ]


def current_graphs(potential: Potential, workload: Workload, dynamics: MolecularDynamics) -> Graphs:
    """The engine's systems as a batch with exact neighbours, edges sorted by receiver."""
    frames = current_frames(workload, dynamics)
    return potential.graphs.collate([potential.graphs.from_atoms(atoms) for atoms in frames])


def engine_against_ase(subject: Subject, workload: Workload, effort: Effort) -> Outcome:
    """Time Langevin dynamics in the engine and in ASE, from the same frames in the same precision.

    ASE runs MACE's own calculator of the saved potential, as its users do; one block takes every system the
    same number of steps further.
    """
    frozen = subject.frozen()
    dynamics = MolecularDynamics.prepare(frozen, workload.points, workload.settings, SEED)
    dynamics.advance(effort.equilibration)
    default = torch.get_default_dtype()
    try:
        runs = _ase_runs(subject, workload, current_frames(workload, dynamics))
        steps = repetitions(lambda: dynamics.advance(1), frozen.device, effort.block, _STEPS)
        ase_steps = repetitions(lambda: _advance(runs, 1), frozen.device, effort.block, _STEPS)
        pairs = compare(
            Side(lambda: dynamics.advance(steps), steps * workload.n_atoms),
            Side(lambda: _advance(runs, ase_steps), ase_steps * workload.n_atoms),
            effort,
            frozen.device,
            UNIT,
        )
    finally:
        # MACE's calculator changes it for the whole process.
        torch.set_default_dtype(default)
    return pairs.outcome(pairs.speed_ratio, {"steps_per_block": steps, "ase_steps_per_block": ase_steps})


def _ase_runs(subject: Subject, workload: Workload, frames: list[Atoms]) -> list[Langevin]:
    """Dynamics of every frame, each with a calculator of its own, as separate runs have it."""
    temperatures = [p.temperature for p in workload.points for _ in range(p.replicas)]
    settings = workload.settings
    runs = []
    for i, (atoms, temperature) in enumerate(zip(frames, temperatures, strict=True)):
        atoms.calc = ase_calculator(subject.potential, default_dtype=subject.dtype)
        rng = np.random.default_rng(i)
        spread = np.sqrt(units.kB * temperature * atoms.get_masses())[:, None]
        atoms.set_momenta(rng.normal(size=(len(atoms), 3)) * spread)
        runs.append(
            Langevin(
                atoms,
                timestep=(settings.timestep or TIMESTEP) * units.fs,
                temperature_K=temperature,
                friction=(settings.friction or FRICTION) * 1e-3 / units.fs,
                fixcm=False,
                rng=rng,
            )
        )
    return runs


def _advance(runs: list[Langevin], steps: int) -> None:
    for run in runs:
        run.run(steps)
