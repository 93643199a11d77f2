"""Frames on disk: one HDF5 file per sampled segment, written atomically, with its provenance."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from ase.io import write
from numpy.typing import NDArray
from torch import Tensor

from mlip_refine.data.hdf5 import UNREADABLE_HDF5, foreign_hdf5, is_sealed, new_hdf5, sealed_hdf5
from mlip_refine.data.hdf5_contents import Item
from mlip_refine.errors import InputError
from mlip_refine.files import require_regular, room_named
from mlip_refine.sampling.monitoring.monitor import Failure
from mlip_refine.sampling.state_points import SERIES, StatePoint, Trajectory

FORMAT = "mlip_refine frames 6"

WITHOUT_CHECKSUMS = "mlip_refine frames 4"

WITHOUT_SEAL = (WITHOUT_CHECKSUMS, "mlip_refine frames 5")
"""Formats before this one, which are still read: by a process of its own, as files of others are. The fifth
has checksums of its groups, the fourth has none."""

# Masks and steps that mark the frames that count.
_MARKS = ("kept", "steps", "revoked")


class DamagedFramesError(InputError):
    """A file of frames is not what was written."""


@dataclass(frozen=True)
class _Group:
    """A group of a file.

    Attributes:
        with_checksums: Whether its arrays must have a checksum.
        attributes: Its attributes.
        arrays: Its arrays by name.
    """

    with_checksums: bool
    attributes: dict[str, str] = field(default_factory=dict)
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


class FrameStore:
    """Segments of trajectories in a folder, reopened when a run is repeated or resumed.

    A stage (`initial`, `step-0012`, ...) is a sequence of segments `STAGE.0000.h5`, ... Each holds the
    frames of all its state points and the state of the integrator at its end. `STAGE.0000.unfinished.h5` is
    how far a segment has come. Whatever is read is compared with the checksums that were written with it:
    that of the file before HDF5 opens it, and those of the groups that are read.
    """

    def __init__(self, folder: Path, provenance: Mapping[str, object]) -> None:
        """Open a folder (made when the first segment is written).

        Args:
            folder: Folder of the files.
            provenance: Everything that the frames depend on beside their stage: model hash, seed, settings,
                versions.
        """
        self.folder, self.provenance = folder, json.dumps(dict(provenance), sort_keys=True, default=str)
        self._sealed: dict[Path, tuple[int, ...]] = {}

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
        with self._contents(self.path(stage, segment), None) as groups:
            return None if groups is None else groups[f"points/{point}"].attributes.get("checksum")

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
        with self._contents(self.unfinished_path(stage, segment), key, "snapshot") as groups:
            return None if groups is None else _tensors(groups, "snapshot")[0]

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
        wanted = ("snapshot", *(f"points/{name}" for name in points))
        with self._contents(self.path(stage, segment), key, *wanted) as groups:
            if groups is None:
                return None
            snapshot, _ = _tensors(groups, "snapshot")
            frames = {}
            for name, point in points.items():
                values, verdicts = _tensors(groups, f"points/{name}")
                frames[name] = Trajectory(point=point, **values, verdicts=tuple(json.loads(verdicts)))
            return frames, snapshot

    @contextmanager
    def _new_file(self, path: Path, key: str) -> Iterator[h5py.File]:
        """Give a file for a segment or a part of one; it appears when it is whole."""
        with room_named(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with new_hdf5(path, sealed=True) as file:
            file.attrs.update({"format": FORMAT, "provenance": self.provenance, "key": _digest(key)})
            file.create_dataset("sampled", data=key)
            yield file

    @contextmanager
    def _contents(self, path: Path, key: str | None, *under: str) -> Iterator[dict[str, _Group] | None]:
        """Give the groups of a file with the arrays of some; `None` if there is none of these settings."""
        if not require_regular(path).exists():
            yield None
            return
        try:
            sealed = self._is_sealed(path)
            with closing((sealed_hdf5 if sealed else foreign_hdf5)(path, under)) as items:
                file = next(items).attributes
                if file.get("format") not in (FORMAT, *WITHOUT_SEAL):
                    raise InputError("this is not a file of frames", where=str(path), expected=FORMAT)
                if not sealed and file["format"] == FORMAT:
                    raise ValueError("its checksum is missing")
                same = key is None or (file["provenance"], file["key"]) == (self.provenance, _digest(key))
                groups = _groups(items, with_checksums=file["format"] != WITHOUT_CHECKSUMS) if same else None
            yield groups
        except UNREADABLE_HDF5 as error:
            raise DamagedFramesError(
                "the file of frames is damaged",
                where=str(path),
                found=str(error),
                fix="Bring it back from a copy, or start again under another name.",
            ) from error

    def _is_sealed(self, path: Path) -> bool:
        """Whether a file has the seal of its content, which is not compared twice for the same file."""
        state = path.stat()
        known = (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        if self._sealed.get(path) != known:
            if not is_sealed(path):
                return False
            self._sealed[path] = known
        return True


def _write_group(
    file: h5py.File, name: str, arrays: Mapping[str, Tensor], *, verdicts: str = ""
) -> h5py.Group:
    """Write tensors and lines of verdicts with their checksum; series of frames are compressed."""
    group, values = file.create_group(name), {k: v.cpu().numpy() for k, v in arrays.items()}
    for array, value in values.items():
        group.create_dataset(array, data=value, compression="lzf" if array in SERIES else None)
    group.attrs.update({"verdicts": verdicts, "checksum": _checksum(values, verdicts)})
    return group


def _groups(items: Iterator[Item], *, with_checksums: bool) -> dict[str, _Group]:
    """Return the groups of a file by name, with what was read of their arrays."""
    groups: defaultdict[str, _Group] = defaultdict(lambda: _Group(with_checksums=with_checksums))
    for name, attributes, value in items:
        group, _, array = name.rpartition("/")
        if value is not None:
            groups[group].arrays[array] = value
        else:
            groups[name].attributes.update(attributes)
    return dict(groups)


def _tensors(groups: Mapping[str, _Group], name: str) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a group and its lines of verdicts.

    Raises:
        KeyError: There is no such group.
        ValueError: They are not those that were written.
    """
    group = groups[name]
    verdicts = group.attributes.get("verdicts", "")
    found = group.attributes.get("checksum")
    if found is None and group.with_checksums:
        raise ValueError(f"{name} has no checksum")
    if found not in (None, _checksum(group.arrays, verdicts)):
        raise ValueError(f"the checksum of {name} is another one")
    return {array: torch.from_numpy(value) for array, value in group.arrays.items()}, verdicts


def _checksum(arrays: Mapping[str, NDArray[Any]], verdicts: str) -> str:
    """Return the SHA-256 of the names, types, shapes and bytes of arrays, and of lines of verdicts."""
    state = hashlib.sha256(verdicts.encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        state.update(f"{name} {array.dtype.str} {arrays[name].shape}".encode())
        state.update(array.tobytes())
    return state.hexdigest()


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
