"""Types of losses by name: the built-in ones, and those of other packages.

This module imports no torch: the options of every built-in loss can be read and checked, and the class that
computes it is imported when it is first asked for.

Another package registers a loss by an entry point of the group `mlip_refine.losses`, named like the loss and
pointing at its class. The class is an `EnsembleLoss`, `BatchLoss` or `PotentialLoss` with a pydantic model
`Options` (a `mlip_refine.config.Section`) and the constructor `(name, weight, options)`, or its own `bind`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from mlip_refine.config import LocatedNode, Section, validate_node
from mlip_refine.errors import InputError, nearest
from mlip_refine.losses import options
from mlip_refine.losses.ensemble.observable_options import OBSERVABLES

if TYPE_CHECKING:
    from mlip_refine.losses.base import Loss, Setting

ENTRY_POINT_GROUP = "mlip_refine.losses"


@dataclass(frozen=True)
class LossType:
    """A type of loss.

    Attributes:
        options: Pydantic model of what a config may say about it.
        target: Dotted name of its class, `package.module:Class`.
        description: What the loss is, in one line.
    """

    options: type[Section]
    target: str
    description: str

    @property
    def loss_class(self) -> "type[Loss]":
        """The class that computes the loss; this imports torch."""
        found: type[Loss] = resolve_name(self.target)
        return found


@dataclass(frozen=True)
class LossSpec:
    """A loss that a config asks for.

    Attributes:
        name: Name in results.
        weight: Factor in the total.
        type: What kind of loss it is.
        options: Its checked options, an instance of `type.options`.
    """

    name: str
    weight: float
    type: LossType
    options: Section

    def bind(self, setting: "Setting") -> "Loss":
        """Return the loss in the setting of a run; this imports torch.

        Raises:
            InputError: The loss does not suit the setting.
        """
        return self.type.loss_class.bind(self.name, self.weight, self.options, setting)


def _built_in(given: type[Section], target: str) -> LossType:
    return LossType(given, f"mlip_refine.losses.{target}", _first_line(given))


def _first_line(documented: type) -> str:
    return (documented.__doc__ or "").strip().partition("\n")[0]


BUILT_IN: dict[str, LossType] = {
    **{name: _built_in(given, "ensemble.observable:ObservableLoss") for name, given in OBSERVABLES.items()},
    "elastic_constants": _built_in(options.ElasticConstantsOptions, "elastic.static:ElasticConstants"),
    "enthalpy_difference": _built_in(
        options.EnthalpyDifferenceOptions, "ensemble.two_phases:EnthalpyDifference"
    ),
    "free_energy_difference": _built_in(
        options.FreeEnergyDifferenceOptions, "ensemble.two_phases:FreeEnergyDifference"
    ),
    "phonon_frequencies": _built_in(
        options.PhononFrequenciesOptions, "phonons.frequencies:PhononFrequencies"
    ),
    "phonon_hvp": _built_in(options.PhononHVPOptions, "phonons.hvp:PhononHVP"),
    "replay": _built_in(options.ReplayOptions, "replay:Replay"),
    "volume_difference": _built_in(options.VolumeDifferenceOptions, "ensemble.two_phases:VolumeDifference"),
}


def loss_types() -> dict[str, LossType]:
    """Return every known type of loss by name.

    Raises:
        InputError: If another package's entry point cannot be imported or is not a loss.
    """
    known = dict(BUILT_IN)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name in known:
            raise InputError(f"two losses are called {point.name!r}", where=point.value)
        try:
            found = point.load()
        except (ImportError, AttributeError) as error:
            problem = f"loss {point.name!r} cannot be imported"
            raise InputError(problem, where=point.value, found=str(error)) from error
        from mlip_refine.losses.base import Loss  # noqa: PLC0415 - imports torch, as the other package has

        if not (isinstance(found, type) and issubclass(found, Loss) and hasattr(found, "Options")):
            raise InputError(f"{point.name!r} is not a loss class with Options", where=point.value)
        known[point.name] = LossType(found.Options, point.value, _first_line(found))
    return known


def loss_specs(nodes: Iterable[LocatedNode]) -> list[LossSpec]:
    """Return the losses of a config from its raw nodes, with their options checked.

    Raises:
        InputError: For an unknown type, wrong options, or two losses of one name.
    """
    known = loss_types()
    specs: dict[str, LossSpec] = {}
    for node in nodes:
        if node.type not in known:
            word = nearest(node.type, known)
            raise InputError(
                f"unknown loss {node.type!r}",
                where=node.where("type"),
                expected=f"one of {', '.join(sorted(known))}",
                fix=f"Did you mean {word!r}?" if word else None,
            )
        if node.name in specs:
            problem = f"two losses are called {node.name!r}"
            raise InputError(problem, where=node.where(), fix="Give each a key 'name'.")
        checked = validate_node(known[node.type].options, node)
        specs[node.name] = LossSpec(node.name, node.weight, known[node.type], checked)
    return list(specs.values())
