"""Crystals that are done count again only if nothing that they depend on has changed."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from ase.build import bulk

from mlip_refine import testing
from mlip_refine.config import Phonons
from mlip_refine.config.sections.phonons import QuasiHarmonic
from mlip_refine.crystals.phonons.harmonic import HarmonicCrystal
from mlip_refine.crystals.relaxation import Rest
from mlip_refine.workflows.phonons import store as phonon_store
from mlip_refine.workflows.phonons.records import PhononPoint
from mlip_refine.workflows.phonons.store import Store
from mlip_refine.workflows.phonons.tasks import Task

SALT = bulk("NaCl", "rocksalt", a=5.64)


@cache
def _crystal(mass: float, a: float) -> HarmonicCrystal:
    cell = bulk("NaCl", "rocksalt", a=a)
    cell.set_masses([mass, 35.5])
    return HarmonicCrystal.of_cell(cell, np.diag([2, 2, 2]))


def _task(name: str = "salt", mass: float = 23.0, a: float = 5.64, **changes) -> Task:
    return replace(Task(name, "relaxed", _crystal(mass, a), Rest("cell")), **changes)


def _point(name: str = "salt") -> PhononPoint:
    return PhononPoint(name, "relaxed", "ClNa", 2, 16, 22.4, {"max_THz": 7.0})


@pytest.fixture
def store(tmp_path):
    (tmp_path / "crystals").mkdir()
    return Store(tmp_path, "abc", Phonons())


def test_what_was_found_is_read_as_long_as_it_is_the_same(store, monkeypatch):
    store.write(_task(), _point(), structures=None)
    assert store.read(_task()) == _point()
    others = [_task(mass=24.0), _task(a=5.65), _task(rest=Rest("atoms"))]
    assert [store.read(task) for task in others] == [None] * 3
    for section in (
        Phonons(mesh=(3, 3, 3)),
        Phonons(displacement=0.02),
        Phonons(quasi_harmonic=QuasiHarmonic()),
    ):
        assert replace(store, section=section).read(_task()) is None
    assert replace(store, section=Phonons(phases=("salt",), supercell=9.0)).read(_task()) == _point()
    assert replace(store, model_hash="abd").read(_task()) is None
    monkeypatch.setattr(phonon_store, "FORMAT", phonon_store.FORMAT + 1)
    assert store.read(_task()) is None


def test_another_reference_is_another_point(store, phonons_of):
    reference = phonons_of(SALT, (2, 2, 2), lambda atoms: testing.bond_springs(atoms, {2.9: 2.5}))
    task = _task(reference=reference)
    store.write(task, _point())
    stiffer = replace(reference, force_constants=1.01 * reference.force_constants)
    found = [store.read(replace(task, reference=r)) for r in (reference, stiffer, None)]
    assert found == [_point(), None, None]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"key": 1}', "\udcff"])
def test_a_file_that_cannot_be_read_is_none(store, text):
    assert store.read(_task()) is None
    store.path(_task(), ".json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert store.read(_task()) is None


@pytest.mark.parametrize("name", ["mp-1/PBE", "../x", "..", "a b", "%2F", "/etc/passwd"])
def test_any_name_is_one_file_of_the_folder(store, name):
    store.write(_task(name), _point(name))
    (file,) = (store.folder / "crystals").iterdir()
    assert file == store.path(_task(name), ".json")
    assert store.read(_task(name)) == _point(name)
    assert list(store.folder.iterdir()) == [store.folder / "crystals"]
