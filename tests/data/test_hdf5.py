"""HDF5 files: what is sealed is what was written, and those of others are read at a distance."""

import os
import re
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest

from mlip_refine.data import hdf5, hdf5_contents
from mlip_refine.data.hdf5 import SEAL_BYTES, foreign_hdf5, is_sealed, new_hdf5, sealed_hdf5
from mlip_refine.errors import InputError

ARRAYS = {
    "a_10/x": np.arange(6.0).reshape(2, 3),
    "a_9/x": np.array(3, dtype="i2"),
    "big": np.array([1, 2], dtype=">i2"),
    "kept": np.array([True, False]),
    "none": np.zeros((0, 3)),
    "word": np.array(b"eV/angstrom^2"),
    "words": np.array([b"H", b"He"]),
}


def fill(file: h5py.File) -> None:
    for name, value in ARRAYS.items():
        file.create_dataset(name, data=value, chunks=(1, 3) if value.shape == (2, 3) else None)
    file["text"] = "É"
    file["texts"] = ["long", "l"]
    file["a_9"].attrs["unit"] = "Å"
    file["a_9"].attrs["number"] = 3
    file["reference"] = file["a_9"].ref


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    with new_hdf5(tmp_path / "sealed.h5", sealed=True) as file:
        fill(file)
    return tmp_path / "sealed.h5"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    with new_hdf5(tmp_path / "plain.h5") as file:
        fill(file)
    return tmp_path / "plain.h5"


def test_both_ways_give_everything(sealed, plain):
    """A group before what is in it, by number, and numbers and text as they were."""
    assert is_sealed(sealed)
    assert not is_sealed(plain)
    for items in (list(sealed_hdf5(sealed)), list(foreign_hdf5(plain))):
        names = [item.name for item in items]
        assert names[:5] == ["", "a_9", "a_9/x", "a_10", "a_10/x"]
        found = {item.name: item.value for item in items}
        for name, value in ARRAYS.items():
            assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
            assert np.array_equal(found[name], value)
        assert found["text"][()] == "É".encode()
        assert found["texts"].tolist() == [b"long", b"l"]
        assert found["reference"] is None
        assert items[1].attributes == {"unit": "Å"}


def test_other_programs_read_sealed_files(sealed):
    with h5py.File(sealed) as file:
        assert file.userblock_size == SEAL_BYTES
        assert np.array_equal(file["a_10/x"], ARRAYS["a_10/x"])


@pytest.mark.parametrize("read", [sealed_hdf5, foreign_hdf5])
def test_parts_are_read_by_name(sealed, read):
    found = {item.name: item.value for item in read(sealed, ["a_1", "a_9", "kept"])}
    assert [name for name, value in found.items() if value is not None] == ["a_9/x", "kept"]
    assert set(found) > set(ARRAYS)


def test_no_changed_file_keeps_its_seal(sealed):
    """Every byte of the seal, bytes of the rest, and its length."""
    content, random = sealed.read_bytes(), np.random.default_rng(0)
    places = [*range(SEAL_BYTES), *random.integers(SEAL_BYTES, len(content), size=100)]
    changes = [content[:-1], content + b"\0", content[:SEAL_BYTES], content[: SEAL_BYTES - 1]]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << int(random.integers(8))
        changes.append(bytes(changed))
    for changed in changes:
        sealed.write_bytes(changed)
        try:
            assert not is_sealed(sealed)
        except ValueError as error:
            assert "checksum" in str(error)  # noqa: PT017 - both answers are right


def test_groups_in_themselves_come_once(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_group("a/b")
        file["a/b/c"] = file["a"]
        file["a/x"] = 1
    assert [item.name for item in foreign_hdf5(tmp_path / "a.h5")] == ["", "a", "a/b", "a/x"]


def test_more_data_than_a_file_can_hold_are_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", shape=(10**8,), chunks=(1000,), dtype="f8")
    with pytest.raises(OSError, match="x has more data than the file can hold"):
        list(foreign_hdf5(tmp_path / "a.h5"))
    assert len(list(foreign_hdf5(tmp_path / "a.h5", under=[]))) == 2


def test_text_is_no_hdf5_file(tmp_path):
    (tmp_path / "a.h5").write_text("HDF5, honestly")
    with pytest.raises(OSError, match="signature"):
        list(foreign_hdf5(tmp_path / "a.h5"))


LOOPS = "while True: pass"
ENDS = {
    "hang": (LOOPS, "does not come to an end"),
    "crash": ("os.kill(os.getpid(), signal.SIGSEGV)", "crashes on it .Segmentation fault"),
    "half an array": (
        "sys.stdout.buffer.write(head + bytes(7)); sys.stdout.flush(); os._exit(0)",
        "status 0",
    ),
    "no such module": ("import nothing_of_this_name", "No module named 'nothing_of_this_name'"),
}


@pytest.mark.parametrize("end", ENDS)
def test_whatever_becomes_of_the_process_is_damage(plain, tmp_path, monkeypatch, end):
    """A library that loops, crashes or breaks off, on the first object or in the midst of data."""
    what, match = ENDS[end]
    folder = Path(hdf5_contents.__file__).parent
    program = tmp_path / "program.py"
    program.write_text(f"""
import json, os, signal, sys
sys.path.insert(0, {str(folder)!r})
import hdf5_contents
hdf5_contents._CPU_SECONDS = 1
head = json.dumps(dict(name="x", attributes={{}}, dtype="<f8", shape=[1])).encode() + b"\\n"
def contents(path, under, before):
    yield hdf5_contents.Item("", {{}}, None)
    before(0)
    {what}
hdf5_contents.contents = contents
hdf5_contents.main(*sys.argv[1:])
""")
    monkeypatch.setattr(hdf5_contents, "__file__", str(program))
    with pytest.raises(OSError, match=match):
        list(foreign_hdf5(plain))


def test_a_reader_that_stops_ends_the_process(plain, monkeypatch):
    started = []

    class Noted(hdf5.subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(hdf5.subprocess, "Popen", Noted)
    items = foreign_hdf5(plain)
    assert next(items).name == ""
    items.close()
    assert started[0].returncode in {0, -signal.SIGKILL}


def test_links_to_elsewhere_are_refused_both_ways(tmp_path):
    for name, sealing, read in (("a.h5", False, foreign_hdf5), ("b.h5", True, sealed_hdf5)):
        with new_hdf5(tmp_path / name, sealed=sealing) as file:
            file["there"] = h5py.ExternalLink("other.h5", "/")
        with pytest.raises(InputError, match=f"{re.escape(name)}.*takes data from elsewhere.*'there'"):
            list(read(tmp_path / name))


def test_odd_paths_are_read(tmp_path, monkeypatch):
    """Relative, with a dash in front, and in bytes that are no text."""
    name = os.fsdecode(b"-a \xff\n.h5")
    with new_hdf5(tmp_path / name) as file:
        fill(file)
    monkeypatch.chdir(tmp_path)
    assert len(list(foreign_hdf5(Path(name)))) == len(list(foreign_hdf5(tmp_path / name))) > len(ARRAYS)
