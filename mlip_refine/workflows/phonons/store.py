"""Files of finished crystals, which a resumed run reads instead of computing them again."""

import json
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from mlip_refine.config import Phonons
from mlip_refine.files import write_json
from mlip_refine.workflows.phonons.records import PhononPoint, file_of_crystal
from mlip_refine.workflows.phonons.tasks import Task

FORMAT = 3
"""Version of the files; raised when the result for the same crystal changes."""

_CHOICE = {"phases", "supercell", "data", "split", "lowest_frequency", "materials", "cell"}
"""Settings that choose crystals: a point depends on all others but for two."""


@dataclass(frozen=True)
class Store:
    """Files of finished crystals.

    Attributes:
        folder: Run folder; the files are in `crystals`.
        model_hash: Hash of the potential.
        section: Section `phonons` of the config.
    """

    folder: Path
    model_hash: str
    section: Phonons

    def path(self, task: Task, suffix: str) -> Path:
        """Return the path of a file of a crystal."""
        return file_of_crystal(self.folder / "crystals", task.name, task.cell, suffix)

    def read(self, task: Task) -> PhononPoint | None:
        """Read the point of a crystal; None if the file is of another crystal or run, or cannot be read."""
        try:
            data = json.loads(self.path(task, ".json").read_text(encoding="utf-8"))
            known = data["key"] == self._key(task) and data.get("lasting", True)
            return TypeAdapter(PhononPoint).validate_python(data["point"]) if known else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, task: Task, point: PhononPoint, *, lasting: bool = True, **further: Any) -> None:
        """Write the point of a crystal, and data that are too large for the file of all crystals.

        Args:
            task: The crystal.
            point: Its point.
            lasting: Whether a resumed run keeps the point; not where something failed for lack of memory.
            further: Data for the file of the crystal alone.
        """
        kept = {"key": self._key(task), "lasting": lasting, "point": asdict(point), **further}
        write_json(self.path(task, ".json"), kept)

    def _key(self, task: Task) -> str:
        """Return the hash of everything that a point depends on."""
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
