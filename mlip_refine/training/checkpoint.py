"""Checkpoints of a training run: plain tensors and numbers, written atomically, read without pickle code."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from mlip_refine.errors import InputError
from mlip_refine.files import written

FORMAT = "mlip_refine checkpoint 2"

_CORRUPT = (
    *(RuntimeError, OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, EOFError),
    *(pickle.UnpicklingError, zipfile.BadZipFile),
)
"""What a damaged file raises somewhere between its first byte and its last tensor."""


def write_checkpoint(folder: Path, step: int, content: dict[str, Any], keep: int = 2) -> Path:
    """Write `step-NNNN.pt`; it appears whole or not at all. Older ones beyond `keep` are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:04d}.pt"
    with written(path) as partial:
        torch.save(content | {"format": FORMAT, "step": step}, partial)
    for old in _written(folder)[:-keep]:
        old.unlink()
    return path


def read_latest(folder: Path) -> dict[str, Any] | None:
    """Read the newest checkpoint of a run, or `None` if there is none.

    Raises:
        InputError: If the file is not a checkpoint of this package.
    """
    paths = _written(folder)
    if not paths:
        return None
    try:
        if not zipfile.is_zipfile(paths[-1]):
            raise _unreadable(paths[-1], "it is not a whole zip archive")
        content: dict[str, Any] = torch.load(paths[-1], map_location="cpu", weights_only=True)
    except _CORRUPT as error:
        raise _unreadable(paths[-1], str(error).partition("\n")[0] or type(error).__name__) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError("this is not a checkpoint of a run", where=str(paths[-1]), expected=FORMAT)
    return content


def _unreadable(path: Path, why: str) -> InputError:
    fix = "Delete it: the run then resumes from the checkpoint before."
    return InputError(f"the checkpoint cannot be read ({why})", where=str(path), fix=fix)


def _written(folder: Path) -> list[Path]:
    """Checkpoints of a folder, oldest first."""
    return sorted(folder.glob("step-*.pt"), key=lambda path: (len(path.name), path.name))
