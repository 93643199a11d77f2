"""By how much errors became smaller: points made as records, common materials, what is printed and kept."""

from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mlip_refine.errors import InputError, StatisticsError
from mlip_refine.files import write_json
from mlip_refine.workflows.phonons.records import (
    QUANTITIES,
    PhononPoint,
    PhononResult,
    compared_with,
    mean_absolute_error,
    read_phonons_json,
    reduction,
    require_comparable,
)
from mlip_refine.workflows.phonons.tables import print_phonons


def _point(name: str, error: float, material: str | None = None) -> PhononPoint:
    reference = {q.key: 10.0 for q in QUANTITIES} | {"min_THz": 0.0, "imaginary": 0.0}
    properties = reference | {q.key: 10.0 + error * (k + 1) for k, q in enumerate(QUANTITIES)}
    return PhononPoint(name, "reference", "Ti", 2, 16, 17.0, properties, reference, material=material or name)


def _result(folder: Path, name: str, points: list[PhononPoint]) -> PhononResult:
    return PhononResult(folder, name, name, (4, 4, 4), 300.0, tuple(points), {})


@pytest.fixture
def before(tmp_path):
    return _result(tmp_path, "before", [_point(f"[m{k}]", 0.1 * (k + 1)) for k in range(7)])


@pytest.fixture
def after(tmp_path):
    """Errors of six of them are a quarter of what they were, and one material is new."""
    points = [_point(f"[m{k}]", -0.025 * (k + 1)) for k in range(6)]
    return _result(tmp_path, "after", [*points, _point("new", 5.0)])


def test_common_materials_tell_the_reduction(before, after, tmp_path):
    found, n = reduction(before, after, "reference")
    assert n == 6
    assert (found.value, found.low, found.high) == pytest.approx((0.75, 0.75, 0.75))
    result = replace(after, baseline=compared_with(before, after))
    write_json(tmp_path / "phonons.json", result.as_json())
    assert read_phonons_json(tmp_path) == result
    cell = result.baseline["cells"]["reference"]
    assert (cell["materials"], cell["value"]) == (6, pytest.approx(0.75))
    assert cell["of_quantities"]["entropy_J_K_mol"] == pytest.approx([0.75, 0.75, 0.75])
    console = Console(file=StringIO(), width=160)
    print_phonons(console, result)
    text = console.file.getvalue()
    for words in (
        "[m0] Ti",
        "reference cells, 7 materials",
        "smaller by, 6 materials of both",
        "75 %",
        "mean of",
    ):
        assert words in text


def test_several_crystals_of_one_material_count_once(tmp_path):
    """The bootstrap draws materials: nine points of one of them are no nine cases."""
    many = [_point(f"a{k}", 0.4, "a") for k in range(9)]
    others = [_point(name, 0.2) for name in "bcde"]
    before = _result(tmp_path, "before", many + others)
    after = _result(tmp_path, "after", [*many, *(_point(name, 0.0) for name in "bcde")])
    found, n = reduction(before, after, "reference")
    assert n == 5
    assert found.value == pytest.approx(1 - 0.4 / 1.2)
    assert found.low < 0.5
    error = mean_absolute_error(before.points, QUANTITIES[0])
    assert error.value == pytest.approx((0.4 + 4 * 0.2) / 5)
    assert error.se == pytest.approx(np.std([0.4, 0.2, 0.2, 0.2, 0.2], ddof=1) / 5**0.5)
    assert after.as_json()["mean_absolute_errors"]["reference"]["materials"] == 5


def test_what_cannot_be_compared_is_refused_and_told(before, after, tmp_path):
    with pytest.raises(InputError, match="another mesh or temperature"):
        require_comparable(before, (4, 4, 4), 500.0)
    with pytest.raises(InputError, match="another mesh or temperature"):
        reduction(before, replace(after, mesh=(5, 5, 5)), "reference")
    few = _result(tmp_path, "few", list(after.points[:4]))
    with pytest.raises(StatisticsError, match="shapes"):
        reduction(before, few, "reference")
    told = compared_with(before, few)["cells"]["reference"]
    assert told["materials"] == 4
    console = Console(file=StringIO(), width=160)
    print_phonons(console, replace(few, baseline=compared_with(before, few)))
    assert "at least 5 cases" in console.file.getvalue()
    other = replace(after.points[0], reference=after.points[0].reference | {"max_THz": 11.0})
    moved = replace(after, points=(other, *after.points[1:]))
    assert "another reference" in compared_with(before, moved)["cells"]["reference"]["refused"]
