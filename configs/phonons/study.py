"""The study of phonon fine-tuning: its frames, its tables, its curves.

    python configs/phonons/study.py frames DISTILLED INDEX FOLDER
    python configs/phonons/study.py tables OUTPUT BASE NAME=PHONONS...
    python configs/phonons/study.py curves OUTPUT NAME=RUN[,RUN...]...
    python configs/phonons/study.py part INDEX COUNT OUTPUT
    python configs/phonons/study.py learning OUTPUT BASE SERIES:COUNT=PHONONS,RUN...

`frames` writes train.extxyz and valid.extxyz into FOLDER from the labelled frames in DISTILLED, without the
materials that INDEX keeps for the test or has in the benchmark of thermal conductivity, and without frames
far from rest. `tables` compares runs of `mlip-refine phonons` on the same materials with BASE: results.md and
results.json in OUTPUT. `curves` draws the validation error of runs of `mlip-refine finetune` against updates,
which cost the same whatever the probe is, and tells when the mean of each kind reaches the last value of the
first. `part` writes an index with only COUNT of the stable materials to train on, beside all others; smaller
parts are within larger ones. `learning` draws what was gained by runs of `mlip-refine finetune` on COUNT
materials, and how well they have the Hessians of the validation part.
"""

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from ase.io import read, write

from mlip_refine.workflows.finetune.records import read_log, read_summary
from mlip_refine.workflows.phonons.records import (
    QUANTITIES,
    PhononResult,
    mean_absolute_error,
    read_phonons_json,
    reduction,
)

LARGEST_FORCE = 12.0
"""Of a frame, eV/Å."""

LOWEST_FREQUENCY = -0.1
"""THz: a material with a lower one is unstable."""

VALIDATION = "validation, relative error"
"""What `phonon_hvp` calls it."""

LARGEST_STRESS = 0.25
"""Largest component of a frame, eV/Å³."""


def frames(distilled: Path, index: Path, folder: Path) -> None:
    """Write the frames that base and replay are trained on."""
    with index.open(newline="") as stream:
        rows = {row["mpid"]: row for row in csv.DictReader(stream)}
    known: set[int] = set()
    for source, target in (("train", "train"), ("val", "valid")):
        kept = [a for a in read(distilled / f"mini_{source}.extxyz.gz", ":") if usable(a, rows, source)]
        known = known or {int(z) for a in kept for z in a.numbers}
        kept = [a for a in kept if known.issuperset(a.numbers.tolist())]
        write(folder / f"{target}.extxyz", kept)
        print(f"{target}: {len(kept)} frames, {sum(map(len, kept))} atoms")
    print(f"{len(known)} elements")


def usable(atoms: Any, rows: dict[str, dict[str, str]], split: str) -> bool:
    """Whether a frame is of its part and of nothing that is kept, and not far from rest."""
    row = rows[atoms.info["mp_id"]]
    near = np.abs(atoms.arrays["REF_forces"]).max() < LARGEST_FORCE
    near &= np.abs(np.ravel(atoms.info["REF_stress"])).max() < LARGEST_STRESS
    return bool(near and row["in_kappa103"] == "0" and row["pft_split"] == split)


def tables(output: Path, base: PhononResult, others: dict[str, PhononResult]) -> None:
    """Write errors and reductions of all potentials, in every kind of cell."""
    output.mkdir(parents=True, exist_ok=True)
    document, lines = {}, []
    for cell in base.cells:
        results = {"base": base, **others}
        document[cell] = {name: row(base, result, cell) for name, result in results.items()}
        lines += [
            f"### {cell} cells, {len(base.compared(cell))} materials",
            "",
            *markdown(document[cell]),
            "",
        ]
    (output / "results.json").write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    (output / "results.md").write_text("\n".join(lines))
    print("\n".join(lines))


def row(base: PhononResult, result: PhononResult, cell: str) -> dict[str, Any]:
    """What is known of one potential in one kind of cell."""
    points = result.compared(cell)
    errors = {q.symbol: mean_absolute_error(points, q) for q in QUANTITIES}
    frequency = [p.frequency_error_THz for p in points if p.frequency_error_THz is not None]
    found: dict[str, Any] = {
        "errors": {name: {"value": e.value, "se": e.se, "unit": e.unit} for name, e in errors.items()},
        "frequencies_THz": float(np.mean(frequency)),
        "with_imaginary_modes": sum(p.properties["imaginary"] > 0 for p in points),
        "materials": len(points),
        "left_out": len(result.left_out),
    }
    if result is not base:
        reduced, n = reduction(base, result, cell)
        found["reduction"] = {
            "value": reduced.value,
            "low": reduced.low,
            "high": reduced.high,
            "materials": n,
        }
    return found


