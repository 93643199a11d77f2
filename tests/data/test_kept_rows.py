"""Rows that are kept while a run lasts: none is computed twice, and they have the bits that they had."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ase.build import bulk
from torch import Tensor

from mlip_refine.crystals.phonons.harmonic import forces
from mlip_refine.crystals.phonons.hessian import hessian_products, unit_displacements
from mlip_refine.crystals.phonons.third_order import PairColumn, third_derivatives
from mlip_refine.data import kept_rows
from mlip_refine.data.kept_rows import rows_kept
from mlip_refine.errors import StorageError
from mlip_refine.potential import Potential, batching
from mlip_refine.training.streaming import further_probes

ATOMS = bulk("Ti", "hcp", a=2.93, c=4.65) * (2, 2, 2)


@pytest.fixture(scope="module")
def titanium() -> Potential:
    return Potential.load("titanium-compact")


class Counted:
    """Counts chunks, and interrupts the run in the midst of one."""

    def __init__(self, potential: Potential, monkeypatch: pytest.MonkeyPatch) -> None:
        self.chunks, self.last = 0, -1
        collate = type(potential.graphs).collate

        def counting(graphs: Any, structures: Any) -> Any:
            if self.chunks == self.last:
                raise KeyboardInterrupt
            self.chunks += 1
            return collate(graphs, structures)

        monkeypatch.setattr(type(potential.graphs), "collate", counting)
        monkeypatch.setitem(batching.CHUNK_ATOMS, "cpu", 64)  # four structures

    def run(self, calculate: Callable[[], Tensor], folder: Path, last: int = -1) -> tuple[Tensor | None, int]:
        """Calculate in a block, and return the result and the number of chunks that took."""
        self.chunks, self.last = 0, last
        found = None
        try:
            with rows_kept(folder):
                found = calculate()
        except KeyboardInterrupt:
            pass
        return found, self.chunks


def calculations(potential: Potential) -> dict[str, Callable[[], Tensor]]:
    structure = potential.graphs.from_atoms(ATOMS)
    columns = [(atom, axis) for atom in range(7) for axis in range(3)]
    pairs = [PairColumn(atom, 0, other, axis) for atom in range(4) for other in range(5) for axis in range(3)]
    moved = []
    for k in range(20):
        moved.append(ATOMS.copy())
        moved[-1].rattle(0.01, seed=k)
    structures = [potential.graphs.from_atoms(atoms) for atoms in moved]
    return {
        "second": lambda: torch.stack(
            hessian_products(potential, [structure] * 21, unit_displacements(16, columns))
        ),
        "third": lambda: third_derivatives(potential, structure, pairs),
        "forces": lambda: torch.from_numpy(forces(potential, moved)),
        "born": lambda: further_probes(potential, structures, {"born": 1})["born"],
    }


@pytest.mark.parametrize("what", ["second", "third", "forces", "born"])
def test_an_interrupted_calculation_goes_on_to_the_same_bits(titanium, monkeypatch, tmp_path, what):
    counted, calculate = Counted(titanium, monkeypatch), calculations(titanium)[what]
    plain = calculate()
    whole, n = counted.run(calculate, tmp_path / "rows")
    assert torch.equal(whole, plain)
    assert n >= 4
    assert not (tmp_path / "rows").exists()
    done = 0
    for last in (2, 1):
        found, took = counted.run(calculate, tmp_path / "rows", last)
        assert found is None
        done += took
        assert (tmp_path / "rows").is_dir()
    found, took = counted.run(calculate, tmp_path / "rows")
    assert torch.equal(found, plain)
    assert done + took == n
    assert not (tmp_path / "rows").exists()


def test_rows_are_written_while_the_work_goes_on(titanium, monkeypatch, tmp_path):
    """A kill leaves no time to write anything."""
    monkeypatch.setattr(kept_rows, "_INTERVAL", 0.0)
    counted, calculate = Counted(titanium, monkeypatch), calculations(titanium)["second"]
    write, left = kept_rows._write, []

    def noted(*args: Any) -> None:
        write(*args)
        left.append([path.name for path in sorted((tmp_path / "rows").iterdir())])

    monkeypatch.setattr(kept_rows, "_write", noted)
    counted.run(calculate, tmp_path / "rows", last=3)
    assert [name.split(".")[1] for name in left[2]] == ["0000000", "0000004", "0000008"]
    assert counted.run(calculate, tmp_path / "rows")[1] == 6 - 3


def test_damaged_rows_and_those_after_them_are_computed_anew(titanium, monkeypatch, tmp_path):
    monkeypatch.setattr(kept_rows, "_INTERVAL", 0.0)
    counted, calculate = Counted(titanium, monkeypatch), calculations(titanium)["second"]
    plain = calculate()
    for damage in (lambda content: content[:-1], lambda content: b"", lambda content: content[512:]):
        counted.run(calculate, tmp_path / "rows", last=3)
        second = sorted((tmp_path / "rows").iterdir())[1]
        second.write_bytes(damage(second.read_bytes()))
        found, took = counted.run(calculate, tmp_path / "rows")
        assert torch.equal(found, plain)
        assert took == 6 - 1


def test_other_questions_read_other_rows(titanium, monkeypatch, tmp_path):
    """Another model, precision, structure, direction or number of rows."""
    counted = Counted(titanium, monkeypatch)
    moved = ATOMS.copy()
    moved.rattle(1e-9, seed=1)
    other = Potential.load("titanium-compact", default_dtype="float64")
    with torch.no_grad():
        next(iter(other.module.parameters())).mul_(1 + 1e-9)
    single = Potential.load("titanium-compact", default_dtype="float32")

    def products(potential: Potential, atoms: Any, atom: int = 0, n: int = 8) -> Tensor:
        structure = potential.graphs.from_atoms(atoms)
        directions = unit_displacements(16, [(atom, 0)] * n)
        return torch.stack(hessian_products(potential, [structure] * n, directions))

    cases = [
        lambda: products(titanium, ATOMS),
        lambda: products(other, ATOMS),
        lambda: products(single, ATOMS),
        lambda: products(titanium, moved),
        lambda: products(titanium, ATOMS, atom=1),
        lambda: products(titanium, ATOMS, n=12),
    ]
    for case in cases:
        assert counted.run(case, tmp_path / "rows", last=1) == (None, 1)
    assert len(list((tmp_path / "rows").iterdir())) == len(cases)


def test_only_what_can_go_on_is_left(tmp_path):
    for error, stays in (
        (ValueError(), False),
        (StorageError("x", "full"), True),
        (KeyboardInterrupt(), True),
    ):
        (tmp_path / "rows").mkdir(exist_ok=True)
        with pytest.raises(type(error)), rows_kept(tmp_path / "rows"):
            raise error
        assert (tmp_path / "rows").exists() == stays
