"""The trajectories of a run: frames as ASE's `Atoms`, or series as tensors, read when they are asked for."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress

from mlip_refine.errors import InputError
from mlip_refine.sampling import FrameStore, StatePoint, Trajectory

STAGE = "md"
"""Name of the frames of a run in its store."""


@dataclass(frozen=True)
class MDTrajectory:
    """The frames of one state point after the equilibration; a loop over it gives ASE's `Atoms`.

    Attributes:
        point: State point.
        n_frames: Number of frames that count, of all replicas.
        skipped: Number of frames of the equilibration of every replica.
        interval: Time between two frames, fs.
        store: Store of the run, from which frames are read whenever they are asked for.
        segments: Number of segments of the whole run.
        held: Series in memory, where the run folder does not keep its frames.
    """

    point: StatePoint
    n_frames: int
    skipped: int
    interval: float
    store: FrameStore
    segments: int
    held: Trajectory | None = None

    def load(self) -> Trajectory:
        """Return the series of all frames, with the equilibration.

        Raises:
            InputError: If the files of the frames are gone or damaged.
        """
        if self.held is not None:
            return self.held
        found = stored_trajectories(self.store, self.segments, {self.point.name: self.point})
        if found is None:
            raise InputError(
                "the frames of the run are gone",
                where=str(self.store.folder),
                fix="Run it again, with output.keep_frames: true.",
            )
        return found[self.point.name]

    def __len__(self) -> int:
        """Number of frames that count."""
        return self.n_frames

    def __iter__(self) -> Iterator[Atoms]:
        """Yield the frames that count, replica after replica, in the order of time.

        Every frame has a calculator with its potential energy, eV, and stress, eV/Å³, tensile positive and
        without the kinetic part; `info` has `config_type` (the state point), `replica` and `time_ps`.
        Positions are not wrapped into the cell, so that displacements can be followed.
        """
        run = self.load()
        for replica, frame in run.kept.nonzero().tolist():
            if frame < self.skipped:
                continue
            positions, cell = run.positions[replica, frame].numpy(), run.cells[replica, frame].numpy()
            time = (frame + 1) * self.interval / 1e3
            atoms = Atoms(run.point.atoms.numbers, positions, cell=cell, pbc=True)
            atoms.info = {"config_type": run.point.name, "replica": replica, "time_ps": time}
            stress = full_3x3_to_voigt_6_stress(run.stress[replica, frame].numpy())
            energy = float(run.model_energy[replica, frame])
            atoms.calc = SinglePointCalculator(atoms, energy=energy, stress=stress)
            yield atoms


def stored_trajectories(
    store: FrameStore, segments: int, points: Mapping[str, StatePoint]
) -> dict[str, Trajectory] | None:
    """Read trajectories that a run has sampled.

    Args:
        store: Store of the run.
        segments: Number of segments of the whole run.
        points: State points to read, by name.

    Returns:
        The trajectories by name; `None` where a segment is missing.

    Raises:
        InputError: If a file is damaged.
    """
    trajectories: dict[str, Trajectory] = {}
    for i in range(segments):
        segment = store.read(STAGE, i, points, None)
        if segment is None:
            return None
        trajectories = {name: trajectories[name].extend(t) if i else t for name, t in segment[0].items()}
    return trajectories
