"""Settings of molecular dynamics, and time steps, thermostats and barostats that suit a phase."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from ase import Atoms
from torch import Tensor
from torch_sim.units import MetalUnits

from mlip_refine.errors import SamplingError
from mlip_refine.potential import Potential
from mlip_refine.quantities import GPA, KB
from mlip_refine.sampling.md.barostat import cell_mass, strain_projection
from mlip_refine.sampling.md.integrators import IntegratorSettings
from mlip_refine.sampling.monitoring.guards import GuardSettings
from mlip_refine.sampling.state_points import StatePoint

FS = 1e-3 * float(MetalUnits.time)

# Steps in the shortest period; BAOAB then errs by well below the anharmonic uncertainties.
STEPS_PER_PERIOD = 30.0
MAX_TIMESTEP = 5.0

# The friction that decorrelates a crystal soonest is near its typical angular frequency.
FRICTION_PER_FREQUENCY = 0.1

# Volume oscillations this much slower than the fastest vibration stay apart from it.
BAROSTAT_PERIODS = 4.0

# Power iterations for the shortest period, their displacement of the lightest atom, Å, and the strain for the
# bulk modulus.
_ITERATIONS = 15
_STEP = 0.02
_STRAIN = 0.005


@dataclass(frozen=True)
class MDSettings:
    """How trajectories are integrated.

    Attributes:
        timestep: Time step, fs; `None` takes a thirtieth of the fastest vibration of each phase.
        friction: Friction of the thermostat, 1/ps; `None` takes a tenth of the fastest angular frequency.
        interval: Time between stored frames, fs.
        barostat_time: Period of volume oscillations in NPT and NPH, fs; `None` takes four times the period of
            the fastest vibration.
        guards: When a system is set back.
    """

    timestep: float | None = 2.0
    friction: float | None = 5.0
    interval: float = 100.0
    barostat_time: float | None = 500.0
    guards: GuardSettings = field(default_factory=GuardSettings)


def shortest_period(potential: Potential, atoms: Atoms) -> float:
    """Return the period of the fastest vibration of a crystal at its sites, fs; infinite if nothing holds it.

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
    """Return the bulk modulus of the static crystal under homogeneous strain, eV/Å³."""
    pressure = []
    for sign in (1.0, -1.0):
        strained = point.with_cell(point.atoms.cell.array * (1 + sign * _STRAIN)).atoms
        graphs = potential.graphs.collate([potential.graphs.from_atoms(strained)])
        stress = potential.evaluate(graphs, ("stress",))["stress"][0].detach().double()
        pressure.append(-float(stress.diagonal().mean()))
    # d ln V = 3 dε
    return (pressure[1] - pressure[0]) / (2 * 3 * _STRAIN)


def suitable_timestep(potential: Potential, crystals: Sequence[Atoms]) -> float:
    """Return the time step that suits the stiffest of some crystals, fs."""
    return min((timestep(shortest_period(potential, atoms)) for atoms in crystals), default=MAX_TIMESTEP)


def timestep(period: float) -> float:
    """Return the time step for a shortest period, both fs, to two digits."""
    return float(f"{min(period / STEPS_PER_PERIOD, MAX_TIMESTEP):.2g}")


def friction(period: float) -> float:
    """Return the Langevin friction, 1/ps, for a shortest period, fs."""
    return float(f"{FRICTION_PER_FREQUENCY * 2e3 * math.pi / min(period, 1e3):.2g}")


def barostat_time(period: float) -> float:
    """Return the period of volume oscillations for a shortest period of the atoms, both fs."""
    return float(f"{BAROSTAT_PERIODS * min(period, 500.0):.2g}")


def with_time_scales(
    potential: Potential, points: Sequence[StatePoint], settings: MDSettings
) -> list[StatePoint]:
    """Return the points with the time step, friction and barostat time that each will have.

    Raises:
        SamplingError: For a thermostat or a bias that does not go with the ensemble.
    """
    periods: dict[bytes, float] = {}
    found = []
    for point in points:
        if point.thermostat == "nose_hoover" and point.ensemble != "nvt":
            raise SamplingError(f"{point.name}: a Nosé-Hoover chain goes with nvt, not with {point.ensemble}")
        bias = point.hamiltonian.bias
        if bias is not None and not bias.moves_with_cell and point.freedom != "fixed":
            raise SamplingError(
                f"{point.name}: a harmonic bias belongs to a fixed cell, not to {point.ensemble}"
            )
        given = {
            name: getattr(settings, name) if getattr(point, name) is None else getattr(point, name)
            for name in ("timestep", "friction", "barostat_time")
        }
        if None in given.values():
            atoms = point.atoms
            key = atoms.positions.tobytes() + atoms.cell.array.tobytes() + atoms.numbers.tobytes()
            if key not in periods:
                periods[key] = shortest_period(potential, atoms)
            period = periods[key]
            suitable = {
                "timestep": timestep(period),
                "friction": friction(period),
                "barostat_time": barostat_time(period),
            }
            given = {name: suitable[name] if value is None else value for name, value in given.items()}
        found.append(replace(point, **given))
    return found


def integrator_settings(
    potential: Potential, systems: Sequence[StatePoint], real: dict[str, Any]
) -> IntegratorSettings:
    """Return the time steps, thermostats and barostats of a batch.

    Args:
        potential: Potential whose bulk moduli set the inertia of the cells.
        systems: State point of every system, with its time scales (see `with_time_scales`).
        real: dtype and device of the tensors.

    Raises:
        SamplingError: For a Nosé-Hoover chain without friction.
    """

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, **real)

    kt = column([KB * p.temperature for p in systems])
    friction, cell_friction, chain_time = [], [], []
    for point in systems:
        rate = float(point.friction or 0.0) * 1e-3 / FS
        friction.append(rate if point.langevin else 0.0)
        # A cell that forgets its velocity in about one radian is well damped, and decorrelates soon.
        period = float(point.barostat_time or 0.0) * FS
        cell_friction.append(2 * math.pi / period if point.ensemble == "npt" else 0.0)
        # A chain relaxes in the inverse friction, as with Langevin noise.
        chained = point.thermostat == "nose_hoover" and point.ensemble == "nvt"
        if chained and not point.friction:
            raise SamplingError(
                f"{point.name}: a Nosé-Hoover chain relaxes in 1/friction; give a friction above 0"
            )
        chain_time.append(1e3 * FS / point.friction if chained and point.friction else math.inf)
    moduli: dict[str, float] = {}
    for point in systems:
        if point.freedom != "fixed" and point.name not in moduli:
            moduli[point.name] = bulk_modulus(potential, point)
    mass = cell_mass(
        column([float(p.atoms.cell.volume) for p in systems]),
        column([moduli.get(p.name, 0.0) for p in systems]),
        column([float(len(p.atoms)) for p in systems]),
        kt,
        column([float(p.barostat_time or 1.0) * FS for p in systems]),
    )
    return IntegratorSettings(
        timestep=column([float(p.timestep or 0.0) * FS for p in systems]),
        kt=kt,
        friction=column(friction),
        pressure=column([p.pressure * GPA for p in systems]),
        projection=torch.stack([strain_projection(p.freedom) for p in systems]).to(**real),
        cell_mass=mass.clamp(min=1e-12),
        cell_friction=column(cell_friction),
        chain_time=column(chain_time),
        conserves_momentum=torch.tensor([not p.langevin for p in systems], device=real["device"]),
    )
