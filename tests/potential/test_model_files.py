"""Names of models become files: embedded, paths, and MACE's foundation models through its own cache."""

import shutil
import urllib.error

import pytest
from mace.calculators import foundations_models

from mlip_refine.errors import InputError
from mlip_refine.potential.checkpoints.unpickle import load_module
from mlip_refine.potential.model_files import EMBEDDED, cached_path, resolve_model


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of mace-torch of our own, and no network."""

    def offline(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(foundations_models.urllib.request, "urlopen", offline)
    return tmp_path / "cache" / "mace"


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_names_load(name, tmp_path):
    path = resolve_model(name, tmp_path)
    assert [int(z) for z in load_module(path).atomic_numbers] == [22]
    assert path.with_suffix(".md").is_file()


def test_paths_are_relative_to_the_base(tmp_path):
    (tmp_path / "models").mkdir()
    file = tmp_path / "models" / "mine.model"
    file.write_bytes(b"x")
    assert resolve_model("models/mine.model", tmp_path) == file
    assert resolve_model(str(file), tmp_path / "elsewhere") == file


@pytest.mark.parametrize("name", ["small", "mh-1"])
def test_foundation_models_come_from_the_cache(name, cache, tmp_path, capsys):
    cache.mkdir(parents=True)
    shutil.copy(resolve_model("titanium-compact", tmp_path), cached_path(name))
    path = resolve_model(name, tmp_path)
    assert path.parent == cache
    assert [int(z) for z in load_module(path).atomic_numbers] == [22]
    assert capsys.readouterr().out == ""


def test_failed_download_says_where_to_put_the_file(cache, tmp_path):
    with pytest.raises(InputError) as refusal:
        resolve_model("small", tmp_path)
    message = str(refusal.value)
    assert str(cache / "20231210mace128L0_energy_epoch249model") in message
    assert "https://github.com/ACEsuit" in message
    assert "no route to host" in message


@pytest.mark.parametrize(
    ("name", "word"),
    [("titanium-compct", "titanium-compact"), ("medium-mpa0", "medium-mpa-0"), ("smal", "small")],
)
def test_unknown_names_are_answered_with_the_nearest(name, word, cache, tmp_path):
    with pytest.raises(InputError, match=f"unknown model '{name}'.*Did you mean '{word}'"):
        resolve_model(name, tmp_path)


def test_missing_files_are_answered_with_the_nearest(tmp_path):
    (tmp_path / "refined.model").write_bytes(b"x")
    with pytest.raises(InputError, match=r"no such model file.*Did you mean 'refined\.model'"):
        resolve_model("refind.model", tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        resolve_model("gone/refined.model", tmp_path)
