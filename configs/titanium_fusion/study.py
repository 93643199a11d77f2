"""The tables and the figure of the titanium study, from run folders of `elastic` and `finetune`.

    python configs/titanium_fusion/study.py FOLDER OUTPUT NAME=ELASTIC[,...][:FINETUNE[,...]]...

FOLDER holds the runs; ELASTIC is a run of `mlip-refine elastic configs/titanium_fusion/evaluate.yaml`, or
several that share its temperatures; FINETUNE the run that made its potential from the DFT model, or its
stages in order. Writes OUTPUT/results.md, results.json and elastic.png. Constants are the stress-strain
coefficients at the stress of the cell, which measurements show.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch

from mlip_refine.crystals.moduli import voigt_average
from mlip_refine.data import experimental_table
from mlip_refine.statistics import polynomial_fit
from mlip_refine.workflows.elastic.records import ThermalElasticPoint, read_thermal_elastic
from mlip_refine.workflows.finetune.records import HeldOutRecord, read_summary

TABLE = "titanium-hcp-elastic"
TRAINED = (23.0, 323.0, 623.0, 923.0)
CONSTANTS = ("C11", "C12", "C13", "C33", "C44")
MODULI = ("K", "G", "nu")


@dataclass
class Potential:
    """What is known of one potential."""

    name: str
    points: list[ThermalElasticPoint]
    errors: dict[str, HeldOutRecord] | None

    @property
    def temperatures(self) -> list[float]:
        return [p.temperature_K for p in self.points]

    def fitted(self, group: str, name: str) -> tuple[np.ndarray, np.ndarray, float]:
        """Values and errors of a quadratic in T through all temperatures, and χ² per degree of freedom.

        Where the quadratic misses by more than the errors, these grow to match.
        """
        found = [getattr(p, group)[name] for p in self.points]
        powers = range(min(3, len(found)))
        fit = polynomial_fit(self.temperatures, [m.value for m in found], [m.se for m in found], list(powers))
        chi = fit.chi_squared / max(1, fit.freedom)
        return fit.values.numpy(), fit.errors.numpy() * max(1.0, chi) ** 0.5, chi


def measured(temperature: float) -> dict[str, float]:
    """Constants, moduli and lattice that were measured."""
    table = experimental_table(TABLE)
    found = {n: table.target(n, temperature).value for n in (*CONSTANTS, "a", "c")}
    c = torch.zeros(6, 6, dtype=torch.float64)
    c[0, 0] = c[1, 1] = found["C11"]
    c[0, 1] = c[1, 0] = found["C12"]
    c[0, 2] = c[2, 0] = c[1, 2] = c[2, 1] = found["C13"]
    c[2, 2], c[3, 3], c[4, 4] = found["C33"], found["C44"], found["C44"]
    c[5, 5] = (found["C11"] - found["C12"]) / 2
    moduli = voigt_average(c)
    return found | {"K": float(moduli.bulk), "G": float(moduli.shear), "nu": float(moduli.poisson)}


def assess(potential: Potential) -> dict[str, Any]:
    """Deviations from the measurements at every temperature, after the quadratic fits."""
    rows = []
    fits = {n: potential.fitted("stress_strain", n) for n in CONSTANTS}
    fits |= {n: potential.fitted("moduli", n) for n in MODULI}
    for k, point in enumerate(potential.points):
        wanted = measured(point.temperature_K)
        row: dict[str, Any] = {
            "temperature_K": point.temperature_K,
            "trained": point.temperature_K in TRAINED,
        }
        for name, (values, errors, _) in fits.items():
            row[name] = {"value": values[k], "se": errors[k], "measured": wanted[name]}
        for axis, lattice in point.rest_lattice.items():
            row[axis] = {"value": lattice.value, "se": lattice.se, "measured": wanted[axis]}
        row["P"] = {"value": point.pressure.value, "se": point.pressure.se}
        rows.append(row)
    unseen = [r for r in rows if not r["trained"]]
    chi = {name: fit[2] for name, fit in fits.items()}
    return {
        "rows": rows,
        "chi_squared": chi,
        "unseen": summarise(unseen),
        "trained": summarise([r for r in rows if r["trained"]]),
    }


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Mean relative deviations of moduli, largest ones of constants and lattice; errors beside them."""
    if not rows:
        return None

    def relative(name: str) -> tuple[float, float]:
        deviations, errors = zip(*(_relative(r, name) for r in rows), strict=True)
        return float(np.mean(deviations)), float(np.mean(errors))

    worst = {n: max((abs(r[n]["value"] - r[n]["measured"]), r[n]["se"]) for r in rows) for n in CONSTANTS}
    moduli = {n: relative(n) for n in MODULI}
    lattice = {n: max(_relative(r, n) for r in rows) for n in "ac"}
    return {
        "moduli": moduli,
        "mean_moduli": float(np.mean([m[0] for m in moduli.values()])),
        "mean_moduli_se": float(np.mean([m[1] for m in moduli.values()])),
        "largest": worst,
        "lattice": lattice,
    }


