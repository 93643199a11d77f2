"""The engine against what it cannot do without: the bare model."""

from dataclasses import replace

from ase import Atoms

from mlip_refine.potential import Acceleration, Graphs, Potential
from mlip_refine.sampling import MolecularDynamics
from mlip_refine.workflows.bench.records import Outcome
from mlip_refine.workflows.bench.subject import Effort, Subject
from mlip_refine.workflows.bench.timing import Side, compare, repeat, repetitions
from mlip_refine.workflows.bench.workloads import Workload

SEED = 1
UNIT = "atom·steps/s"


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
    return replace(pairs.outcome(pairs.time_ratio, details), ran=frozen.backend)


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
