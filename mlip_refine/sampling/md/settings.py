"""From state points to what drives their systems: time steps, thermostats and barostats."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from ase import Atoms
from torch import Tensor

from mlip_refine.errors import SamplingError
from mlip_refine.potential import Potential
from mlip_refine.quantities import GPA, KB
from mlip_refine.sampling.md import defaults
from mlip_refine.sampling.md.barostat import cell_mass, strain_projection
from mlip_refine.sampling.md.defaults import FS
from mlip_refine.sampling.md.integrators import Controls
from mlip_refine.sampling.monitoring.guards import GuardSettings
from mlip_refine.sampling.state_points import StatePoint


@dataclass(frozen=True)
class MDSettings:
    """How trajectories are integrated.

    Attributes:
        timestep: fs; `None` takes a thirtieth of the fastest vibration of each phase.
        friction: Of the thermostat of the atoms, 1/ps; `None` takes a tenth of its angular frequency.
        interval: Time between stored frames, fs.
        barostat_time: Period of volume oscillations in NPT and NPH, fs; `None` takes four of its periods.
        guards: When a system is set back.
    """

    timestep: float | None = 2.0
    friction: float | None = 5.0
    interval: float = 100.0
    barostat_time: float | None = 500.0
    guards: GuardSettings = field(default_factory=GuardSettings)


def resolved(potential: Potential, points: Sequence[StatePoint], settings: MDSettings) -> list[StatePoint]:
    """The points with the time step, friction and barostat time that each will have.

    Raises:
        SamplingError: For a thermostat that does not go with the ensemble.
    """
    periods: dict[bytes, float] = {}
    return [_resolved(potential, p, settings, periods) for p in points]


def _resolved(
    potential: Potential, point: StatePoint, settings: MDSettings, periods: dict[bytes, float]
) -> StatePoint:
    if point.thermostat == "nose_hoover" and point.ensemble != "nvt":
        raise SamplingError(f"{point.name}: a Nosé-Hoover chain goes with nvt, not with {point.ensemble}")
    if point.hamiltonian.bias is not None and point.freedom != "fixed":
        raise SamplingError(f"{point.name}: a harmonic bias belongs to a fixed cell, not to {point.ensemble}")
    values = {
        name: getattr(point, name) if getattr(point, name) is not None else getattr(settings, name)
        for name in ("timestep", "friction", "barostat_time")
    }
    for name in (n for n, v in values.items() if v is None):
        values[name] = getattr(defaults, name)(_period(potential, point.atoms, periods))
    return replace(point, **values)


def _period(potential: Potential, atoms: Atoms, known: dict[bytes, float]) -> float:
    key = atoms.positions.tobytes() + atoms.cell.array.tobytes() + atoms.numbers.tobytes()
    if key not in known:
        known[key] = defaults.shortest_period(potential, atoms)
    return known[key]


def timesteps(systems: Sequence[StatePoint], real: dict[str, Any]) -> Tensor:
    """Time steps of systems with resolved points `[n_systems]`, torch-sim time."""
    return torch.tensor([float(p.timestep or 0.0) * FS for p in systems], **real)


def batch_controls(potential: Potential, systems: Sequence[StatePoint], real: dict[str, Any]) -> Controls:
    """Thermostats and barostats of a batch.

    Args:
        potential: Whose bulk moduli set the inertia of the cells.
        systems: Resolved point of every system.
        real: dtype and device of the tensors.
    """

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, **real)

    kt = column([KB * p.temperature for p in systems])
    langevin = [p.langevin for p in systems]
    friction = [float(p.friction or 0.0) * 1e-3 / FS * on for p, on in zip(systems, langevin, strict=True)]
    period = [float(p.barostat_time or 0.0) * FS for p in systems]
    # A cell that forgets its velocity in about one radian is well damped, and decorrelates soon.
    moving = [p.ensemble == "npt" for p in systems]
    cell_friction = [2 * math.pi / t if on else 0.0 for t, on in zip(period, moving, strict=True)]
    chained = [p.thermostat == "nose_hoover" and p.ensemble == "nvt" for p in systems]
    chain = [_chain_time(p) if on else math.inf for p, on in zip(systems, chained, strict=True)]
    return Controls(
        kt=kt,
        friction=column(friction),
        pressure=column([p.pressure * GPA for p in systems]),
        projection=torch.stack([strain_projection(p.freedom) for p in systems]).to(**real),
        cell_mass=_cell_masses(potential, systems, real),
        cell_friction=column(cell_friction),
        chain_time=column(chain),
        conserves_momentum=torch.tensor([not on for on in langevin], device=real["device"]),
    )


def _chain_time(point: StatePoint) -> float:
    """Relaxation time of a chain, torch-sim time: the inverse friction, as for Langevin noise."""
    if not point.friction:
        raise SamplingError(
            f"{point.name}: a Nosé-Hoover chain relaxes in 1/friction; give a friction above 0"
        )
    return 1e3 * FS / point.friction


def _cell_masses(potential: Potential, systems: Sequence[StatePoint], real: dict[str, Any]) -> Tensor:
    moduli: dict[str, float] = {}
    for point in systems:
        if point.freedom != "fixed" and point.name not in moduli:
            moduli[point.name] = defaults.bulk_modulus(potential, point)
    columns = [
        (float(p.atoms.cell.volume), moduli.get(p.name, 0.0), float(len(p.atoms)), KB * p.temperature)
        for p in systems
    ]
    volume, modulus, n_atoms, kt = torch.tensor(columns, **real).T
    period = torch.tensor([float(p.barostat_time or 1.0) * FS for p in systems], **real)
    mass = cell_mass(volume, modulus, n_atoms, kt, period)
    return mass.clamp(min=1e-12)
