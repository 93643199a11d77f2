"""Sets of calculations: nothing that is kept for the test is trained on, and nothing is read twice."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import phonopy
import pytest
import torch
from phonopy import Phonopy
from phonopy.structure.atoms import PhonopyAtoms

from mlip_refine.data.phonons import collections as phonon_sets
from mlip_refine.data.phonons.cache import stored
from mlip_refine.data.phonons.checks import functional_warnings
from mlip_refine.data.phonons.collections import calculation_names, read_phonon_set, second_order
from mlip_refine.data.phonons.reference import PhononMetadata, PhononReference
from mlip_refine.data.phonons.splits import SplitRule, check_parts, in_kappa103, split_phonons
from mlip_refine.errors import InputError

DATA = Path(__file__).parent
SET = DATA / "set"


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """A cache that every test of this file shares: a material is read once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def references(kept) -> list[PhononReference]:
    return read_phonon_set(SET, cache=kept)


def _named(name: str, **metadata: object) -> PhononReference:
    """A reference of which only name and metadata are asked."""
    given = {"material": name, "formula": name, "prototype": name, **metadata}
    return PhononReference(name, None, None, None, None, None, None, (), PhononMetadata(**given))


def test_index_gives_names_parts_and_provenance(references, kept):
    assert [r.name for r in references] == ["mp-1000", "mp-10182", "mp-1070", "mp-28395"]
    assert {r.metadata.licence for r in references} == {"CC BY 4.0"}
    assert [r.name for r in read_phonon_set(SET, split="train", cache=kept)] == ["mp-10182"]
    assert [r.name for r in read_phonon_set(SET, split="test", cache=kept)] == ["mp-28395"]
    assert [r.name for r in read_phonon_set(SET, split="kappa103", cache=kept)] == ["mp-1000", "mp-1070"]
    stable = read_phonon_set(SET / "index.csv", lowest_frequency=-1e-6, cache=kept)
    assert len(stable) == 4
    with pytest.raises(InputError, match="no phonon calculations are left"):
        read_phonon_set(SET, lowest_frequency=0.5, cache=kept)
    with pytest.raises(InputError, match="Did you mean 'train'"):
        read_phonon_set(SET, split="trian", cache=kept)
    with pytest.raises(InputError, match="no phonon calculations are left; found split val, 0 read"):
        read_phonon_set(SET, split="val", cache=kept)
    with pytest.raises(InputError, match="1 read, 1 of them of the benchmark kappa103"):
        read_phonon_set(SET / "materials-id-1000-bate-fm-3m-225.tar.lzma", split="train", cache=kept)


