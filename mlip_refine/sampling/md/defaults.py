"""Time step, friction and barostat that suit a phase, from its fastest vibration."""

import math
from collections.abc import Sequence

import torch
from ase import Atoms
from torch_sim.units import MetalUnits

from mlip_refine.potential import Potential
from mlip_refine.sampling.state_points import StatePoint

FS = 1e-3 * float(MetalUnits.time)

# Parts of the shortest period in one step; BAOAB then errs by well below the anharmonic uncertainties.
STEPS_PER_PERIOD = 30.0
MAX_TIMESTEP = 5.0

# The friction that decorrelates a crystal soonest is near its typical angular frequency.
FRICTION_PER_FREQUENCY = 0.1

# Volume oscillations this much slower than the fastest vibration stay apart from it.
BAROSTAT_PERIODS = 4.0

_ITERATIONS = 15
_STEP = 0.02
_STRAIN = 0.005


def shortest_period(potential: Potential, atoms: Atoms) -> float:
    """Period of the fastest vibration of a crystal at its sites, fs; infinite if nothing holds it.

    Power iteration on the mass-weighted Hessian, its products from differences of forces.
    """
    graphs = potential.graphs.collate([potential.graphs.from_atoms(atoms)])
    masses = torch.from_numpy(atoms.get_masses()).to(graphs.positions)
    root, scale = masses.sqrt()[:, None], _STEP * math.sqrt(float(masses.min()))
    vector = torch.randn(graphs.positions.shape, generator=torch.Generator().manual_seed(1)).to(root)
    for _ in range(_ITERATIONS):
        vector = vector / vector.norm().clamp(min=1e-12)
        ends = [graphs.displaced(sign * scale * vector / root) for sign in (1, -1)]
        plus, minus = (potential.evaluate(g, ("forces",))["forces"].detach() for g in ends)
        vector = (minus - plus) / (2 * scale * root)
    curvature = float(vector.norm())
    return 2 * math.pi / math.sqrt(curvature) / FS if curvature > 0 else math.inf


def bulk_modulus(potential: Potential, point: StatePoint) -> float:
    """Bulk modulus of the static crystal under homogeneous strain, eV/Å³."""
    pressure = []
    for sign in (1.0, -1.0):
        strained = point.with_cell(point.atoms.cell.array * (1 + sign * _STRAIN)).atoms
        graphs = potential.graphs.collate([potential.graphs.from_atoms(strained)])
        stress = potential.evaluate(graphs, ("stress",))["stress"][0].detach().double()
        pressure.append(-float(stress.diagonal().mean()))
    # d ln V = 3 dε
    return (pressure[1] - pressure[0]) / (2 * 3 * _STRAIN)


def suitable_timestep(potential: Potential, crystals: Sequence[Atoms]) -> float:
    """Time step that suits the stiffest of some crystals, fs."""
    return min((timestep(shortest_period(potential, atoms)) for atoms in crystals), default=MAX_TIMESTEP)


def timestep(period: float) -> float:
    """Time step for a shortest period, fs, to two digits."""
    return float(f"{min(period / STEPS_PER_PERIOD, MAX_TIMESTEP):.2g}")


def friction(period: float) -> float:
    """Langevin friction for a shortest period in fs, 1/ps."""
    return float(f"{FRICTION_PER_FREQUENCY * 2e3 * math.pi / min(period, 1e3):.2g}")


def barostat_time(period: float) -> float:
    """Period of volume oscillations for a shortest period of the atoms, fs."""
    return float(f"{BAROSTAT_PERIODS * min(period, 500.0):.2g}")
