"""By how much errors of phonons became smaller: one potential beside another on the same materials."""

from collections.abc import Mapping
from typing import Any

from mlip_refine.errors import InputError, MlipRefineError
from mlip_refine.statistics import Reduction, paired_reduction
from mlip_refine.workflows.phonons.records import (
    QUANTITIES,
    PhononPoint,
    PhononResult,
    errors_of_materials,
    materials_of,
)

_SAME = 1e-6
"""Values of one reference differ by less than this."""


def require_comparable(before: PhononResult, mesh: tuple[int, int, int], temperature: float) -> None:
    """Refuse a baseline that is of another mesh or temperature.

    Args:
        before: The baseline.
        mesh: Points along each reciprocal vector.
        temperature: K.

    Raises:
        InputError: It is.
    """
    if (before.mesh, before.temperature_K) != (mesh, temperature):
        raise InputError(
            "the baseline is of another mesh or temperature",
            where=str(before.folder),
            found=f"{before.mesh}, {before.temperature_K:g} K",
            expected=f"{mesh}, {temperature:g} K",
        )


def reduction(before: PhononResult, after: PhononResult, cell: str) -> tuple[Reduction, int]:
    """Share by which errors of ω_max, S, F and C_V became smaller, on the materials that both have.

    Args:
        before: Of one potential.
        after: Of another, with the same mesh and temperature.
        cell: Kind of cell.

    Returns:
        The reduction, and the number of materials; points of one material count as one.

    Raises:
        InputError: Mesh or temperature differ, or the references of a material do.
        StatisticsError: There are too few materials in both.
    """
    require_comparable(before, after.mesh, after.temperature_K)
    pairs = _pairs(before, after, cell)
    for old, new in pairs:
        if not _same(old.reference, new.reference):
            raise InputError("the baseline has another reference", where=str(before.folder), found=new.name)
    materials = materials_of([new for _, new in pairs])
    old_errors, new_errors = (errors_of_materials([pair[k] for pair in pairs], materials) for k in (0, 1))
    return paired_reduction(old_errors, new_errors), len(old_errors)


def compared_with(before: PhononResult, after: PhononResult) -> dict[str, Any]:
    """Plain data of the reduction in every kind of cell, or why there is none.

    Args:
        before: The baseline.
        after: Of another potential.

    Returns:
        `name` and `model_hash` of the baseline, and `cells`: by kind `materials`, their number, with `value`,
        `low` and `high` of the mean reduction and `of_quantities`, the three of each; or with `refused`.
    """
    cells = {cell: _reduction_json(before, after, cell) for cell in after.cells}
    return {"name": before.name, "model_hash": before.model_hash, "cells": cells}


def _reduction_json(before: PhononResult, after: PhononResult, cell: str) -> dict[str, Any]:
    try:
        found, n = reduction(before, after, cell)
    except MlipRefineError as error:
        common = [new for _, new in _pairs(before, after, cell)]
        return {"materials": len(set(materials_of(common))), "refused": str(error)}
    ends = zip(QUANTITIES, found.of_quantities, strict=True)
    return {
        "materials": n,
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "of_quantities": {quantity.key: list(three) for quantity, three in ends},
    }


def _pairs(before: PhononResult, after: PhononResult, cell: str) -> list[tuple[PhononPoint, PhononPoint]]:
    known = {point.name: point for point in before.compared(cell)}
    return [(known[p.name], p) for p in after.compared(cell) if p.name in known]


def _same(one: Mapping[str, float] | None, other: Mapping[str, float] | None) -> bool:
    if one is None or other is None:
        return False
    return all(abs(one[q.key] - other[q.key]) < _SAME for q in QUANTITIES)
