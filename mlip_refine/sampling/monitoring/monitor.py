"""Monitor of a running batch: it finds faults and sets systems back; the others do not notice.

Positions averaged over 0.2 ps decide about the phase; the rolling average is judged four times in that span,
and so is the temperature. A system that passes keeps its state as the one to come back to. A system that
fails goes back to the last state that passed at least a whole average before, with new momenta and a noise
stream of its own, and all its frames since then are discarded. After a few restarts it is given up: it still
runs, because a batch of constant shape keeps the others' arithmetic as it is, but its frames do not count.
Time without a fault makes up for restarts, so that rare ones do not end a long run.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from mlip_refine.sampling.md.integrators import Integrator
from mlip_refine.sampling.md.noise import stream_key
from mlip_refine.sampling.monitoring.guards import (
    AVERAGING_TIME,
    PARTS,
    GuardSettings,
    Restarts,
    RollingAverage,
    SiteDisplacement,
    max_temperature_ratios,
    nearest_neighbour_distance,
)
from mlip_refine.sampling.monitoring.phase_identity import PhaseIdentity
from mlip_refine.sampling.state_points import StatePoint

# Verdicts in a row that make a departure: bcc crystals make excursions towards hcp and come back.
LASTING = PARTS

# Closer to its sites than this share of the allowed displacement no crystal is another phase: the shuffles
# from bcc to hcp and to ω move atoms by 0.14 neighbour distances (r.m.s.), the default limit is 0.2.
IN_PLACE = 0.5

# Step up to which frames of earlier segments count where no system was set back: no run reaches it.
NEVER = 2**62

# A numerical fault is retried with the time step times this.
SHORTER = 0.5


@dataclass(frozen=True)
class Failure:
    """A fault of a system.

    Attributes:
        point: Name of the state point.
        replica: Number of the replica.
        step: Step at which the fault was found.
        reason: Reason, one line.
        frames: Structures for inspection: the last good state, averages over the last parts, and the state
            that failed.
    """

    point: str
    replica: int
    step: int
    reason: str
    frames: Sequence[Atoms]


@dataclass
class _Past:
    """States that passed the checks: the newest, and one a whole average before it; steps `[n_systems]`."""

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


class Monitor:
    """Looks at a batch after every step, and sets systems back that went wrong.

    Attributes:
        verdicts: What happened to each system since they were last read, one line each, by system.
        discarded: Frames of this segment that do not count: system, and the steps after and up to which.
        restarts: How often each system was set back.
    """

    def __init__(
        self,
        systems: Sequence[tuple[StatePoint, int]],
        integrator: Integrator,
        settings: GuardSettings,
        seed: int,
        on_failure: Callable[[Failure], None] | None = None,
    ) -> None:
        """Start at the present state.

        Args:
            systems: Point, with its time scales, and replica of every system.
            integrator: Steps the batch.
            settings: When a system is set back.
            seed: Random seed of the batch.
            on_failure: Called with every failure.
        """
        self.systems, self.integrator, self.settings = systems, integrator, settings
        self.verdicts: dict[int, list[str]] = {}
        self.discarded: list[tuple[int, int, int]] = []
        self._seed, self._on_failure = seed, on_failure
        state = integrator.state
        self._timestep = integrator.timestep.clone()
        shortest = min(float(p.timestep or 1.0) for p, _ in systems)
        steps = max(PARTS, round(AVERAGING_TIME / shortest))
        # Without a thermostat new momenta are another ensemble: such a system is given up at once.
        allowed = [0 if p.ensemble in ("nve", "nph") else settings.restarts for p, _ in systems]
        self.restarts = Restarts(allowed, max(1, round(settings.forgiving_time / shortest)))
        self._average = RollingAverage(state.system_idx, len(systems), steps)
        sites = np.concatenate([p.atoms.get_scaled_positions(wrap=False) for p, _ in systems])
        self._displacement = SiteDisplacement(
            torch.as_tensor(sites).to(state.positions), state.masses, state.system_idx
        )
        bonds = [
            # Displacements from sites say nothing about liquids, and about what is not judged.
            nearest_neighbour_distance(p.atoms) if p.identity in ("structure", "sites") else np.inf
            for p, _ in systems
        ]
        self._limit = settings.max_displacement * torch.tensor(bonds)
        self._identities: dict[str, PhaseIdentity] = {}
        for point, _ in systems:
            if point.identity == "liquid":
                self._identity(point)
        self._suspicions = [0] * len(systems)
        self._hottest = max_temperature_ratios(settings, integrator.dof)
        start = torch.zeros(2, len(systems), dtype=torch.long)
        self._past = _Past(state.snapshot(), state.snapshot(), *start.unbind())
        self._waiting, self._equilibration = [-1] * len(systems), -1

    def _identity(self, point: StatePoint) -> PhaseIdentity:
        if point.name not in self._identities:
            limit = self.settings.max_displacement
            identity = PhaseIdentity(point.atoms, liquid=point.identity == "liquid", max_displacement=limit)
            self._identities[point.name] = identity
        return self._identities[point.name]

    def begin_segment(self, step: int) -> None:
        """Begin to record frames; the equilibration ends with the first call."""
        self.discarded = []
        self._equilibration = step if self._equilibration < 0 else self._equilibration

    def idle(self, step: int) -> list[int]:
        """Return the systems whose state is no frame: given up, or not equilibrated since set back."""
        waiting = (i for i, until in enumerate(self._waiting) if step <= until)
        return sorted({*self.restarts.given_up, *waiting})

    def revoked(self) -> Tensor:
        """Return the step after which frames of earlier segments do not count either `[n_systems]`."""
        steps = torch.full((len(self.systems),), NEVER)
        for system, since, _ in self.discarded:
            steps[system] = min(int(steps[system]), since)
        return steps

    def after_step(self, step: int) -> None:
        """Look at the batch after a step."""
        forcefield = self.integrator.forcefield
        if forcefield.alarm:
            self._set_back_lost(forcefield.failed, step)
            forcefield.clear()
        if self._average.add(self.integrator.state.positions, forcefield.cell):
            hot = self.integrator.temperature_ratio() > self._hottest
            for i in hot.nonzero().flatten().tolist():
                self._set_back(i, step, "it overheated", numerical=True)
            if bool(self._average.ready.any()):
                self._check_phases(step)
            # Once in an average, what passed moves the states to come back to forward.
            passed = self._average.ready & (self._average.filled % PARTS == 0)
            passed &= torch.tensor(self._suspicions) == 0
            state, past = self.integrator.state, self._past
            state.copy_systems(passed, past.newest, past.safe)
            state.copy_systems(passed, state.dynamic(), past.newest)
            past.safe_step[passed] = past.newest_step[passed]
            past.newest_step[passed] = step

    def finish_segment(self, step: int) -> None:
        """Check the last steps of a segment, before its frames are used.

        Systems under suspicion are judged in the next segment: most come back. To discard their frames here
        would only cut excursions at the ends of segments.
        """
        state = self.integrator.state
        lost = ~torch.isfinite(state.energy)
        for values in (state.positions, state.momenta, state.forces):
            lost.index_put_((state.system_idx,), ~torch.isfinite(values).all(-1), accumulate=True)
        self._set_back_lost(lost, step)

    def _set_back_lost(self, systems: Tensor, step: int) -> None:
        for i in systems.nonzero().flatten().tolist():
            self._set_back(i, step, "its positions or cell became non-finite", numerical=True)

    def _check_phases(self, step: int) -> None:
        """Ask systems that moved far whether they are still their phase; a departure is one that lasts."""
        cell, mean = self.integrator.forcefield.cell, self._average.mean()
        moved = (self._displacement(mean, cell).double().cpu() / self._limit).tolist()
        whole = (self._average.filled % PARTS == 0).tolist()
        for i in self._average.ready.nonzero().flatten().tolist():
            point, _ = self.systems[i]
            sites, far = point.identity == "sites", moved[i] > 1
            # A crystal so close to its sites can be no other phase; a liquid has none.
            if point.identity != "liquid" and not far and (sites or moved[i] < IN_PLACE):
                self._suspicions[i] = 0
                continue
            # Matching templates takes time: what is not far away is looked at once in an average.
            if not (far or whole[i]):
                continue
            reason: str | None = "it left its lattice sites"
            if not sites:
                atoms = self.integrator.state.system_idx == i
                here = (mean[atoms] @ cell[i]).double().cpu().numpy()
                reason = self._identity(point).departed(here, cell[i].double().cpu().numpy())
            if far and reason is None:
                self._displacement.move_sites(i, mean)
            self._suspicions[i] = self._suspicions[i] + (1 if far else LASTING // 2) if reason else 0
            if reason and self._suspicions[i] >= LASTING:
                self._set_back(i, step, reason, numerical=False)

    def _set_back(self, system: int, step: int, reason: str, *, numerical: bool) -> None:
        """Go back to the safe state with new momenta and new noise, and discard the frames since then."""
        point, replica = self.systems[system]
        integrator, past, since = self.integrator, self._past, int(self._past.safe_step[system])
        # What the equilibration had not yet done for the safe state is made up for.
        self._waiting[system] = step + max(0, self._equilibration - since)
        self.discarded.append((system, since, step))
        if system not in self.restarts.given_up:
            if self._on_failure:
                self._on_failure(Failure(point.name, replica, step, reason, self._frames(system)))
            self.restarts.add(system, step)
            often = self.restarts.allowed[system]
            what = f"set back to step {since} (restart {self.restarts.counted[system]} of {often})"
            if system in self.restarts.given_up:
                what = "stopped" + (f" after {often} restarts" if often else "")
            line = f"{point.name}, replica {replica}, step {step}: {what}, {reason}"
            self.verdicts.setdefault(system, []).append(line)
        state, chosen = integrator.state, torch.arange(len(self.systems)) == system
        state.copy_systems(chosen, past.safe, state.dynamic())
        key = stream_key(self._seed, point.name, replica, self.restarts.total[system])
        integrator.noise.restart(system, key)
        integrator.draw_momenta([system])
        self._average.reset(system)
        self._suspicions[system] = 0
        state.copy_systems(chosen, state.dynamic(), past.newest)
        state.copy_systems(chosen, state.dynamic(), past.safe)
        past.newest_step[system] = past.safe_step[system]
        self.restarts.shortenings[system] += numerical
        self._shorten_timesteps()

    def _shorten_timesteps(self) -> None:
        factors = [SHORTER**n for n in self.restarts.shortenings]
        self.integrator.set_timestep(self._timestep * torch.tensor(factors).to(self._timestep))

    def _frames(self, system: int) -> list[Atoms]:
        """The last good state of a system, its averages over the last parts, and its present state."""
        point, _ = self.systems[system]
        state = self.integrator.state
        atoms = state.system_idx == system
        cell = self.integrator.forcefield.cell[system]
        parts = [part[atoms] @ cell for part in self._average.parts]
        places = [self._past.safe["positions"][atoms], *parts, state.positions[atoms]]
        cells = [self._past.safe["cell"][system].T, *[cell] * len(parts), state.row_vector_cell[system]]
        return [
            Atoms(point.atoms.numbers, x.double().cpu().numpy(), cell=h.double().cpu().numpy(), pbc=True)
            for x, h in zip(places, cells, strict=True)
        ]

    def snapshot(self) -> dict[str, Tensor]:
        """Return what `restore` goes on from."""
        counts = {
            "suspicions": torch.tensor(self._suspicions),
            "waiting": torch.tensor(self._waiting),
            "equilibration": torch.tensor(self._equilibration),
            "sites": self._displacement.sites.clone(),
        }
        return counts | self.restarts.snapshot() | self._past.snapshot() | self._average.snapshot()

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from a snapshot; earlier verdicts stay with the segment in which they were reached."""
        self.restarts.restore(saved)
        self._suspicions = saved["suspicions"].tolist()
        self._waiting, self._equilibration = saved["waiting"].tolist(), int(saved["equilibration"])
        self._displacement.sites.copy_(saved["sites"])
        self._past.restore(saved)
        self._average.restore(saved)
        for i, (point, replica) in enumerate(self.systems):
            if often := self.restarts.total[i]:
                self.integrator.noise.restart(i, stream_key(self._seed, point.name, replica, often))
        self._shorten_timesteps()

    def segment_snapshot(self) -> dict[str, Tensor]:
        """Return what a segment that is under way knows of its faults, beside `snapshot`."""
        verdicts = json.dumps([[system, lines] for system, lines in self.verdicts.items()])
        return {
            "discarded": torch.tensor(self.discarded, dtype=torch.long).reshape(-1, 3),
            "verdicts": torch.tensor(list(verdicts.encode()), dtype=torch.uint8),
        }

    def restore_segment(self, saved: Mapping[str, Tensor]) -> None:
        """Go on within a segment."""
        self.discarded = [(system, since, until) for system, since, until in saved["discarded"].tolist()]
        self.verdicts = dict(json.loads(bytes(saved["verdicts"].tolist())))
