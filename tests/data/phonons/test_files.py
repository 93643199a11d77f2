"""Phonon calculations are read in every form that phonopy and phono3py write, or refused with the reason."""

import copy
import json
import lzma
import shutil
import tarfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from ase.units import Bohr, Rydberg
from phonopy.file_IO import parse_FORCE_SETS, write_FORCE_CONSTANTS, write_force_constants_to_hdf5
from phonopy.interface.phonopy_yaml import load_yaml

from mlip_refine.data.phonons import reader as phonon_reading
from mlip_refine.data.phonons.calculations import PhononFiles
from mlip_refine.data.phonons.checks import PhononTolerances
from mlip_refine.data.phonons.collections import calculation_names
from mlip_refine.data.phonons.files import read_text
from mlip_refine.data.phonons.formats import (
    READERS,
    PartReader,
    WholeReader,
    calculations_of_yaml,
    reader_of,
    with_forces,
)
from mlip_refine.data.phonons.reader import PhononSettings, read_phonon_orders, read_phonons
from mlip_refine.data.phonons.reference import PhononReference
from mlip_refine.errors import InputError

DATA = Path(__file__).parent
CDSE = DATA / "set" / "materials-id-1070-cdse-p6-3mc-186.tar.lzma"
PTO2 = DATA / "refused" / "materials-id-7868-pto2-p6-3mc-186.tar.lzma"
RANDOM = DATA / "phonopy_params_NaCl-rd.yaml.xz"
PAIRS = DATA / "phono3py_params_NaCl222.yaml.xz"
POLAR = DATA / "phonopy_params_TiPN3.yaml.xz"


@cache
def _tin_oxide() -> PhononReference:
    return read_phonons(DATA / "SnO2")


@cache
def _random() -> PhononReference:
    return read_phonons(RANDOM)


@cache
def _polar() -> dict:
    """TiPN3, low in symmetry and quick."""
    return load_yaml(POLAR)


def _copy(folder: Path, *left_out: str) -> Path:
    target = folder / "copy"
    shutil.copytree(DATA / "SnO2", target)
    for name in left_out:
        (target / name).unlink()
    return target


def _agree(found: PhononReference, wanted: PhononReference, atol: float = 1e-10) -> bool:
    return torch.allclose(found.force_constants, wanted.force_constants, atol=atol)


def test_folder_of_force_sets_cell_and_conf():
    reference = _tin_oxide()
    assert (reference.name, reference.n_atoms, len(reference.primitive_atoms)) == ("SnO2", 72, 6)
    assert reference.metadata.nac
    assert reference.metadata.formula == "O2Sn"
    assert reference.metadata.prototype == "AB2_136_2_4"
    assert [d.displacement.norm().item() for d in reference.displacements] == pytest.approx([0.01] * 3)
    for d in reference.displacements:
        missed = (d.forces + reference.product(d.displacement)).norm() / d.forces.norm()
        assert missed < 0.04
    assert torch.equal(reference.supercell_matrix, torch.diag(torch.tensor([2, 2, 3])))


@pytest.mark.parametrize("form", ["full text", "compact text", "full HDF5", "compact HDF5"])
def test_force_constants_in_files_are_those_that_were_written(tmp_path, form):
    folder = _copy(tmp_path, "FORCE_SETS")
    reference = _tin_oxide()
    full = reference.dense().transpose(1, 2).contiguous().numpy()
    compact = reference.force_constants.numpy()
    values = full if form.startswith("full") else compact
    atoms = np.array(reference.primitive_atoms)
    if form.endswith("text"):
        write_FORCE_CONSTANTS(values, folder / "FORCE_CONSTANTS", p2s_map=atoms)
    else:
        write_force_constants_to_hdf5(values, folder / "force_constants.hdf5", p2s_map=atoms)
    found = read_phonons(folder)
    assert _agree(found, reference)
    assert not found.displacements


