"""What a bench prints and writes: numbers with errors, goals, and whether they are met."""

import json
import math

import pytest
from rich.console import Console

from mlip_refine.quantities import Measured
from mlip_refine.workflows.bench.records import (
    GOALS,
    BenchResult,
    Comparison,
    Goal,
    Machine,
    Outcome,
    Topic,
)
from mlip_refine.workflows.bench.tables import print_bench

MACHINE = Machine(
    processor="A CPU [4.0]",
    cores=2,
    threads=1,
    load=0.25,
    device="cpu",
    python="3.12.1",
    torch="2.11",
    mace="0.3.16",
    dtype="float32",
)


def _outcome(ratio: float, ran: str = "none") -> Outcome:
    return Outcome(
        ours=Measured(7901.2, 41.0, "atom·steps/s"),
        reference=Measured(8642.0, 38.0, "atom·steps/s"),
        ratio=Measured(ratio, 0.006, ""),
        details={"edges": 5852},
        ran=ran,
    )


def _row(topic: Topic, model: str, workload: str, accelerate: str = "none", **found: object) -> Comparison:
    return Comparison(topic=topic, model=model, workload=workload, accelerate=accelerate, **found)


ROWS = [
    _row(Topic.ENGINE, "small", "4 x 54, NVT", outcome=_outcome(1.096)),
    _row(
        Topic.ENGINE,
        "small",
        "8 x 128, NVT",
        "compile",
        outcome=_outcome(1.031, "compile"),
    ),
    _row(Topic.ENGINE, "small", "8 x 128, NPT", "cueq", outcome=_outcome(1.031)),
    _row(Topic.ENGINE, "large", "925 x 54, NVT", "cueq", failure="out of memory"),
    _row(Topic.ASE, "small", "16 x 54, NVT", outcome=_outcome(2.31)),
    _row(
        Topic.MEMORY,
        "small",
        "2000 and 200 frames",
        outcome=Outcome(
            ours=Measured(1350.0, math.nan, "MiB"),
            reference=Measured(1295.0, math.nan, "MiB"),
            ratio=Measured(1.0425, math.nan, ""),
        ),
    ),
]


@pytest.fixture
def printed() -> list[str]:
    console = Console(width=120, highlight=False)
    with console.capture() as capture:
        print_bench(console, BenchResult(machine=MACHINE, rows=ROWS))
    return capture.get().splitlines()


def _line(printed: list[str], start: str) -> list[str]:
    (line,) = (line for line in printed if line.strip().startswith(start))
    return line.split()


def test_rows_show_numbers_with_errors_goals_and_verdicts(printed):
    assert _line(printed, "small: 4 x 54, NVT")[5:] == [
        "7901(41)",
        "8642(38)",
        "1.0960(60)",
        "≤",
        "1.05",
        "missed",
    ]
    assert _line(printed, "small: 8 x 128, NVT, compile")[-3:] == ["≤", "1.05", "met"]
    assert _line(printed, "small: 8 x 128, NPT, cueq (ran: none)")[-3:] == ["≤", "1.05", "met"]
    assert _line(printed, "small: 16 x 54, NVT")[-4:] == ["2.3100(60)", "≥", "2.25", "met"]


def test_a_number_read_once_has_no_error(printed):
    assert _line(printed, "small: 2000 and 200 frames")[-6:] == ["1350", "1295", "1.042", "≤", "1.05", "met"]


def test_a_row_without_numbers_says_why(printed):
    assert _line(printed, "large: 925 x 54, NVT, cueq")[-3:] == ["out", "of", "memory"]


def test_topics_units_machine_and_the_count_of_goals(printed):
    text = "\n".join(printed)
    assert "A CPU [4.0], 2 cores, 1 threads; load average before the start 0.25" in text
    assert "device cpu, float32\ntorch 2.11, mace 0.3.16, Python 3.12.1\n" in text
    assert "engine step against the bare model, atom·steps/s" in text
    assert "peak memory of the streamed gradient, MiB" in text
    assert printed[-1] == "goals: 4 met, 1 missed, 1 rows without numbers"


def test_the_model_is_named_once_if_there_is_one():
    console = Console(width=120, highlight=False)
    with console.capture() as capture:
        print_bench(console, BenchResult(machine=MACHINE, rows=ROWS[:2]))
    assert capture.get().count("small") == 1
    assert "goals: 1 met, 1 missed\n" in capture.get()


def test_json_holds_the_same_numbers_goals_and_a_version():
    data = json.loads(json.dumps(BenchResult(machine=MACHINE, rows=ROWS).as_json(), allow_nan=False))
    assert (data["format"], data["version"]) == ("mlip-refine bench", 1)
    assert data["machine"]["threads"] == 1
    first, _, _, failed, *_, memory = data["rows"]
    assert first["outcome"]["ratio"] == {"value": 1.096, "se": 0.006, "unit": ""}
    assert first["goal"] == {"relation": "at most", "limit": 1.05}
    assert [row["met"] for row in data["rows"]] == [False, True, True, None, True, True]
    assert (failed["outcome"], failed["failure"]) == (None, "out of memory")
    assert memory["outcome"]["ratio"]["se"] is None


def test_goals_hold_at_their_limits():
    assert Goal(relation="at most", limit=1.05).met(1.05)
    assert not Goal(relation="at most", limit=1.05).met(1.0501)
    assert Goal(relation="at least", limit=2.25).met(2.25)
    assert not Goal(relation="at least", limit=2.25).met(2.2499)
    assert {topic: str(goal) for topic, goal in GOALS.items()} == {
        Topic.ENGINE: "≤ 1.05",
        Topic.ASE: "≥ 2.25",
        Topic.GRADIENT: "≤ 1.10",
        Topic.MEMORY: "≤ 1.05",
    }