def markdown(rows: dict[str, dict[str, Any]]) -> list[str]:
    """A table of potentials."""
    heads = [f"{q.symbol}, {q.unit}" for q in QUANTITIES]
    lines = [
        "| potential | " + " | ".join(heads) + " | ω, THz | imaginary | smaller by (95 %) |",
        "|---|" + "---|" * (len(heads) + 3),
    ]
    for name, found in rows.items():
        errors = [f"{e['value']:.3g} ± {e['se']:.2g}" for e in found["errors"].values()]
        reduced = found.get("reduction")
        text = "" if reduced is None else interval(reduced)
        imaginary = f"{found['with_imaginary_modes']} of {found['materials']}"
        lines.append(
            f"| {name} | {' | '.join(errors)} | {found['frequencies_THz']:.3g} | {imaginary} | {text} |"
        )
    return lines


def interval(reduced: dict[str, float]) -> str:
    """A reduction in words."""
    value, low, high = (100 * reduced[key] for key in ("value", "low", "high"))
    return f"{value:.0f} % ({low:.0f} to {high:.0f})"


def curves(output: Path, runs: dict[str, list[Path]]) -> None:
    """Draw and write the validation error of runs, several seeds of each kind."""
    output.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    document: dict[str, Any] = {}
    for k, (name, folders) in enumerate(runs.items()):
        found = [validation(folder) for folder in folders]
        for number, (updates, errors) in enumerate(found):
            axes.plot(updates, errors, color=f"C{k}", label=name if number == 0 else None, linewidth=1.2)
        updates, last = found[0][0], [errors[-1] for _, errors in found]
        document[name] = {"runs": found}
        spread = np.std(last, ddof=1) / len(last) ** 0.5 if len(last) > 1 else float("nan")
        print(f"{name}: {np.mean(last):.2f}({spread:.2f}) % at update {updates[-1]}")
    wanted = np.mean([errors[-1] for _, errors in next(iter(document.values()))["runs"]])
    for name, found in document.items():
        updates, errors = found["runs"][0][0], np.mean([e for _, e in found["runs"]], axis=0)
        found["reached"] = reached = first_below(updates, errors, float(wanted))
        print(f"{name}: {wanted:.2f} % " + ("never" if reached is None else f"at update {reached:.0f}"))
    axes.set_xlabel("update")
    axes.set_ylabel("relative error of validation Hessians, %")
    axes.legend(frameon=False)
    figure.savefig(output / "curves.png", dpi=200)
    (output / "curves.json").write_text(json.dumps(document, indent=1) + "\n")


def first_below(updates: Sequence[int], errors: Sequence[float], wanted: float) -> float | None:
    """Where a curve of straight pieces first is at or below a value; None: nowhere."""
    for k, error in enumerate(errors):
        if error <= wanted:
            if k == 0:
                return float(updates[0])
            part = (errors[k - 1] - wanted) / (errors[k - 1] - error)
            return updates[k - 1] + part * (updates[k] - updates[k - 1])
    return None


def validation(folder: Path) -> tuple[list[int], list[float]]:
    """Updates and validation errors, %, of a run."""
    found = [
        (update.step, measured[VALIDATION].value)
        for update in read_log(folder)
        for measured in update.diagnostics.values()
        if VALIDATION in measured
    ]
    return [step for step, _ in found], [error for _, error in found]


def part(index: Path, count: int, output: Path) -> None:
    """Write an index with fewer materials to train on; paths are as seen from OUTPUT's folder."""
    with index.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    trained = [row for row in rows if trainable(row)]
    order = np.random.default_rng(0).permutation(len(trained))
    dropped = {trained[i]["mpid"] for i in order[count:]}
    with output.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        for row in rows:
            if row["mpid"] not in dropped:
                writer.writerow({**row, "file": str(index.parent.relative_to(output.parent) / row["file"])})
    print(f"{len(trained) - len(dropped)} of {len(trained)}")


def trainable(row: dict[str, str]) -> bool:
    """Whether a material is stable and of the training part."""
    kept = row["in_kappa103"] == "0" and row["pft_split"] == "train"
    return kept and float(row["wmin_THz"]) > LOWEST_FREQUENCY


