"""Text of others within reason, for parsers that do whatever a file asks for."""

import re
from io import TextIOWrapper

from ase.io.extxyz import XYZError

_LONGEST_LINE = 1 << 24
_MOST_PAST_THE_END = 1000
_COLUMNS = re.compile(r"[Pp]roperties=\S*:\d{5}")


class BoundedLines(TextIOWrapper):
    """Lines of extended XYZ: what asks for more atoms, columns or characters than there can be is refused.

    Its parser counts to any number of atoms, and makes any number of columns.
    """

    def readline(self, size: int = -1, /) -> str:  # type: ignore[override]
        """Return a line, as any text does.

        Raises:
            XYZError: It is longer, or asks for more, than any frame does; or the end was asked for again and
                again.
        """
        line = super().readline(_LONGEST_LINE if size < 0 else size)
        if len(line) == _LONGEST_LINE:
            raise XYZError(f"a line of more than {_LONGEST_LINE:,} characters")
        if _COLUMNS.search(line):
            raise XYZError("a property of more columns than anything has")
        if not line:
            self._past_the_end = getattr(self, "_past_the_end", 0) + 1
            if self._past_the_end > _MOST_PAST_THE_END:
                raise XYZError("the file ends before the number of atoms that it names")
        return line
