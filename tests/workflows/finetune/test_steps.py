"""One line per update, complete at any width."""

import io
import re

import numpy as np
import pytest
from rich.console import Console

from mlip_refine.quantities import Measured
from mlip_refine.workflows.finetune.records import Update, read_log
from mlip_refine.workflows.finetune.steps import HEADER_EVERY, StepPrinter, implied_temperature


def printed(updates, width=80, **options):
    file = io.StringIO()
    printer = StepPrinter(Console(file=file, width=width, highlight=False, **options))
    for update in updates:
        printer(update)
    return file.getvalue().splitlines()


def test_an_update_is_one_line_with_everything(run_folder):
    lines = printed(read_log(run_folder))
    (first,) = (line for line in lines if re.match(r" +0 ", line))
    assert first.split() == ["0", "900", "882", "-8.91(23)", "-", "0.01", "1.5", "0.06", "100", "100"]
    (last,) = (line for line in lines if re.match(r" +2 ", line))
    assert "-2.97(23)" in last
    assert last.endswith("60  60  resampled bcc-1005K-5GPa")


def test_the_header_has_units_and_names(run_folder):
    header = printed(read_log(run_folder))[:4]
    assert header[0] == "N_eff/N of 1 bcc-1005K-5GPa, 2 hcp-1005K-5GPa"
    assert header[1].split() == ["hcp-bcc-5GPa", "replay", "N_eff/N"]
    assert " ".join(header[2].split()) == "step total loss ΔG T* energy forces stress 1 2"
    assert header[3].split() == ["meV/atom", "K", "%", "%"]


def test_the_header_comes_back_and_follows_new_columns(run_folder):
    first = read_log(run_folder)[0]
    lines = printed([first] * (HEADER_EVERY + 1))
    assert sum(line.startswith("step") for line in lines) == 2
    other = type(first)(1, {"total": 1.0}, {}, {}, ())
    assert sum(line.startswith("step") for line in printed([first, other, other])) == 2


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_terminal_gets_whole_blocks(run_folder, width):
    lines = printed(read_log(run_folder), width, force_terminal=True, color_system=None)
    assert max(map(len, lines)) <= width
    assert lines[-1].strip() == "resampled bcc-1005K-5GPa"
    assert any(line.endswith("0.01     1.5    0.06   80  80") for line in lines)


def test_without_the_temperature_the_distance_is_shown(write, run_data):
    for line in run_data["log"]:
        del line["diagnostics"]["hcp-bcc-5GPa"]["temperature"]
    lines = printed(read_log(write(run_data)))
    assert "T*-T" in lines[2]
    assert "-270(33)" in lines[4]


def diagnostics(delta_g, delta_s):
    return {"delta_g": delta_g, "delta_s": delta_s, "temperature": Measured(1005.0, 0.0, "K")}


def test_the_implied_temperature_and_its_error():
    """Against 100,000 draws of independent ΔG and ΔH (error of the spread: 0.3 %), linear regime."""
    temperature, g, h = 1005.0, Measured(-3.0, 0.3, "meV/atom"), Measured(40.0, 0.5, "meV/atom")
    rng = np.random.default_rng(0)
    draws_g, draws_h = rng.normal(g.value, g.se, 100_000), rng.normal(h.value, h.se, 100_000)
    draws = temperature + draws_g / ((draws_h - draws_g) / temperature)
    found = implied_temperature(diagnostics(g, (h - g).scaled(1 / temperature, "meV/atom/K")))
    assert found.value == pytest.approx(temperature + g.value * temperature / 43.0)
    assert found.se == pytest.approx(draws.std(), rel=0.02)


@pytest.mark.parametrize("entropy", [(0.01, 0.004), (0.0, 0.0), (float("nan"), 0.1), (0.01, float("nan"))])
def test_an_unknown_entropy_carries_no_temperature(entropy):
    delta_g = Measured(-0.1, 0.1, "meV/atom")
    assert implied_temperature(diagnostics(delta_g, Measured(*entropy, "meV/atom/K"))) is None


def test_a_temperature_too_far_away_is_refused():
    assert (
        implied_temperature(diagnostics(Measured(9.0, 0.1, "meV/atom"), Measured(0.03, 0.001, "u"))) is None
    )


def test_missing_entropy_is_no_error():
    assert implied_temperature({"delta_g": Measured(1.0, 0.1, "meV/atom")}) is None


def test_a_loss_with_many_diagnostics_shows_their_root_mean_square():
    measured = {f"C{i}": Measured(100.0 + i, 1.0, "GPa") for i in range(24)}
    few = {name: measured[name] for name in ("C0", "C1", "C2")}
    losses = {"total": 6.5, "elastic": 6.25, "cell": 0.25}
    header, titles, units, values = printed([Update(0, losses, {"elastic": measured, "cell": few}, {}, ())])
    assert header.split() == ["elastic", "cell"]
    assert titles.split() == ["step", "total", "loss", "r.m.s.", "loss", "C0", "C1", "C2"]
    assert units.split() == ["sigma", "GPa", "GPa", "GPa"]
    assert values.split() == ["0", "6.5", "6.25", "2.5", "0.25", "100.0(1.0)", "101.0(1.0)", "102.0(1.0)"]
    assert max(map(len, (titles, values))) < 80
