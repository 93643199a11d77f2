"""Files appear whole or not at all."""

from pathlib import Path

import pytest

from mlip_refine.config import config_from_dict, load_config
from mlip_refine.data import load_structure, read_frames, read_table
from mlip_refine.data.phonons.collections import read_phonon_set
from mlip_refine.data.phonons.reader import read_phonons
from mlip_refine.errors import InputError
from mlip_refine.files import user_path, write_text, written
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
