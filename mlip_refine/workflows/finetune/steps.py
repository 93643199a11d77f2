"""One line per update: losses, ΔG, implied transition temperatures, effective sizes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console

from mlip_refine.quantities import Measured
from mlip_refine.report.tables import number
from mlip_refine.statistics import transition_temperature
from mlip_refine.workflows.finetune.records import Update

if TYPE_CHECKING:
    from mlip_refine.training.trainer import StepReport

HEADER_EVERY = 20
"""Updates between two headers."""

MOST_COLUMNS = 4
"""Most columns of a loss: one that measures more shows the root mean square of its deviations."""

INDENT = " " * 6
"""Indent of the further lines of an update in a narrow terminal: as wide as the step."""


@dataclass(frozen=True)
class StepColumn:
    """One column of the line of an update.

    Attributes:
        title: Heading.
        unit: Unit, below the heading.
        width: Least width in characters.
        text: Value.
    """

    title: str
    unit: str
    width: int
    text: str


@dataclass(frozen=True)
class Block:
    """Neighbouring columns under one heading."""

    title: str
    columns: tuple[StepColumn, ...]

    @property
    def heading(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        """Titles and units, which decide whether a new header is needed."""
        return self.title, tuple((c.title, c.unit) for c in self.columns)

    @property
    def width(self) -> int:
        """Width of every line of the block, in characters."""
        return max(len(self.title), len(self._line([c.text for c in self.columns])))

    def lines(self) -> tuple[str, str, str, str]:
        """Return the block title, column titles, units and values, all of one width."""
        cells = zip(*((c.title, c.unit, c.text) for c in self.columns), strict=True)
        titles, units, values = (self._line(list(line)).rjust(self.width) for line in cells)
        return self.title.center(self.width), titles, units, values

    def _line(self, cells: list[str]) -> str:
        return " ".join(cell.rjust(column.width) for cell, column in zip(cells, self.columns, strict=True))


class StepPrinter:
    """Prints a line for every update, and a header with units now and then.

    In a terminal narrower than the line, whole blocks go to the next line; elsewhere a line stays one line.
    """

    def __init__(self, console: Console) -> None:
        """Print to a console of rich."""
        self._console = console
        self._since_header = 0
        self._headings: list[object] = []

    def __call__(self, report: "StepReport | Update") -> None:
        """Print one update."""
        blocks = _blocks(report)
        heading = ([b.heading for b in blocks], list(report.n_eff))
        if self._since_header >= HEADER_EVERY:
            self._headings, self._since_header = [], 0
        # Under a schedule, updates of different losses take turns: each kind has its header once.
        if heading not in self._headings:
            if report.n_eff:
                sources = ", ".join(f"{i} {name}" for i, name in enumerate(report.n_eff, 1))
                self._print(f"N_eff/N of {sources}", "dim")
            for i, row in enumerate(self._rows(blocks)):
                for line in zip(*(block.lines()[:3] for block in row), strict=True):
                    self._print(((INDENT if i else "") + "  ".join(line)).rstrip(), "bold")
            self._headings.append(heading)
        self._since_header += 1
        values = [[block.lines()[3] for block in row] for row in self._rows(blocks)]
        lines = [(INDENT if i else "") + "  ".join(row) for i, row in enumerate(values)]
        if report.resampled:
            tail = "resampled " + ", ".join(report.resampled)
            fits = self._fits(len(lines[-1]) + 2 + len(tail))
            lines = [*lines[:-1], f"{lines[-1]}  {tail}"] if fits else [*lines, INDENT + tail]
        for line in lines:
            self._print(line)

    def _rows(self, blocks: list[Block]) -> list[list[Block]]:
        """Return the blocks of each line of the terminal."""
        rows, used = [blocks[:1]], blocks[0].width
        for block in blocks[1:]:
            if not self._fits(used + 2 + block.width):
                rows.append([])
                used = len(INDENT) - 2
            rows[-1].append(block)
            used += 2 + block.width
        return rows

    def _fits(self, width: int) -> bool:
        return width <= self._console.width or not self._console.is_terminal

    def _print(self, line: str, style: str | None = None) -> None:
        self._console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def implied_temperature(measured: Mapping[str, Measured]) -> Measured | None:
    """Return the transition temperature in K that ΔG and ΔS of a loss imply, or `None` where it is refused.

    Args:
        measured: Diagnostics of a loss: `delta_g` (meV/atom), `delta_s` (meV/atom/K) and `temperature` (K),
            where ΔG holds. Without the last, the result is the distance T* - T.
    """
    delta_g, delta_s, at = (measured.get(name) for name in ("delta_g", "delta_s", "temperature"))
    if delta_g is None or delta_s is None:
        return None
    return transition_temperature(at.value if at else None, delta_g, delta_s)[0]


def _blocks(report: "StepReport | Update") -> list[Block]:
    losses = dict(report.losses)
    total = losses.pop("total", float("nan"))
    blocks = [Block("", (StepColumn("step", "", 4, str(report.step)), _loss("total", total)))]
    for name, measured in report.diagnostics.items():
        if "delta_g" in measured:
            delta_g, title = measured["delta_g"], "T*" if "temperature" in measured else "T*-T"
            columns = [
                StepColumn("ΔG", delta_g.unit, 9, number(delta_g)),
                StepColumn(title, "K", 9, number(implied_temperature(measured))),
            ]
        else:
            columns = [
                StepColumn(key, value.unit, max(9, len(key), len(value.unit)), number(value))
                for key, value in measured.items()
            ]
        loss = losses.pop(name, None)
        if loss is not None:
            # A loss with many targets is the mean of their squared deviations in σ.
            if len(columns) >= MOST_COLUMNS:
                columns = [StepColumn("r.m.s.", "sigma", 7, f"{math.sqrt(loss):.3g}")]
            columns = [_loss("loss", loss), *columns]
        blocks.append(Block(name, tuple(columns)))
    # Components that share the name before their last dot stand together: replay.energy, replay.forces.
    for group, names in groupby(losses, key=lambda name: name.rpartition(".")[0]):
        blocks.append(Block(group, tuple(_loss(name.rpartition(".")[2], losses[name]) for name in names)))
    if report.n_eff:
        sizes = (StepColumn(str(i), "%", 3, f"{100 * x:.0f}") for i, x in enumerate(report.n_eff.values(), 1))
        blocks.append(Block("N_eff/N", tuple(sizes)))
    return blocks


def _loss(title: str, value: float) -> StepColumn:
    return StepColumn(title, "", max(7, len(title)), f"{value:.3g}")
