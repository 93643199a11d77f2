"""Crystals have the wanted size, density and neighbours; files are periodic or refused."""

import gzip
import json

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from matscipy.neighbours import neighbour_list

from mlip_refine.data import build_phase, load_structure
from mlip_refine.errors import InputError

NEIGHBOURS = {
    "hcp": (12, 1.0),
    "bcc": (8, np.sqrt(3) / 2),
    "fcc": (12, np.sqrt(0.5)),
    "diamond": (4, np.sqrt(3) / 4),
    "sc": (6, 1.0),
}
PER_CELL = {"hcp": 2, "bcc": 2, "fcc": 4, "diamond": 8, "sc": 1}


@pytest.mark.parametrize("prototype", NEIGHBOURS)
@pytest.mark.parametrize("n", [2, 3])
def test_supercells_of_prototypes(prototype, n):
    a = 3.3
    atoms = build_phase(prototype, "Ti", PER_CELL[prototype] * n**3, a=a, c=a * np.sqrt(8 / 3))
    count, distance = NEIGHBOURS[prototype]
    assert len(atoms) == PER_CELL[prototype] * n**3
    assert atoms.pbc.all()
    assert np.linalg.det(np.array(atoms.cell)) > 0
    assert atoms.cell[0, 1:] == pytest.approx(0)
    assert atoms.cell[0, 0] == pytest.approx(n * a)
    receivers = neighbour_list("i", atoms, cutoff=1.01 * distance * a)
    assert set(np.bincount(receivers, minlength=len(atoms))) == {count}


@pytest.mark.parametrize("n_atoms", [54, 128, 250])
def test_hcp_and_bcc_meet_at_equal_sizes(n_atoms):
    hcp, bcc = build_phase("hcp", "Ti", n_atoms, 2.93, 4.65), build_phase("bcc", "Ti", n_atoms, 3.26)
    assert len(hcp) == len(bcc) == n_atoms
    assert hcp.cell.cellpar()[3:] == pytest.approx([90, 90, 120])
    assert bcc.cell.volume / n_atoms == pytest.approx(3.26**3 / 2)
    assert hcp.cell.volume / n_atoms == pytest.approx(np.sqrt(3) / 4 * 2.93**2 * 4.65)


def test_tabulated_lattice_constants():
    assert build_phase("hcp", "Ti", 54).cell.cellpar()[:3] / 3 == pytest.approx([2.95, 2.95, 4.69], abs=0.02)
    assert build_phase("fcc", "Al", 32).cell.cellpar()[0] == pytest.approx(8.1)
    with pytest.raises(InputError, match="no tabulated lattice constant of bcc Ti"):
        build_phase("bcc", "Ti", 54)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bcc", "Ti", 53, 3.3), r"found n_atoms 53, expected one of 2, 16, 54, 128, 250.*nearest is 54"),
        (("diamond", "Si", 9, 5.4), "one of 8, 64, 216"),
        (("bcc", "Ti", 0, 3.3), "n_atoms 0"),
        (("hpc", "Ti", 54, 3.3), "unknown prototype.*Did you mean 'hcp'"),
        (("hcp", "Tj", 54, 3.3), "unknown element"),
        (("hcp", "Ti", 54, -1.0), "a must be above 0"),
        (("hcp", "Ti", 54, 2.9, float("nan")), "c must be above 0"),
    ],
)
def test_impossible_phases_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        build_phase(*arguments)


@pytest.mark.parametrize("name", ["POSCAR", "a.cif", "a.extxyz", "a.xsf"])
def test_files_that_ase_reads(name, tmp_path):
    crystal = bulk("Ti", "hcp", a=2.95, c=4.7)
    ase.io.write(tmp_path / name, crystal)
    atoms = load_structure(tmp_path / name, (2, 1, 3))
    assert len(atoms) == 12
    assert atoms.cell.volume == pytest.approx(6 * crystal.cell.volume, rel=1e-5)
    assert np.linalg.det(np.array(atoms.cell)) > 0


