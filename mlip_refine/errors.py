"""Errors that a user can act on: what is wrong, where, what was found, and what would do."""

from collections.abc import Iterable
from difflib import get_close_matches

LONGEST_FOUND = 1000
"""Characters of an offending value that a message shows."""


class MlipRefineError(Exception):
    """Base of every error that this package raises on purpose.

    Attributes:
        exit_code: Exit status of the command line when the error ends a run.
    """

    exit_code = 1


class OutOfMemoryError(MlipRefineError):
    """A single system does not fit into the memory of the device, as it is now."""


class StorageError(MlipRefineError):
    """A file could not be written: the disk or a quota is full, or the file system may only be read.

    Args:
        path: Path of the file.
        reason: Reason of the system.
        needed: Bytes that the file needs, as far as it is known.
        free: Bytes that are free there.
    """

    exit_code = 3

    def __init__(self, path: str, reason: str, *, needed: int | None = None, free: int | None = None) -> None:
        """Store the parts; the message is put together by ``str``."""
        super().__init__(path, reason)
        self.path, self.reason, self.needed, self.free = path, reason, needed, free

    def __str__(self) -> str:
        """Return what is missing where, and how to go on."""
        numbers = (("needs", self.needed), ("free", self.free))
        room = ", ".join(f"{what} {bytes_in_words(n)}" for what, n in numbers if n is not None)
        why = f"{self.reason}; {room}" if room else self.reason
        return (
            f"{self.path}: cannot be written ({why}). Make room there, or make it writable; a run then goes "
            "on with --resume from what was written before, which is whole."
        )


def bytes_in_words(n: int) -> str:
    """Return a number of bytes as people say it, such as `12.3 MB`."""
    size = float(n)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


class InputError(MlipRefineError):
    """Something that the user gave (file, key, value, option) cannot be used.

    Args:
        problem: What is wrong, in one clause.
        where: The place: ``config.yaml:12`` or ``train.extxyz, frame 7``.
        found: The offending value, shown as ``str`` shows it.
        expected: What is allowed there, in words.
        fix: What to do, a sentence of its own.
    """

    exit_code = 2

    def __init__(
        self,
        problem: str,
        *,
        where: str | None = None,
        found: object = None,
        expected: str | None = None,
        fix: str | None = None,
    ) -> None:
        """Store the parts; the message is put together by ``str``."""
        super().__init__(problem, where, found, expected, fix)
        self.problem = problem
        self.where = where
        self.found = found
        self.expected = expected
        self.fix = fix

    def __reduce__(self) -> tuple[object, ...]:
        """Rebuild from keyword parts, so that the error crosses process borders."""
        # From the attributes: whoever catches the error may fill in the place.
        parts = (self.problem, self.where, self.found, self.expected, self.fix)
        return _rebuild_input_error, (type(self), *parts)

    def __str__(self) -> str:
        """Return ``<where>: <problem>; found <found>, expected <expected>. <fix>``."""
        message = f"{self.where}: {self.problem}" if self.where else self.problem
        details = []
        if self.found is not None:
            found = str(self.found)
            shown = found if len(found) <= LONGEST_FOUND else f"{found[:LONGEST_FOUND]}..."
            details.append(f"found {shown}")
        if self.expected is not None:
            details.append(f"expected {self.expected}")
        if details:
            message = f"{message}; {', '.join(details)}"
        message = f"{message.rstrip('.')}. {self.fix}" if self.fix else message
        # What a file holds must not steer the terminal: control characters are shown as their escapes.
        return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in message)


def _rebuild_input_error(
    cls: type[InputError],
    problem: str,
    where: str | None,
    found: object,
    expected: str | None,
    fix: str | None,
) -> InputError:
    return cls(problem, where=where, found=found, expected=expected, fix=fix)


class StatisticsError(MlipRefineError):
    """The data do not carry the estimate that was asked of them.

    Args:
        problem: Which estimate, and why the data do not carry it.
        needed: What would do, for example how many samples.
    """

    def __init__(self, problem: str, *, needed: str | None = None) -> None:
        """Store the parts; the message is put together by ``str``."""
        super().__init__(problem)
        self.problem = problem
        self.needed = needed

    def __str__(self) -> str:
        """Return ``<problem>; needed: <needed>``."""
        return f"{self.problem}; needed: {self.needed}" if self.needed else self.problem


class SamplingError(MlipRefineError):
    """A simulation went wrong: non-finite, too hot, or out of its phase."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word closest to a misspelt one.

    Args:
        word: What was found.
        known: The words that would have been right.

    Returns:
        The best match regardless of case, or None when nothing is similar.
    """
    by_lower: dict[str, str] = {}
    for candidate in known:
        by_lower.setdefault(candidate.lower(), candidate)
    matches = get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[matches[0]] if matches else None
