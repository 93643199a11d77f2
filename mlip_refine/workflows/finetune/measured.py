"""What the losses of a run measured, beside their targets, as the summary keeps it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mlip_refine.losses import Loss
from mlip_refine.quantities import Measured, Target
from mlip_refine.workflows.finetune.records import Update


def measured_json(
    updates: Sequence[Update], losses: Sequence[Loss], delivered: Mapping[str, Mapping[str, Measured]]
) -> dict[str, Any]:
    """What losses measured in their first and their last update, reweighted as they were trained.

    Args:
        updates: Of the run.
        losses: Of the run.
        delivered: What losses say of the potential that the run ends with, by loss and quantity.

    Returns:
        By loss and quantity: `first` and `last` with `_se` and `unit`, where there is one `target` with
        `target_uncertainty`, and `delivered` with `_se`.
    """
    targets = {loss.name: loss.targets for loss in losses}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for update in updates:
        for loss, measured in update.diagnostics.items():
            for name, m in measured.items():
                target = targets.get(loss, {}).get(name)
                entry = found.setdefault(loss, {}).setdefault(name, _first(m, target))
                entry |= {"last": m.value, "last_se": m.known_se}
    for loss, values in delivered.items():
        for name, m in values.items():
            entry = found.setdefault(loss, {}).setdefault(name, {"unit": m.unit})
            entry |= {"delivered": m.value, "delivered_se": m.known_se}
    return found


def _first(measured: Measured, target: Target | None) -> dict[str, Any]:
    entry = {"first": measured.value, "first_se": measured.known_se, "unit": measured.unit}
    if target is not None:
        entry |= {"target": target.value, "target_uncertainty": target.uncertainty}
    return entry


def deviations_json(updates: Sequence[Update], losses: Sequence[Loss]) -> dict[str, Any]:
    """Root mean squares of all deviations of losses that have targets, in σ, in their first and last update.

    Such a loss is the mean of the squares.
    """
    found = {}
    for loss in losses:
        squares = [update.losses[loss.name] for update in updates if loss.name in update.losses]
        if loss.targets and squares:
            found[loss.name] = {"first_sigma": math.sqrt(squares[0]), "last_sigma": math.sqrt(squares[-1])}
    return found
