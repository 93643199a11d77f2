"""Frames on disk: one HDF5 file per sampled segment, written atomically, with its provenance."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import torch
from ase.io import write
from torch import Tensor

from mlip_refine.data.hdf5 import new_hdf5, refuse_outside_data
from mlip_refine.errors import InputError
from mlip_refine.files import require_regular, room_named
from mlip_refine.sampling.monitoring.monitor import Failure
from mlip_refine.sampling.state_points import SERIES, StatePoint, Trajectory

FORMAT = "mlip_refine frames 5"

WITHOUT_CHECKSUMS = "mlip_refine frames 4"
"""The format before this one, whose files have no checksums."""

UNREADABLE_HDF5 = (OSError, KeyError, ValueError, TypeError, RuntimeError, ArithmeticError, MemoryError)
"""What h5py and the conversion of its data raise for a damaged file."""

# Masks and steps that mark the frames that count.
_MARKS = ("kept", "steps", "revoked")


class DamagedFramesError(InputError):
    """A file of frames is not what was written."""


class FrameStore:
    """Segments of trajectories in a folder, reopened when a run is repeated or resumed.

    A stage (`initial`, `step-0012`, ...) is a sequence of segments `STAGE.0000.h5`, ... Each holds the
    frames of all its state points and the state of the integrator at its end. `STAGE.0000.unfinished.h5` is
    how far a segment has come. Whatever is read is compared with the checksums that were written with it.
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

    def unfinished_path(self, stage: str, segment: int) -> Path:
        """Return the file of a segment that is under way."""
        return self.folder / f"{stage}.{segment:04d}.unfinished.h5"

    def dump(self, stage: str, failure: Failure) -> None:
        """Write the last frames of a system that failed, for inspection."""
        folder = self.folder / "failed"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{stage}-{failure.point}-{failure.replica}-step-{failure.step}.extxyz"
        for atoms in failure.frames:
            atoms.info["failure"] = failure.reason
        write(folder / name, failure.frames, format="extxyz")

    def checksum(self, stage: str, segment: int, point: str) -> str | None:
        """Return the checksum of the frames of a point, or `None` where there is none."""
        with self._opened(self.path(stage, segment), None) as file:
            known = None if file is None else file[f"points/{point}"].attrs.get("checksum")
            return None if known is None else str(known)

    def write(
        self,
        stage: str,
        segment: int,
        frames: Mapping[str, Trajectory],
        snapshot: Mapping[str, Tensor],
        key: str,
    ) -> None:
        """Write a segment; it appears whole or not at all. `key` says in full what was sampled."""
        with self._new_file(self.path(stage, segment), key) as file:
            _write_group(file, "snapshot", snapshot)
            for name, trajectory in frames.items():
                series = {array: getattr(trajectory, array) for array in SERIES}
                marks = {mark: value for mark in _MARKS if (value := getattr(trajectory, mark)) is not None}
                verdicts = json.dumps(trajectory.verdicts)
                group = _write_group(file, f"points/{name}", series | marks, verdicts=verdicts)
                group.attrs["units"] = "Å, eV, eV/Å³ (tensile positive)"
        self.unfinished_path(stage, segment).unlink(missing_ok=True)

    def write_unfinished(self, stage: str, segment: int, snapshot: Mapping[str, Tensor], key: str) -> None:
        """Write the present state of a segment that is under way, in place of an earlier one."""
        with self._new_file(self.unfinished_path(stage, segment), key) as file:
            _write_group(file, "snapshot", snapshot)

    def read_unfinished(self, stage: str, segment: int, key: str) -> dict[str, Tensor] | None:
        """Return the state that a segment has come to, or `None` if there is none, or of other settings.

        Raises:
            DamagedFramesError: If the file is damaged.
        """
        with self._opened(self.unfinished_path(stage, segment), key) as file:
            return None if file is None else _read_group(file["snapshot"])[0]

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
            InputError: If the file was not written by this package.
            DamagedFramesError: If it is not what was written: truncated, or with changed bits.
        """
        with self._opened(self.path(stage, segment), key) as file:
            if file is None:
                return None
            snapshot, _ = _read_group(file["snapshot"])
            frames = {}
            for name, point in points.items():
                values, verdicts = _read_group(file[f"points/{name}"])
                frames[name] = Trajectory(point=point, **values, verdicts=tuple(json.loads(verdicts)))
            return frames, snapshot

    @contextmanager
    def _new_file(self, path: Path, key: str) -> Iterator[h5py.File]:
        """Give a file for a segment or a part of one; it appears when it is whole."""
        with room_named(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with new_hdf5(path) as file:
            file.attrs.update({"format": FORMAT, "provenance": self.provenance, "key": _digest(key)})
            file.create_dataset("sampled", data=key)
            yield file

    @contextmanager
    def _opened(self, path: Path, key: str | None) -> Iterator[h5py.File | None]:
        """Give a file of this store, or `None` if there is none, or one of other settings."""
        if not require_regular(path).exists():
            yield None
            return
        try:
            refuse_outside_data(path)
            with h5py.File(path, "r") as file:
                if file.attrs.get("format") not in (FORMAT, WITHOUT_CHECKSUMS):
                    raise InputError("this is not a file of frames", where=str(path), expected=FORMAT)
                sampled = (file.attrs["provenance"], file.attrs["key"])
                same = key is None or sampled == (self.provenance, _digest(key))
                yield file if same else None
        except UNREADABLE_HDF5 as error:
            raise DamagedFramesError(
                "the file of frames is damaged",
                where=str(path),
                found=str(error),
                fix="Bring it back from a copy, or start again under another name.",
            ) from error


def _write_group(
    file: h5py.File, name: str, arrays: Mapping[str, Tensor], *, verdicts: str = ""
) -> h5py.Group:
    """Write tensors and lines of verdicts with their checksum; series of frames are compressed."""
    group, values = file.create_group(name), {k: v.cpu().numpy() for k, v in arrays.items()}
    for array, value in values.items():
        group.create_dataset(array, data=value, compression="lzf" if array in SERIES else None)
    group.attrs.update({"verdicts": verdicts, "checksum": _checksum(values, verdicts)})
    return group


def _read_group(group: h5py.Group) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a group and its lines of verdicts.

    Raises:
        ValueError: They are not those that were written.
    """
    values = {name: np.asarray(dataset) for name, dataset in group.items()}
    verdicts = str(group.attrs.get("verdicts", ""))
    if group.attrs.get("checksum", _checksum(values, verdicts)) != _checksum(values, verdicts):
        raise ValueError(f"the checksum of {group.name} is another one")
    if "checksum" not in group.attrs and group.file.attrs["format"] == FORMAT:
        raise ValueError(f"{group.name} has no checksum")
    return {name: torch.from_numpy(value) for name, value in values.items()}, verdicts


def _checksum(arrays: Mapping[str, np.ndarray], verdicts: str) -> str:
    """Return the SHA-256 of the names, types, shapes and bytes of arrays, and of lines of verdicts."""
    state = hashlib.sha256(verdicts.encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        state.update(f"{name} {array.dtype.str} {arrays[name].shape}".encode())
        state.update(array.tobytes())
    return state.hexdigest()


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
