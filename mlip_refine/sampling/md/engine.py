"""Batched molecular dynamics: all replicas of all state points step together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Self

import torch
from ase import Atoms
from torch import Tensor, tensor

from mlip_refine.potential import Potential
from mlip_refine.progress import Ticker
from mlip_refine.sampling.md.forcefield import ForceField
from mlip_refine.sampling.md.integrators import Integrator
from mlip_refine.sampling.md.noise import NoiseStreams, stream_key
from mlip_refine.sampling.md.settings import MDSettings, integrator_settings, with_time_scales
from mlip_refine.sampling.md.state import BatchState
from mlip_refine.sampling.monitoring.monitor import Failure, Monitor
from mlip_refine.sampling.state_points import StatePoint, Trajectory


@dataclass
class Recording:
    """Frames of a segment that is under way.

    Attributes:
        first: Step at which the segment began.
        steps: Steps at which frames were taken.
        frames: Series of every frame, of all systems, on the CPU in float64.
        kept: Systems whose state is a frame `[n_systems]`, by frame.
    """

    first: int
    steps: list[int] = field(default_factory=list)
    frames: list[dict[str, Tensor]] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)

    def add(self, step: int, present: Mapping[str, Tensor], kept: Tensor) -> None:
        """Add copies of the present tensors as a frame: the dynamics goes on in place."""
        self.steps.append(step)
        self.frames.append({k: v.detach().to("cpu", torch.float64, copy=True) for k, v in present.items()})
        self.kept.append(kept)

    def snapshot(self) -> dict[str, Tensor]:
        """Return what `restored` goes on from."""
        series = {k: torch.stack([frame[k] for frame in self.frames]) for k in chain(*self.frames[:1])}
        kept = {"kept": torch.stack(self.kept)} if self.kept else {}
        return series | kept | {"first": tensor(self.first), "steps": tensor(self.steps, dtype=torch.long)}

    @classmethod
    def restored(cls, saved: Mapping[str, Tensor]) -> Self:
        """Go on from a snapshot."""
        steps = saved["steps"].tolist()
        series = {k: v for k, v in saved.items() if k not in ("first", "steps", "kept")}
        frames = [{k: v[i] for k, v in series.items()} for i in range(len(steps))]
        return cls(int(saved["first"]), steps, frames, list(saved["kept"]) if steps else [])


class MolecularDynamics:
    """One batch of systems stepped together, each in its own ensemble at its own temperature and pressure.

    Replica r of a point is a system of its own. What happens to a system depends on itself, its name and the
    seed alone, not on what else is in the batch. `prepare` sets up a batch from a potential and state points.

    Attributes:
        points: State points with the time step, friction and barostat time that each has.
        settings: How trajectories are integrated.
        integrator: Steps the batch.
        forcefield: Computes its forces.
        state: A torch-sim state of all systems, changed in place.
        monitor: Finds faults and sets systems back.
        step: Steps taken.
        recording: Frames of the segment that is under way, if there is one.
    """

    def __init__(
        self, points: Sequence[StatePoint], settings: MDSettings, integrator: Integrator, monitor: Monitor
    ) -> None:
        """Keep the parts of a batch that is ready for its first step (see `prepare`)."""
        self.points, self.settings, self.step = tuple(points), settings, 0
        self.recording: Recording | None = None
        self.integrator, self.monitor = integrator, monitor
        self.forcefield, self.state = integrator.forcefield, integrator.state
        self._always_stress = self.forcefield.compute_stress

    @classmethod
    def prepare(
        cls,
        potential: Potential,
        points: Sequence[StatePoint],
        settings: MDSettings,
        seed: int,
        start: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        on_failure: Callable[[Failure], None] | None = None,
    ) -> Self:
        """Set up a batch: time scales, first forces and momenta.

        Args:
            potential: Frozen copy of a potential (see `Potential.frozen_copy`).
            points: State points; their names are unique.
            settings: How to integrate.
            seed: Random seed of momenta and thermostat noise.
            start: Positions `[replicas, n_atoms, 3]` and cells `[replicas, 3, 3]` (rows), Å, by point name;
                by default the ideal crystals.
            on_failure: Called with every failure of a system.

        Raises:
            SamplingError: For a thermostat or a bias that does not go with the ensemble.
        """
        points = with_time_scales(potential, points, settings)
        systems = [(p, r) for p in points for r in range(p.replicas)]
        atoms: list[Atoms] = []
        for point, replica in systems:
            crystal = point.atoms.copy()
            if start and point.name in start:
                positions, cells = start[point.name]
                crystal.set_cell(cells[replica % len(cells)].numpy())
                crystal.positions = positions[replica % len(positions)].numpy()
            atoms.append(crystal)
        alone, sizes = [p for p, _ in systems], [len(a) for a in atoms]
        rigid = all(p.freedom == "fixed" for p in points)
        forcefield = ForceField(potential, [p.hamiltonian for p in alone], sizes, rigid=rigid)
        forcefield.compute_stress, forcefield.evaluates_all = not rigid, False
        real: dict[str, Any] = {"device": potential.device, "dtype": potential.dtype}
        keys = [stream_key(seed, p.name, r) for p, r in systems]
        integrator = Integrator(
            BatchState.from_atoms(atoms, potential.device, potential.dtype),
            forcefield,
            integrator_settings(potential, alone, real),
            NoiseStreams(keys, sizes, potential.dtype, potential.device),
        )
        integrator.compute_forces()
        integrator.draw_momenta(range(len(systems)))
        return cls(
            points, settings, integrator, Monitor(systems, integrator, settings.guards, seed, on_failure)
        )

    @property
    def timestep(self) -> float:
        """Shortest time step of the batch, fs: the one in which times are counted."""
        return min(float(p.timestep or 0.0) for p in self.points)

    def steps(self, time: float) -> int:
        """Return the number of steps that a time in fs takes, at least one."""
        return max(1, round(time / self.timestep))

    def advance(self, steps: int, tick: Ticker | None = None) -> None:
        """Take steps without recording."""
        for _ in range(steps):
            self._step()
            if tick:
                tick(self.step)

    def record(self, n_frames: int, tick: Ticker | None = None) -> dict[str, Trajectory]:
        """Take `n_frames` intervals and return the frames at their ends, by point name.

        A segment that `restore` has found begun goes on. A run that goes on from a `snapshot`, of whatever
        moment, gives the same bits as one that never stopped.
        """
        if self.recording is None:
            self.forcefield.forget_neighbours()
            self.monitor.begin_segment(self.step)
            self.recording = Recording(self.step)
        recording, interval = self.recording, self.steps(self.settings.interval)
        while self.step < recording.first + n_frames * interval:
            ends_interval = (self.step + 1 - recording.first) % interval == 0
            self.forcefield.compute_stress = self._always_stress or ends_interval
            self.forcefield.evaluates_all = ends_interval
            self._step()
            if ends_interval:
                present = {
                    "positions": self.state.positions,
                    "cells": self.state.row_vector_cell,
                    "model_energy": self.forcefield.model_energy,
                    "bias_energy": self.forcefield.bias_energy,
                    "stress": self.forcefield.stress,
                    "kinetic_energy": self.integrator.kinetic(),
                }
                kept = torch.ones(len(self.state.energy), dtype=torch.bool)
                kept[self.monitor.idle(self.step)] = False
                recording.add(self.step, present, kept)
            if tick:
                tick(self.step)
        self.forcefield.evaluates_all = False
        self.monitor.finish_segment(self.step)
        kept, taken = torch.stack(recording.kept), tensor(recording.steps)
        for system, since, until in self.monitor.discarded:
            kept[(taken > since) & (taken <= until), system] = False
        trajectories = self._trajectories(recording.frames, kept.T, taken)
        self.monitor.verdicts, self.recording = {}, None
        return trajectories

    def _step(self) -> None:
        self.integrator.step(self.step)
        self.step += 1
        self.monitor.after_step(self.step)

    def _trajectories(
        self, frames: Sequence[Mapping[str, Tensor]], kept: Tensor, steps: Tensor
    ) -> dict[str, Trajectory]:
        """Cut frames of the batch into a trajectory per point; the replicas of a point are consecutive."""
        series = {name: torch.stack([frame[name] for frame in frames]) for name in frames[0]}
        positions, revoked = series.pop("positions"), self.monitor.revoked()
        result, system, atom = {}, 0, 0
        for point in self.points:
            n, systems = len(point.atoms), slice(system, system + point.replicas)
            block = positions[:, atom : atom + n * point.replicas]
            lines = [self.monitor.verdicts.get(i, []) for i in range(system, systems.stop)]
            result[point.name] = Trajectory(
                point=point,
                positions=block.view(len(block), point.replicas, n, 3).transpose(0, 1).contiguous(),
                **{name: v[:, systems].transpose(0, 1).contiguous() for name, v in series.items()},
                kept=kept[systems].clone(),
                steps=steps.clone(),
                revoked=revoked[systems].clone(),
                verdicts=tuple(chain.from_iterable(lines)),
            )
            system, atom = systems.stop, atom + n * point.replicas
        return result

    def snapshot(self, *, under_way: bool = False) -> dict[str, Tensor]:
        """Return everything that continues this run (see `restore`).

        Args:
            under_way: Whether this is the middle of an equilibration or a segment: the frames of the segment,
                its faults and where the neighbours were found then belong to it.
        """
        saved = self.state.snapshot() | self.monitor.snapshot() | {"step": tensor(self.step)}
        if under_way:
            parts = {
                "neighbours": self.forcefield.neighbours_found_at(),
                "faults": self.monitor.segment_snapshot(),
                "recording": self.recording.snapshot() if self.recording else {},
            }
            saved |= {f"{part}.{name}": v for part, values in parts.items() for name, v in values.items()}
        return saved

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from a snapshot of a batch of the same points."""
        self.state.restore(saved)
        self.monitor.restore(saved)
        self.step = int(saved["step"])
        if neighbours := _part(saved, "neighbours"):
            self.forcefield.find_neighbours_at(self.state, neighbours)
        if faults := _part(saved, "faults"):
            self.monitor.restore_segment(faults)
        if recording := _part(saved, "recording"):
            self.recording = Recording.restored(recording)


def _part(saved: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """Return the entries `PART.NAME` of a snapshot by name."""
    return {k.removeprefix(f"{part}."): v for k, v in saved.items() if k.startswith(f"{part}.")}