def test_force_constants_in_hdf5_have_a_unit_and_atoms(tmp_path):
    """In units of other calculators they are converted; for other atoms than they say, they are refused."""
    folder = _copy(tmp_path, "FORCE_SETS")
    reference = _tin_oxide()
    values, atoms = reference.force_constants.numpy(), np.array(reference.primitive_atoms)
    path = folder / "force_constants.hdf5"
    in_rydberg = values / (Rydberg / Bohr**2)
    write_force_constants_to_hdf5(in_rydberg, path, p2s_map=atoms, physical_unit="Ry/au^2")
    found = read_phonons(folder).force_constants
    assert torch.allclose(found, reference.force_constants, rtol=1e-6, atol=1e-9)
    write_force_constants_to_hdf5(values, path, p2s_map=atoms + 1)
    with pytest.raises(InputError, match="compact force constants are those of other atoms"):
        read_phonons(folder)
    with h5py.File(path, "w") as file:
        file["fc3"] = values
    with pytest.raises(InputError, match="neither fc2 nor force_constants"):
        read_phonons(folder)


def test_force_constants_and_forces_of_one_calculation_go_together_and_the_former_count(tmp_path):
    folder = _copy(tmp_path)
    doubled = 1.02 * _tin_oxide().dense().transpose(1, 2).contiguous().numpy()
    write_FORCE_CONSTANTS(doubled, folder / "FORCE_CONSTANTS")
    assert torch.allclose(
        read_phonons(folder).force_constants, 1.02 * _tin_oxide().force_constants, atol=1e-10
    )
    fitted = read_phonons(folder, settings=PhononSettings(PhononFiles(force_constants=False)))
    assert _agree(fitted, _tin_oxide())
    write_FORCE_CONSTANTS(2 * doubled, folder / "FORCE_CONSTANTS")
    with pytest.raises(InputError, match="not what the force constants give"):
        read_phonons(folder)


def test_archive_with_its_functional():
    reference = read_phonons(CDSE, name="mp-1070", metadata={"source": "phonondb"})
    metadata = reference.metadata
    assert (metadata.material, metadata.functional, metadata.source) == ("mp-1070", "PBEsol", "phonondb")
    assert metadata.cutoff == pytest.approx(356.6368)
    assert metadata.prototype == "AB_186_2_2"


def test_residual_forces_are_taken_out_of_displaced_supercells():
    """CdSe of phonondb keeps 0.013 eV/Å along its free coordinate: 80 % of the forces of a displacement."""
    reference = read_phonons(CDSE)
    assert reference.metadata.checks["residual_force"] == pytest.approx(0.0129, abs=1e-4)
    for d in reference.displacements:
        response = -reference.product(d.displacement)
        assert (d.forces - response).norm() / response.norm() < 0.03
    untouched = read_phonons(
        CDSE,
        settings=PhononSettings(residual_forces=np.zeros((128, 3)), tolerances=PhononTolerances(misfit=2.0)),
    )
    response = -untouched.product(untouched.displacements[0].displacement)
    assert (untouched.displacements[0].forces - response).norm() / response.norm() > 0.8
    assert _agree(reference, untouched, atol=1e-6)


def test_yaml_with_forces_and_force_constants_of_another_program():
    reference = read_phonons(DATA / "mp-149.yaml.xz", metadata={"functional": "PBE"})
    assert (reference.name, reference.n_atoms, len(reference.displacements)) == ("mp-149", 64, 1)
    assert float(reference.columns(0, 0)[0, 0]) == pytest.approx(12.8879, abs=1e-3)
    assert reference.metadata.functional == "PBE"


def test_random_displacements_with_energies():
    reference = _random()
    assert (reference.name, len(reference.displacements)) == ("NaCl-rd", 10)
    assert reference.displacements[0].energy == pytest.approx(-216.84472784)
    assert reference.metadata.energy_reference
    assert reference.metadata.checks["misfit"] < 0.06


