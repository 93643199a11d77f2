"""What `phonopy.conf` and files beside it say of a calculation counts, is named as ignored, or is refused."""

import copy
import json
import shutil
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from phonopy.interface.phonopy_yaml import load_yaml

from mlip_refine.data.phonons import collections
from mlip_refine.data.phonons.calculations import PhononFiles
from mlip_refine.data.phonons.collections import read_phonon_set
from mlip_refine.data.phonons.formats import calculations_of_yaml
from mlip_refine.data.phonons.reader import PhononSettings, read_phonon_orders, read_phonons
from mlip_refine.data.phonons.reference import PhononReference
from mlip_refine.errors import InputError

DATA = Path(__file__).parent
RANDOM = DATA / "phonopy_params_NaCl-rd.yaml.xz"
PAIRS = DATA / "phono3py_params_NaCl222.yaml.xz"
POLAR = DATA / "phonopy_params_TiPN3.yaml.xz"
CELL = (DATA / "SnO2" / "POSCAR-unitcell").read_text()
FOURTH = CELL.replace("Sn O\n", "cassiterite\n", 1).replace(" Sn O\n", "")
"""The same as VASP 4 has it."""

UNFITTED = PhononSettings(fit=False)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Force sets, cell and conf of SnO2."""
    return shutil.copytree(DATA / "SnO2", tmp_path / "SnO2")


@cache
def _polar() -> dict:
    return load_yaml(POLAR)


def _read(folder: Path, conf: str, cell: str | None = None) -> PhononReference:
    (folder / "phonopy.conf").write_text(f"DIM = 2 2 3\nPRIMITIVE_AXES = P\n{conf}\n")
    if cell is not None:
        (folder / "POSCAR-unitcell").write_text(cell)
    return read_phonons(folder, settings=UNFITTED)


def _written(folder: Path, data: dict, name: str = "phonopy_params.yaml") -> Path:
    (folder / name).write_text(json.dumps(data))
    return folder / name


@pytest.mark.parametrize(
    "cell", [FOURTH, CELL, CELL.replace(" Sn O\n", " Sn_d O_s/6a2f\n").replace("Sn O\n", "x\n", 1)]
)
def test_atom_name_gives_the_elements_of_a_poscar_that_names_none(folder, cell):
    assert str(_read(folder, "ATOM_NAME = sn O", cell).supercell.symbols) == "Sn24O48"


@pytest.mark.parametrize(
    ("conf", "cell", "message"),
    [
        ("", FOURTH, "the POSCAR names no elements; expected 2 symbol.*ATOM_NAME into phonopy.conf"),
        ("ATOM_NAME = Sn", FOURTH, "names no elements; found Sn, expected 2 symbol.s., for 2 . 4 atoms"),
        ("ATOM_NAME = Sn Ox", FOURTH, "names no elements; found Sn Ox"),
        ("", CELL.replace(" Sn O\n", " Sn Ox\n"), "does not name every element; found Sn Ox"),
        ("", CELL.replace("1.0\n", "-73.0\n"), "whose scale is a volume"),
    ],
)
def test_elements_are_never_guessed(folder, conf, cell, message):
    """phonopy takes hydrogen, helium, ... for groups of atoms without names."""
    with pytest.raises(InputError, match=f"POSCAR-unitcell: .*{message}"):
        _read(folder, conf, cell)


def test_masses_of_the_primitive_cell_count(folder):
    masses = _read(folder, "MASS = 120 120 18 18 18 18").supercell.get_masses()
    assert masses.tolist() == [120.0] * 24 + [18.0] * 48
    with pytest.raises(InputError, match="MASS does not fit; found 2 masses, expected one for each of the 6"):
        _read(folder, "MASS = 120 18")
    for mass in ("-5", "0", "nan", "1e300"):
        with pytest.raises(InputError, match="a mass that no atom has"):
            _read(folder, f"MASS = {mass} 120 18 18 18 18")
    with pytest.raises(InputError, match=r"phonopy\.conf: cannot be read"):
        _read(folder, "MASS = heavy")


def test_moments_count_and_lower_the_symmetry(folder):
    found = _read(folder, "MAGMOM = 1 5*0")
    assert set(found.supercell.get_initial_magnetic_moments()) == {1.0, 0.0}
    assert len(found.symmetry.rotations) < len(_read(folder, "").symmetry.rotations)


def test_the_cell_has_the_name_that_conf_gives(folder, tmp_path):
    (folder / "POSCAR-unitcell").rename(folder / "mine.vasp")
    (folder / "POSCAR").write_text("supercell of another code\n")
    assert len(_read(folder, "CELL_FILENAME = mine.vasp").supercell) == 72
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        # The cell comes before the file that names it.
        for name in ("mine.vasp", "FORCE_SETS", "POSCAR", "phonopy.conf"):
            archive.add(folder / name, f"deep/{name}")
    assert len(read_phonons(tmp_path / "a.tar", settings=UNFITTED).supercell) == 72
    with pytest.raises(
        InputError, match=r"CELL_FILENAME is not a file beside it; found \.\./SnO2/mine\.vasp"
    ):
        _read(folder, "CELL_FILENAME = ../SnO2/mine.vasp")
    with pytest.raises(InputError, match="no unit cell; expected none"):
        _read(folder, "CELL_FILENAME = none")


def test_a_changed_cell_is_read_anew(folder, tmp_path):
    """The cache knows the file by the name that conf gives."""
    (folder / "POSCAR-unitcell").rename(folder / "mine.vasp")
    _read(folder, "CELL_FILENAME = mine.vasp")
    for scale in (1.0, 1.01):
        (folder / "mine.vasp").write_text(CELL.replace("1.0\n", f"{scale}\n"))
        (found,) = read_phonon_set(folder, settings=UNFITTED, cache=tmp_path / "cache")
        assert found.supercell.cell.lengths()[0] == pytest.approx(2 * 4.77258125 * scale)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("PRIMITVE_AXES", "PRIMITIVE_AXES"), ("DIMM", "DIM"), ("ATOM_NAMES", "ATOM_NAME"), ("MASSES", "MASS")],
)
def test_a_misspelt_tag_is_refused(folder, wrong, right):
    with pytest.raises(
        InputError, match=rf"phonopy\.conf: unknown tag; found {wrong}\. Did you mean '{right}'"
    ):
        _read(folder, f"{wrong} = 1 2 3")


def test_tags_that_change_nothing_are_named(folder, tmp_path, monkeypatch):
    found = _read(folder, "MP = 8 8 8\nFC_SYMMETRY = .TRUE.\nMY_OWN = 3")
    assert found.metadata.notes == ("tags of phonopy.conf that change nothing: MP, FC_SYMMETRY, MY_OWN",)
    said = []
    monkeypatch.setattr(collections.console, "print", lambda text, **_: said.append(text))
    for _ in range(2):  # the second time from the cache
        read_phonon_set(folder, settings=UNFITTED, cache=tmp_path / "cache")
    assert said == [f"SnO2: {found.metadata.notes[0]}"] * 2


def test_conf_beside_a_file_with_everything_is_named(tmp_path):
    _written(tmp_path, _polar())
    (tmp_path / "phonopy.conf").write_text("DIM = 9 9 9\nMASS = 1\n")
    found = read_phonons(tmp_path, settings=UNFITTED)
    assert found.metadata.notes == ("phonopy.conf is not used: phonopy_params.yaml has cells and matrices",)


@pytest.mark.parametrize("dim", ["1/0 2 3", "2.5 2 3", "0 0 0", "1 1 1 1 1 1 1 1 1", "2 2", "nan 2 2", "x"])
def test_a_dim_that_is_no_supercell_is_refused(folder, dim):
    (folder / "phonopy.conf").write_text(f"DIM = {dim}\n")
    with pytest.raises(InputError, match=r"phonopy\.conf: (no supercell|cannot be read)"):
        read_phonons(folder)


@pytest.mark.parametrize("name", ["POSCAR-unitcell", "FORCE_SETS"])
def test_a_damaged_file_of_a_calculation_is_named(folder, tmp_path, name):
    (folder / name).write_text("x\n1.0\n1 0\n")
    with pytest.raises(InputError) as caught:
        read_phonons(folder)
    assert caught.value.where == str(folder / name)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for file in folder.iterdir():
            archive.add(file, file.name)
    with pytest.raises(InputError) as caught:
        read_phonons(tmp_path / "a.tar")
    assert caught.value.where == str(tmp_path / "a.tar" / name)


def test_an_archive_without_a_cell_is_named_by_its_own_path(folder, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(folder / "FORCE_SETS", "FORCE_SETS")
    with pytest.raises(InputError, match=r"a\.tar: no unit cell; expected phonopy_params\.yaml") as caught:
        read_phonons(tmp_path / "a.tar")
    assert caught.value.where == str(tmp_path / "a.tar")


def test_displacements_of_all_atoms_in_a_cell_that_is_not_primitive():
    """symfc finds the primitive cell by symmetry; the calculation may have a larger one."""
    small = read_phonons(RANDOM)
    large = read_phonons(RANDOM, settings=PhononSettings(PhononFiles(primitive_matrix="P")))
    assert (len(small.primitive_atoms), len(large.primitive_atoms)) == (2, 8)
    assert torch.allclose(small.dense(), large.dense(), atol=1e-9)


def test_unfinished_displacements_are_named(tmp_path):
    data = copy.deepcopy(_polar())
    for k in (1, 4):
        del data["displacements"][k]["forces"]
    with pytest.raises(InputError, match="displacements without forces; found none for 2, 5 of 17"):
        read_phonons(_written(tmp_path, data))
    for one in data["displacements"]:
        one.pop("forces", None)
    with pytest.raises(
        InputError, match="neither forces nor force constants; found 17 displacements without"
    ):
        read_phonons(_written(tmp_path, data))
    every = load_yaml(RANDOM)
    for atom in every["displacements"][3]:
        del atom["force"]
    with pytest.raises(InputError, match="displacements without forces; found none for 4 of 10"):
        read_phonons(_written(tmp_path, every))


def test_second_order_forces_count_without_those_of_third_order(tmp_path):
    """In a supercell of their own, and in that of the pairs, whose single displacements come first."""
    data = {key: value for key, value in copy.deepcopy(_polar()).items() if key != "phonopy"}
    forces = np.array([one.pop("forces") for one in data["displacements"]])
    for key in ("supercell_matrix", "primitive_matrix", "supercell", "displacements"):
        data[f"phonon_{key}"] = data[key]
    data |= {"phono3py": {"version": "3.0"}, "displacements": data["displacements"][:7]}
    _written(tmp_path, data, "phono3py_disp.yaml")
    np.savetxt(tmp_path / "FORCES_FC2", forces.reshape(-1, 3))
    (found,) = read_phonon_orders(tmp_path, settings=UNFITTED)
    assert len(found.displacements) == 17
    assert found.displacements[0].forces.numpy() == pytest.approx(forces[0], abs=1e-9)

    pairs = load_yaml(PAIRS)
    (whole,) = calculations_of_yaml(pairs)
    for one in pairs["displacement_pairs"]:
        del one["forces"]
        for second in one["paired_with"]:
            second.pop("forces", None)
    (tmp_path / "one").mkdir()
    _written(tmp_path / "one", pairs, "phono3py_disp.yaml")
    np.savetxt(tmp_path / "one" / "FORCES_FC2", whole.forces[: whole.n_fitted].reshape(-1, 3))
    (found,) = read_phonon_orders(tmp_path / "one")
    assert len(found.displacements) == whole.n_fitted == 2
    assert found.metadata.checks["misfit"] < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mass": 0.0}, "a mass that no atom has; found 0 of atom 0"),
        ({"mass": -5.0}, "a mass that no atom has; found -5 of atom 0"),
        ({"mass": float("nan")}, "a mass that no atom has; found nan"),
        ({"coordinates": [float("nan")] * 3}, "not finite"),
    ],
)
def test_numbers_that_no_crystal_has_are_refused(tmp_path, change, message):
    data = {key: value for key, value in copy.deepcopy(_polar()).items() if key != "supercell"}
    data["unit_cell"]["points"][0] |= change
    with pytest.raises(InputError, match=message):
        read_phonons(_written(tmp_path, data))


@pytest.mark.parametrize("a", [0.0, 1e-5, 1e300, float("nan")])
def test_a_lattice_that_no_crystal_has_is_refused(tmp_path, a):
    data = {key: value for key, value in copy.deepcopy(_polar()).items() if key != "supercell"}
    data["unit_cell"]["lattice"] = (a * np.eye(3)).tolist()
    with pytest.raises(InputError, match=r"(no volume|beyond measure|not finite|cannot be read)"):
        read_phonons(_written(tmp_path, data))


def test_one_calculation_has_one_name(tmp_path):
    for name in ("a", "b"):
        _written(tmp_path, _polar(), f"{name}.yaml")
    with pytest.raises(InputError, match="one calculation has two names, 'a' and 'b'"):
        read_phonon_set(tmp_path, cache=False, settings=UNFITTED)
    (tmp_path / "index.csv").write_text("file,name\na.yaml,one\na.yaml,two\n")
    with pytest.raises(InputError, match="one calculation has two names, 'one' and 'two'"):
        read_phonon_set(tmp_path, cache=False, settings=UNFITTED)


def test_a_name_of_an_index_does_not_steer_the_terminal(tmp_path):
    _written(tmp_path, _polar(), "a.yaml")
    (tmp_path / "index.csv").write_text("file,name\na.yaml,\x1b[31mred\n")
    with pytest.raises(InputError, match=r"index\.csv:2: a name with control characters"):
        read_phonon_set(tmp_path, cache=False)
