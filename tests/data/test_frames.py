"""Frames are read whole or refused with file, frame and reason."""

import gzip
from pathlib import Path

import ase.io
import h5py
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from mace.data import AtomicData, KeySpecification
from mace.data.utils import load_from_xyz, save_configurations_as_HDF5
from mace.modules.utils import compute_forces_virials
from mace.tools import AtomicNumberTable

from mlip_refine.data import read_frames
from mlip_refine.data.frame_formats import FORMATS
from mlip_refine.data.frames import atoms_on_one_place
from mlip_refine.errors import InputError

STRESS = np.array([[0.01, 0.002, 0.003], [0.002, -0.02, 0.004], [0.003, 0.004, 0.03]])
VOIGT = "0.01 -0.02 0.03 0.004 0.003 0.002"
NINE = " ".join(map(str, STRESS.ravel()))
LABELS = f'REF_energy=-15.5 REF_stress="{NINE}" config_type=hcp'
PROPERTIES = "species:S:1:pos:R:3:REF_forces:R:3"
ATOMS = ("Ti 0.0 0.0 0.0 0.1 0.2 0.3", "Ti 1.6 1.6 1.6 -0.1 -0.2 -0.3")


def _text(
    labels: str = LABELS,
    properties: str = PROPERTIES,
    atoms: tuple[str, ...] = ATOMS,
    pbc: str = "T T T",
    n: int | None = None,
    lattice: str = "3.2 0 0 0 3.2 0 0 0 3.2",
) -> str:
    header = f'Lattice="{lattice}" Properties={properties} {labels} pbc="{pbc}"'
    return "\n".join([str(n or len(atoms)), header, *atoms, ""])


def _file(folder: Path, *frames: str) -> Path:
    path = folder / "train.extxyz"
    path.write_text("".join(frames or [_text()]))
    return path


def test_frame_holds_its_labels(tmp_path):
    frame = read_frames(_file(tmp_path))[0]
    assert frame.energy == -15.5
    assert frame.numbers.tolist() == [22, 22]
    assert np.allclose(frame.forces, [[0.1, 0.2, 0.3], [-0.1, -0.2, -0.3]])
    assert np.allclose(frame.stress, STRESS)
    assert frame.info["config_type"] == "hcp"
    assert frame.source == "train.extxyz, frame 0"
    assert frame.volume == pytest.approx(3.2**3)
    assert frame.to_atoms().get_chemical_formula() == "Ti2"


def test_compressed_files_and_lists_of_files(tmp_path):
    plain = _file(tmp_path, _text(), _text())
    packed = tmp_path / "more.extxyz.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    frames = read_frames([plain, packed])
    assert [f.source for f in frames][1:3] == ["train.extxyz, frame 1", "more.extxyz.gz, frame 0"]
    assert len(frames) == 4


@pytest.mark.parametrize(
    "stress", [NINE, VOIGT, "_JSON [[0.01,0.002,0.003],[0.002,-0.02,0.004],[0.003,0.004,0.03]]"]
)
def test_stress_in_nine_numbers_rows_or_voigt_order(stress, tmp_path):
    labels = f'REF_energy=-15.5 REF_stress="{stress}"'
    assert np.allclose(read_frames(_file(tmp_path, _text(labels)))[0].stress, STRESS)


def test_keys_that_ase_takes_for_a_calculator(tmp_path):
    atoms = bulk("Ti", "hcp", a=2.95, c=4.7)
    forces = np.arange(6.0).reshape(2, 3)
    voigt = np.array([1.0, 2, 3, 4, 5, 6]) / 100
    atoms.calc = SinglePointCalculator(atoms, energy=-3.0, forces=forces, stress=voigt)
    ase.io.write(tmp_path / "ase.extxyz", atoms)
    frame = read_frames(tmp_path / "ase.extxyz", "energy", "forces", "stress")[0]
    assert frame.energy == -3.0
    assert np.allclose(frame.forces, forces)
    assert frame.stress[1, 2] == pytest.approx(0.04)
    assert frame.stress[0, 1] == pytest.approx(0.06)