def test_too_few_displacements_are_refused(tmp_path):
    data = {**_polar(), "displacements": _polar()["displacements"][:1]}
    path = tmp_path / "phonopy_params.yaml"
    path.write_text(json.dumps(data))
    alone = read_phonons(path, settings=PhononSettings(fit=False))
    assert alone.force_constants is None
    assert len(alone.displacements) == 1
    with pytest.raises(InputError, match="do not determine force constants"):
        read_phonons(path)
    possible = read_phonons(path, settings=PhononSettings(fit="possible"))
    assert possible.force_constants is None
    assert torch.equal(possible.displacements[0].forces, alone.displacements[0].forces)
    rng = np.random.default_rng(0)
    atoms = [{"displacement": u, "force": f} for u, f in rng.normal(0, 0.01, (80, 2, 3)).tolist()]
    path.write_text(json.dumps({**data, "displacements": [atoms]}))
    with pytest.raises(InputError, match="1 displaced supercells where"):
        read_phonons(path)


def test_pairs_of_displacements_of_phono3py_agree_with_random_ones():
    reference, other = read_phonons(PAIRS), _random()
    moved = [int((d.displacement.norm(dim=1) > 0).sum()) for d in reference.displacements]
    assert (len(moved), moved[:2], max(moved)) == (2 + 144, [1, 1], 2)
    relative = (reference.force_constants - other.force_constants).norm() / other.force_constants.norm()
    assert relative < 0.03
    assert reference.metadata.checks["misfit"] < 0.1


def test_forces_fc3_beside_the_displacements_of_phono3py():
    reference = read_phonons(DATA / "Si")
    assert len(reference.displacements) == 111
    assert len(reference.irreducible()) == 1
    energies = [float((d.forces * d.displacement).sum()) for d in reference.displacements]
    assert max(energies) < 0
    assert reference.metadata.checks["misfit"] < 0.1


def test_pairs_beyond_the_cutoff_of_phono3py_have_no_forces():
    """phono3py leaves such pairs out, and writes zeros for them into FORCES_FC3."""
    data = load_yaml(PAIRS)
    (whole,) = calculations_of_yaml(data)
    pairs = data["displacement_pairs"][0]["paired_with"]
    first = pairs[-1]
    first["included"] = False
    (some,) = calculations_of_yaml(data)
    n_left_out = int(some.left_out.sum())
    assert n_left_out == len(first.get("displacements", [0]))
    assert np.isnan(some.forces[some.left_out]).all()
    assert np.array_equal(some.forces[~some.left_out], whole.forces[~some.left_out])
    zeros = np.where(some.left_out[:, None, None], 0.0, whole.forces)
    filled = with_forces(some, zeros.reshape(-1, 3))
    assert np.array_equal(filled.forces, some.forces, equal_nan=True)
    assert whole.left_out is None


def test_forces_fc3_of_random_displacements(tmp_path):
    """Six columns, as phono3py writes them: the displacement before the force."""
    data = load_yaml(RANDOM)
    table = [[*one["displacement"], *one["force"]] for group in data["displacements"] for one in group]
    kept = (
        "physical_unit",
        "supercell_matrix",
        "primitive_matrix",
        "unit_cell",
        "supercell",
        "primitive_cell",
    )
    written = {"phono3py": {"version": "3.0"}, **{key: data[key] for key in kept if key in data}}
    (tmp_path / "phono3py_disp.yaml").write_text(json.dumps(written))
    np.savetxt(tmp_path / "FORCES_FC3", table, fmt="%.16f", header="File: 1")
    found = read_phonons(tmp_path)
    assert len(found.displacements) == 10
    assert _agree(found, _random(), atol=1e-8)


