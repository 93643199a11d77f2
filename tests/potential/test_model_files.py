"""Names of models become files: embedded, paths, and MACE's foundation models through its own cache."""

import shutil
import urllib.error

import pytest
from mace.calculators import foundations_models

from mlip_refine.errors import InputError
from mlip_refine.potential.checkpoints.unpickle import load_module
from mlip_refine.potential.model_files import (
    EMBEDDED,
    cached_path,
    chemistry,
    foundation_urls,
    resolve_model,
)


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


@pytest.mark.parametrize("name", ["small", "medium-mpa-0", "off-small", "anicc"])
@pytest.mark.parametrize("file", [None, "MACE-OFF23_small.model"])  # mace_off keeps the name of the file
def test_foundation_models_come_from_the_cache(name, file, cache, tmp_path, capsys):
    if file and name != "off-small":
        pytest.skip("a name of another model")
    cache.mkdir(parents=True)
    shutil.copy(resolve_model("titanium-compact", tmp_path), cache / file if file else cached_path(name))
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
    [
        *(("titanium-compct", "titanium-compact"), ("medium-mpa0", "medium-mpa-0"), ("smal", "small")),
        *(
            ("mpa-0", "medium-mpa-0"),
            ("MEDIUM", "medium"),
            ("mace-off-medium", "off-medium"),
            ("ani", "anicc"),
        ),
        *(
            ("matpes-pb", "mace-matpes-pbe-0"),
            ("large-off23", "off-large"),
            ("medium-omat0", "medium-omat-0"),
        ),
    ],
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


@pytest.mark.parametrize(
    "name", ["off", "medium-oft", "nequip-oam-l", "chgnet", "mattersim", "medium-xyz", "mh-7"]
)
def test_no_model_of_another_chemistry_is_offered(name, cache, tmp_path):
    with pytest.raises(InputError, match=f"unknown model '{name}'") as refusal:
        resolve_model(name, tmp_path)
    offered = (refusal.value.fix or "").removeprefix("Did you mean '").removesuffix("'?")
    assert offered == "" or chemistry(offered)[:3] == name[-3:].replace("oft", "off") or name == "off"


def test_every_name_of_mace_is_known_or_refused_by_its_kind(cache, tmp_path):
    for name in ("polar-1-s", "polar-1-l", "omol", "omol-extra-large", "mace-omol-0"):
        with pytest.raises(InputError, match=rf"{name}: this is a .*Start from a"):
            resolve_model(name, tmp_path)
    known = foundation_urls()
    assert known.keys() >= {*foundations_models.mace_mp_urls, "off-small", "off-medium", "off-large", "anicc"}
    assert not any(chemistry(name).startswith(("polar", "omol")) for name in known)


def test_a_url_is_named_as_one(cache, tmp_path):
    for url in ("https://example.org/a.model", "ftp://example.org/a", "s3://bucket/a.model"):
        with pytest.raises(InputError, match=r"this is a URL.*Download it"):
            resolve_model(url, tmp_path)