def test_folder_without_an_index_and_a_single_calculation(tmp_path, kept):
    for name in ("1000-bate-fm-3m-225", "10182-liznp-f-43m-216"):
        shutil.copy(SET / f"materials-id-{name}.tar.lzma", tmp_path)
    shutil.copytree(DATA / "SnO2", tmp_path / "SnO2")
    found = read_phonon_set(tmp_path, cache=kept, metadata={"functional": "PBEsol"})
    assert [r.name for r in found] == [
        "SnO2",
        "materials-id-1000-bate-fm-3m-225",
        "materials-id-10182-liznp-f-43m-216",
    ]
    assert {r.metadata.functional for r in found} == {"PBEsol"}
    assert [r.name for r in read_phonon_set(tmp_path / "SnO2", cache=kept)] == ["SnO2"]
    with pytest.raises(InputError, match="lowest_frequency needs an index"):
        read_phonon_set(tmp_path, cache=kept, lowest_frequency=0.0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no phonon calculations"):
        read_phonon_set(tmp_path / "empty", cache=kept)


def test_what_was_kept_is_what_is_read(references, kept, monkeypatch):
    fresh = read_phonon_set(SET / "materials-id-28395-b6p-r-3m-166.tar.lzma", cache=False)[0]
    monkeypatch.setattr(phonon_sets, "read_phonon_orders", None)
    again = read_phonon_set(SET, cache=kept)
    assert [r.name for r in again] == [r.name for r in references]
    found = again[-1]
    assert torch.equal(found.force_constants, fresh.force_constants)
    assert torch.equal(found.permutations, fresh.permutations)
    assert torch.equal(found.supercell_matrix, fresh.supercell_matrix)
    assert found.supercell == fresh.supercell
    assert np.array_equal(found.supercell.get_masses(), fresh.supercell.get_masses())
    assert found.irreducible() == fresh.irreducible()
    assert found.metadata.checks == fresh.metadata.checks
    for kept_set, read_set in zip(found.displacements, fresh.displacements, strict=True):
        assert torch.equal(kept_set.forces, read_set.forces)
        assert kept_set.energy == read_set.energy


def test_a_changed_file_setting_or_phonopy_and_damage_are_read_anew(tmp_path, monkeypatch):
    source, cache = tmp_path / "SnO2", tmp_path / "cache"
    shutil.copytree(DATA / "SnO2", source)
    first = read_phonon_set(source, cache=cache)[0]
    (kept,) = cache.iterdir()
    kept.write_bytes(kept.read_bytes()[:1000])
    assert torch.equal(read_phonon_set(source, cache=cache)[0].force_constants, first.force_constants)
    assert len(list(cache.iterdir())) == 1
    atoms = (source / "POSCAR-unitcell").read_text()
    (source / "POSCAR-unitcell").write_text(atoms.replace("4.77258125", "4.77258126"))
    assert read_phonon_set(source, cache=cache)[0].supercell.cell[0, 0] > first.supercell.cell[0, 0]
    read_phonon_set(source, cache=cache, metadata={"functional": "PBE"})
    assert len(list(cache.iterdir())) == 3
    monkeypatch.setattr(phonopy, "__version__", "0.0")
    read_phonon_set(source, cache=cache)
    assert len(list(cache.iterdir())) == 4


def test_changed_bits_of_the_cache_are_read_anew(tmp_path):
    """What comes from the cache is what was read, whichever bit has changed."""
    whole = read_phonon_set(DATA / "SnO2", cache=tmp_path)[0]
    (kept,) = tmp_path.iterdir()
    content, random, missed = kept.read_bytes(), np.random.default_rng(0), 0
    for position in random.integers(len(content), size=60):
        changed = bytearray(content)
        changed[position] ^= 1 << int(random.integers(8))
        kept.write_bytes(bytes(changed))
        found = stored(tmp_path, kept.stem)
        missed += found is None
        if found is not None:
            assert torch.equal(found[0].force_constants, whole.force_constants)
            assert found[0].supercell == whole.supercell
    assert missed > 50


def test_a_cache_that_cannot_be_written_to_does_no_harm(tmp_path):
    (tmp_path / "file").write_text("")
    assert len(read_phonon_set(DATA / "SnO2", cache=tmp_path / "file" / "cache")) == 1


def test_refused_calculations_are_all_named_or_left_out(tmp_path, kept, capsys):
    (tmp_path / "broken.tar.gz").write_bytes(b"nothing")
    shutil.copy(next((DATA / "refused").iterdir()), tmp_path / "PtO2.tar.lzma")
    shutil.copytree(DATA / "SnO2", tmp_path / "SnO2")
    with pytest.raises(
        InputError, match=r"2 of 3 phonon calculations are refused.*PtO2: the force constants"
    ):
        read_phonon_set(tmp_path, cache=kept)
    assert [r.name for r in read_phonon_set(tmp_path, cache=kept, skip_refused=True)] == ["SnO2"]
    told = capsys.readouterr().err
    assert "left out PtO2" in told
    assert "left out broken" in told


def test_two_calculations_of_one_name_are_refused(tmp_path, kept):
    archive = "materials-id-10182-liznp-f-43m-216.tar.lzma"
    shutil.copy(SET / archive, tmp_path)
    (tmp_path / "index.csv").write_text(f"file,name\n{archive},one\n{archive},one\n")
    with pytest.raises(InputError, match="two calculations are named 'one'"):
        read_phonon_set(tmp_path, cache=kept)
    (tmp_path / "index.csv").write_text(f"path,name\n{archive},one\n")
    with pytest.raises(InputError, match="no column 'file'"):
        read_phonon_set(tmp_path, cache=kept)
    (tmp_path / "index.csv").write_text(f"file,lowest_frequency\n{archive},low\n")
    with pytest.raises(InputError, match=r"index.csv:2: not a frequency"):
        read_phonon_set(tmp_path, cache=kept, lowest_frequency=0.0)


def test_frequencies_are_those_of_phonopy_alone(references):
    """The index has what phonopy makes of these files by itself, on a mesh of 8 x 8 x 8."""
    rows = [line.split(",") for line in (SET / "index.csv").read_text().splitlines()[1:]]
    for reference, row in zip(references, rows, strict=True):
        atoms = reference.supercell
        cell = PhonopyAtoms(atoms.symbols, cell=atoms.cell[:], scaled_positions=atoms.get_scaled_positions())
        axes = torch.linalg.inv(reference.supercell_matrix.double()) @ reference.primitive_matrix
        phonon = Phonopy(cell, np.eye(3, dtype=int), primitive_matrix=axes.numpy())
        assert phonon.primitive.p2s_map.tolist() == reference.primitive_atoms
        phonon.force_constants = reference.force_constants.numpy()
        phonon.run_mesh([8, 8, 8], is_gamma_center=True)
        frequencies = phonon.mesh.frequencies
        assert frequencies.max() == pytest.approx(float(row[4]), abs=2e-4)
        assert frequencies.min() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("by", ["material", "prototype"])
def test_parts_have_their_sizes_and_tear_nothing_apart(by):
    rng = np.random.default_rng(0)
    prototypes = [f"P{int(k)}" for k in rng.geometric(0.05, 400)]
    members = [
        _named(f"{k}", material=f"m{k % 380}", prototype=p, formula=f"F{k % 390}")
        for k, p in enumerate(prototypes)
    ]
    parts = split_phonons(members, SplitRule(val=0.1, test=0.2, by=by))
    count = Counter(parts)
    # Groups draw their parts: of single materials the spread is binomial, prototypes are large.
    spread = 30 if by == "material" else 80
    assert count["train"] == pytest.approx(280, abs=spread)
    assert count["test"] == pytest.approx(80, abs=spread)
    assert count["val"] > 0
    of = {part: [m for m, p in zip(members, parts, strict=True) if p == part] for part in count}
    if by == "material":
        check_parts(of)
    else:
        seen = [{m.metadata.prototype for m in of[part]} for part in ("train", "val", "test")]
        assert sum(map(len, seen)) == len(set.union(*seen))
    assert parts == split_phonons(members, SplitRule(val=0.1, test=0.2, by=by))
    assert parts != split_phonons(members, SplitRule(val=0.1, test=0.2, by=by, seed=1))


def test_a_material_keeps_its_part_when_others_come_or_go():
    """Or what was tested would be trained on after a file was added."""
    members = [_named(f"{k}", material=f"m{k}") for k in range(300)]
    parts = dict(zip((m.name for m in members), split_phonons(members, SplitRule()), strict=True))
    fewer = [m for k, m in enumerate(members) if k % 7]
    assert split_phonons(fewer, SplitRule()) == [parts[m.name] for m in fewer]


def test_fractions_that_leave_nothing_are_refused():
    with pytest.raises(InputError, match="below 1 together"):
        split_phonons([_named("a")], SplitRule(val=0.5, test=0.5))


def test_compounds_of_the_benchmark_are_known_by_id_or_structure(references):
    assert [in_kappa103(r) for r in references] == [True, False, True, False]
    assert in_kappa103(_named("mine", formula="MgO", space_group=225))
    assert not in_kappa103(_named("mine", formula="MgO", space_group=216 + 5))
    assert split_phonons(references, SplitRule()).count("kappa103") == 2
    with pytest.raises(InputError, match="benchmark are trained on"):
        check_parts({"train": references})


def test_shared_materials_are_refused():
    one = _named("a", material="mp-1")
    with pytest.raises(InputError, match=r"train and test share a material; found a and b"):
        check_parts({"train": [one], "test": [_named("b", material="mp-1")]})
    same = {"formula": "AlN", "prototype": "AB_186_2_2"}
    with pytest.raises(InputError, match="share a material"):
        check_parts({"train": [_named("a", **same)], "val": [_named("b", **same)]})
    check_parts({"train": [one], "test": [_named("b", material="mp-2")]})


def test_functionals_that_differ_are_named():
    pbe, sol, unknown = (_named(n, functional=f) for n, f in (("a", "PBE"), ("b", "PBEsol"), ("c", None)))
    assert functional_warnings([sol], base="PBEsol", replay="PBEsol") == []
    assert functional_warnings([sol], base=None, replay=None) == []
    assert functional_warnings([sol, sol], base="PBE") == [
        "phonons of b, b are PBEsol, but the base model was trained on PBE"
    ]
    many = functional_warnings([pbe, sol, unknown], base="PBE", replay="PBEsol")
    assert many == [
        "the functional of c is not known",
        "phonon references mix functionals: PBE (a), PBEsol (b)",
        "phonons of b are PBEsol, but the base model was trained on PBE",
        "phonons of a are PBE, but the replay data are PBEsol",
    ]


def test_names_choose_and_do_not_change_parts(tmp_path, kept):
    """Of an index only what is wanted is read, but a rule divides the whole set."""
    assert [r.name for r in read_phonon_set(SET, names=["mp-1000", "none"], cache=kept)] == ["mp-1000"]
    assert read_phonon_set(SET, names=["none"], cache=kept) == []
    assert calculation_names(SET) == ["mp-1000", "mp-10182", "mp-1070", "mp-28395"]
    files = [f"materials-id-{name}.tar.lzma" for name in ("10182-liznp-f-43m-216", "28395-b6p-r-3m-166")]
    for file in files:
        shutil.copy(SET / file, tmp_path)
    rows = "".join(f"{file},mp-{k}\n" for k, file in enumerate(files))
    (tmp_path / "index.csv").write_text("file,name\n" + rows)
    whole = read_phonon_set(tmp_path, cache=kept)
    rules = (SplitRule(val=0.0, test=0.5, seed=seed) for seed in range(20))
    rule = next(rule for rule in rules if len(set(split_phonons(whole, rule))) == 2)
    whole = {part: read_phonon_set(tmp_path, split=part, rule=rule, cache=kept) for part in ("train", "test")}
    for part, other in (("train", "test"), ("test", "train")):
        (name,) = (r.name for r in whole[part])
        chosen = {"rule": rule, "names": [name], "cache": kept}
        assert [r.name for r in read_phonon_set(tmp_path, split=part, **chosen)] == [name]
        assert read_phonon_set(tmp_path, split=other, **chosen) == []


def test_the_header_of_an_index_forgives_case_spaces_and_the_mark_of_its_encoding(tmp_path, kept):
    names = ("10182-liznp-f-43m-216", "28395-b6p-r-3m-166")
    files = [f"materials-id-{name}.tar.lzma" for name in names]
    for file in files:
        shutil.copy(SET / file, tmp_path)
    index = tmp_path / "index.csv"
    index.write_bytes(f"\ufefffile, Name,Split \n{files[0]},a,Train\n\n{files[1]},b, test\n".encode())
    assert [r.name for r in read_phonon_set(index, split="train", cache=kept)] == ["a"]
    assert [r.name for r in read_phonon_set(index, split="test", cache=kept)] == ["b"]
    index.write_text(f"file,name,split\n{files[0]},a,train\n{files[1]},b,tset\n")
    with pytest.raises(InputError, match=r"index.csv:3: no such part; found tset.*Did you mean 'test'"):
        read_phonon_set(index, split="train", cache=kept)
    index.write_text(f"file,name,lowest_frequency\n{files[0]},a\n")
    with pytest.raises(InputError, match=r"index.csv:2: not a frequency; found ''"):
        read_phonon_set(index, lowest_frequency=-0.1, cache=kept)
    index.write_bytes("file,name\né,a\n".encode("latin-1"))
    with pytest.raises(InputError, match="no CSV in UTF-8"):
        read_phonon_set(index, cache=kept)
    index.write_text("file,name\n,a\n")
    with pytest.raises(InputError, match=r"index.csv:2: a row without a file"):
        read_phonon_set(index, cache=kept)


def test_a_calculation_has_one_reference_of_second_order():
    both = [_named("a"), _named("a-fc3", material="a"), _named("b-fc3"), _named("c"), _named("c-fc3")]
    assert [r.name for r in second_order(both)] == ["a", "b-fc3", "c", "c-fc3"]
