"""HDF5 files: those of others have their data in the file itself, or are refused; our own appear whole.

A file may name other files whose bytes HDF5 then reads as if they were its own: external storage, virtual
datasets and external links. None of that is what phonopy or this package writes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from mlip_refine.errors import InputError
from mlip_refine.files import write_bytes


@contextmanager
def new_hdf5(path: Path) -> Iterator[h5py.File]:
    """Give a file in memory that is written atomically at the end: HDF5 itself does not survive a full disk.

    Raises:
        StorageError: If there is no room for it.
    """
    with h5py.File(path.name, "w", driver="core", backing_store=False) as file:
        yield file
        file.flush()
        content = file.id.get_file_image()
    write_bytes(path, content)


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
