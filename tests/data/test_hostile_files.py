"""Files of other people are data: no reader runs code that they name, imports it, or writes anywhere."""

import gzip
import json
import lzma
import os
import pickle
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ase.io
import h5py
import numpy as np
import pytest
from ase.build import bulk

sys.path.insert(0, str(Path(__file__).parents[1] / "hostile"))
from audit import CANARY, Watch

from mlip_refine import testing
from mlip_refine.config import load_config
from mlip_refine.data.frames import read_frames
from mlip_refine.data.phonons.calculations import PhononFiles
from mlip_refine.data.phonons.collections import read_phonon_set
from mlip_refine.data.phonons.reader import PhononSettings, read_phonons
from mlip_refine.data.structures import load_structure
from mlip_refine.data.tables import read_table
from mlip_refine.errors import InputError
from mlip_refine.sampling.store import FrameStore

PHONONS = Path(__file__).parent / "phonons"
POLAR = lzma.decompress((PHONONS / "phonopy_params_TiPN3.yaml.xz").read_bytes())
THIRD = lzma.decompress((PHONONS / "phono3py_params_NaCl222.yaml.xz").read_bytes())

watch = Watch()
sys.addaudithook(watch)


@pytest.fixture
def watched(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder for hostile files: nothing may happen outside of the temporary folder beside it."""
    files, temporary = tmp_path / "files", tmp_path / "temporary"
    files.mkdir()
    temporary.mkdir()
    (tmp_path / f"{CANARY}.py").write_text(
        f"open({str(files / 'PWNED')!r}, 'w').close()\n\nclass Trap: pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(files)
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", None)
    watch.seen.clear()
    yield files
    watch.folder = None
    assert not (files / "PWNED").exists()
    assert CANARY not in sys.modules


def refused(folder: Path, read: Callable[[], Any], match: str) -> InputError:
    """Read under the watch: one error that a user understands comes, and nothing else happens."""
    watch.folder = folder
    try:
        with pytest.raises(InputError, match=match) as caught:
            read()
    finally:
        watch.folder = None
    assert watch.seen == []
    return caught.value


def test_the_watch_sees_what_it_is_for(watched):
    watch.folder = watched
    os.system("true")
    exec(f"'{CANARY}'")
    (watched / "x").write_text("")
    with pytest.raises(ModuleNotFoundError):
        __import__(f"{CANARY}_2")
    watch.folder = None
    found = [line.split()[0] for line in watch.seen]
    watch.seen.clear()
    assert found == ["os.system", "compile", "exec", "open", "import"]


TAGS = {
    "system": '!!python/object/apply:os.system ["touch PWNED"]',
    "new": f"!!python/object/new:{CANARY}.Trap []",
    "object": f"!!python/object:{CANARY}.Trap {{}}",
    "name": f"!!python/name:{CANARY}.Trap",
    "module": f"!!python/module:{CANARY}",
    "popen": '!!python/object/apply:subprocess.Popen [["touch", "PWNED"]]',
    "tuple": "!!python/tuple [1, 2]",
}
POISON = f"x: {TAGS['system']}\n".encode()
NOT_DATA = r"asks for more than data \(line \d+\).*python/object/apply:os\.system.*is not data"


@pytest.mark.parametrize("tag", TAGS)
def test_tags_of_a_phonopy_file_are_not_data(watched, tag):
    path = watched / "phonopy_params.yaml"
    path.write_bytes(POLAR + f"x: {TAGS[tag]}\n".encode())
    error = refused(
        watched, lambda: read_phonons(path), "asks for more than data.*!!python/object is not data"
    )
    assert error.where == str(path)


def _tar(path: Path, name: str, content: bytes) -> Path:
    inner = path.parent / "inner" / name
    inner.parent.mkdir()
    inner.write_bytes(content)
    with tarfile.open(path, "w:xz") as archive:
        archive.add(inner, arcname=name)
    inner.unlink()
    inner.parent.rmdir()
    return path


def _phonons(form: str, folder: Path) -> Path:
    """One hostile calculation in every form in which calculations come."""
    if form in {"bare", "loss"}:
        (folder / "phonopy_params.yaml").write_bytes(POLAR + POISON)
        return folder / "phonopy_params.yaml"
    if form in {"xz", "gz"}:
        packed = {"xz": lzma.compress, "gz": gzip.compress}[form](POLAR + POISON)
        (folder / f"phonopy_params.yaml.{form}").write_bytes(packed)
        return folder / f"phonopy_params.yaml.{form}"
    if form == "phono3py":
        (folder / "phono3py_params.yaml").write_bytes(THIRD + POISON)
        return folder / "phono3py_params.yaml"
    if form == "tar":
        return _tar(folder / "a.tar.xz", "phonopy_params.yaml", POLAR + POISON)
    (folder / "one").mkdir()
    (folder / "one" / "phonopy.yaml").write_bytes(POLAR + POISON)
    if form == "index":
        (folder / "index.csv").write_text("file,name\none,a\n")
        return folder / "index.csv"
    return folder / "one" if form == "folder" else folder


@pytest.mark.parametrize("form", ["bare", "xz", "gz", "phono3py", "tar", "index", "folder", "collection"])
@pytest.mark.parametrize("cache", [False, True])
def test_a_hostile_calculation_is_refused_in_every_form(watched, form, cache):
    path = _phonons(form, watched)
    kept = watched.parent / "temporary" / "cache" if cache else False
    error = refused(watched, lambda: read_phonon_set(path, cache=kept), NOT_DATA)
    assert str(watched) in error.where


def test_a_hostile_calculation_is_refused_by_the_loss(watched, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(watched.parent / "temporary"))
    node = {"type": "phonon_hvp", "data": str(_phonons("loss", watched)), "split": None}
    refused(watched, lambda: testing.loss_of(node), NOT_DATA)


def test_no_calculator_makes_phonopy_parse_yaml(watched):
    (watched / "POSCAR-unitcell").write_bytes(POLAR + POISON)
    settings = PhononSettings(PhononFiles(calculator="phonopy_yaml"))
    refused(watched, lambda: read_phonons(watched, settings=settings), "no calculator")
    settings = PhononSettings(PhononFiles(cell=watched / "POSCAR-unitcell"))
    refused(
        watched, lambda: read_phonons(watched, settings=settings), "cannot be read as a phonon calculation"
    )


CLASSES = "().__class__.__mro__[1].__getattribute__(*[().__class__.__mro__[1]]+['__sub'+'classes__'])()"
SYSTEM = '__import__("os").system("touch PWNED")'
CIF = f"""data_5yOhtAoR
_audit_creation_date 2018-06-08
loop_
_parent_propagation_vector.id
_parent_propagation_vector.kxkykz
k1 [0 0 0]
_space_group_magn.transform_BNS_Pp_abc 'a,b,[d for d in {CLASSES} if d] + [{SYSTEM}];0,0,0'
_space_group_magn.number_BNS 62.448
_space_group_magn.name_BNS "P n' m a' "
"""


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch PWNED",)


def _structure(name: str, path: Path) -> None:
    """A file that makes a careless reader run code."""
    trap = {"@module": CANARY, "@class": "Trap", "@callable": "Trap", "data": {"x": 1}}
    if name.endswith(".json"):
        sites = [{"species": [{"element": "Ti", "occu": 1}], "abc": [0, 0, 0], "properties": {"x": trap}}]
        # With the trap for a lattice there is nothing to read; site properties are left unread.
        lattice = trap if name == "lattice.json" else {"matrix": (4 * np.eye(3)).tolist(), "@module": CANARY}
        path.write_text(json.dumps({**trap, "lattice": lattice, "sites": sites}))
    elif name.endswith((".yaml", ".yml")):
        path.write_text(f"lattice: {TAGS['system']}\nsites: {TAGS['object']}\n")
    elif name.endswith(".cif"):
        path.write_text(CIF)
    elif name.endswith("xyz"):
        path.write_text(
            f"1\nLattice=\"__import__('{CANARY}')\" Properties=eval:os.system('touch PWNED')\nTi 0 0 0\n"
        )
    elif name == "POSCAR":
        path.write_text(f"__import__('{CANARY}')\n__import__('os').system('touch PWNED')\n" + "exec\n" * 8)
    else:
        path.write_bytes(pickle.dumps(_Trap(), protocol=2))


STRUCTURES = [
    *("lattice.json", "a.yaml", "a.yml", "a.cif", "a.mcif", "a.xyz", "a.extxyz", "POSCAR", "a.vasp"),
    *(
        "a.traj",
        "a.trj",
        "a.pkl",
        "a.pickle",
        "a.gpw",
        "a.npz",
        "a.db",
        "a.bundle",
        "a.nc",
        "a.py",
        "a.json.pkl",
    ),
]


@pytest.mark.parametrize("name", STRUCTURES)
def test_hostile_structures_are_refused(watched, name):
    _structure(name, watched / name)
    refused(watched, lambda: load_structure(watched / name), name)


def test_a_structure_starts_no_program(watched):
    ase.io.write(watched / "a.cell", bulk("Ti", "hcp", a=2.95, c=4.7), format="castep-cell")
    refused(watched, lambda: load_structure(watched / "a.cell"), "a structure must not start a program")


def test_structures_of_pymatgen_are_read_without_what_they_name(watched):
    _structure("a.json", watched / "a.json")
    watch.folder = watched
    atoms = load_structure(watched / "a.json")
    watch.folder = None
    assert watch.seen == []
    assert atoms.get_chemical_formula() == "Ti"
    assert atoms.cell.lengths() == pytest.approx([4, 4, 4])


@pytest.mark.parametrize("content", ["pickle", "text", "key"])
def test_hostile_frames_are_refused(watched, content):
    path = watched / "a.extxyz"
    if content == "pickle":
        _structure("x.pkl", path)
    elif content == "text":
        _structure("x.xyz", path)
    else:
        lines = f'REF_energy="__import__(\'{CANARY}\')" Lattice="3 0 0 0 3 0 0 0 3" '
        lines += "Properties=species:S:1:pos:R:3"
        path.write_text(f'1\n{lines} pbc="T T T" y={{"@module":"{CANARY}"}}\nTi 0 0 0\n')
    refused(watched, lambda: read_frames(path, forces_key=None, stress_key=None), r"a\.extxyz")


@pytest.mark.parametrize("kind", ["external storage", "external link", "soft link", "virtual dataset"])
def test_hdf5_files_hold_their_own_data(watched, kind):
    folder = watched / "SnO2"
    folder.mkdir()
    for name in ("POSCAR-unitcell", "phonopy.conf"):
        (folder / name).write_bytes((PHONONS / "SnO2" / name).read_bytes())
    n = 72 * 72 * 9
    np.zeros(n).tofile(watched / "secret")
    with h5py.File(watched / "other.h5", "w") as other:
        other["fc2"] = np.zeros((72, 72, 3, 3))
    path = folder / "force_constants.hdf5"
    with h5py.File(path, "w") as file:
        shape = (72, 72, 3, 3)
        if kind == "external storage":
            file.create_dataset("fc2", shape, "f8", external=[(str(watched / "secret"), 0, 8 * n)])
        elif kind == "external link":
            file["fc2"] = h5py.ExternalLink(str(watched / "other.h5"), "/fc2")
        elif kind == "soft link":
            file["a"] = np.zeros(shape)
            file["fc2"] = h5py.SoftLink("/a")
        else:
            layout = h5py.VirtualLayout(shape, "f8")
            layout[:] = h5py.VirtualSource(str(watched / "other.h5"), "fc2", shape)
            file.create_virtual_dataset("fc2", layout)
    error = refused(watched, lambda: read_phonons(folder), "takes data from elsewhere.*in the file itself")
    assert error.where == str(path)


def test_stored_frames_hold_their_own_data(watched):
    store = FrameStore(watched, {})
    with h5py.File(store.path("sampling", 0), "w") as file:
        file["snapshot"] = h5py.ExternalLink("other.h5", "/")
    refused(watched, lambda: store.read("sampling", 0, {}, None), "takes data from elsewhere")


def test_hostile_tables_indices_and_configs_are_refused(watched):
    (watched / "a.csv").write_text(
        "# title: =cmd|'/bin/touch PWNED'!A1\n# column: T | K | __import__('os')\nT\n1\n"
    )
    refused(watched, lambda: read_table(watched / "a.csv"), r"a\.csv")
    (watched / "index.csv").write_text("file,name\n\"=cmd|' /C touch PWNED'!A0\",a\n")
    refused(watched, lambda: read_phonon_set(watched, cache=False), "no such file")
    (watched / "a.yaml").write_text(f"name: {TAGS['system']}\npotential: {TAGS['object']}\n")
    refused(watched, lambda: load_config(watched / "a.yaml"), "tag.*is not allowed")


def test_files_without_a_trap_are_read_under_the_watch(watched):
    ase.io.write(watched / "a.cif", bulk("Ti", "hcp", a=2.95, c=4.7))
    (watched / "phonopy_params.yaml").write_bytes(POLAR)
    watch.folder = watched
    load_structure(watched / "a.cif")
    read_phonons(watched / "phonopy_params.yaml")
    watch.folder = None
    assert watch.seen == []