def _relative(row: dict[str, Any], name: str) -> tuple[float, float]:
    """Deviation of a quantity and its error, both in units of what was measured."""
    found = row[name]
    return abs(found["value"] / found["measured"] - 1), found["se"] / found["measured"]


def markdown(results: dict[str, dict[str, Any]], potentials: Sequence[Potential]) -> str:
    """The tables."""
    lines = ["# Titanium: DFT and experiments together", ""]
    lines += [
        "| potential | temperatures | K | G | ν | mean | largest deviation of a constant, GPa | a | c |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for name, result in results.items():
        for group in ("trained", "unseen"):
            found = result[group]
            if found:
                percent = [f"{100 * v:.1f} ({100 * s:.1f})" for v, s in found["moduli"].values()]
                constant, (value, se) = max(found["largest"].items(), key=lambda item: item[1][0])
                lattice = [f"{100 * v:.2f} ({100 * s:.2f})" for v, s in found["lattice"].values()]
                mean = f"{100 * found['mean_moduli']:.1f} ({100 * found['mean_moduli_se']:.1f})"
                cells = [name, group, *percent, mean, f"{constant} {value:.1f} ({se:.1f})", *lattice]
                lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Deviations in %, standard errors in parentheses: of moduli the means, of a and c the largest.",
        "",
    ]
    lines += [
        "| potential | energy MAE, meV/atom | forces MAE, meV/Å | stress MAE, GPa |",
        "|---|---|---|---|",
    ]
    trained = [(p.name, p.errors) for p in potentials if p.errors]
    lines += [_errors("before", errors["before"]) for _, errors in trained[:1]]
    lines += [_errors(name, errors["after"]) for name, errors in trained]
    for name, result in results.items():
        lines += [
            "",
            f"## {name}",
            "",
            "| T, K | " + " | ".join((*CONSTANTS, *MODULI, "P, GPa", "a, Å", "c, Å")) + " |",
        ]
        lines += ["|" + "---|" * (len(CONSTANTS) + len(MODULI) + 4)]
        for row in result["rows"]:
            mark = "" if row["trained"] else " *"
            cells = [_cell(row[n], 1 if n != "nu" else 3) for n in (*CONSTANTS, *MODULI)]
            cells += [f"{row['P']['value']:.2f} ({row['P']['se']:.2f})"]
            cells += [_cell(row[n], 4) if n in row else "" for n in "ac"]
            lines.append(f"| {row['temperature_K']:g}{mark} | " + " | ".join(cells) + " |")
        lines += [
            "",
            "χ² per degree of freedom of the fits: "
            + ", ".join(f"{n} {x:.1f}" for n, x in result["chi_squared"].items()),
        ]
    return "\n".join(lines) + "\n"


def _errors(name: str, errors: HeldOutRecord) -> str:
    parts = (errors.energy.value, errors.forces.value, errors.stress.value)
    return f"| {name} | {parts[0]:.2f} | {parts[1]:.1f} | {parts[2]:.3f} |"


def _cell(entry: dict[str, float], digits: int) -> str:
    return f"{entry['value']:.{digits}f} ({entry['se']:.{digits}f}) / {entry['measured']:.{digits}f}"


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Constants over temperature: fits with bands, points and measurements."""
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.5), layout="constrained")
    table = experimental_table(TABLE)
    for axis, name in zip(axes.flat, (*CONSTANTS, "nu"), strict=True):
        if name in CONSTANTS:
            axis.plot(table.index.values, table[name].values, "k.", ms=4, label="measured")
        else:
            t = table.index.values
            axis.plot(t, [measured(x)["nu"] for x in t], "k.", ms=4, label="measured")
        for k, (label, result) in enumerate(results.items()):
            rows = result["rows"]
            t = [r["temperature_K"] for r in rows]
            values = [r[name]["value"] for r in rows]
            errors = [r[name]["se"] for r in rows]
            axis.errorbar(t, values, errors, marker="o", ms=3, lw=1, color=f"C{k}", label=label)
        axis.set(title="ν" if name == "nu" else f"{name}, GPa", xlabel="T, K")
    axes.flat[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(folder: Path, output: Path, words: Sequence[str]) -> None:
    """Write tables and figure."""
    potentials = []
    for word in words:
        name, _, runs = word.partition("=")
        elastic, _, finetune = runs.partition(":")
        found = [p for run in elastic.split(",") for p in read_thermal_elastic(folder / run)]
        points = sorted(found, key=lambda p: p.temperature_K)
        stages = [read_summary(folder / f).replay for f in finetune.split(",") if f]
        errors = {"before": stages[0].before, "after": stages[-1].after} if stages else None
        potentials.append(Potential(name, points, errors))
    results = {p.name: assess(p) for p in potentials}
    output.mkdir(parents=True, exist_ok=True)
    text = markdown(results, potentials)
    (output / "results.md").write_text(text)
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, output / "elastic.png")
    print(text)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
