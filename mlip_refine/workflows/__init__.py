"""The verbs: what a user asks for, each in a folder of its own."""

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlip_refine.workflows.base import Command, Workflow

WORKFLOWS = (
    "mlip_refine.workflows.finetune:finetune",
    "mlip_refine.workflows.free_energy:free_energy",
    "mlip_refine.workflows.transition:transition",
    "mlip_refine.workflows.phase_diagram:phase_diagram",
    "mlip_refine.workflows.md:md",
    "mlip_refine.workflows.elastic:elastic",
    "mlip_refine.workflows.phonons:phonons",
)
"""Verbs with a run folder, `package.module:name` of each `Workflow`; the name is that of the Python API."""

COMMANDS = (
    "mlip_refine.workflows.bench:command",
    "mlip_refine.workflows.catalogue:schema",
    "mlip_refine.workflows.catalogue:losses",
    "mlip_refine.workflows.catalogue:guide",
)
"""Verbs without a run folder, `package.module:name` of each `Command`."""


def verbs() -> "list[Workflow[Any, Any] | Command]":
    """Return all verbs in the order of the help; this imports no torch."""
    return [resolve_name(name) for name in (*WORKFLOWS, *COMMANDS)]