def learning(output: Path, base: PhononResult, series: dict[str, dict[int, tuple[Path, Path]]]) -> None:
    """Draw and write, against the number of materials that were trained on, what was gained.

    Args:
        output: Folder of figure and numbers.
        base: The test before.
        series: By name and number of materials: the test after, and the run that led there.
    """
    output.mkdir(parents=True, exist_ok=True)
    document = {
        name: {n: learned(base, read_phonons_json(after), run) for n, (after, run) in sorted(points.items())}
        for name, points in series.items()
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.6), layout="constrained")
    for name, points in document.items():
        counts, found = list(points), list(points.values())
        gained = np.array([[100 * f["reduction"][key] for key in ("value", "low", "high")] for f in found]).T
        spread = [gained[0] - gained[1], gained[2] - gained[0]]
        left.errorbar(counts, gained[0], spread, marker="o", capsize=3, linewidth=1.2, label=name)
        values, errors = np.array([[f["hessian"]["value"], f["hessian"]["se"]] for f in found]).T
        right.errorbar(counts, values, errors, marker="o", capsize=3, linewidth=1.2, label=name)
    left.axhline(0, color="0.6", linewidth=0.8)
    left.set_ylabel("errors of the test smaller by, %")
    right.axhline(first_validation(series), color="0.6", linewidth=0.8)
    right.set_ylabel("error of validation Hessians, %")
    counts = sorted({n for points in document.values() for n in points})
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(counts, [str(count) for count in counts], minor=False)
        axes.minorticks_off()
        axes.set_xlabel("materials that were trained on")
    right.legend(frameon=False)
    figure.savefig(output / "learning.png", dpi=200)
    (output / "learning.json").write_text(json.dumps(document, indent=1) + "\n")
    for name, points in document.items():
        for n, found in points.items():
            hessian = "{value:.1f}({se:.1f})".format(**found["hessian"])
            print(f"{name}, {n}: {interval(found['reduction'])}, Hessians {hessian} %")


def learned(base: PhononResult, after: PhononResult, run: Path) -> dict[str, Any]:
    """What a run gained on the test, the validation error that it ended with, and what replay says."""
    reduced, _ = reduction(base, after, "reference")
    summary = read_summary(run)
    (measured,) = (m for m in summary.measured.values() if VALIDATION in m)
    delivered = measured[VALIDATION].delivered
    before, behind = summary.replay.before, summary.replay.after
    parts = {"energy_mae_mev_per_atom": "energy", "forces_mae_mev_per_A": "forces"}
    return {
        "reduction": {"value": reduced.value, "low": reduced.low, "high": reduced.high},
        "hessian": {"value": delivered.value, "se": delivered.known_se},
        "replay": {key: getattr(behind, x).value / getattr(before, x).value - 1 for key, x in parts.items()},
    }


def first_validation(series: dict[str, dict[int, tuple[Path, Path]]]) -> float:
    """The validation error of the base, %."""
    _, run = next(iter(next(iter(series.values())).values()))
    return validation(run)[1][0]


def series_of(words: Sequence[str]) -> dict[str, dict[int, tuple[Path, Path]]]:
    """SERIES:COUNT=AFTER,RUN..."""
    found: dict[str, dict[int, tuple[Path, Path]]] = {}
    for key, paths in named(words).items():
        name, count = key.rsplit(":", 1)
        after, run = paths.split(",")
        found.setdefault(name.replace("_", " "), {})[int(count)] = (Path(after), Path(run))
    return found


def named(words: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE."""
    return dict(word.split("=", 1) for word in words)


def results(words: Sequence[str]) -> tuple[PhononResult, dict[str, PhononResult]]:
    """BASE NAME=PHONONS..."""
    others = {name: read_phonons_json(Path(path)) for name, path in named(words[1:]).items()}
    return read_phonons_json(Path(words[0])), others


def main(command: str, *words: str) -> None:
    """Run one of the commands."""
    if command == "frames":
        frames(*(Path(word) for word in words))
    elif command == "tables":
        tables(Path(words[0]), *results(words[1:]))
    elif command == "part":
        part(Path(words[0]), int(words[1]), Path(words[2]))
    elif command == "learning":
        learning(Path(words[0]), read_phonons_json(Path(words[1])), series_of(words[2:]))
    elif command == "curves":
        runs = {name: [Path(p) for p in paths.split(",")] for name, paths in named(words[1:]).items()}
        curves(Path(words[0]), runs)
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:])
