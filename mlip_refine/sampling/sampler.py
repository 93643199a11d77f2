"""From state points to trajectories: batches, segments, and what is already on disk."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial, reduce
from itertools import accumulate

from torch import Tensor

from mlip_refine.errors import MlipRefineError, SamplingError, bytes_in_words
from mlip_refine.interruption import check, deferred, pending
from mlip_refine.potential import Potential
from mlip_refine.potential.batching import bytes_of_memory
from mlip_refine.progress import console, progress
from mlip_refine.sampling.md.engine import MolecularDynamics
from mlip_refine.sampling.md.settings import MDSettings
from mlip_refine.sampling.state_points import StatePoint, Trajectory
from mlip_refine.sampling.store import DamagedFramesError, FrameStore

KEEP_EVERY = 300.0
"""Seconds between two writes of what a stage has come to: the most that the sudden end of a process costs."""

Start = Mapping[str, tuple[Tensor, Tensor]]


class PhaseLostError(SamplingError):
    """Every replica of a point was stopped.

    Attributes:
        trajectories: Trajectories of all points by name, as far as their frames count.
    """

    def __init__(self, message: str, trajectories: dict[str, Trajectory]) -> None:
        """Set the message and what was sampled."""
        super().__init__(message)
        self.trajectories = trajectories


@dataclass(frozen=True)
class Length:
    """Length of a sampling.

    Attributes:
        equilibration: Time before the first frame, fs.
        frames: Number of frames per replica.
        segment: Frames per segment, the part that is stored at once; by default all.
    """

    equilibration: float
    frames: int
    segment: int | None = None

    def segments(self) -> list[int]:
        """Return the number of frames of every segment."""
        size = self.segment or self.frames
        full, rest = divmod(self.frames, size)
        return [size] * full + ([rest] if rest else [])


def sample(
    potential: Potential,
    points: Sequence[StatePoint],
    settings: MDSettings,
    length: Length,
    *,
    seed: int,
    stage: str,
    store: FrameStore | None = None,
    start: Start | None = None,
    taken: Callable[[int], None] | None = None,
) -> dict[str, Trajectory]:
    """Sample all state points in one batch.

    Segments found in the store with the same model, settings and seed are not sampled again; damaged ones
    are. A stage that is now to be longer continues from its last whole segment. One that was interrupted goes
    on where it was: its state and its frames are stored every `KEEP_EVERY` seconds, and when a signal ends
    the process.

    Args:
        potential: Frozen copy of a potential (see `Potential.frozen_copy`).
        points: State points to sample; their names are unique.
        settings: How to integrate.
        length: How long to sample.
        seed: Random seed of this stage.
        stage: Name of this sampling in the store and in messages.
        store: Store of the frames; without one they are only returned.
        start: Positions and cells to start from by point name; by default the ideal crystals.
        taken: Called with the number of steps that were taken now, if any were.

    Returns:
        A trajectory per point, all replicas; `Trajectory.kept` marks the frames that count.

    Raises:
        PhaseLostError: If every replica of a point was stopped; it has the trajectories of the others.
        MlipRefineError: If two points have the same name.
    """
    if len({p.name for p in points}) < len(points):
        raise MlipRefineError(
            f"state points must have different names: {', '.join(sorted(p.name for p in points))}"
        )
    needed, memory = memory_of_frames(points, length.frames), bytes_of_memory()
    if needed > memory:
        raise MlipRefineError(
            f"{stage}: {length.frames:,} frames need {bytes_in_words(needed)} of memory; this machine has "
            f"{bytes_in_words(memory)}: sample fewer frames, further apart, or fewer replicas"
        )
    keys = _keys(potential, points, settings, length, seed, start)
    named = {p.name: p for p in points}
    parts, snapshot = _stored(store, stage, named, keys) if store else ([], None)
    if len(parts) < len(keys):
        dump = partial(store.dump, stage) if store else None
        dynamics = MolecularDynamics.prepare(potential, points, settings, seed, start, dump)
        equilibration = dynamics.steps(length.equilibration) if length.equilibration > 0 else 0
        if snapshot is not None:
            dynamics.restore(snapshot)
        total, first = equilibration + length.frames * dynamics.steps(settings.interval), dynamics.step
        with progress(f"sampling {stage}", total) as tick, deferred():
            kept_at = time.monotonic()

            def after_step(done: int) -> None:
                """Report, keep what there is so far if that is due, and end if a signal asked for it."""
                nonlocal kept_at
                tick(done)
                if store and (pending() or time.monotonic() - kept_at > KEEP_EVERY):
                    unfinished = dynamics.snapshot(under_way=True)
                    store.write_unfinished(stage, len(parts), unfinished, keys[len(parts)])
                    kept_at = time.monotonic()
                check()

            dynamics.advance(equilibration - dynamics.step, after_step)
            for i, n_frames in enumerate(length.segments()[len(parts) :], start=len(parts)):
                part = dynamics.record(n_frames, after_step)
                known = {v for before in parts for t in before.values() for v in t.verdicts}
                for verdict in (v for t in part.values() for v in t.verdicts if v not in known):
                    console.print(f"{stage}: {verdict}", markup=False, soft_wrap=True)
                if store:
                    store.write(stage, i, part, dynamics.snapshot(), keys[i])
                parts.append(part)
        if taken:
            taken(dynamics.step - first)
    result = {name: reduce(Trajectory.extend, [part[name] for part in parts]) for name in named}
    for name, trajectory in result.items():
        if not bool(trajectory.kept.any()):
            reasons = "; ".join(trajectory.verdicts)
            raise PhaseLostError(f"no replica of {name} survived: {reasons}", result)
    return result


def memory_of_frames(points: Sequence[StatePoint], frames: int) -> int:
    """Return the bytes that frames of state points take: in parts, joined, and once more as they are used."""
    systems = sum(point.replicas for point in points)
    atoms = sum(point.replicas * len(point.atoms) for point in points)
    return 3 * 8 * frames * (3 * atoms + 21 * systems)


def _stored(
    store: FrameStore, stage: str, points: Mapping[str, StatePoint], keys: Sequence[str]
) -> tuple[list[dict[str, Trajectory]], dict[str, Tensor] | None]:
    """Return the whole segments of a stage, and the state that it goes on from, as far as both are sound."""
    parts: list[dict[str, Trajectory]] = []
    snapshot: dict[str, Tensor] | None = None
    try:
        for i, key in enumerate(keys):
            found = store.read(stage, i, points, key)
            if found is None:
                return parts, store.read_unfinished(stage, i, key) or snapshot
            parts.append(found[0])
            snapshot = found[1]
    except DamagedFramesError as error:
        console.print(f"{error.where}: damaged ({error.found}); sampled anew", markup=False, soft_wrap=True)
    return parts, snapshot


def _keys(
    potential: Potential,
    points: Sequence[StatePoint],
    settings: MDSettings,
    length: Length,
    seed: int,
    start: Start | None,
) -> list[str]:
    """Return what every segment is sampled from, as JSON: model, points, settings, seed and start.

    Arrays stand there by their hash. Nothing of later segments is in it, so that a stage can go on longer.
    """
    arrays = hashlib.sha256()
    for point in points:
        atoms = point.atoms
        for array in (atoms.positions, atoms.cell.array, atoms.numbers, atoms.get_masses()):
            arrays.update(array.tobytes())
        if point.hamiltonian.bias is not None:
            arrays.update(point.hamiltonian.bias.key())
        if start and point.name in start:
            arrays.update(b"".join(t.contiguous().numpy().tobytes() for t in start[point.name]))
    described = [
        {f.name: getattr(p, f.name) for f in fields(p) if f.name not in ("atoms", "hamiltonian")}
        | {"scale": p.hamiltonian.scale, "bias_scale": p.hamiltonian.bias_scale}
        for p in points
    ]
    sampled = {
        "model_hash": potential.hash,
        "head": potential.head,
        "dtype": str(potential.dtype),
        "points": described,
        "settings": asdict(settings),
        "equilibration": length.equilibration,
        "seed": seed,
        "arrays": arrays.hexdigest(),
    }
    sizes = length.segments()
    firsts = accumulate(sizes, initial=0)
    segments = ({"first_frame": first, "frames": n} for first, n in zip(firsts, sizes, strict=False))
    return [json.dumps(sampled | segment, indent=1) for segment in segments]


def last_frames(trajectories: Mapping[str, Trajectory]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return positions and cells of the last kept frames of all replicas, to start the next sampling from."""
    return {name: t.last() for name, t in trajectories.items()}
