"""Checks of a config that need no torch, shared by the verbs."""

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
