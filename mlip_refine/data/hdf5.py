"""HDF5 files that somebody else wrote: their data are in the file itself, or they are refused.

A file may name other files whose bytes HDF5 then reads as if they were its own: external storage, virtual
datasets and external links. None of that is what phonopy or this package writes.
"""

from pathlib import Path

import h5py

from mlip_refine.errors import InputError


def refuse_outside_data(path: Path) -> None:
    """Refuse an HDF5 file whose contents lie in other files, or are reached by anything but plain links.

    Raises:
        InputError: The file has an external or soft link, a virtual dataset, or external storage.
        OSError: It is no HDF5 file, or damaged.
    """
    with h5py.File(path, "r") as file:
        objects: list[tuple[str, h5py.Group | h5py.Dataset]] = [("/", file)]
        # Each object once, even where groups contain themselves; links other than hard ones are not followed.
        file.visititems(lambda name, found: objects.append((name, found)))
        for name, found in objects:
            if isinstance(found, h5py.Dataset):
                outside = [name] if found.external or found.is_virtual else []
            elif isinstance(found, h5py.Group):
                links = {key: found.get(key, getlink=True) for key in found}
                outside = [key for key, link in links.items() if not isinstance(link, h5py.HardLink)]
            else:
                outside = []
            if outside:
                raise InputError(
                    "the HDF5 file takes data from elsewhere",
                    where=str(path),
                    found=f"a link or external storage at {outside[0]!a}",
                    expected="data in the file itself",
                )
