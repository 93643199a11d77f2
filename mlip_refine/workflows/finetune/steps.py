"""One line per update: losses, ΔG, implied transition temperatures, effective sizes."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console

from mlip_refine.quantities import Measured
from mlip_refine.statistics import transition_temperature
from mlip_refine.workflows.finetune.records import Update

if TYPE_CHECKING:
    from mlip_refine.training.trainer import StepReport

HEADER_EVERY = 20
"""Updates between two headers."""

REFUSED = "-"

MOST_COLUMNS = 4
"""Of a loss, itself included; one that measures more shows the root mean square of its deviations."""

INDENT = " " * 6
"""Before the blocks that a narrow terminal puts on further lines: as wide as the step."""


@dataclass(frozen=True)
class Column:
    """A cell of an update with its heading."""

    title: str
    unit: str
    width: int
    text: str


@dataclass(frozen=True)
class Block:
    """Neighbouring columns under one heading."""

    title: str
    columns: tuple[Column, ...]

    @property
    def heading(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        """What the header says about the block."""
        return self.title, tuple((c.title, c.unit) for c in self.columns)

    @property
    def width(self) -> int:
        """Characters that every line of the block takes."""
        return max(len(self.title), len(self._line([c.text for c in self.columns])))

    def lines(self) -> tuple[str, str, str, str]:
        """Block title, column titles, units, values; all of one width."""
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
            self._header(blocks, list(report.n_eff))
            self._headings.append(heading)
        self._since_header += 1
        rows = [[block.lines()[3] for block in row] for row in self._rows(blocks)]
        lines = [(INDENT if i else "") + "  ".join(row) for i, row in enumerate(rows)]
        if report.resampled:
            tail = "resampled " + ", ".join(report.resampled)
            fits = self._fits(len(lines[-1]) + 2 + len(tail))
            lines = [*lines[:-1], f"{lines[-1]}  {tail}"] if fits else [*lines, INDENT + tail]
        for line in lines:
            self._print(line)

    def _header(self, blocks: list[Block], sources: list[str]) -> None:
        if sources:
            self._print("N_eff/N of " + ", ".join(f"{i} {name}" for i, name in enumerate(sources, 1)), "dim")
        for i, row in enumerate(self._rows(blocks)):
            for line in zip(*(block.lines()[:3] for block in row), strict=True):
                self._print(((INDENT if i else "") + "  ".join(line)).rstrip(), "bold")

    def _rows(self, blocks: list[Block]) -> list[list[Block]]:
        """The blocks of every line of the terminal."""
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


def number(measured: Measured | None) -> str:
    """A value with its error and without its unit; a dash for one that is refused."""
    return REFUSED if measured is None else str(measured).removesuffix(measured.unit).rstrip()


def _blocks(report: "StepReport | Update") -> list[Block]:
    losses = dict(report.losses)
    total = losses.pop("total", float("nan"))
    blocks = [Block("", (Column("step", "", 4, str(report.step)), _loss("total", total)))]
    for name, measured in report.diagnostics.items():
        blocks.append(Block(name, _loss_columns(losses.pop(name, None), measured)))
    blocks += _component_blocks(losses)
    if report.n_eff:
        sizes = (Column(str(i), "%", 3, f"{100 * x:.0f}") for i, x in enumerate(report.n_eff.values(), 1))
        blocks.append(Block("N_eff/N", tuple(sizes)))
    return blocks


def _loss_columns(loss: float | None, measured: Mapping[str, Measured]) -> tuple[Column, ...]:
    """A loss and what it measured; where that is much, how far it is from its targets in all.

    A loss with many targets is the mean of their squared deviations in σ.
    """
    columns = tuple(_measured_columns(measured))
    if loss is None:
        return columns
    if len(columns) >= MOST_COLUMNS:
        columns = (Column("r.m.s.", "sigma", 7, f"{math.sqrt(loss):.3g}"),)
    return _loss("loss", loss), *columns


def _measured_columns(measured: Mapping[str, Measured]) -> Iterator[Column]:
    """ΔG and T* of a loss that has them; else whatever it measured."""
    if "delta_g" not in measured:
        for name, value in measured.items():
            yield Column(name, value.unit, max(9, len(name), len(value.unit)), number(value))
        return
    yield Column("ΔG", measured["delta_g"].unit, 9, number(measured["delta_g"]))
    title = "T*" if "temperature" in measured else "T*-T"
    yield Column(title, "K", 9, number(implied_temperature(measured)))


def _component_blocks(components: Mapping[str, float]) -> Iterator[Block]:
    """Components that share the name before their last dot stand together: replay.energy, replay.forces."""
    for group, names in groupby(components, key=lambda name: name.rpartition(".")[0]):
        yield Block(group, tuple(_loss(name.rpartition(".")[2], components[name]) for name in names))


def _loss(title: str, value: float) -> Column:
    return Column(title, "", max(7, len(title)), f"{value:.3g}")
