"""Watching a running batch: faults are found, the system is set back, the others do not notice.

Positions averaged over 0.2 ps decide about the phase; the rolling average is judged four times in that span,
and so is the temperature. A system that passes keeps its state as the one to come back to. A system that
fails goes back to the last state that passed at least a whole average before, with new momenta and a noise
stream of its own, and all its frames since then are discarded. After a few restarts it is given up: it still
runs, because a batch of constant shape keeps the others' arithmetic as it is, but its frames do not count.
Time without a fault makes up for restarts, so that rare ones do not end a long run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from mlip_refine.sampling.md.integrators import Integrator
from mlip_refine.sampling.md.noise import stream_key
from mlip_refine.sampling.monitoring.guards import (
    AVERAGING_TIME,
    PARTS,
    Displacement,
    GuardSettings,
    RollingAverage,
    hottest,
    nearest_neighbour_distance,
)
from mlip_refine.sampling.monitoring.phase_identity import PhaseIdentity
from mlip_refine.sampling.monitoring.recorder import Recorder
from mlip_refine.sampling.monitoring.restarts import Restarts
from mlip_refine.sampling.state_points import StatePoint

# Verdicts in a row that make a departure: bcc crystals make excursions towards hcp and come back.
LASTING = PARTS

# Closer to its sites than this share of the allowed displacement no crystal is another phase: the shuffles
# from bcc to hcp and to ω move atoms by 0.14 neighbour distances (r.m.s.), the default limit is 0.2.
AT_HOME = 0.5

# A numerical fault is retried with the time step times this.
SHORTER = 0.5


@dataclass(frozen=True)
class Failure:
    """What went wrong with a system.

    Attributes:
        point: Name of the state point.
        replica: Number of the replica.
        step: When it was found.
        reason: One line.
        frames: For inspection: the last good state, averages over the last parts, and the state that failed.
    """

    point: str
    replica: int
    step: int
    reason: str
    frames: Sequence[Atoms]


@dataclass
class _Past:
    """States that passed: the newest, and the one a whole average before it; steps `[n_systems]`."""

    newest: dict[str, Tensor]
    safe: dict[str, Tensor]
    newest_step: Tensor
    safe_step: Tensor

    def snapshot(self) -> dict[str, Tensor]:
        states = {"newest": self.newest, "safe": self.safe}
        copies = {f"{k}.{name}": v.clone() for k, state in states.items() for name, v in state.items()}
        return copies | {"newest.step": self.newest_step.clone(), "safe.step": self.safe_step.clone()}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        for kind, state in (("newest", self.newest), ("safe", self.safe)):
            for name, value in state.items():
                value.copy_(saved[f"{kind}.{name}"])
        self.newest_step, self.safe_step = saved["newest.step"].clone(), saved["safe.step"].clone()


@dataclass
class Watch:
    """Guards a batch; `after_step` is called after every step.

    Attributes:
        systems: Point and replica of every system, points resolved.
        integrator: Steps the batch.
        settings: When to act.
        seed: Of the batch.
        on_failure: Told about every failure.
        verdicts: Lines about each system.
        restarts: How often each system was set back.
    """

    systems: Sequence[tuple[StatePoint, int]]
    integrator: Integrator
    settings: GuardSettings
    seed: int
    on_failure: Callable[[Failure], None] | None = None
    verdicts: dict[int, list[str]] = field(default_factory=dict)
    restarts: Restarts = field(init=False)

    def __post_init__(self) -> None:
        """Start watching at the present state."""
        state = self.integrator.state
        self._timestep = self.integrator.timestep.clone()
        shortest = min(float(p.timestep or 1.0) for p, _ in self.systems)
        steps = max(PARTS, round(AVERAGING_TIME / shortest))
        # Without a thermostat new momenta are another ensemble: such a system is given up at once.
        free = [p.ensemble in ("nve", "nph") for p, _ in self.systems]
        allowed = [0 if on else self.settings.restarts for on in free]
        self.restarts = Restarts(allowed, max(1, round(self.settings.forgiving_time / shortest)))
        self._average = RollingAverage(state.system_idx, len(self.systems), steps)
        sites = np.concatenate([p.atoms.get_scaled_positions(wrap=False) for p, _ in self.systems])
        self._displacement = Displacement(
            torch.as_tensor(sites).to(state.positions), state.masses, state.system_idx
        )
        self._limit = self.settings.max_displacement * torch.tensor([_bond(p) for p, _ in self.systems])
        self._judges = {p.name: self._judge_of(p) for p, _ in self.systems if p.identity == "liquid"}
        self._suspicions = [0] * len(self.systems)
        self._hottest = hottest(self.settings, self.integrator.dof)
        start = torch.zeros(2, len(self.systems), dtype=torch.long)
        self._past = _Past(state.snapshot(), state.snapshot(), *start.unbind())
        self._waiting, self._equilibration = [-1] * len(self.systems), -1

    def idle(self, step: int) -> list[int]:
        """Systems whose state at a step is no frame: given up, or not equilibrated since set back."""
        waiting = (i for i, until in enumerate(self._waiting) if step <= until)
        return sorted({*self.restarts.given_up, *waiting})

    def equilibrated(self, step: int) -> None:
        """Say at which step the equilibration ended; later calls change nothing."""
        self._equilibration = step if self._equilibration < 0 else self._equilibration

    def after_step(self, step: int, recorder: Recorder | None) -> None:
        """Look at the batch after a step."""
        forcefield = self.integrator.forcefield
        if forcefield.alarm:
            self._lost(forcefield.failed, step, recorder)
            forcefield.clear()
        if self._average.add(self.integrator.state.positions, forcefield.cell):
            self._judge(step, recorder)

    def finish(self, step: int, recorder: Recorder) -> None:
        """Judge what the last steps of a segment did, before its frames are used.

        Systems under suspicion are judged in the next segment: most come back. To discard their frames here
        would only cut excursions at the ends of segments.
        """
        state = self.integrator.state
        lost = ~torch.isfinite(state.energy)
        for values in (state.positions, state.momenta, state.forces):
            lost.index_put_((state.system_idx,), ~torch.isfinite(values).all(-1), accumulate=True)
        self._lost(lost, step, recorder)

    def _lost(self, systems: Tensor, step: int, recorder: Recorder | None) -> None:
        for i in systems.nonzero().flatten().tolist():
            self._set_back(i, step, "its positions or cell became non-finite", recorder, numerical=True)

    def _judge(self, step: int, recorder: Recorder | None) -> None:
        hot = self.integrator.temperature_ratio() > self._hottest
        for i in hot.nonzero().flatten().tolist():
            self._set_back(i, step, "it overheated", recorder, numerical=True)
        if bool(self._average.ready.any()):
            self._suspect(step, recorder)
        self._remember(step)

    def _suspect(self, step: int, recorder: Recorder | None) -> None:
        """Weigh verdicts against systems; what lasts is a departure."""
        cell, mean = self.integrator.forcefield.cell, self._average.mean()
        moved = (self._displacement(mean, cell).double().cpu() / self._limit).tolist()
        whole = (self._average.filled % PARTS == 0).tolist()
        for i in self._average.ready.nonzero().flatten().tolist():
            if self._is_in_place(i, moved[i]):
                self._suspicions[i] = 0
            elif moved[i] > 1 or whole[i]:
                # Matching templates takes time: what is not far away is looked at once in an average.
                weight = 1 if moved[i] > 1 else LASTING // 2
                reason = self._departed(i, mean, cell)
                if moved[i] > 1 and reason is None:
                    self._displacement.settle(i, mean)
                self._weigh(i, reason, weight, step, recorder)

    def _is_in_place(self, system: int, moved: float) -> bool:
        """Whether a crystal is so close to its sites that it can be no other phase; a liquid has none."""
        identity = self.systems[system][0].identity
        return identity != "liquid" and moved <= 1 and (moved < AT_HOME or identity == "sites")

    def _weigh(
        self, system: int, reason: str | None, weight: int, step: int, recorder: Recorder | None
    ) -> None:
        self._suspicions[system] = self._suspicions[system] + weight if reason else 0
        if reason and self._suspicions[system] >= LASTING:
            self._set_back(system, step, reason, recorder, numerical=False)

    def _departed(self, system: int, fractional: Tensor, cell: Tensor) -> str | None:
        """Why a system that has moved is not its phase, if so."""
        point, _ = self.systems[system]
        if point.identity == "sites":
            return "it left its lattice sites"
        if point.name not in self._judges:
            self._judges[point.name] = self._judge_of(point)
        atoms = self.integrator.state.system_idx == system
        here = (fractional[atoms] @ cell[system]).double().cpu().numpy()
        return self._judges[point.name].departed(here, cell[system].double().cpu().numpy())

    def _judge_of(self, point: StatePoint) -> PhaseIdentity:
        limit = self.settings.max_displacement
        return PhaseIdentity(point.atoms, liquid=point.identity == "liquid", max_displacement=limit)

    def _remember(self, step: int) -> None:
        """Once in an average, move the states to come back to forward."""
        chosen = self._average.ready & (self._average.filled % PARTS == 0)
        chosen &= torch.tensor(self._suspicions) == 0
        state, past = self.integrator.state, self._past
        state.copy_systems(chosen, past.newest, past.safe)
        state.copy_systems(chosen, state.dynamic(), past.newest)
        past.safe_step[chosen] = past.newest_step[chosen]
        past.newest_step[chosen] = step

    def _set_back(
        self, system: int, step: int, reason: str, recorder: Recorder | None, *, numerical: bool
    ) -> None:
        point, replica = self.systems[system]
        known, since = system in self.restarts.given_up, int(self._past.safe_step[system])
        # What the equilibration had not yet done for the safe state is made up for.
        self._waiting[system] = step + max(0, self._equilibration - since)
        if recorder:
            recorder.discard(system, since)
        if not known:
            if self.on_failure:
                self.on_failure(Failure(point.name, replica, step, reason, self._frames(system)))
            self.restarts.add(system, step)
            self._tell(system, step, since, reason)
        self._restart(system)
        self.restarts.shortenings[system] += numerical
        self._shorten()

    def _tell(self, system: int, step: int, since: int, reason: str) -> None:
        point, replica = self.systems[system]
        often = self.restarts.allowed[system]
        what = f"set back to step {since} (restart {self.restarts.counted[system]} of {often})"
        if system in self.restarts.given_up:
            what = "stopped" + (f" after {often} restarts" if often else "")
        self.verdicts.setdefault(system, []).append(
            f"{point.name}, replica {replica}, step {step}: {what}, {reason}"
        )

    def _restart(self, system: int) -> None:
        """Back to the safe state with new momenta and new noise."""
        point, replica = self.systems[system]
        integrator, past = self.integrator, self._past
        state = integrator.state
        chosen = torch.arange(len(self.systems)) == system
        state.copy_systems(chosen, past.safe, state.dynamic())
        key = stream_key(self.seed, point.name, replica, self.restarts.total[system])
        integrator.noise.restart(system, key)
        integrator.draw_momenta([system])
        self._average.forget(system)
        self._suspicions[system] = 0
        state.copy_systems(chosen, state.dynamic(), past.newest)
        state.copy_systems(chosen, state.dynamic(), past.safe)
        past.newest_step[system] = past.safe_step[system]

    def _shorten(self) -> None:
        factors = [SHORTER**n for n in self.restarts.shortenings]
        self.integrator.set_timestep(self._timestep * torch.tensor(factors).to(self._timestep))

    def _frames(self, system: int) -> list[Atoms]:
        point, _ = self.systems[system]
        state = self.integrator.state
        atoms = state.system_idx == system
        cell = self.integrator.forcefield.cell[system]
        parts = [part[atoms] @ cell for part in self._average.parts()]
        places = [self._past.safe["positions"][atoms], *parts, state.positions[atoms]]
        cells = [self._past.safe["cell"][system].T, *[cell] * len(parts), state.row_vector_cell[system]]
        return [
            Atoms(point.atoms.numbers, x.double().cpu().numpy(), cell=h.double().cpu().numpy(), pbc=True)
            for x, h in zip(places, cells, strict=True)
        ]

    def snapshot(self) -> dict[str, Tensor]:
        """What was seen of the systems, and how often they were set back."""
        counts = {
            "suspicions": torch.tensor(self._suspicions),
            "waiting": torch.tensor(self._waiting),
            "equilibration": torch.tensor(self._equilibration),
            "sites": self._displacement.sites.clone(),
        }
        return counts | self.restarts.snapshot() | self._past.snapshot() | self._average.snapshot()

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from a snapshot; what was told before stays with the segment in which it happened."""
        self.restarts.restore(saved)
        self._suspicions = saved["suspicions"].tolist()
        self._waiting, self._equilibration = saved["waiting"].tolist(), int(saved["equilibration"])
        self._displacement.sites.copy_(saved["sites"])
        self._past.restore(saved)
        self._average.restore(saved)
        for i, (point, replica) in enumerate(self.systems):
            if often := self.restarts.total[i]:
                self.integrator.noise.restart(i, stream_key(self.seed, point.name, replica, often))
        self._shorten()


def _bond(point: StatePoint) -> float:
    """Neighbour distance of an ideal crystal, Å; infinite where displacements say nothing."""
    return nearest_neighbour_distance(point.atoms) if point.identity in ("structure", "sites") else np.inf
