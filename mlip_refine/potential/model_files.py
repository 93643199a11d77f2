"""From the name that a config gives to the model file: embedded, a path, or a MACE foundation model.

mace, which has the list of foundation models, is imported only for names that are none of the other two.
"""

import contextlib
import os
import sys
from importlib.resources import files
from pathlib import Path

from mlip_refine.errors import InputError, nearest
from mlip_refine.files import user_path

EMBEDDED = ("titanium-compact",)
"""Checkpoints that come with the package."""

_SUFFIXES = (".model", ".safetensors", ".pt", ".pth")


def resolve_model(name_or_path: str, base: Path) -> Path:
    """Find the file of a model.

    Args:
        name_or_path: An embedded name, a path, or the name of a MACE foundation model; tried in that order.
        base: Folder that relative paths start from.

    Returns:
        Path of the file. A foundation model is downloaded by mace-torch into its own cache unless it is
        there.

    Raises:
        InputError: Neither a known name nor an existing file, or the download failed.
    """
    name = name_or_path
    if name in EMBEDDED:
        return Path(str(files("mlip_refine").joinpath("assets", f"{name}.model")))
    path = base / user_path(name)
    if path.exists():
        return path
    urls = foundation_urls()
    if name not in urls and ("/" in name or name.endswith(_SUFFIXES)):
        folder = path.parent
        word = nearest(path.name, sorted(p.name for p in folder.iterdir()) if folder.is_dir() else [])
        raise InputError(
            "no such model file" if folder.is_dir() else "no such folder",
            where=str(path),
            fix=f"Did you mean {word!r}?" if word else None,
        )
    if name not in urls:
        known = [*EMBEDDED, *urls]
        word = nearest(name, known)
        raise InputError(
            f"unknown model {name!r}, and no file of that name in {path.parent}",
            where="model",
            expected=f"a path, or one of {', '.join(known)}",
            fix=f"Did you mean {word!r}?" if word else None,
        )
    from mace.calculators.foundations_models import download_mace_mp_checkpoint  # noqa: PLC0415

    try:
        with contextlib.redirect_stdout(sys.stderr):
            return Path(download_mace_mp_checkpoint(name))
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"the foundation model {name!r} is not in the cache and cannot be downloaded ({error})",
            fix=f"Download {urls[name]} on a connected machine and put it at {cached_path(name)} "
            "(XDG_CACHE_HOME moves the cache), or give the path of the file in place of its name.",
        ) from error


def foundation_urls() -> dict[str, str]:
    """Return where every foundation model that mace-torch knows is downloaded from, by name."""
    import mlip_refine.potential.quiet_mace  # noqa: F401, PLC0415 - before the rest of mace

    # isort: split
    from mace.calculators.foundations_models import mace_mp_urls  # noqa: PLC0415

    return dict(mace_mp_urls)


def cached_path(name: str) -> Path:
    """Return where mace-torch keeps a foundation model.

    Args:
        name: A name that `resolve_model` knows as a foundation model.
    """
    from mace.tools.utils import get_cache_dir  # noqa: PLC0415

    file = os.path.basename(foundation_urls()[name])  # noqa: PTH119 - of a URL
    return Path(get_cache_dir()) / "".join(c for c in file if c.isalnum() or c == "_")
