"""An audit hook that notes what no reader of a stranger's file may do."""

import os
import sys
from pathlib import Path
from types import CodeType
from typing import Any

CANARY = "canary_in_a_file"
"""Module that only hostile files name; importing it leaves a mark as well."""

_STARTS = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen"}
_CHANGES = {
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
}


_HDF5_READER = str(Path("mlip_refine") / "data" / "hdf5_contents.py")


def _reads_hdf5(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether this is the one process that readers start: this package's own, for HDF5 files of others."""
    command = [os.fsdecode(part) for part in arguments[1][:3]] if event == "subprocess.Popen" else []
    return command[:2] == [sys.executable, "-P"] and command[2].endswith(_HDF5_READER)


class Watch:
    """Notes what a reader of a hostile file must never do; an audit hook cannot be taken out again."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if (event in _STARTS and not _reads_hdf5(event, arguments)) or (
            event in _CHANGES and not self._allowed(*arguments[:2])
        ):
            self.seen.append(f"{event} {arguments}")
        elif event == "open" and isinstance(arguments[2], int):
            writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes and not self._allowed(arguments[0]):
                self.seen.append(f"open {arguments}")
        elif event == "import" and str(arguments[0]).startswith(CANARY):
            self.seen.append(f"import {arguments[0]}")
        elif event == "exec" and isinstance(arguments[0], CodeType):
            code = arguments[0]
            if CANARY in repr((code.co_consts, code.co_names, code.co_filename)):
                self.seen.append(f"exec {code}")
        elif event == "compile" and CANARY in repr(arguments[0]):
            self.seen.append("compile")
        elif event == "pickle.find_class":
            self.seen.append(f"{event} {arguments}")

    def _allowed(self, path: Any, within: Any = -1) -> bool:
        """Temporary files, which are taken away by open folders, compiled modules and /dev/null."""
        if isinstance(within, int) and within != -1:
            return True
        text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        home = os.environ["TMPDIR"]
        return not text or text.startswith(home) or "__pycache__" in text or text == os.devnull
