"""Checks of a config that need no torch, shared by the verbs."""

from collections.abc import Sequence

from mlip_refine.config import Config
from mlip_refine.errors import InputError, nearest


def require_phase(config: Config, name: str, who: str, where: str | None) -> None:
    """Refuse the name of a phase that the config does not have.

    Args:
        config: The config with its phases.
        name: Name of the phase.
        who: What names it, such as "a loss".
        where: Its place in the config.

    Raises:
        InputError: With the nearest known name.
    """
    if name not in config.phases:
        word = nearest(name, config.phases)
        raise InputError(
            f"{who} names the phase {name!r}, which is not among phases",
            where=where,
            expected=f"one of {', '.join(config.phases) or '(none)'}",
            fix=f"Did you mean {word!r}?" if word else None,
        )


def require_solids(config: Config, names: Sequence[str], section: str, what: str) -> None:
    """Refuse phases that the config does not have, and liquids, for what only crystals have.

    Args:
        config: The config with its phases.
        names: Names of phases, in the order of the key `phases` of the section.
        section: Section that names them, such as `elastic`.
        what: What a liquid does not have, such as "elastic constants".

    Raises:
        InputError: With the nearest known name, or the liquid.
    """
    for number, name in enumerate(names):
        require_phase(config, name, section, config.where(section, "phases", number))
        if config.phases[name].identity == "liquid" or config.phases[name].melt is not None:
            raise InputError(
                f"the phase {name!r} is a liquid: it has no {what}",
                where=config.where("phases", name, "identity") or config.where("phases", name),
                fix=f"Name the crystals in {section}.phases.",
            )