def test_last_frame_format_and_handedness(tmp_path):
    left = bulk("NaCl", "rocksalt", a=5.6)
    left.set_cell(np.array(left.cell)[[1, 0, 2]])
    assert (
        np.linalg.det(np.array(left.cell)) * np.linalg.det(np.array(bulk("NaCl", "rocksalt", a=5.6).cell)) < 0
    )
    for crystal in (left, bulk("NaCl", "rocksalt", a=5.6)):
        ase.io.write(tmp_path / "data.txt", crystal, format="extxyz")
        atoms = load_structure(tmp_path / "data.txt", format="extxyz")
        assert np.linalg.det(np.array(atoms.cell)) > 0
        assert len(neighbour_list("i", atoms, cutoff=2.9)) == 12


@pytest.mark.parametrize("atoms", [molecule("H2O"), Atoms("Ti", cell=[3, 3, 0], pbc=True)])
def test_structures_that_are_not_periodic_are_refused(atoms, tmp_path):
    ase.io.write(tmp_path / "a.extxyz", atoms)
    with pytest.raises(InputError, match=r"a\.extxyz: not a structure that is periodic"):
        load_structure(tmp_path / "a.extxyz")


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such structure file"):
        load_structure(tmp_path / "POSCAR")
    (tmp_path / "POSCAR").write_text("nothing\nat all\n")
    with pytest.raises(InputError, match="cannot be read as a structure"):
        load_structure(tmp_path / "POSCAR")
    with pytest.raises(InputError, match="cannot be read as cif"):
        load_structure(tmp_path / "POSCAR", format="cif")
    with pytest.raises(InputError, match="unknown file format; found ciff"):
        load_structure(tmp_path / "POSCAR", format="ciff")
    with pytest.raises(InputError, match="wrong supercell"):
        load_structure(tmp_path / "POSCAR", (1, 0, 1))


CIF = """data_x
_cell_length_a 6.02
_cell_length_b 6.02
_cell_length_c 6.02
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_space_group_name_H-M 'F m -3 m'
_symmetry_Int_Tables_number 225
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
Te1 Te 0 0 0 1.0
Ge1 Ge 0.5 0.5 0.5 0.4
Sb1 Sb 0.5 0.5 0.5 0.4
"""
XYZ = """2
Lattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3:{name}:R:1 pbc="T T T"
Ti 0 0 0 {value}
Ti 2 2 2 {value}
"""


def _of_pymatgen(*species: dict) -> str:
    lattice = {"matrix": np.diag([3.0, 3.0, 3.0]).tolist()}
    sites = [{"species": list(species), "abc": [0, 0, 0]}]
    module = {"@module": "pymatgen.core.structure", "@class": "Structure"}
    return json.dumps({**module, "lattice": lattice, "sites": sites})


def _read(folder, name, text):
    (folder / name).write_text(text)
    return load_structure(folder / name)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.cif", CIF, "Ge 0.4, Sb 0.4"),
        ("a.cif", CIF.replace("Sb1 Sb 0.5 0.5 0.5 0.4\n", ""), "Ge 0.4"),
        ("a.json", _of_pymatgen({"element": "Ti", "occu": 0.5}), "Ti 0.5"),
        (
            "a.json",
            _of_pymatgen({"element": "Ti", "occu": 0.5}, {"element": "Zr", "occu": 0.5}),
            "Ti 0.5, Zr 0.5",
        ),
        ("a.extxyz", XYZ.format(name="occupancy", value=0.5), "Ti 0.5"),
    ],
)
def test_sites_that_are_occupied_in_part_are_refused(tmp_path, name, text, found):
    with pytest.raises(
        InputError, match=rf"{name}: a site is not occupied by one whole atom; found {found}\."
    ):
        _read(tmp_path, name, text)


@pytest.mark.parametrize("value", ["1.0", "1.0(2)", "?", ".", "0.9999"])
def test_sites_that_are_occupied_by_one_atom_are_read(tmp_path, value):
    full = CIF.replace("Sb1 Sb 0.5 0.5 0.5 0.4\n", "").replace("0.5 0.5 0.5 0.4", f"0.5 0.5 0.5 {value}")
    assert _read(tmp_path, "a.cif", full).get_chemical_formula() == "Ge4Te4"


