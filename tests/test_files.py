"""Files appear whole or not at all."""

import errno
import os
from pathlib import Path

import pytest
import torch

from mlip_refine.config import config_from_dict, load_config
from mlip_refine.data import load_structure, read_frames, read_table
from mlip_refine.data.phonons.collections import read_phonon_set
from mlip_refine.data.phonons.reader import read_phonons
from mlip_refine.errors import InputError, StorageError
from mlip_refine.files import room_named, user_path, write_text, written
from mlip_refine.potential.model_files import resolve_model


def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path):
    path = tmp_path / "log.txt"
    write_text(path, "before")
    with pytest.raises(TypeError), written(path) as partial:
        partial.open("w").writelines(["half", 1])
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["log.txt"]


def test_results_are_shared_like_any_other_file(tmp_path):
    plain, path = tmp_path / "plain", tmp_path / "result"
    plain.touch()
    with written(path) as partial:
        partial.touch(mode=0o600)
    assert path.stat().st_mode == plain.stat().st_mode


def test_a_shared_file_is_written_under_a_name_of_the_process(tmp_path):
    path = tmp_path / "kept"
    with written(path, shared=True) as mine, written(path) as other:
        assert mine != other
        other.write_text("other")
        mine.write_text("mine")
    assert path.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


READERS = [
    *(load_config, load_structure, read_frames, read_table, read_phonons, read_phonon_set),
    lambda path: resolve_model(str(path), path.parent),
    lambda path: config_from_dict({**CONFIG, "base": str(path)}),
    lambda path: config_from_dict({**CONFIG, "output": {"folder": str(path)}}).run_folder,
    lambda path: config_from_dict(CONFIG).resolve(path),
]
CONFIG = {"name": "x", "potential": {"model": "titanium-compact"}}
"""What reads or takes the path that somebody wrote."""


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ["~nouser-of-this-name/x", "a" * 300, f"{'µ' * 128}/x", "x/\ud800"])
def test_a_path_that_cannot_be_is_refused(read, name):
    with pytest.raises(InputError, match=r"no such path|unable to parse raw data as a unicode string"):
        read(Path(name))


def test_a_path_may_start_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/a/b") == tmp_path / "a" / "b"
    assert user_path("a" * 255) == Path("a" * 255)


def test_a_full_disk_is_named_with_what_is_needed(tmp_path, file_size_limit):
    path = tmp_path / "result.json"
    write_text(path, "before")
    with file_size_limit(1000), pytest.raises(StorageError) as caught:
        write_text(path, "x" * 123456)
    assert str(caught.value).startswith(f"{path}: cannot be written (File too large; needs 123 kB, free ")
    assert "goes on with --resume" in str(caught.value)
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_library_that_hides_a_full_disk_does_not(tmp_path, file_size_limit):
    """As torch does: its error has neither path nor reason. Other errors of a library stay what they are."""
    path = tmp_path / "model.pt"
    refused = pytest.raises(StorageError, match=r"model\.pt: cannot be written \(File too large")
    with file_size_limit(1000), refused, written(path) as partial:
        torch.save(torch.zeros(1000), partial)
    with pytest.raises(RuntimeError, match="something else"), written(path):
        raise RuntimeError("something else")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_what_the_system_refuses_anywhere_is_named(tmp_path, number):
    refused = pytest.raises(StorageError, match=f"frames: cannot be written \\({os.strerror(number)}; free")
    with refused, room_named(tmp_path):
        raise OSError(number, os.strerror(number), str(tmp_path / "frames"))
    with pytest.raises(PermissionError), room_named(tmp_path):
        raise PermissionError(errno.EACCES, "no", "file")


def test_standard_output_may_be_full(tmp_path):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    refused = pytest.raises(StorageError, match="standard output: cannot be written")
    with refused, room_named(Path("standard output")), full.open("w") as stream:
        stream.write("x")
