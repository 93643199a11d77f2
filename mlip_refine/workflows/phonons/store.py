"""Crystals whose phonons are known, in files of their own: a run that is resumed keeps them."""

import json
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from mlip_refine.config import Phonons
from mlip_refine.files import write_json
from mlip_refine.workflows.phonons.records import PhononPoint, file_of_crystal
from mlip_refine.workflows.phonons.tasks import Task

FORMAT = 2
"""Raised when what is found for the same crystal changes."""

_CHOICE = {"phases", "supercell", "data", "split", "lowest_frequency", "materials", "cell"}
"""Settings that choose crystals: every other one is part of what a point depends on, but for two."""


@dataclass(frozen=True)
class Store:
    """Crystals that are done.

    Attributes:
        folder: Of the run; the files are in `crystals`.
        model_hash: Of the potential.
        section: Of the config.
    """

    folder: Path
    model_hash: str
    section: Phonons

    def path(self, task: Task, suffix: str) -> Path:
        """A file of a crystal."""
        return file_of_crystal(self.folder / "crystals", task.name, task.cell, suffix)

    def read(self, task: Task) -> PhononPoint | None:
        """What is known about a crystal already; None when it is another one, or cannot be read."""
        try:
            data = json.loads(self.path(task, ".json").read_text(encoding="utf-8"))
            known = data["key"] == self._key(task) and data.get("lasting", True)
            return PhononPoint(**data["point"]) if known else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, task: Task, point: PhononPoint, *, lasting: bool = True, **further: Any) -> None:
        """Keep what was found, and what is too large for the file of all crystals.

        Args:
            task: The crystal.
            point: What was found.
            lasting: Whether to find it again is of no use: what failed for lack of memory is tried again.
            further: For the file of the crystal alone.
        """
        kept = {"key": self._key(task), "lasting": lasting, "point": asdict(point), **further}
        write_json(self.path(task, ".json"), kept)

    def _key(self, task: Task) -> str:
        """Hash of everything that a point depends on."""
        settings = self.section.model_dump_json(exclude=_CHOICE | {"skip_refused", "baseline"})
        state = sha256(f"{FORMAT} {self.model_hash} {settings} {task.name} {task.rest}".encode())
        reference, primitive = task.reference, task.crystal.primitive_matrix
        atoms = task.crystal.supercell
        moments = atoms.get_initial_magnetic_moments()
        arrays = [atoms.cell.array, atoms.positions, atoms.numbers, atoms.get_masses(), moments, primitive]
        if reference is not None and reference.force_constants is not None:
            arrays.append(reference.force_constants.numpy())
        for array in arrays:
            state.update(f"{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return state.hexdigest()