def test_sites_of_one_element_that_have_names_of_their_own(tmp_path):
    """phonopy writes Mn1 and Mn2 where sites must not be taken for equivalent."""
    data = copy.deepcopy(_polar())
    for cell in ("unit_cell", "supercell", "primitive_cell"):
        for point in data[cell]["points"]:
            point["symbol"] += "1" if point["symbol"] == "Ti" else ""
    path = tmp_path / "TiPN3.yaml"
    path.write_text(json.dumps(data))
    found = read_phonons(path)
    assert set(found.supercell.get_chemical_symbols()) == {"Ti", "P", "N"}
    assert _agree(found, read_phonons(POLAR), atol=1e-8)


def test_what_libraries_raise_after_reading_names_the_file(tmp_path, monkeypatch):
    def odd(*_: object, **__: object) -> None:
        raise KeyError("Mn1")

    monkeypatch.setattr(phonon_reading, "phonon_crystal", odd)
    with pytest.raises(InputError, match=r"TiPN3.*cannot be read as a phonon calculation \('Mn1'\)"):
        read_phonons(POLAR)


def test_two_supercells_of_phono3py_are_two_references_of_one_material(tmp_path):
    data = {key: value for key, value in _polar().items() if key != "phonopy"}
    for key in ("supercell_matrix", "primitive_matrix", "supercell", "displacements"):
        data[f"phonon_{key}"] = data[key]
    data |= {"phono3py": {"version": "3.0"}, "displacements": data["displacements"][:7]}
    path = tmp_path / "TiPN3.yaml.xz"
    path.write_bytes(lzma.compress(json.dumps(data).encode()))
    harmonic, third = read_phonon_orders(path, settings=PhononSettings(fit=False))
    assert (harmonic.name, third.name) == ("TiPN3", "TiPN3-fc3")
    assert harmonic.metadata.material == third.metadata.material == "TiPN3"
    assert (len(harmonic.displacements), len(third.displacements)) == (17, 7)


def test_other_units_are_converted(tmp_path):
    """What Quantum ESPRESSO would have written: Bohr and Rydberg."""
    data = copy.deepcopy(_polar())
    data["phonopy"]["calculator"] = "qe"
    for cell in ("unit_cell", "supercell", "primitive_cell"):
        data[cell]["lattice"] = (np.array(data[cell]["lattice"]) / Bohr).tolist()
    for d in data["displacements"]:
        d["displacement"] = (np.array(d["displacement"]) / Bohr).tolist()
        d["forces"] = (np.array(d["forces"]) / (Rydberg / Bohr)).tolist()
    data.pop("physical_unit")
    path = tmp_path / "TiPN3.yaml"
    path.write_text(json.dumps(data))
    found, wanted = read_phonons(path), read_phonons(POLAR)
    assert np.allclose(found.supercell.positions, wanted.supercell.positions, atol=1e-5)
    assert torch.allclose(found.displacements[0].forces, wanted.displacements[0].forces, atol=1e-5)
    assert _agree(found, wanted, atol=1e-4)
    constants = wanted.force_constants.numpy() / (Rydberg / Bohr**2)
    data["force_constants"] = {"shape": constants.shape[:2], "elements": constants.tolist()}
    path.write_text(json.dumps(data))
    assert _agree(read_phonons(path), wanted, atol=1e-4)


def test_forces_of_the_undisplaced_supercell_in_the_set_are_subtracted(tmp_path):
    folder = _copy(tmp_path)
    lines = (folder / "FORCE_SETS").read_text().split("\n")
    rest = np.zeros((72, 3))
    rest[5] = [0.01, 0.0, 0.0]
    sets = ["72", "4", "", "1", "0 0 0", *(" ".join(map(str, row)) for row in rest), *lines[2:]]
    (folder / "FORCE_SETS").write_text("\n".join(sets))
    found = read_phonons(folder, settings=PhononSettings(tolerances=PhononTolerances(*[9.0] * 6)))
    assert len(found.displacements) == 3
    as_given = read_phonons(DATA / "SnO2", settings=PhononSettings(residual_forces=0 * rest))
    change = found.displacements[0].forces - as_given.displacements[0].forces
    assert torch.allclose(change, -torch.from_numpy(rest), atol=1e-9)
    assert found.metadata.checks["residual_force"] == pytest.approx(0.01)


