"""Losses by name: the built-in ones, and those of other packages.

Another package registers a loss by an entry point of the group `mlip_refine.losses`, named like the loss and
pointing at its class. The class is an `EnsembleLoss` or `BatchLoss` with a pydantic model `Options` (a
`mlip_refine.config.Section`) and the constructor `(name, weight, options)`.
"""

from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import Any

from mlip_refine.config import LocatedNode, validate_node
from mlip_refine.errors import InputError, nearest
from mlip_refine.losses.base import Loss
from mlip_refine.losses.elastic.static import ElasticConstants
from mlip_refine.losses.ensemble.free_energy import FreeEnergyDifference
from mlip_refine.losses.ensemble.observable import OBSERVABLE_LOSSES
from mlip_refine.losses.ensemble.phase_difference import EnthalpyDifference, VolumeDifference
from mlip_refine.losses.phonons.frequencies import PhononFrequencies
from mlip_refine.losses.phonons.hvp import PhononHVP
from mlip_refine.losses.replay import Replay

ENTRY_POINT_GROUP = "mlip_refine.losses"

BUILT_IN: dict[str, type[Any]] = {
    **OBSERVABLE_LOSSES,
    "elastic_constants": ElasticConstants,
    "enthalpy_difference": EnthalpyDifference,
    "free_energy_difference": FreeEnergyDifference,
    "phonon_frequencies": PhononFrequencies,
    "phonon_hvp": PhononHVP,
    "replay": Replay,
    "volume_difference": VolumeDifference,
}


def registry() -> dict[str, type[Any]]:
    """Every known loss class by name.

    Raises:
        InputError: If another package's entry point cannot be imported or is not a loss.
    """
    known = dict(BUILT_IN)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name in known:
            raise InputError(f"two losses are called {point.name!r}", where=point.value)
        try:
            loss = point.load()
        except (ImportError, AttributeError) as error:
            problem = f"loss {point.name!r} cannot be imported"
            raise InputError(problem, where=point.value, found=str(error)) from error
        if not (isinstance(loss, type) and issubclass(loss, Loss) and hasattr(loss, "Options")):
            raise InputError(f"{point.name!r} is not a loss class with Options", where=point.value)
        known[point.name] = loss
    return known


def build_losses(nodes: Iterable[LocatedNode]) -> list[Loss]:
    """Losses from the raw nodes of a config, their options checked.

    Raises:
        InputError: For an unknown type, wrong options, or two losses of one name.
    """
    known, losses = registry(), list[Loss]()
    for node in nodes:
        if node.type not in known:
            word = nearest(node.type, known)
            raise InputError(
                f"unknown loss {node.type!r}",
                where=node.where("type"),
                expected=f"one of {', '.join(sorted(known))}",
                fix=f"Did you mean {word!r}?" if word else None,
            )
        if node.name in {loss.name for loss in losses}:
            problem = f"two losses are called {node.name!r}"
            raise InputError(problem, where=node.where(), fix="Give each a key 'name'.")
        loss_class = known[node.type]
        losses.append(loss_class.create(node.name, node.weight, validate_node(loss_class.Options, node)))
    return losses
