"""Errors that a user can act on: what is wrong, where, what was found, and what would do."""

from collections.abc import Iterable
from difflib import get_close_matches


class MlipRefineError(Exception):
    """Base of every error that this package raises on purpose.

    Attributes:
        exit_code: Exit status of the command line when the error ends a run.
    """

    exit_code = 1


class OutOfMemoryError(MlipRefineError):
    """A single system does not fit into the memory of the device, as it is now."""


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
            details.append(f"found {self.found}")
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