def test_labels_that_are_not_asked_for_may_be_absent(tmp_path):
    text = _text("REF_energy=-1", "species:S:1:pos:R:3", ("Ti 0 0 0",))
    frame = read_frames(_file(tmp_path, text), forces_key=None, stress_key=None)[0]
    assert frame.forces is None
    assert frame.stress is None


COORDINATES = ("Ti 0.0 0.0 0.0", "Ti 1.6 1.6 1.6")
NAN_FORCE = ("Ti 0.0 0.0 0.0 0.1 0.2 0.3", "Ti 1.6 1.6 1.6 -0.1 nan -0.3")
NAN_POSITION = ("Ti 0.0 0.0 0.0 0.1 0.2 0.3", "Ti inf 1.6 1.6 -0.1 0 -0.3")
BAD = {
    "misspelt energy": (
        _text(LABELS.replace("REF_energy", "REF_enrgy")),
        "no energy under.*REF_enrgy.*energy_key: REF_enrgy",
    ),
    "energy of ase": (
        _text(LABELS.replace("REF_energy", "energy")),
        "no energy.*Did you mean energy_key: energy",
    ),
    "misspelt forces": (
        _text(properties=PROPERTIES.replace("REF_", "DFT_")),
        "no forces.*forces_key: DFT_forces",
    ),
    "no label": (
        _text("config_type=hcp", "species:S:1:pos:R:3", ("Ti 0 0 0",)),
        "no label under the keys 'REF_energy', 'REF_forces', .*found keys config_type",
    ),
    "forces in the comment line": (
        _text(f'{LABELS} REF_forces="_JSON [[1,2,3],[4,5,6]]"', "species:S:1:pos:R:3", COORDINATES),
        r"must be a column of the atoms; found in the comment line, of shape \[2, 3\].*atoms.arrays",
    ),
    "energy as a column": (
        _text(f'REF_stress="{NINE}"', f"{PROPERTIES}:REF_energy:R:1", tuple(f"{a} -7" for a in ATOMS)),
        r"must be in the comment line; found a column of the atoms, of shape \[2\].*atoms.info",
    ),
    "stress of ase": (_text(LABELS.replace("REF_stress", "stress")), "Did you mean stress_key: stress"),
    "virials under another name": (
        _text(LABELS.replace("REF_stress", "virial")),
        "no virials.*Did you mean virials_key: virial",
    ),
    "negative weight": (_text(f"{LABELS} config_weight=-1"), "config_weight is no weight; found -1"),
    "word for a weight": (_text(f"{LABELS} config_energy_weight=big"), "config_energy_weight is no weight"),
    "two atoms on one place": (
        _text(atoms=(ATOMS[0], "Ti 3.19 3.2 0.01 0 0 0")),
        "two atoms are on one place; found atoms 0 and 1 at a distance of 0.014 Å",
    ),
    "nan energy": (_text(LABELS.replace("-15.5", "nan")), "energy 'REF_energy' is not finite"),
    "nan force": (_text(atoms=NAN_FORCE), "forces 'REF_forces' of atom 1 are not finite"),
    "nan stress": (_text(LABELS.replace("0.03", "nan")), "stress 'REF_stress' is not finite"),
    "inf position": (_text(atoms=NAN_POSITION), "positions of atom 1 are not finite"),
    "text energy": (_text(LABELS.replace("-15.5", "low")), "is not a number; found low"),
    "truth as energy": (
        _text(LABELS.replace("-15.5", "T")),
        "energy 'REF_energy' is not a number; found True",
    ),
    "truth as stress": (_text(LABELS.replace(NINE, "T " * 9)), "stress 'REF_stress' is not a number"),
    "truth as forces": (
        _text(
            properties=PROPERTIES.replace("forces:R", "forces:L"), atoms=("Ti 0 0 0 T T F", "Ti 1 1 1 F T T")
        ),
        "forces 'REF_forces' is not a number",
    ),
    "energy vector": (
        _text(LABELS.replace("-15.5", '"1 2"')),
        r"wrong shape; found shape \[2\], expected one number",
    ),
    "short stress": (_text(LABELS.replace(NINE, "1 2 3 4")), r"found shape \[4\], expected 9 numbers"),
    "twisted stress": (_text(LABELS.replace("0.002 -0.02", "0.9 -0.02")), "not symmetric"),
    "scalar forces": (
        _text(properties="species:S:1:pos:R:3:REF_forces:R:1", atoms=("Ti 0 0 0 1",)),
        r"found shape \[1\], expected \[1, 3\]",
    ),
    "flat cell": (_text(lattice="3 0 0 0 3 0 3 3 0"), "no volume; found 0 Å³"),
    "too few atoms": (_text(n=3), "cannot be read as extended XYZ"),
    "bad number": (_text(atoms=("Ti 0 0 x 0 0 0",)), "cannot be read as extended XYZ"),
    "unknown element": (
        _text(atoms=("Xx 0 0 0 0 0 0",)),
        "elements that the model does not know|cannot be read",
    ),
    "other element": (_text(atoms=("Al 0 0 0 0 0 0",)), "does not know; found Al, expected Ti"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_frames_are_named(name, tmp_path):
    text, message = BAD[name]
    path = _file(tmp_path, _text(), text)
    with pytest.raises(InputError, match=f"train.extxyz, frame [01].*{message}") as refusal:
        read_frames(path, elements={22})
    assert refusal.value.exit_code == 2
    assert "frame 1" in str(refusal.value)


def test_all_bad_frames_of_a_file_are_named_at_once(tmp_path):
    good, misspelt = _text(), _text(LABELS.replace("REF_energy", "REF_enrgy"))
    path = _file(tmp_path, good, misspelt, BAD["nan force"][0], good, *[misspelt] * 4)
    with pytest.raises(InputError) as refusal:
        read_frames(path)
    first, *lines = str(refusal.value).splitlines()
    assert first == "train.extxyz: 6 of 8 frames cannot be used:"
    assert lines[0].startswith("  frames 1, 4, 5 and 2 more: no energy under the key 'REF_energy'")
    assert lines[1] == "  frame 2: forces 'REF_forces' of atom 1 are not finite"
    with pytest.raises(InputError, match=r"^train\.extxyz, frames 0, 1 of 2: no energy.*REF_enrgy\?"):
        read_frames(_file(tmp_path, misspelt, misspelt))
    others = [BAD[name][0] for name in ("nan energy", "nan force", "nan stress", "flat cell", "text energy")]
    with pytest.raises(InputError, match=r"5 of 5(.|\n)*and, for other reasons, frames 3, 4$"):
        read_frames(_file(tmp_path, *others))


def test_frames_count_for_the_labels_that_they_have(tmp_path, capsys):
    bare = _text("REF_energy=-1", "species:S:1:pos:R:3", COORDINATES)
    forces = _text("config_type=a")
    path = _file(tmp_path, _text(), bare, forces)
    whole, only_energy, only_forces = read_frames(path)
    assert (only_energy.energy, only_energy.forces, only_energy.stress) == (-1, None, None)
    assert (only_forces.energy, only_forces.stress) == (None, None)
    assert np.allclose(only_forces.forces, whole.forces)
    said = capsys.readouterr().err
    assert said == "train.extxyz: 3 frames; energy of 2; forces of 2; stress of 1\n"


def test_a_file_without_stress_is_read_and_says_so(tmp_path, capsys):
    path = _file(tmp_path, _text("REF_energy=-1"))
    assert read_frames(path)[0].stress is None
    assert capsys.readouterr().err == "train.extxyz: 1 frames; stress of none\n"
    read_frames(path, stress_key=None)
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match=r"no stress under the key 'sigma'.*to null to do without"):
        read_frames(path, stress_key="sigma")
    bare = _file(tmp_path, _text("REF_energy=-1", "species:S:1:pos:R:3", COORDINATES))
    with pytest.raises(InputError, match=r"all 1 frames: no forces under.*found keys REF_energy.*to null"):
        read_frames(bare)
    assert read_frames(bare, forces_key=None)[0].energy == -1


def test_isolated_atoms_molecules_and_slabs_are_left_out(tmp_path, capsys):
    atom = ("Ti 0 0 0 0 0 0",)
    isolated = [
        _text(f"{LABELS.replace('hcp', 'IsolatedAtom')}", atoms=atom, pbc=pbc) for pbc in ("F F F", "T T T")
    ]
    # Of a crystal, the word means nothing.
    crystal = _text(LABELS.replace("hcp", "IsolatedAtom"))
    path = _file(tmp_path, _text(), *isolated, crystal, _text(pbc="T T F"), _text(pbc="F F F"))
    assert [f.source[-7:] for f in read_frames(path)] == ["frame 0", "frame 3"]
    assert capsys.readouterr().err == (
        "train.extxyz: 2 frames; left out: 2 IsolatedAtom, 2 not periodic in three dimensions\n"
    )
    with pytest.raises(InputError, match="no frame can be used; found 1 frames: 1 not periodic"):
        read_frames(_file(tmp_path, _text(pbc="T T F")))


def _read_by_mace(path: Path) -> list[AtomicData]:
    """What MACE itself makes of a file, with its own names of keys."""
    _, configurations = load_from_xyz(str(path), KeySpecification.from_defaults())
    table = AtomicNumberTable([22])
    return [AtomicData.from_config(c, z_table=table, cutoff=3.0) for c in configurations]


def test_weights_are_those_of_mace(tmp_path):
    given = (
        "",
        "config_weight=0.5",
        "config_energy_weight=2 config_forces_weight=0 config_stress_weight=0.1",
        "config_weight=3 config_forces_weight=7.0",
    )
    path = _file(tmp_path, *(_text(f"{LABELS} {weights}") for weights in given))
    for frame, theirs in zip(read_frames(path), _read_by_mace(path), strict=True):
        for name in ("energy", "forces", "stress"):
            expected = float(theirs.weight * getattr(theirs, f"{name}_weight"))
            assert frame.weights[name] == pytest.approx(expected, rel=1e-6)


def test_virials_are_those_of_mace(tmp_path):
    """Their sign and unit: the stress that MACE predicts is minus what it calls virials, over the volume."""
    virials = " ".join(map(str, (-STRESS * 3.2**3).ravel()))
    path = _file(tmp_path, _text(f'REF_energy=-1 REF_virials="{virials}" config_virials_weight=0.5'))
    (frame,), (theirs,) = read_frames(path), _read_by_mace(path)
    assert np.allclose(frame.stress, STRESS)
    assert np.allclose(frame.stress, -theirs.virials[0].numpy() / frame.volume)
    assert frame.weights["stress"] == pytest.approx(float(theirs.virials_weight)) == 0.5
    strained = torch.tensor(2.0, dtype=torch.float64) * torch.eye(3, dtype=torch.float64)
    strain = torch.zeros(1, 3, 3, dtype=torch.float64, requires_grad=True)
    energy = (strained * strain[0]).sum()[None]
    positions = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    cell = 2 * torch.eye(3, dtype=torch.float64)
    _, mace_virials, mace_stress = compute_forces_virials(
        energy + positions.sum(), positions, strain, cell, compute_stress=True
    )
    assert torch.allclose(mace_stress, -mace_virials / 8)


def test_a_stress_goes_before_virials(tmp_path):
    nine = " ".join(map(str, np.eye(3).ravel()))
    both = _file(tmp_path, _text(f'{LABELS} REF_virials="{nine}"'), _text(f'REF_energy=1 DFT_v="{nine}"'))
    first, second = read_frames(both, virials_key="DFT_v")
    assert np.allclose(first.stress, STRESS)
    assert np.allclose(second.stress, -np.eye(3) / 3.2**3)


def test_virials_that_are_named_as_a_stress_are_refused(tmp_path):
    path = _file(tmp_path, _text(LABELS.replace("REF_stress", "REF_virials")))
    with pytest.raises(InputError, match=r"sounds like virials.*expected virials_key: REF_virials"):
        read_frames(path, stress_key="REF_virials")


def test_atoms_are_told_apart_in_any_cell():
    """The check of distances is that of ASE, also over the borders of a skewed cell."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        atoms = Atoms("Ti12", positions=rng.uniform(-4, 8, (12, 3)), pbc=True)
        atoms.set_cell(4 * np.eye(3) + rng.normal(0, 0.7, (3, 3)))
        atoms.positions[7] = (
            atoms.positions[3] + rng.uniform(-0.05, 0.05, 3) + rng.integers(-2, 3, 3) @ atoms.cell
        )
        i, j, distance = atoms_on_one_place(atoms)
        assert (i, j) == (3, 7)
        assert distance == pytest.approx(atoms.get_distance(3, 7, mic=True))
        del atoms[7]
        assert atoms_on_one_place(atoms) is None


def test_trajectories_of_ase_are_read(tmp_path):
    atoms = bulk("Ti", "hcp", a=2.95, c=4.7)
    forces = np.arange(6.0).reshape(2, 3)
    voigt = np.array([1.0, 2, 3, 4, 5, 6]) / 100
    atoms.calc = SinglePointCalculator(atoms, energy=-3.0, forces=forces, stress=voigt)
    ase.io.write(tmp_path / "md.traj", [atoms, atoms])
    frames = read_frames(tmp_path / "md.traj", "energy", "forces", "stress")
    assert len(frames) == 2
    assert frames[1].energy == -3.0
    assert np.allclose(frames[1].forces, forces)
    assert frames[1].stress[1, 2] == pytest.approx(0.04)
    with pytest.raises(InputError, match=r"frames 0, 1 of 2: no energy.*Did you mean energy_key: energy"):
        read_frames(tmp_path / "md.traj")
    (tmp_path / "md.traj").write_bytes(b"- of Ulm" * 20)
    with pytest.raises(InputError, match=r"md\.traj"):
        read_frames(tmp_path / "md.traj")


def test_hdf5_of_mace_is_read(tmp_path):
    """Files as MACE's preprocessing writes them hold the same frames as the XYZ that they are made of."""
    bare = _text("REF_energy=-1 config_weight=0.5 head=pbe", "species:S:1:pos:R:3", COORDINATES)
    virials = _text(f'REF_energy=-1 REF_virials="{NINE}" config_energy_weight=3')
    isolated = _text(LABELS.replace("hcp", "IsolatedAtom"), atoms=(ATOMS[0],))
    path = _file(tmp_path, _text(), bare, isolated, virials, *[_text()] * 8)
    _, configurations = load_from_xyz(str(path), KeySpecification.from_defaults())
    with h5py.File(tmp_path / "train_0.h5", "w") as file:
        save_configurations_as_HDF5(configurations, None, file)
    for ours, theirs in zip(read_frames(tmp_path / "train_0.h5"), read_frames(path), strict=True):
        assert (ours.energy, ours.info.get("config_type")) == (
            theirs.energy,
            theirs.info.get("config_type", "Default"),
        )
        for name in ("positions", "cell", "numbers", "forces", "stress"):
            a, b = getattr(ours, name), getattr(theirs, name)
            assert (a is None) == (b is None)
            assert a is None or np.allclose(a, b)
            assert name in ("positions", "cell", "numbers") or b is None or ours.weights == theirs.weights
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1.0
    with pytest.raises(InputError, match=r"other\.h5, frame 0: cannot be read as HDF5 of MACE"):
        read_frames(tmp_path / "other.h5")
    (tmp_path / "text.h5").write_text("no")
    with pytest.raises(InputError, match=r"text\.h5: the file is damaged"):
        read_frames(tmp_path / "text.h5")


def test_bad_files(tmp_path):
    with pytest.raises(InputError, match=r"gone\.xyz: no such file"):
        read_frames(tmp_path / "gone.xyz")
    with pytest.raises(InputError, match="a folder"):
        read_frames(tmp_path)
    (tmp_path / "empty.xyz").write_text("")
    with pytest.raises(InputError, match=r"empty\.xyz: no frames"):
        read_frames(tmp_path / "empty.xyz")
    packed = gzip.compress(_text().encode() * 50)
    (tmp_path / "short.xyz.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InputError, match="damaged"):
        read_frames(tmp_path / "short.xyz.gz")
    (tmp_path / "not.xyz.gz").write_text("hello")
    with pytest.raises(InputError, match="damaged"):
        read_frames(tmp_path / "not.xyz.gz")
    (tmp_path / "binary.xyz").write_bytes(bytes(range(256)))
    with pytest.raises(InputError, match=r"binary\.xyz"):
        read_frames(tmp_path / "binary.xyz")


def test_an_unknown_suffix_is_named_with_the_format_that_was_tried(tmp_path):
    _file(tmp_path).rename(tmp_path / "frames.dat")
    assert len(read_frames(tmp_path / "frames.dat")) == 1
    (tmp_path / "frames.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be read as extended XYZ") as error:
        read_frames(tmp_path / "frames.json")
    assert error.value.fix == (
        "The suffix .json is not known, so that extended XYZ was tried; "
        "known are .xyz, .extxyz, .traj, .h5, .hdf5; extended XYZ also with .gz."
    )
    (tmp_path / "OUTCAR").write_text("")
    with pytest.raises(
        InputError, match=r"no frames.*The name has no suffix, so that extended XYZ was tried"
    ):
        read_frames(tmp_path / "OUTCAR")


def test_another_format_is_one_entry_of_the_table(tmp_path, monkeypatch):
    def read(path):
        yield from ase.io.iread(path, format="json")

    monkeypatch.setitem(FORMATS, ".json", ("ASE's JSON", read))
    atoms = bulk("Ti", "hcp", a=2.95, c=4.7)
    atoms.calc = SinglePointCalculator(atoms, energy=-3.0, forces=np.zeros((2, 3)))
    ase.io.write(tmp_path / "frames.json", atoms)
    (frame,) = read_frames(tmp_path / "frames.json", "energy", "forces", None)
    assert frame.energy == -3.0
    (tmp_path / "frames.json").write_text("{")
    with pytest.raises(
        InputError, match=r"cannot be read as ASE's JSON.*a complete frame of ASE's JSON"
    ) as error:
        read_frames(tmp_path / "frames.json")
    assert error.value.fix is None


@pytest.mark.parametrize(("name", "count"), [("train", 300), ("valid", 100)])
def test_titanium_frames_of_the_repository(name, count):
    path = Path(__file__).parents[2] / "configs" / "data" / "ti_pbe" / f"{name}.extxyz.gz"
    frames = read_frames(path, elements={22})
    assert len(frames) == count
    for frame in frames:
        assert 14.8 < frame.volume / frame.n_atoms < 23
        assert frame.energy / frame.n_atoms < -6.95
        assert np.linalg.norm(frame.forces, axis=1).max() < 9
        assert np.abs(frame.stress).max() < 0.5


def test_frames_of_other_heads_are_left_out_by_name(tmp_path, capsys):
    path = tmp_path / "train.extxyz"
    texts = [_text(f"{LABELS} head={head}") for head in ("pbe", "PBE", "scan")]
    path.write_text("".join([*texts, _text(LABELS)]))
    assert [f.source for f in read_frames(path, head="pbe")] == [
        f"train.extxyz, frame {i}" for i in (0, 1, 3)
    ]
    assert "3 frames; left out: 1 of the head scan, not pbe" in capsys.readouterr().err
    assert len(read_frames(path)) == 4
    path.write_text(texts[2])
    with pytest.raises(InputError, match="no frame can be used; found 1 frames: 1 of the head scan, not pbe"):
        read_frames(path, head="pbe")
