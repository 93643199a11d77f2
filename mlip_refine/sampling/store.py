"""Frames on disk: one HDF5 file per sampled segment, written atomically, with its provenance."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
import torch
from ase.io import write
from torch import Tensor

from mlip_refine.data.hdf5 import refuse_outside_data
from mlip_refine.errors import InputError
from mlip_refine.files import written
from mlip_refine.sampling.monitoring.monitor import Failure
from mlip_refine.sampling.state_points import SERIES, StatePoint, Trajectory

FORMAT = "mlip_refine frames 4"

# Masks and steps that mark the frames that count.
_MARKS = ("kept", "steps", "revoked")


class FrameStore:
    """Segments of trajectories in a folder, reopened when a run is repeated or resumed.

    A stage (`initial`, `step-0012`, ...) is a sequence of segments `STAGE.0000.h5`, ... Each holds the
    frames of all its state points and the state of the integrator at its end.
    """

    def __init__(self, folder: Path, provenance: Mapping[str, object]) -> None:
        """Open a folder (made when the first segment is written).

        Args:
            folder: Folder of the files.
            provenance: Everything that the frames depend on beside their stage: model hash, seed, settings,
                versions.
        """
        self.folder, self.provenance = folder, json.dumps(dict(provenance), sort_keys=True, default=str)

    def path(self, stage: str, segment: int) -> Path:
        """Return the file of a segment."""
        return self.folder / f"{stage}.{segment:04d}.h5"

    def dump(self, stage: str, failure: Failure) -> None:
        """Write the last frames of a system that failed, for inspection."""
        folder = self.folder / "failed"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{stage}-{failure.point}-{failure.replica}-step-{failure.step}.extxyz"
        for atoms in failure.frames:
            atoms.info["failure"] = failure.reason
        write(folder / name, failure.frames, format="extxyz")

    def write(
        self,
        stage: str,
        segment: int,
        frames: Mapping[str, Trajectory],
        snapshot: Mapping[str, Tensor],
        key: str,
    ) -> None:
        """Write a segment; it appears whole or not at all. `key` says in full what was sampled."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(stage, segment)
        with written(path) as partial, h5py.File(partial, "w") as file:
            file.attrs.update({"format": FORMAT, "provenance": self.provenance, "key": _digest(key)})
            file.create_dataset("sampled", data=key)
            for name, value in snapshot.items():
                file.create_dataset(f"snapshot/{name}", data=value.cpu().numpy())
            for name, trajectory in frames.items():
                group = file.create_group(f"points/{name}")
                for array in SERIES:
                    group.create_dataset(array, data=getattr(trajectory, array).numpy(), compression="lzf")
                for array in _MARKS:
                    if getattr(trajectory, array) is not None:
                        group.create_dataset(array, data=getattr(trajectory, array).numpy())
                group.attrs["verdicts"] = json.dumps(trajectory.verdicts)
                group.attrs["units"] = "Å, eV, eV/Å³ (tensile positive)"

    def read(
        self, stage: str, segment: int, points: Mapping[str, StatePoint], key: str | None
    ) -> tuple[dict[str, Trajectory], dict[str, Tensor]] | None:
        """Return a segment, or `None` if it was not written yet or belongs to other settings.

        Args:
            stage: Name of the stage.
            segment: Number of the segment.
            points: State points to read, by name.
            key: Description that the segment must have (see `write`); `None` takes whatever the stage holds.

        Raises:
            InputError: If the file is truncated or was not written by this package.
        """
        path = self.path(stage, segment)
        if not path.exists():
            return None
        try:
            refuse_outside_data(path)
            with h5py.File(path, "r") as file:
                if file.attrs.get("format") != FORMAT:
                    raise InputError("this is not a file of frames", where=str(path), expected=FORMAT)
                if key is not None and (file.attrs["provenance"], file.attrs["key"]) != (
                    self.provenance,
                    _digest(key),
                ):
                    return None
                snapshot = {name: torch.from_numpy(np.asarray(d)) for name, d in file["snapshot"].items()}
                frames = {}
                for name, point in points.items():
                    group = file[f"points/{name}"]
                    arrays = (*SERIES, *(mark for mark in _MARKS if mark in group))
                    values = {array: torch.from_numpy(np.asarray(group[array])) for array in arrays}
                    verdicts = tuple(json.loads(group.attrs["verdicts"]))
                    frames[name] = Trajectory(point=point, **values, verdicts=verdicts)
        except (OSError, KeyError, ValueError, TypeError, RuntimeError, ArithmeticError) as error:
            raise InputError(
                "the file of frames cannot be read",
                where=str(path),
                found=str(error),
                fix="delete it and run again",
            ) from error
        return frames, snapshot


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
