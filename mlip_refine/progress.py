"""Progress of long work: a bar in a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Plain lines come at most this often, in seconds.
LINE_EVERY = 20.0

listeners: list[Callable[[str], None]] = []
"""Called with every line of text that `console` prints, such as by the log of a run."""


class _Notices(Console):
    """Standard error, whose lines of text reach the listeners too."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*objects, **options)
        text = " ".join(o for o in objects if isinstance(o, str))
        if text:
            for listener in listeners:
                listener(text)


console = _Notices(stderr=True, highlight=False)
"""Where notices about the work go; `console.quiet = True` silences them and the progress."""


class Ticker(Protocol):
    """A callback that receives how far the work has come."""

    def __call__(self, done: int) -> None:
        """Report that `done` units of the total are done."""


@contextmanager
def progress(description: str, total: int) -> Iterator[Ticker]:
    """Show the progress of `total` units of work while the block runs."""
    if sys.stderr.isatty() and not console.quiet:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        with Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True
        ) as bar:
            task = bar.add_task(description, total=total)
            yield lambda done: bar.update(task, completed=done)
        return

    start = last = time.monotonic()
    first: int | None = None

    def tick(done: int) -> None:
        nonlocal first, last
        now = time.monotonic()
        # What a resumed run found done says nothing about its speed.
        first = done if first is None else first
        if now - last >= LINE_EVERY:
            last = now
            left = (now - start) * (total - done) / max(done - first, 1)
            console.print(f"{description}: {done}/{total}, {left:.0f} s left", soft_wrap=True)

    yield tick
