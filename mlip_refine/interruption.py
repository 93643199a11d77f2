"""Signals that end a run: Ctrl-C, and those of batch systems and closed terminals.

Long work that can be cut anywhere is left by an exception. Work that has something to keep first, such as a
simulation, defers signals, asks for them now and then, and ends by itself.
"""

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Ctrl-C, the end of a job, a closed terminal, and the warning that batch systems send before the end."""


class Interrupted(BaseException):
    """A signal asked the process to end.

    Attributes:
        signal: The signal.
        folder: Folder of the run that goes on from here with `--resume`, if there is one.
    """

    def __init__(self, received: signal.Signals, folder: Path | None = None) -> None:
        """Store what is known."""
        super().__init__(received.name)
        self.signal, self.folder = received, folder

    @property
    def exit_code(self) -> int:
        """Exit status of the command line: 128 and the number of the signal, so 130 for Ctrl-C."""
        return 128 + int(self.signal)

    def __str__(self) -> str:
        """Return one line that says what ended the run, and how it goes on."""
        what = "Ctrl-C" if self.signal is signal.SIGINT else self.signal.name
        if self.folder is None:
            return f"ended by {what}"
        return f"ended by {what}; go on with the same command and --resume (kept in {self.folder})"


class _Received:
    """What this process was told.

    Attributes:
        last: The signal that ends it, once there is one.
        deferred: How many blocks defer signals.
    """

    last: signal.Signals | None = None
    deferred = 0


def _receive(number: int, _: FrameType | None) -> None:
    again = _Received.last is not None
    _Received.last = signal.Signals(number)
    if _Received.last is signal.SIGHUP:
        _leave_the_terminal()
    # Whoever presses Ctrl-C twice means now; batch systems may well send the same signal twice.
    if not _Received.deferred or (again and _Received.last is signal.SIGINT):
        raise Interrupted(_Received.last)


def _leave_the_terminal() -> None:
    """Write no more to a terminal that is gone: every line would be an error."""
    for descriptor in (1, 2):
        try:
            os.tcgetpgrp(descriptor)
        except OSError as error:
            if error.errno == errno.EIO:
                with suppress(OSError), Path(os.devnull).open("w") as nowhere:
                    os.dup2(nowhere.fileno(), descriptor)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let `SIGNALS` raise `Interrupted` in this block; those that are ignored, as by nohup, stay so."""
    _Received.last = None
    before = {each: signal.getsignal(each) for each in SIGNALS}
    caught = [each for each in SIGNALS if before[each] is not signal.SIG_IGN]
    try:
        for each in caught:
            signal.signal(each, _receive)
        yield
    finally:
        for each in caught:
            signal.signal(each, before[each])


@contextmanager
def deferred() -> Iterator[None]:
    """Let signals wait in this block, which asks for them; one that waits at its end is raised there."""
    check()
    _Received.deferred += 1
    try:
        yield
    finally:
        _Received.deferred -= 1
    check()


def pending() -> bool:
    """Return whether a signal has asked for the end."""
    return _Received.last is not None


def check() -> None:
    """End here if a signal has asked for it.

    Raises:
        Interrupted: If so.
    """
    if _Received.last is not None:
        raise Interrupted(_Received.last)
