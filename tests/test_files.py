"""Files appear whole or not at all."""

import pytest

from mlip_refine.files import write_text, written


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