def test_an_inconsistent_calculation_is_refused():
    """One displaced supercell of PtO2 in phonondb is in another electronic state than the others."""
    with pytest.raises(InputError, match="not symmetric"):
        read_phonons(PTO2)
    with pytest.raises(InputError, match="not what the force constants give"):
        read_phonons(PTO2, settings=PhononSettings(tolerances=PhononTolerances(asymmetry=1.0)))


def test_another_order_of_atoms_is_refused(tmp_path):
    folder = _copy(tmp_path, "FORCE_SETS")
    order = np.random.default_rng(0).permutation(72)
    full = _tin_oxide().dense().transpose(1, 2).contiguous().numpy()[order][:, order]
    write_FORCE_CONSTANTS(full, folder / "FORCE_CONSTANTS")
    with pytest.raises(InputError, match="change under translations"):
        read_phonons(folder)
    atoms = np.array(_tin_oxide().primitive_atoms)
    write_FORCE_CONSTANTS(full[atoms], folder / "FORCE_CONSTANTS", p2s_map=atoms)
    with pytest.raises(InputError, match="break the acoustic sum rule"):
        read_phonons(folder)


def test_a_listed_supercell_in_another_order_is_refused(tmp_path):
    data = {**_polar()}
    data["supercell"] = {**data["supercell"], "points": data["supercell"]["points"][::-1]}
    path = tmp_path / "phonopy_params.yaml"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="atom by atom"):
        read_phonons(path)


@pytest.mark.parametrize(
    ("conf", "message"),
    [
        ("", "supercell is not known"),
        ("DIM = 2 2 2", r"Number of atoms in FORCE_SETS \(72\) is not 48"),
        ("DIM = 2 2 x", "cannot be read"),
        ("DIM = 2 2 3\nPRIMITIVE_AXES = 1/3 0 0 0 1/3 0 0 0 1/3", "matrices do not fit"),
    ],
)
def test_matrices_that_fit_nothing_are_refused(tmp_path, conf, message):
    folder = _copy(tmp_path)
    (folder / "phonopy.conf").write_text(conf)
    with pytest.raises(InputError, match=message):
        read_phonons(folder)


def test_what_the_caller_says_goes_before_the_files(tmp_path):
    folder = _copy(tmp_path, "phonopy.conf")
    files = PhononFiles(supercell_matrix=np.array([2, 2, 3]), primitive_matrix="P")
    reference = read_phonons(folder / "FORCE_SETS", settings=PhononSettings(files))
    assert reference.name == "copy"
    assert _agree(reference, _tin_oxide())


def test_a_cell_that_is_not_primitive_has_the_same_hessian_and_columns():
    path = DATA / "set" / "materials-id-1000-bate-fm-3m-225.tar.lzma"
    large = read_phonons(path, settings=PhononSettings(PhononFiles(primitive_matrix="P")))
    small = read_phonons(path)
    assert (len(large.primitive_atoms), len(small.primitive_atoms)) == (8, 2)
    assert len(large.irreducible()) == len(small.irreducible()) == 2
    assert torch.allclose(large.dense(), small.dense(), atol=1e-9)


