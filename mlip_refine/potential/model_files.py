"""From the name that a config gives to the model file: embedded, a path, or a MACE foundation model.

mace, which has the list of foundation models, is imported only for names that are none of the other two.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches
from importlib.resources import files
from pathlib import Path

from mlip_refine.errors import InputError, nearest
from mlip_refine.files import user_path

EMBEDDED = ("titanium-compact", "titanium-compact-2")
"""Checkpoints that come with the package."""

_SUFFIXES = (".model", ".safetensors", ".pt", ".pth")

_SIZES = ("small", "medium", "large", "extra", "s", "m", "l")

_ORGANIC = {
    f"off-{size}": f"https://raw.githubusercontent.com/ACEsuit/mace-off/main/mace_off23/MACE-OFF23_{size}.model"
    for size in ("small", "medium", "large")
} | {
    "anicc": "https://github.com/ACEsuit/mace/raw/main/mace/calculators/foundations_models/"
    "ani500k_large_CC.model"
}
"""Where the models behind `mace_off` and `mace_anicc` are downloaded from; MACE keeps no list of them."""

_NOT_REFINED = {
    "polar": "mace.modules.extensions.PolarMACE",
    "omol": "mace.modules.embeddings.GenericJointEmbedding",
}
"""Beginnings of names of foundation models that are not refined, and a class of each that says why."""


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
    if re.match(r"\w+://", name):
        raise InputError(
            "this is a URL, and only foundation models are downloaded",
            where="model",
            found=name,
            expected="a path, or the name of a foundation model",
            fix="Download it and give the path of the file.",
        )
    urls = foundation_urls()
    if name not in urls and ("/" in name or name.endswith(_SUFFIXES)):
        folder = path.parent
        word = nearest(path.name, sorted(p.name for p in folder.iterdir()) if folder.is_dir() else [])
        raise InputError(
            "no such model file" if folder.is_dir() else "no such folder",
            where=str(path),
            fix=f"Did you mean {word!r}?" if word else None,
        )
    family = chemistry(name)
    for beginning, part in _NOT_REFINED.items():
        if family.startswith(beginning):
            from mlip_refine.potential.checkpoints.kinds import unsupported  # noqa: PLC0415

            raise unsupported(part, name) or InputError("not refined", where=name)
    if name not in urls:
        known = [*EMBEDDED, *urls]
        word = nearest_model(name, known)
        raise InputError(
            f"unknown model {name!r}, and no file of that name in {path.parent}",
            where="model",
            expected=f"a path, or one of {', '.join(known)}",
            fix=f"Did you mean {word!r}?" if word else None,
        )
    return cached_path(name) if cached_path(name).is_file() else _downloaded(name, urls[name])


def _downloaded(name: str, url: str) -> Path:
    from mace.calculators.foundations_models import download_mace_mp_checkpoint  # noqa: PLC0415

    try:
        with contextlib.redirect_stdout(sys.stderr):
            if name.startswith("off-"):
                print("MACE-OFF is under the Academic Software License: https://github.com/gabor1/ASL")  # noqa: T201
            return Path(download_mace_mp_checkpoint(url))
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"the foundation model {name!r} is not in the cache and cannot be downloaded ({error})",
            fix=f"Download {url} on a connected machine and put it at {cached_path(name)} "
            "(XDG_CACHE_HOME moves the cache), or give the path of the file as potential.model.",
        ) from error


def chemistry(name: str) -> str:
    """Return what the name of a foundation model says beside its size: `mpa0` of `medium-mpa-0`."""
    return "".join(word for word in _words(name) if not get_close_matches(word, _SIZES, n=1, cutoff=0.8))


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word not in ("", "mace")]


def nearest_model(name: str, known: Iterable[str]) -> str | None:
    """Return the known model that a misspelt name means, of the same chemistry; None where there is none.

    A model of other data is no correction of a name: energies of `off` and `omat` have nothing in common.
    """
    wanted = chemistry(name)
    alike = [k for k in known if SequenceMatcher(None, wanted, chemistry(k)).ratio() >= 0.75]
    sorted_words = {" ".join(sorted(_words(k))): k for k in alike}
    word = nearest(" ".join(sorted(_words(name))), sorted_words)
    return sorted_words[word] if word else (alike[0] if len(alike) == 1 else None)


def foundation_urls() -> dict[str, str]:
    """Return where every foundation model that mace-torch knows is downloaded from, by name.

    Names are those of `mace_mp`, those of `mace_off` (the same) after `off-`, and `anicc`. Kinds that are not
    refined are left out.
    """
    import mlip_refine.potential.quiet_mace  # noqa: F401, PLC0415 - before the rest of mace

    # isort: split
    from mace.calculators.foundations_models import mace_mp_urls  # noqa: PLC0415

    return dict(mace_mp_urls) | _ORGANIC


def cached_path(name: str) -> Path:
    """Return where mace-torch keeps a foundation model.

    Args:
        name: A name that `resolve_model` knows as a foundation model.
    """
    from mace.tools.utils import get_cache_dir  # noqa: PLC0415

    file = os.path.basename(foundation_urls()[name])  # noqa: PTH119 - of a URL
    kept = Path(get_cache_dir()) / file  # as mace_off does
    simple = Path(get_cache_dir()) / "".join(c for c in file if c.isalnum() or c == "_")  # as mace_mp does
    return kept if kept.is_file() else simple
