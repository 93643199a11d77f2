"""Crystals have the wanted size, density and neighbours; files are periodic or refused."""

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
