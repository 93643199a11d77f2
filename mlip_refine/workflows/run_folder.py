"""The folder of a run: made, refused or resumed, locked while a process works in it, and its log."""

import fcntl
import json
import os
import socket
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from io import FileIO, StringIO
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from mlip_refine import progress
from mlip_refine.config import Config, dump_config, load_config
from mlip_refine.errors import InputError
from mlip_refine.files import write_text
from mlip_refine.interruption import Interrupted

PACKAGES = ("mlip-refine", "torch", "mace-torch", "torch-sim-atomistic", "ase", "numpy")
"""What the numbers of a run depend on."""

LOG = "log.txt"
LOCK = ".lock"

FILE_WIDTH = 160
"""Characters per line of tables that are written to a file."""

RESUMABLE = (
    "base",
    "output",
    "free_energy.max_error",
    "training.steps",
    "training.tolerance",
    "training.patience",
    "training.held_out_growth",
    "training.checkpoint_every",
)
"""Keys that may differ when any run is resumed: where it reads and writes, and when it stops."""

ONE_VERB_SECTIONS = ("md", "elastic", "phonons", "transition", "phase_diagram")
"""Sections that one verb alone reads: the runs of other verbs may be resumed with other values."""


def packages() -> dict[str, str]:
    """Return the versions of what the numbers of a run depend on."""
    return {name: version(name) for name in PACKAGES}


@contextmanager
def locked_run_folder(
    config: Config,
    *,
    resume: bool,
    section: str | None = None,
    resumable: tuple[str, ...] = (),
    growing: tuple[str, ...] = (),
) -> Iterator[Path]:
    """Open a run folder as `open_run_folder` does, and keep other processes out of it.

    Raises:
        InputError: If the folder cannot be used, or another process works in it.
    """
    _make(config, resume=resume, section=section, resumable=resumable, growing=growing)
    with _locked(config.run_folder):
        # Once more: another process may have started a run since.
        yield open_run_folder(config, resume=resume, section=section, resumable=resumable, growing=growing)


def open_run_folder(
    config: Config,
    *,
    resume: bool,
    section: str | None = None,
    resumable: tuple[str, ...] = (),
    growing: tuple[str, ...] = (),
) -> Path:
    """Make the folder of a run, or go on in one.

    Args:
        config: The config, which names the folder.
        resume: Whether a run that is there is continued; without one, a run is started.
        section: Section of the config that this kind of run alone reads.
        resumable: Keys that may differ when this kind of run is resumed, beside `RESUMABLE`.
        growing: Keys that may become larger when this kind of run is resumed.

    Raises:
        InputError: If the folder exists and is not to be resumed, holds a run of another config, or cannot be
            written. Nothing is overwritten.
    """
    _make(config, resume=resume, section=section, resumable=resumable, growing=growing)
    write_text(config.run_folder / "config.yaml", dump_config(config))
    return config.run_folder


def _make(
    config: Config,
    *,
    resume: bool,
    section: str | None,
    resumable: tuple[str, ...],
    growing: tuple[str, ...],
) -> None:
    """Make the folder if it is not there, or refuse it."""
    folder = config.run_folder
    if (folder / "config.yaml").exists():
        if not resume:
            raise InputError(
                "the run folder exists",
                where=str(folder),
                fix="Give the run another name, go on with --resume, or remove the folder.",
            )
        others = (name for name in ONE_VERB_SECTIONS if name != section)
        _require_same(config, folder, (*RESUMABLE, *others, *resumable), growing)
        return
    if folder.exists() and (not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir())):
        problem = "the run folder exists and is not a run"
        raise InputError(problem, where=str(folder), fix="Choose another name.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, str(error)) from error
    if not os.access(folder, os.W_OK):
        raise _unwritable(folder, "no permission to write")


def _require_same(
    config: Config, folder: Path, may_differ: tuple[str, ...], growing: tuple[str, ...]
) -> None:
    """Refuse a config of which a resumed run would be a mixture of two runs."""
    old, new = (_flat(c.model_dump()) for c in (load_config(folder / "config.yaml"), config))
    differs = {key for key in old | new if old.get(key) != new.get(key)}
    changed = sorted(key for key in differs if not key.startswith((*may_differ, *growing)))
    # A learning rate that ends somewhere knows from its first update how many there will be.
    if "training.steps" in differs and old.get("training.final_learning_rate") is not None:
        changed.append("training.steps")
    if changed:
        raise InputError(
            "the run folder belongs to another config",
            where=str(folder / "config.yaml"),
            found=f"differences in {', '.join(changed)}",
            fix="Give the run another name, or resume with the config that it was started with.",
        )
    for key in growing:
        if key in old and key in new and new[key] < old[key]:
            raise InputError(
                "a run cannot be made shorter",
                where=config.where(*key.split(".")),
                found=f"{key} {new[key]:g}",
                expected=f"at least {old[key]:g}, as in {folder / 'config.yaml'}",
            )


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _unwritable(folder: Path, why: str) -> InputError:
    problem = "the run folder cannot be written"
    return InputError(problem, where=str(folder), found=why, fix="Set output.folder.")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder; the system releases that of a process that has died.

    Raises:
        InputError: Another process holds it.
    """
    path = folder / LOCK
    while True:
        stream = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            try:
                holder = json.load(stream)
                found = f"process {holder['process']} on {holder['host']}"
            except (ValueError, KeyError, TypeError):
                found = "a process that has just started"
            stream.close()
            raise InputError(
                "another process works in the run folder",
                where=str(folder),
                found=found,
                fix="Wait until it has ended, or give the run another name.",
            ) from error
        except OSError:
            # A file system without locks; the run works there as well.
            break
        # Its last holder may have removed the file between the opening and the locking.
        if path.exists() and os.path.samestat(os.fstat(stream.fileno()), path.stat()):
            break
        stream.close()
    with stream:
        stream.truncate(0)
        stream.write(json.dumps({"process": os.getpid(), "host": socket.gethostname()}))
        stream.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


class _LogStream(StringIO):
    """Text for the log of a run; what a full disk does not take is left out: no result depends on it."""

    def __init__(self, file: FileIO) -> None:
        super().__init__()
        self._file = file

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._file.write(text.encode("utf-8", "backslashreplace"))
        return len(text)


@contextmanager
def logged(folder: Path, title: str) -> Iterator[Console]:
    """Append to the log of a run: what is printed to the console, notices, warnings, and how it ended.

    Args:
        folder: The run folder.
        title: First line, after the time.

    Yields:
        The console of the log.
    """
    with (folder / LOG).open("ab", buffering=0) as file:
        log = Console(file=_LogStream(file), width=FILE_WIDTH, highlight=False, color_system=None)

        def write(text: str) -> None:
            log.print(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC  {text}", markup=False, soft_wrap=True)

        process = f"process {os.getpid()} on {socket.gethostname()}"
        write(f"{title}, mlip-refine {version('mlip-refine')}, {process}")
        shown = warnings.showwarning

        def show_and_log(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            write(f"{category.__name__} at {filename}:{lineno}: {message}")
            shown(message, category, filename, lineno, file, line)

        warnings.showwarning = show_and_log
        progress.listeners.append(write)
        try:
            yield log
        except Interrupted as end:
            end.folder = folder
            write(str(end))
            raise
        except BaseException as error:
            write(f"ended by {type(error).__name__}\n{traceback.format_exc()}")
            raise
        else:
            write("finished")
        finally:
            progress.listeners.remove(write)
            warnings.showwarning = shown
