"""Style of the tables of all verbs."""

from mlip_refine.quantities import Measured

REFUSED = "-"
"""What stands in place of a number that is refused."""


def number(measured: Measured | None) -> str:
    """Return a value with its error and without its unit, such as ``-8.91(23)``; a dash for `None`."""
    return REFUSED if measured is None else str(measured).removesuffix(measured.unit).rstrip()
