"""The folder of a run: made, refused, or resumed."""

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlip_refine.config import Config, dump_config, load_config
from mlip_refine.errors import InputError
from mlip_refine.files import write_text

PACKAGES = ("mlip-refine", "torch", "mace-torch", "torch-sim-atomistic", "ase", "numpy")
"""What the numbers of a run depend on."""

LAYOUT = """{folder}
├── config.yaml       the config with every default
├── log.jsonl         one line per update
├── checkpoints/      what --resume starts from
├── frames/           sampled frames (HDF5)
├── {name}.model        the refined MACE checkpoint
├── {name}.safetensors  the same without pickle, with {name}.json
├── summary.json      what changed, with errors
└── *.png             figures"""


def packages() -> dict[str, str]:
    """Return the versions of what the numbers of a run depend on."""
    return {name: version(name) for name in PACKAGES}


def open_run_folder(config: Config, *, resume: bool, growing: tuple[str, ...] = ()) -> Path:
    """Make the folder of a run, or go on in one.

    Args:
        config: Names the folder.
        resume: Whether a run that is there is continued; without one, a run is started.
        growing: Keys that may become larger in this kind of run, beside those of `GROWING`.

    Raises:
        InputError: If the folder exists and is not to be resumed, holds a run of another config, or cannot be
            written. Nothing is overwritten.
    """
    folder = config.run_folder
    if (folder / "config.yaml").exists():
        if not resume:
            raise InputError(
                "the run folder exists",
                where=str(folder),
                fix="Give the run another name, go on with --resume, or remove the folder.",
            )
        _require_same(config, folder, (*GROWING, *growing))
        write_text(folder / "config.yaml", dump_config(config))
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        problem = "the run folder exists and is not a run"
        raise InputError(problem, where=str(folder), fix="Choose another name.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, str(error)) from error
    if not os.access(folder, os.W_OK):
        raise _unwritable(folder, "no permission to write")
    write_text(folder / "config.yaml", dump_config(config))
    return folder


# What may differ when a run goes on: where to look and write, and when to stop.
RESUMABLE = (
    "base",
    "output",
    "free_energy.max_error",
    "md.dynamics",
    "md.export",
    "phonons.baseline",
    "training.steps",
    "training.tolerance",
    "training.patience",
    "training.checkpoint_every",
)

# What may only become larger, in every kind of run.
GROWING = ("md.duration",)


def _require_same(config: Config, folder: Path, growing: tuple[str, ...]) -> None:
    """Resuming under another config would mix two runs."""
    old, new = (_flat(c.model_dump()) for c in (load_config(folder / "config.yaml"), config))
    differs = {key for key in old | new if old.get(key) != new.get(key)}
    changed = sorted(key for key in differs if not key.startswith((*RESUMABLE, *growing)))
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
