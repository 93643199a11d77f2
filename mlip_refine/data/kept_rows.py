"""Rows of a long calculation that a run keeps while it lasts, so that an interrupted one does not start anew.

A calculation is many rows (columns of a Hessian, Born terms of frames), each from one structure and what is
asked about it. In a block of `rows_kept`, finished rows are written to a folder about once a minute and when
a signal ends the run; a further run that asks for the same rows of the same model reads them. What is read
has the bits that were written.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mlip_refine.data.hdf5 import UNREADABLE_HDF5, is_sealed, new_hdf5, sealed_hdf5
from mlip_refine.errors import StorageError
from mlip_refine.interruption import Interrupted
from mlip_refine.potential import Graphs, Potential, Structure, Work

FORMAT = 1
"""Version of the files; raised when the rows of the same calculation change."""

_INTERVAL = 60.0
"""Seconds of work that are lost at most when the process is killed."""

_WORTH = 1.0
"""Seconds that a calculation takes at least whose rows are kept after it has ended."""

_FOLDER: ContextVar[Path | None] = ContextVar("folder of kept rows", default=None)


@contextmanager
def rows_kept(folder: Path) -> Iterator[None]:
    """Keep rows in this block. The folder stays if the block is interrupted, or a disk is full.

    Args:
        folder: Folder of the files, made with the first, and removed at the end.
    """
    before = _FOLDER.set(folder)
    try:
        yield
    except StorageError:
        raise
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        _FOLDER.reset(before)


def evaluate_rows(
    potential: Potential,
    work: Work,
    structures: Sequence[Structure],
    evaluate: Callable[[slice, Graphs], Sequence[Tensor]],
    question: str,
    given: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Evaluate a row for every structure, without a graph, or read those that are kept.

    Args:
        potential: The potential.
        work: Kind of the evaluation.
        structures: Structure of every row; one structure may come many times.
        evaluate: Evaluation of one chunk, as for `Potential.in_chunks`; gives a tensor per structure.
        question: Name of what is asked: other questions about the same structures have other files.
        given: Whatever else the rows depend on, such as the displacements of every structure.

    Returns:
        The rows as `evaluate` gives them, on the CPU where they were kept.

    Raises:
        MlipRefineError: Memory runs out for a single system.
        StorageError: There is no room for the rows.
    """
    folder = _FOLDER.get()
    if folder is None:
        return [row for chunk in potential.in_chunks(work, structures, evaluate) for row in chunk]
    name = _name(potential, work, structures, question, given)
    rows = _read(folder, name)
    known, started = len(rows), time.monotonic()

    def rest(part: slice, graphs: Graphs) -> list[Tensor]:
        return list(evaluate(slice(part.start + known, part.stop + known), graphs))

    written, last = known, started
    try:
        for chunk in potential.in_chunks(work, structures[known:], rest):
            rows += chunk
            if time.monotonic() - last > _INTERVAL:
                _write(folder, name, written, rows[written:])
                written, last = len(rows), time.monotonic()
    except (Interrupted, KeyboardInterrupt):
        _write(folder, name, written, rows[written:])
        raise
    if time.monotonic() - started > _WORTH:
        _write(folder, name, written, rows[written:])
    return rows


def _name(
    potential: Potential, work: Work, structures: Sequence[Structure], question: str, given: Sequence[Tensor]
) -> str:
    """Return the hash of everything that the rows depend on."""
    graphs = potential.graphs
    settings = (FORMAT, torch.__version__, potential.hash, potential.head, graphs.dtype, graphs.device.type)
    state = hashlib.sha256(f"{settings} {work} {question} {len(structures)}".encode())
    seen: dict[int, int] = {}
    for structure in structures:
        # One structure comes as often as there are directions: from the second time on its number is enough.
        number = seen.setdefault(id(structure), len(seen))
        state.update(f"{number}".encode())
        if number == len(seen) - 1:
            for part in (structure.positions, structure.cell, structure.species):
                _add(state, part)
    for part in given:
        _add(state, part)
    return state.hexdigest()


def _add(state: "hashlib._Hash", tensor: Tensor) -> None:
    array = tensor.detach().cpu().numpy()
    state.update(f"{array.dtype.str} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())


def _path(folder: Path, name: str, first: int) -> Path:
    return folder / f"{name[:32]}.{first:07d}.h5"


def _write(folder: Path, name: str, first: int, rows: Sequence[Tensor]) -> None:
    if not rows:
        return
    folder.mkdir(parents=True, exist_ok=True)
    arrays = [row.cpu().numpy() for row in rows]
    with new_hdf5(_path(folder, name, first), sealed=True) as file:
        file.attrs["name"] = name
        file["shapes"] = np.array([array.shape for array in arrays])
        file["values"] = np.concatenate([array.ravel() for array in arrays])


def _read(folder: Path, name: str) -> list[Tensor]:
    """Return the rows that are kept, from the first to the last before a gap or a damaged file."""
    rows: list[Tensor] = []
    while (path := _path(folder, name, len(rows))).is_file():
        try:
            if not is_sealed(path):
                break
            whole, *parts = sealed_hdf5(path)
        except UNREADABLE_HDF5:
            break
        if whole.attributes.get("name") != name:
            break
        found = {part.name: part.value for part in parts if part.value is not None}
        values, shapes = torch.from_numpy(found["values"]), found["shapes"].tolist()
        sizes = [int(np.prod(shape)) for shape in shapes]
        rows += [row.reshape(shape) for row, shape in zip(values.split(sizes), shapes, strict=True)]
    return rows
