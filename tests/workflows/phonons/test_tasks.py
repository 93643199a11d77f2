"""Which crystals there are, and which are left out, before any model is loaded."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlip_refine.config import Config, config_from_dict
from mlip_refine.crystals.relaxation import Rest
from mlip_refine.data.phonons.collections import read_phonon_set
from mlip_refine.errors import InputError, OutOfMemoryError
from mlip_refine.workflows.phonons import point
from mlip_refine.workflows.phonons import tasks as workflow
from mlip_refine.workflows.phonons.point import further_properties
from mlip_refine.workflows.phonons.store import Store
from mlip_refine.workflows.phonons.tasks import Task, phonon_tasks

SNO2 = Path(__file__).parents[2] / "data" / "phonons" / "SnO2"
INDIUM = '2\nLattice="3.25 0 0 0 3.25 0 0 0 4.95" pbc="T T T"\nIn 0 0 0\nIn 1.625 1.625 2.475\n'


def _config(phases: dict[str, Any] | None = None, **phonons: Any) -> Config:
    data = {"name": "x", "potential": {"model": "m"}, "phases": phases or {}, "phonons": phonons}
    return config_from_dict(data)


@pytest.fixture
def mixed(tmp_path, monkeypatch) -> Path:
    """One calculation that can be read, and one that cannot."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(SNO2, tmp_path / "data" / "SnO2")
    (tmp_path / "data" / "broken.tar.gz").write_bytes(b"nothing")
    return tmp_path / "data"


def test_what_is_refused_at_reading_is_left_out_and_told(mixed):
    tasks, left_out = phonon_tasks(_config(data=str(mixed), skip_refused=True, cell=["reference", "relaxed"]))
    assert [(task.title, task.rest) for task in tasks] == [
        ("SnO2 (reference)", None),
        ("SnO2 (relaxed)", Rest("cell")),
    ]
    assert list(left_out) == ["broken"]
    with pytest.raises(InputError, match="broken"):
        phonon_tasks(_config(data=str(mixed)))
    with pytest.raises(InputError, match=r"nothing to do.*broken: "):
        phonon_tasks(_config(data=str(mixed), skip_refused=True, materials="broken"))


def test_only_named_materials_are_read(mixed):
    tasks, left_out = phonon_tasks(_config(data=str(mixed), materials="SnO2"))
    assert [task.name for task in tasks] == ["SnO2"]
    assert left_out == {}
    (mixed / "index.csv").write_text("file,name,split\nSnO2,oxide,train\nbroken.tar.gz,other,test\n")
    tasks, _ = phonon_tasks(_config(data=str(mixed), materials="oxide"))
    assert [task.name for task in tasks] == ["oxide"]
    with pytest.raises(InputError, match="Did you mean 'oxide'"):
        phonon_tasks(_config(data=str(mixed), materials="oxid"))
    with pytest.raises(InputError, match=r"not in the part of the data.*split train"):
        phonon_tasks(_config(data=str(mixed), materials=["oxide", "other"], split="train"))


def test_a_calculation_with_two_supercells_counts_once(mixed, monkeypatch):
    (harmonic,) = read_phonon_set(SNO2)
    both = [harmonic, replace(harmonic, name="SnO2-fc3")]
    monkeypatch.setattr(
        workflow,
        "read_phonon_set",
        lambda *_, names, **__: [r for r in both if names is None or r.name in names],
    )

    def names(**phonons: Any) -> list[str]:
        return [task.name for task in phonon_tasks(_config(data=str(mixed), **phonons))[0]]

    assert names() == ["SnO2"]
    assert names(materials=["SnO2", "SnO2-fc3"]) == ["SnO2", "SnO2-fc3"]
    assert names(materials="SnO2-fc3") == ["SnO2-fc3"]
    # Another material with such a name is one of its own.
    both[1] = replace(both[1], metadata=replace(harmonic.metadata, material="other"))
    assert names() == ["SnO2", "SnO2-fc3"]


def test_a_tetragonal_phase_keeps_its_point_group(tmp_path):
    (tmp_path / "In.xyz").write_text(INDIUM)
    (task,), _ = phonon_tasks(_config({"In": {"file": str(tmp_path / "In.xyz")}}))
    assert len(task.crystal.symmetry.rotations) == 16
    assert len(task.crystal.supercell) == 6**3


def test_what_a_crystal_cannot_have_is_told_beside_what_fails(mixed, monkeypatch):
    def further(task: Task, config: Config) -> tuple[dict[str, Any], dict[str, str], bool]:
        store = Store(mixed, "hash", config.phonons)
        return further_properties(None, task, store, task.crystal, None, None, None)

    held = {"prototype": "hcp", "element": "Ti", "n_atoms": 2, "a": 2.93, "cell_freedom": "fixed"}
    config = _config({"hcp": held}, gruneisen=True, quasi_harmonic={}, supercell=5.0, bands=False)
    (task,), _ = phonon_tasks(config)
    assert task.rest == Rest("atoms")
    refused = dict.fromkeys(("gruneisen", "quasi_harmonic"), "the cell is held (cell_freedom: fixed)")
    assert further(task, config) == ({}, refused, True)
    both = _config(data=str(mixed), materials="SnO2", cell=["reference", "relaxed"])
    (task, _), _ = phonon_tasks(both)
    assert further(task, config) == ({}, {}, True)
    without = replace(task, reference=replace(task.reference, force_constants=None))
    assert "no force constants" in further(without, config)[1]["reference"]

    def less_symmetric(*_: object) -> None:
        raise InputError("the cell has less symmetry than the atoms in it")

    def too_large(*_: object) -> None:
        raise OutOfMemoryError("out of memory in the hessian of a single system")

    config = _config(data=str(mixed), materials="SnO2", conductivity={})
    monkeypatch.setattr(point, "band_structures", less_symmetric)
    monkeypatch.setattr(point, "conductivity", lambda *_: 1)
    found, refused, lasting = further(task, config)
    assert (found, list(refused), lasting) == ({"conductivity": 1}, ["bands"], True)
    monkeypatch.setattr(point, "conductivity", too_large)
    found, refused, lasting = further(task, config)
    assert (found, list(refused), lasting) == ({}, ["bands", "conductivity"], False)
