"""Frames are read whole or refused with file, frame and reason."""

import gzip
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator

from mlip_refine.data import read_frames
from mlip_refine.data.frames import FORMATS
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
    "no forces": (
        _text(properties="species:S:1:pos:R:3", atoms=("Ti 0 0 0",)),
        "no forces.*no labels at all",
    ),
    "no stress": (_text("REF_energy=-1"), "no stress under the key 'REF_stress'"),
    "nan energy": (_text(LABELS.replace("-15.5", "nan")), "energy 'REF_energy' is not finite"),
    "nan force": (_text(atoms=NAN_FORCE), "forces 'REF_forces' of atom 1 are not finite"),
    "nan stress": (_text(LABELS.replace("0.03", "nan")), "stress 'REF_stress' is not finite"),
    "inf position": (_text(atoms=NAN_POSITION), "positions of atom 1 are not finite"),
    "text energy": (_text(LABELS.replace("-15.5", "low")), "is not a number; found low"),
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
    "molecule": (_text(pbc="F F F"), "not periodic"),
    "slab": (_text(pbc="T T F"), "not periodic.*expected a Lattice"),
    "flat cell": (_text(lattice="3 0 0 0 3 0 3 3 0"), "not periodic.*volume 0"),
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
        "known are .xyz, .extxyz, each also with .gz."
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
