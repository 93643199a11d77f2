"""Style of the tables of all verbs."""

from rich import box
from rich.table import Table

from mlip_refine.quantities import Measured

REFUSED = "-"
"""What stands in place of a number that is refused."""


def number(measured: Measured | None) -> str:
    """Return a value with its error and without its unit, such as ``-8.91(23)``; a dash for `None`."""
    return REFUSED if measured is None else str(measured).removesuffix(measured.unit).rstrip()


def plain_table(title: str | None = None) -> Table:
    """Return an empty table in the style of all verbs: a line below the heads of the columns, no frame."""
    return Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
