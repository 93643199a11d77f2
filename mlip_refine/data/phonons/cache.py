"""Phonon calculations kept for the next time: arrays and text, under the hash of what they came from."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import phonopy
import torch
from ase import Atoms
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mlip_refine.data.phonons.calculations import files_of
from mlip_refine.data.phonons.reference import Displacement, PhononMetadata, PhononReference
from mlip_refine.data.phonons.spacegroups import CrystalSymmetry, Translations
from mlip_refine.errors import StorageError
from mlip_refine.files import written

FORMAT = 3
"""Version of the cache; a new one is due when the same files are read differently."""


def default_cache() -> Path:
    """Return the user's cache folder for calculations; `XDG_CACHE_HOME` moves it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlip-refine" / "phonons"


def cache_key(path: Path, name: str, settings: object, metadata: Mapping[str, Any]) -> str:
    """Hash everything that a reference depends on: its files, how they are read, and by which phonopy."""
    state = sha256(f"{FORMAT} {phonopy.__version__} {name} {_plain(settings)} {_plain(metadata)}".encode())
    for file in files_of(path):
        state.update(file.name.encode())
        state.update(sha256(file.read_bytes()).digest())
    return state.hexdigest()


def _plain(value: Any) -> str:
    return json.dumps(value, default=_json, sort_keys=True)


def _json(value: Any) -> Any:
    if isinstance(value, Path):
        return sha256(value.read_bytes()).hexdigest() if value.is_file() else str(value)
    if hasattr(value, "__dataclass_fields__"):
        return {key: getattr(value, key) for key in value.__dataclass_fields__}
    return np.asarray(value).tolist()


def stored(folder: Path, key: str) -> tuple[PhononReference, ...] | None:
    """Return what was kept under a key; None when there is nothing, or it is damaged."""
    path = _path(folder, key)
    try:
        with safe_open(path, framework="pt") as file:
            text, checksum = file.metadata()["references"], file.metadata()["checksum"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if checksum != _checksum(tensors, text):
            return None
        header = json.loads(text)
        references = []
        for k, one in enumerate(header):
            prefix = f"{k}."
            own = {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
            atoms = Atoms(
                own["numbers"].numpy(), own["positions"].numpy(), cell=own["cell"].numpy(), pbc=True
            )
            atoms.set_masses(own["masses"].numpy())
            if own["magnetic_moments"].any():
                atoms.set_initial_magnetic_moments(own["magnetic_moments"].numpy())
            energies = one["energies"]
            sets = zip(own["displacements"], own["forces"], energies, strict=True) if energies else ()
            references.append(
                PhononReference(
                    name=one["name"],
                    supercell=atoms,
                    translations=Translations(own["translations"].long(), own["primitive_atoms"]),
                    symmetry=CrystalSymmetry(own["rotations"], own["permutations"].long()),
                    primitive_matrix=own["primitive_matrix"],
                    supercell_matrix=own["supercell_matrix"],
                    force_constants=own.get("force_constants"),
                    displacements=tuple(Displacement(u, f, energy) for u, f, energy in sets),
                    metadata=PhononMetadata(**{**one["metadata"], "notes": tuple(one["metadata"]["notes"])}),
                )
            )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    return tuple(references)


def store(folder: Path, key: str, references: Sequence[PhononReference]) -> None:
    """Keep references under a key; a folder that cannot be written to keeps nothing."""
    tensors: dict[str, Tensor] = {}
    headers = []
    for k, reference in enumerate(references):
        atoms, translations, symmetry = reference.supercell, reference.translations, reference.symmetry
        own = {
            "numbers": torch.from_numpy(atoms.numbers),
            "positions": torch.from_numpy(atoms.positions),
            "cell": torch.from_numpy(np.array(atoms.cell)),
            "masses": torch.from_numpy(atoms.get_masses()),
            "magnetic_moments": torch.from_numpy(atoms.get_initial_magnetic_moments()),
            "translations": translations.permutations.int(),
            "primitive_atoms": translations.primitive_atoms,
            "rotations": symmetry.rotations,
            "permutations": symmetry.permutations.int(),
            "primitive_matrix": reference.primitive_matrix,
            "supercell_matrix": reference.supercell_matrix,
        }
        if reference.force_constants is not None:
            own["force_constants"] = reference.force_constants
        if reference.displacements:
            own["displacements"] = torch.stack([d.displacement for d in reference.displacements])
            own["forces"] = torch.stack([d.forces for d in reference.displacements])
        tensors |= {f"{k}.{name}": tensor.contiguous() for name, tensor in own.items()}
        energies = [d.energy for d in reference.displacements]
        headers.append({"name": reference.name, "metadata": asdict(reference.metadata), "energies": energies})
    text = json.dumps(headers)
    header = {"references": text, "checksum": _checksum(tensors, text)}
    path = _path(folder, key)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written(path, shared=True) as partial:
            partial.write_bytes(save(tensors, metadata=header))
    except (OSError, StorageError):
        return


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """Return the SHA-256 of the names, types, shapes and bytes of tensors, and of a text."""
    state = sha256(text.encode())
    for name in sorted(tensors):
        array = tensors[name].numpy()
        state.update(f"{name} {array.dtype.str} {array.shape}".encode())
        state.update(array.tobytes())
    return state.hexdigest()


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key}.safetensors"