def test_damaged_and_missing_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_phonons(tmp_path / "nothing")
    folder = _copy(tmp_path)
    sets = (folder / "FORCE_SETS").read_text()
    (folder / "FORCE_SETS").write_text(sets[: len(sets) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        read_phonons(folder)
    (folder / "FORCE_SETS").unlink()
    with pytest.raises(InputError, match="neither forces nor force constants"):
        read_phonons(folder)
    (folder / "POSCAR-unitcell").unlink()
    with pytest.raises(InputError, match="no unit cell"):
        read_phonons(folder)
    cut = tmp_path / "cut.tar.lzma"
    cut.write_bytes(CDSE.read_bytes()[:3000])
    with pytest.raises(InputError, match="cannot be read"):
        read_phonons(cut)
    with pytest.raises(InputError, match="Did you mean 'functional'"):
        read_phonons(CDSE, metadata={"functionl": "PBE"})


def test_an_archive_cannot_reach_outside_and_holds_one_calculation(tmp_path):
    folder = _copy(tmp_path)
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        for file in folder.iterdir():
            archive.add(file, f"../../outside/{file.name}")
    assert _agree(read_phonons(tmp_path / "evil.tar"), _tin_oxide())
    assert not (tmp_path.parent.parent / "outside").exists()
    with tarfile.open(tmp_path / "two.tar.gz", "w:gz") as archive:
        for k in (1, 2):
            archive.add(folder, f"material-{k}")
    with pytest.raises(InputError, match="several calculations"):
        read_phonons(tmp_path / "two.tar.gz")


@pytest.fixture
def readers():
    """The table of readers, as it was after the test."""
    kept = list(READERS)
    yield READERS
    READERS[:] = kept


@pytest.mark.parametrize("name", ["forces.json", "forces.json.xz"])
def test_forces_of_another_program_need_one_entry_of_the_table(tmp_path, readers, name):
    folder = _copy(tmp_path)
    sets = json.dumps(parse_FORCE_SETS(filename=folder / "FORCE_SETS"), default=np.ndarray.tolist)
    (folder / "FORCE_SETS").unlink()
    compress = lzma.compress if name.endswith(".xz") else bytes
    (folder / name).write_bytes(compress(sets.encode()))
    with pytest.raises(InputError, match="neither forces nor force constants"):
        read_phonons(folder)

    def read(calculation, path):
        data = json.loads(read_text(path))
        for one in data["first_atoms"]:
            one.update({key: np.array(one[key]) for key in ("displacement", "forces")})
        return calculation.with_dataset(data)

    readers.append(PartReader(gives="forces", names=("forces.json",), patterns=("*.json",), read=read))
    with tarfile.open(tmp_path / "packed.tar", "w") as archive:
        archive.add(folder, "SnO2")
    other = (folder / name).rename(folder / f"other-{name}")
    for path in (tmp_path / "packed.tar", other):
        assert _agree(read_phonons(path), _tin_oxide())
    assert calculation_names(tmp_path) == ["packed"]
    other.rename(folder / name)
    assert calculation_names(tmp_path) == ["copy", "packed"]
    assert _agree(read_phonons(folder), _tin_oxide())


def test_a_whole_calculation_of_another_program_needs_one_entry_of_the_table(tmp_path, readers):
    path = tmp_path / "TiPN3.json"
    path.write_text(json.dumps(_polar()))
    assert calculation_names(path) == ["TiPN3"]
    with pytest.raises(InputError, match="no unit cell"):
        read_phonons(path)

    def read(path):
        return [replace(calculations_of_yaml(json.loads(read_text(path)))[0], functional="PBE")]

    readers.append(WholeReader(names=("calculation.json",), patterns=("*.json",), read=read))
    found = read_phonons(path)
    assert found.metadata.functional == "PBE"
    assert _agree(found, read_phonons(POLAR))
    path.rename(tmp_path / "calculation.json")
    assert _agree(read_phonons(tmp_path), found)


@pytest.mark.parametrize(
    ("name", "gives"),
    [
        ("anything.yaml.xz", None),
        ("FORCES_FC3.yml", None),
        ("FORCE_SETS", "forces"),
        ("forces of mine.gz", "forces"),
        ("FORCES_FC2", "second-order forces"),
        ("FORCE_CONSTANTS_2ND", "force constants"),
        ("FORCE_CONSTANTS.hdf5", "force constants"),
    ],
)
def test_a_file_by_itself_is_read_by_the_most_special_reader(name, gives):
    assert getattr(reader_of(Path(name)), "gives", None) == gives
    if name.endswith(".hdf5"):
        assert reader_of(Path(name)) is reader_of(Path("fc2.hdf5"))
