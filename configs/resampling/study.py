"""Molecular dynamics that a free-energy matching run needs until its targets are met: schemes side by side.

    python configs/resampling/study.py run FOLDER SCHEME SEED [KEY=VALUE]...
    python configs/resampling/study.py table FOLDER

A run ends when every ΔG of the log is within `WITHIN` of its target in `IN_A_ROW` updates, and goes on where
it was if it was interrupted. All schemes of a seed start from the same frames.
"""

import json
import math
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from mlip_refine import finetune, load_config
from mlip_refine.training.trainer import StepReport
from mlip_refine.workflows.finetune.records import read_log

CONFIG = Path(__file__).with_name("resampling.yaml")
WITHIN, IN_A_ROW = 0.5, 3
SCHEMES = {
    "plain": {
        "sampling.n_eff_threshold": 0.9,
        "sampling.max_references": 1,
        "training.trust_region": False,
    },
    "multistate": {"sampling.n_eff_threshold": 0.9},
    "default": {},
}


class Reached(Exception):  # noqa: N818
    """The targets are met: the run may end."""


def run(folder: Path, scheme: str, seed: int, overrides: list[str]) -> None:
    """Run a scheme with a seed until its targets are met."""
    words = [f"{key}={json.dumps(value)}" for key, value in SCHEMES[scheme].items()]
    words += [f"name={scheme}-{seed}", f"seed={seed}", f"output.folder={folder}", *overrides]
    config = load_config(CONFIG, words)

    def report(update: StepReport) -> None:
        measured = " ".join(str(d["delta_g"]) for d in update.diagnostics.values() if "delta_g" in d)
        sizes = " ".join(
            f"{n:.2f}/{k}" for n, k in zip(update.n_eff.values(), update.references.values(), strict=True)
        )
        alpha = math.nan if update.alpha is None else update.alpha
        print(f"{update.step:3d} {measured}  {sizes}  {alpha:.2f} {update.md_steps / 1e6:.3f}", flush=True)
        if reached(config.run_folder) is not None:
            raise Reached(f"{scheme}-{seed}: reached after update {update.step}")

    def opened(own: Path) -> None:
        _share_first_frames(folder, own, seed)

    try:
        finetune(config, resume=True, report=report, opened=opened)
    except Reached as end:
        print(end)


def _share_first_frames(folder: Path, own: Path, seed: int) -> None:
    """Take the first frames of another scheme with this seed, if there are any; they count all the same."""
    for path in folder.glob(f"*-{seed}/frames/initial.*.h5"):
        target = own / "frames" / path.name
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def reached(folder: Path) -> int | None:
    """The update of a run that ends the first row of updates with every ΔG close to its target."""
    losses = load_config(folder / "config.yaml").losses
    targets = {str(loss["name"]): float(loss.get("target", 0.0)) for loss in losses if "name" in loss}
    row = 0
    for update in read_log(folder):
        found = {name: d["delta_g"].value for name, d in update.diagnostics.items() if "delta_g" in d}
        row = row + 1 if all(abs(found[name] - targets[name]) <= WITHIN for name in found) else 0
        if row == IN_A_ROW:
            return update.step
    return None


def table(folder: Path) -> None:
    """One line per run, and the ratio of the means to the plain scheme."""
    spent: dict[str, list[float]] = {}
    for path in sorted(folder.glob("*/log.jsonl")):
        scheme = path.parent.name.rpartition("-")[0]
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        end = reached(path.parent)
        last = lines[-1 if end is None else end]
        spent.setdefault(scheme, []).append(last["md_steps"] / 1e6 if end is not None else math.inf)
        found = "  ".join(_delta_g(d["delta_g"]) for d in last["diagnostics"].values() if "delta_g" in d)
        redrawn = sum(len(line["resampled"]) for line in lines[: last["step"] + 1])
        state = "not reached" if end is None else f"update {end:2d}"
        print(f"{path.parent.name:14s} {state}  {last['md_steps'] / 1e6:6.3f}  {redrawn:2d} redrawn  {found}")
    for scheme, values in spent.items():
        mean = statistics.mean(values)
        print(
            f"{scheme}: {mean:.3f} million atom steps, {mean / statistics.mean(spent['plain']):.2f} of plain"
        )


def _delta_g(measured: dict[str, Any]) -> str:
    return f"{measured['value']:+.2f} ± {measured['se']:.2f}"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", folder, scheme, seed, *overrides]:
            run(Path(folder), scheme, int(seed), overrides)
        case ["table", folder]:
            table(Path(folder))
        case _:
            sys.exit(__doc__)
