"""Batched molecular dynamics: all replicas of all state points step together."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ase import Atoms
from torch import Tensor, tensor

from mlip_refine.potential import Potential
from mlip_refine.progress import Ticker
from mlip_refine.sampling.md.forcefield import ForceField
from mlip_refine.sampling.md.integrators import Integrator
from mlip_refine.sampling.md.noise import NoiseStreams, stream_key
from mlip_refine.sampling.md.settings import MDSettings, batch_controls, resolved, timesteps
from mlip_refine.sampling.md.state import BatchState
from mlip_refine.sampling.monitoring.monitor import Failure, Watch
from mlip_refine.sampling.monitoring.recorder import Recorder
from mlip_refine.sampling.state_points import StatePoint, Trajectory


class MolecularDynamics:
    """One batch of systems stepped together, each in its own ensemble at its own temperature and pressure.

    Replica r of a point is a system of its own. What happens to a system depends on itself, its name and the
    seed alone, not on what else is in the batch.

    Attributes:
        points: With the time step, friction and barostat time that each has.
        step: Steps taken.
        state: A torch-sim state of all systems, changed in place.
    """

    def __init__(
        self,
        potential: Potential,
        points: Sequence[StatePoint],
        settings: MDSettings,
        seed: int,
        start: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        on_failure: Callable[[Failure], None] | None = None,
    ) -> None:
        """Set up the batch.

        Args:
            potential: A frozen copy (see `Potential.frozen_copy`).
            points: State points; their names are unique.
            settings: How to integrate.
            seed: Of momenta and thermostat noise.
            start: Positions `[replicas, n_atoms, 3]` and cells `[replicas, 3, 3]` (rows) by point name.
            on_failure: Told about every system that is set back.

        Raises:
            SamplingError: For a thermostat that does not go with the ensemble.
        """
        self.points = tuple(resolved(potential, points, settings))
        self.settings, self.step = settings, 0
        systems = [(p, r) for p in self.points for r in range(p.replicas)]
        alone = [p for p, _ in systems]
        atoms = [_started(p, r, start) for p, r in systems]
        real: dict[str, Any] = {"device": potential.device, "dtype": potential.dtype}
        self.state = BatchState.from_atoms(atoms, potential.device, potential.dtype)
        rigid = all(p.freedom == "fixed" for p in self.points)
        sizes = [len(a) for a in atoms]
        self.forcefield = ForceField(potential, [p.hamiltonian for p in alone], sizes, rigid=rigid)
        self._always_stress = self.forcefield.compute_stress = not rigid
        keys = [stream_key(seed, p.name, r) for p, r in systems]
        self.integrator = Integrator(
            self.state,
            self.forcefield,
            batch_controls(potential, alone, real),
            timesteps(alone, real),
            NoiseStreams(keys, sizes, potential.dtype, potential.device),
        )
        self.integrator.draw_momenta(range(len(systems)))
        self._watch = Watch(systems, self.integrator, settings.guards, seed, on_failure)

    @property
    def timestep(self) -> float:
        """Shortest time step of the batch, fs: the one in which times are counted."""
        return min(float(p.timestep or 0.0) for p in self.points)

    def steps(self, time: float) -> int:
        """Steps that a time in fs takes, at least one."""
        return max(1, round(time / self.timestep))

    def advance(self, steps: int, tick: Ticker | None = None) -> None:
        """Take steps without recording."""
        for _ in range(steps):
            self._step(None)
            if tick:
                tick(self.step)

    def record(self, n_frames: int, tick: Ticker | None = None) -> dict[str, Trajectory]:
        """Take `n_frames` intervals and return the frame at the end of each, by point name.

        A run that goes on from a `snapshot` of the last record gives the same bits as one that never stopped.
        """
        self.forcefield.forget_neighbours()
        self._watch.equilibrated(self.step)
        recorder, interval = Recorder(len(self.state.energy)), self.steps(self.settings.interval)
        for _ in range(n_frames):
            for left in reversed(range(interval)):
                self.forcefield.compute_stress = self._always_stress or left == 0
                self._step(recorder)
                if tick:
                    tick(self.step)
            recorder.take(self.step, self.integrator, self._watch.idle(self.step))
        self._watch.finish(self.step, recorder)
        lines, self._watch.verdicts = self._verdicts(), {}
        return recorder.trajectories(self.points, lines)

    def _step(self, recorder: Recorder | None) -> None:
        self.integrator.step(self.step)
        self.step += 1
        self._watch.after_step(self.step, recorder)

    def _verdicts(self) -> list[list[str]]:
        lines, system = [], 0
        for point in self.points:
            mine = range(system, system + point.replicas)
            lines.append([line for i in mine for line in self._watch.verdicts.get(i, [])])
            system = mine.stop
        return lines

    def snapshot(self) -> dict[str, Tensor]:
        """Everything that continues this run: restore it with `restore`."""
        return self.state.snapshot() | self._watch.snapshot() | {"step": tensor(self.step)}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from a snapshot of a batch of the same points."""
        self.state.restore(saved)
        self._watch.restore(saved)
        self.step = int(saved["step"])


def _started(point: StatePoint, replica: int, start: Mapping[str, tuple[Tensor, Tensor]] | None) -> Atoms:
    atoms: Atoms = point.atoms.copy()
    if start and point.name in start:
        positions, cells = start[point.name]
        atoms.set_cell(cells[replica % len(cells)].numpy())
        atoms.positions = positions[replica % len(positions)].numpy()
    return atoms
