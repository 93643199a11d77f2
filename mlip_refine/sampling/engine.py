"""Batched molecular dynamics: all replicas of all state points step together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch_sim as ts
from ase import Atoms
from torch import Tensor
from torch_sim.integrators import (
    npt_langevin_anisotropic_init,
    npt_langevin_anisotropic_step,
    npt_langevin_isotropic_init,
    npt_langevin_isotropic_step,
    nvt_langevin_init,
    nvt_langevin_step,
)
from torch_sim.units import MetalUnits

from mlip_refine.errors import SamplingError
from mlip_refine.potential import Potential
from mlip_refine.progress import Ticker
from mlip_refine.quantities import GPA, KB
from mlip_refine.sampling.forcefield import ForceField
from mlip_refine.sampling.guards import AVERAGING_TIME, GuardSettings, PhaseGuard, nearest_neighbour_distance
from mlip_refine.sampling.state_points import StatePoint, Trajectory

FS = 1e-3 * float(MetalUnits.time)

INTEGRATORS: dict[tuple[str, str], tuple[Any, Any]] = {
    ("nvt", "isotropic"): (nvt_langevin_init, nvt_langevin_step),
    ("npt", "isotropic"): (npt_langevin_isotropic_init, npt_langevin_isotropic_step),
    ("npt", "anisotropic"): (npt_langevin_anisotropic_init, npt_langevin_anisotropic_step),
}


@dataclass(frozen=True)
class MDSettings:
    """How trajectories are integrated.

    Attributes:
        timestep: fs.
        friction: Langevin friction of the atoms, 1/ps.
        interval: Time between stored frames, fs.
        barostat_time: Relaxation time of the cell in NPT, fs.
        guards: When a system is stopped.
    """

    timestep: float = 2.0
    friction: float = 5.0
    interval: float = 100.0
    barostat_time: float = 200.0
    guards: GuardSettings = field(default_factory=GuardSettings)

    def steps(self, time: float) -> int:
        """Steps that a time in fs takes, at least one."""
        return max(1, round(time / self.timestep))


@dataclass
class _Recorder:
    positions: list[Tensor] = field(default_factory=list)
    cells: list[Tensor] = field(default_factory=list)
    model_energy: list[Tensor] = field(default_factory=list)
    bias_energy: list[Tensor] = field(default_factory=list)
    stress: list[Tensor] = field(default_factory=list)


class MolecularDynamics:
    """One batch of systems of one ensemble kind, stepped together, each at its own temperature.

    Replica r of a point is a system of its own. A system that becomes non-finite, overheats or leaves its
    phase is stopped: it is set back to its lattice sites, its replica is not kept, and the others go on.
    """

    def __init__(
        self,
        potential: Potential,
        points: Sequence[StatePoint],
        settings: MDSettings,
        seed: int,
        start: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Set up the batch.

        Args:
            potential: A frozen copy (see `Potential.frozen_copy`).
            points: State points of one ensemble kind and cell freedom.
            settings: How to integrate.
            seed: Of momenta and thermostat noise.
            start: Positions `[replicas, n_atoms, 3]` and cells `[replicas, 3, 3]` (rows) by point name.

        Raises:
            SamplingError: If the points mix ensemble kinds.
        """
        self.points, self.settings, self.step = tuple(points), settings, 0
        self._systems = [(p, r) for p in points for r in range(p.replicas)]
        self._kind = _common_kind(points)
        atoms = [_started(p, r, start) for p, r in self._systems]
        self.forcefield = ForceField(
            potential, [p.hamiltonian for p, _ in self._systems], [len(a) for a in atoms]
        )
        self.forcefield.compute_stress = self._kind[0] == "npt"
        state = ts.io.atoms_to_state(atoms, potential.device, potential.dtype)
        state.rng = seed
        real: dict[str, Any] = {"device": potential.device, "dtype": potential.dtype}
        self._kt = torch.tensor([KB * p.temperature for p, _ in self._systems], **real)
        self._arguments = self._step_arguments(real)
        self.state = INTEGRATORS[self._kind][0](state, self.forcefield, **self._init_arguments(state))
        sites = np.concatenate([p.atoms.get_scaled_positions(wrap=False) for p, _ in self._systems])
        self._scaled_sites = torch.tensor(sites, **real)
        self._home = [p.atoms.positions for p, _ in self._systems]
        window = settings.steps(AVERAGING_TIME)
        self._guard = PhaseGuard(self._scaled_sites, self.state.masses, self.state.system_idx, window)
        self._bond = torch.tensor([nearest_neighbour_distance(p.atoms) for p, _ in self._systems], **real)
        self.stopped: dict[int, str] = {}

    def _step_arguments(self, real: dict[str, Any]) -> dict[str, Any]:
        arguments: dict[str, Any] = {"dt": torch.tensor(self.settings.timestep * FS, **real), "kT": self._kt}
        if self._kind[0] == "nvt":
            return arguments | {"gamma": torch.tensor(self.settings.friction * 1e-3 / FS, **real)}
        pressure = torch.tensor([p.pressure * GPA for p, _ in self._systems], **real)
        anisotropic = self._kind[1] == "anisotropic"
        return arguments | {"external_pressure": pressure[:, None].expand(-1, 3) if anisotropic else pressure}

    def _init_arguments(self, state: ts.SimState) -> dict[str, Any]:
        """torch-sim's NPT frictions are in mass per time, of the atoms and of the cell."""
        if self._kind[0] == "nvt":
            return {"kT": self._kt}
        n_atoms = torch.bincount(state.system_idx).to(self._kt)
        mass = torch.zeros_like(n_atoms).index_add_(0, state.system_idx, state.masses) / n_atoms
        b_tau = torch.full_like(n_atoms, self.settings.barostat_time * FS)
        return {
            "kT": self._kt,
            "dt": self._arguments["dt"],
            "alpha": self.settings.friction * 1e-3 / FS * mass,
            "cell_alpha": (n_atoms + 1) * self._kt * b_tau,
            "b_tau": b_tau,
        }

    def advance(self, steps: int, tick: Ticker | None = None) -> None:
        """Take steps without recording."""
        for _ in range(steps):
            self._step()
            if tick:
                tick(self.step)

    def record(self, n_frames: int, tick: Ticker | None = None) -> dict[str, Trajectory]:
        """Take `n_frames` intervals and return the frame at the end of each, by point name.

        A run that goes on from a `snapshot` of the last record gives the same bits as one that never stopped.
        """
        self.forcefield.forget_neighbours()
        self._guard.reset()
        recorder, interval = _Recorder(), self.settings.steps(self.settings.interval)
        for _ in range(n_frames):
            self.advance(interval - 1, tick)
            self.forcefield.compute_stress = True
            self.advance(1, tick)
            self._take(recorder)
            self.forcefield.compute_stress = self._kind[0] == "npt"
        self._check(None)
        return self._trajectories(recorder)

    def _step(self) -> None:
        self.state = INTEGRATORS[self._kind][1](self.state, self.forcefield, **self._arguments)
        self.step += 1
        displaced = self._guard.add(self.state.positions, self.forcefield.cell)
        if displaced is not None or self.step % self.settings.guards.check_interval == 0:
            self._check(displaced)

    def _check(self, displaced: Tensor | None) -> None:
        guards = self.settings.guards
        hot = self.state.calc_kT() / self._kt
        verdicts = [(self.forcefield.failed, "its energy, forces, positions or cell became non-finite")]
        verdicts.append((hot > guards.max_temperature_ratio, "it overheated"))
        if displaced is not None:
            left = displaced > guards.max_displacement * self._bond
            verdicts.append((left, "it left its lattice sites: another phase, or a slip to equivalent sites"))
        for flags, reason in verdicts:
            for i in flags.nonzero().flatten().tolist():
                self._stop(i, reason)

    def _stop(self, system: int, reason: str) -> None:
        point, replica = self._systems[system]
        self.stopped.setdefault(
            system, f"{point.name}, replica {replica}, step {self.step}: stopped, {reason}"
        )
        atoms = self.state.system_idx == system
        self.state.positions[atoms] = torch.as_tensor(self._home[system]).to(self.state.positions)
        self.state.momenta[atoms] = 0.0
        if self._kind[0] == "npt":
            self.state.cell_positions[system] = 0.0
            self.state.cell_velocities[system] = 0.0
            self.state.cell[system] = self.state.reference_cell[system]
        self.forcefield.clear()

    def _take(self, recorder: _Recorder) -> None:
        recorder.positions.append(self.state.positions.double().cpu())
        recorder.cells.append(self.state.row_vector_cell.double().cpu())
        recorder.model_energy.append(self.forcefield.model_energy.double().cpu())
        recorder.bias_energy.append(self.forcefield.bias_energy.double().cpu())
        recorder.stress.append(self.forcefield.stress.double().cpu())

    def _trajectories(self, recorder: _Recorder) -> dict[str, Trajectory]:
        positions = torch.stack(recorder.positions)
        per_system = {
            name: torch.stack(getattr(recorder, name)).transpose(0, 1)
            for name in ("cells", "model_energy", "bias_energy", "stress")
        }
        result, system, atom = {}, 0, 0
        for point in self.points:
            n, systems = len(point.atoms), slice(system, system + point.replicas)
            block = positions[:, atom : atom + n * point.replicas]
            result[point.name] = Trajectory(
                point=point,
                positions=block.view(len(block), point.replicas, n, 3).transpose(0, 1).contiguous(),
                **{name: value[systems].contiguous() for name, value in per_system.items()},
                kept=torch.tensor(
                    [[i not in self.stopped] * len(block) for i in range(systems.start, systems.stop)]
                ),
                verdicts=tuple(
                    v for i, v in sorted(self.stopped.items()) if v and systems.start <= i < systems.stop
                ),
            )
            system, atom = systems.stop, atom + n * point.replicas
        return result

    def snapshot(self) -> dict[str, Tensor]:
        """Everything that continues this run: restore it with `restore`."""
        names = (
            "positions",
            "momenta",
            "forces",
            "energy",
            "cell",
            "stress",
            "cell_positions",
            "cell_velocities",
        )
        saved = {name: getattr(self.state, name).clone() for name in names if hasattr(self.state, name)}
        stopped = [i in self.stopped for i in range(len(self._systems))]
        return saved | {
            "generator": self.state.rng.get_state(),
            "step": torch.tensor(self.step),
            "stopped": torch.tensor(stopped),
        }

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from a snapshot of a batch of the same points."""
        for name, value in saved.items():
            if name not in ("generator", "step", "stopped"):
                setattr(self.state, name, value.to(getattr(self.state, name)))
        self.state.rng.set_state(saved["generator"])
        self.step = int(saved["step"])
        # What happened to them is told by the segment in which it did.
        self.stopped = {int(i): "" for i in saved["stopped"].nonzero().flatten()}


def _common_kind(points: Sequence[StatePoint]) -> tuple[str, str]:
    kinds = {(p.ensemble, p.cell_freedom if p.ensemble == "npt" else "isotropic") for p in points}
    if len(kinds) != 1:
        raise SamplingError(f"a batch holds one kind of ensemble, not {sorted(kinds)}")
    return kinds.pop()


def _started(point: StatePoint, replica: int, start: Mapping[str, tuple[Tensor, Tensor]] | None) -> Atoms:
    atoms: Atoms = point.atoms.copy()
    if start and point.name in start:
        positions, cells = start[point.name]
        atoms.set_cell(cells[replica % len(cells)].numpy())
        atoms.positions = positions[replica % len(positions)].numpy()
    return atoms
