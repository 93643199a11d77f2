"""The final table holds the numbers of the summary."""

import io

import pytest
from rich.console import Console

from mlip_refine.report import print_summary


def table(folder, width=80):
    file = io.StringIO()
    print_summary(Console(file=file, width=width, highlight=False), folder)
    return file.getvalue()


def test_the_table_has_every_number(run_folder):
    lines = [" ".join(line.split()) for line in table(run_folder).splitlines()]
    assert "hcp → bcc, 1005 K, 5 GPa, N = 54" in lines
    assert "ΔG, meV/atom (target 0) -8.91(24) -0.12(30) 8.79(18)" in lines
    assert "transition temperature, K - 1001.4(9.1)" in lines
    assert "energy MAE, meV/atom 4 4.2 +5.0 %" in lines
    assert "forces MAE, meV/Å 97.4 97.4 +0.0 %" in lines
    assert not any("stress" in line for line in lines)


def test_notes_model_and_time_are_below(run_folder):
    text = table(run_folder)
    assert "note, hcp-bcc-5GPa: before: no transition temperature: it lies -310 K away\n" in text
    assert f"model      {run_folder / 'tiny.model'}\n" in text
    assert "wall time  1 h 2 min 5 s\n" in text
    assert "updates    3, every target met\n" in text


def test_nothing_is_cut_in_a_narrow_terminal(run_folder):
    text = table(run_folder, width=50)
    assert "…" not in text
    assert str(run_folder / "tiny.model") in text


@pytest.mark.parametrize("seconds", [(12.2, "12 s"), (150, "2 min 30 s"), (7200, "2 h 0 min 0 s")])
def test_durations(write, run_data, seconds):
    run_data["summary"]["wall_time_s"] = seconds[0]
    assert f"wall time  {seconds[1]}\n" in table(write(run_data))


def test_a_run_without_transitions_or_replay(write, run_data):
    run_data["summary"] |= {"transitions": [], "replay": {"before": None, "after": None}, "converged": False}
    text = table(write(run_data))
    assert "held-out" not in text
    assert "all steps used" in text