def test_occupancies_that_a_program_does_not_know_are_no_occupancies(tmp_path):
    assert len(_read(tmp_path, "a.extxyz", XYZ.format(name="occupancy", value=0.0))) == 2


POSCAR = "{comment}\n1.0\n3.25 0 0\n0 3.25 0\n0 0 3.25\n{counts}\nDirect\n0 0 0\n.5 .5 .5\n"


@pytest.mark.parametrize("name", ["POSCAR", "a.vasp", "CONTCAR", "POSCAR.gz"])
@pytest.mark.parametrize("comment", ["my cell", "cell of H", "", "Ti bulk", "X", "Ti O"])
def test_a_poscar_without_elements_is_refused_with_one_sentence(tmp_path, name, comment):
    """ASE takes `cell of H` for hydrogen, and looks for a POTCAR or an OUTCAR."""
    text = POSCAR.format(comment=comment, counts="2")
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    with pytest.raises(InputError, match="the POSCAR names no elements; expected a line of symbols"):
        load_structure(path)


@pytest.mark.parametrize(
    ("comment", "counts", "formula"),
    [
        ("my cell", "Ti\n2", "Ti2"),
        ("cell of H", "Ti_sv O\n1 1", "OTi"),
        ("Ti", "2", "Ti2"),
        ("Ti O", "1 1", "OTi"),
        ("TiO", "1 1", "OTi"),
    ],
)
def test_a_poscar_names_its_elements_in_two_places(tmp_path, comment, counts, formula):
    assert (
        _read(tmp_path, "a.vasp", POSCAR.format(comment=comment, counts=counts)).get_chemical_formula()
        == formula
    )


def test_a_file_that_is_cut_off_is_named_by_its_format(tmp_path):
    with pytest.raises(
        InputError, match=r"structure of the format vasp-out; found Incomplete OUTCAR.*cut off"
    ):
        _read(tmp_path, "OUTCAR", " vasp.5.4.4\n POTCAR: PAW_PBE Ti\n")
    with pytest.raises(InputError, match=r"cannot be read as a structure; .*Name its format"):
        _read(tmp_path, "a.unknown", "nothing\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (XYZ.format(name="masses", value=0.0), "a mass that no atom has; found 0 of atom 0"),
        (XYZ.format(name="masses", value=-5.0), "a mass that no atom has; found -5 of atom 0"),
        (XYZ.format(name="masses", value="nan"), "a mass that no atom has; found nan of atom 0"),
        (XYZ.format(name="masses", value=1e30), "a mass that no atom has"),
        (XYZ.format(name="tags", value=0).replace("Ti 2", "X 2"), "an atom without an element; found atom 1"),
        (
            XYZ.format(name="tags", value=0).replace("4 0 0 0 4", "nan 0 0 0 4"),
            "cell or positions are not finite",
        ),
        (
            XYZ.format(name="tags", value=0).replace("4 0 0 0 4", "inf 0 0 0 4"),
            "cell or positions are not finite",
        ),
        (XYZ.format(name="tags", value=0).replace("4 0 0 0 4", "1e300 0 0 0 4"), "a cell beyond measure"),
        (XYZ.format(name="tags", value=0).replace("2 2 2", "2 nan 2"), "cell or positions are not finite"),
    ],
)
def test_numbers_that_no_crystal_has_are_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=rf"a\.extxyz: {message}"):
        _read(tmp_path, "a.extxyz", text)


def test_nested_and_ragged_json_is_refused(tmp_path):
    for text in (
        "[" * 100_000 + "]" * 100_000,
        _of_pymatgen({"element": "Ti", "occu": 1}).replace("[0, 0, 0]", "[0, [1], 0]", 1),
    ):
        with pytest.raises(InputError, match=r"a\.json: cannot be read as a structure"):
            _read(tmp_path, "a.json", text)
