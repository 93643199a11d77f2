"""The final table holds the numbers of the summary."""

import io

import pytest
from rich.console import Console

from mlip_refine.workflows.finetune.tables import print_summary


def entry(first, last, unit, target=None):
    found = {"first": (first, 0.05), "last": (last, 0.05)} | ({} if target is None else {"target": target})
    return {name: {"value": value, "se": se, "unit": unit} for name, (value, se) in found.items()}


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
    assert "updates    3, every target within its tolerance\n" in text
    assert "targets    1 of 1 met on new frames of the refined potential\n" in text


def test_nothing_is_cut_in_a_narrow_terminal(run_folder):
    text = table(run_folder, width=50)
    assert "…" not in text
    assert str(run_folder / "tiny.model") in text


def _with_observables(run_data):
    """A lattice, of which c has no target, and 24 elastic constants that start 30 σ off and end up to 2.4."""
    run_data["summary"]["measured"] = {
        "hcp-bcc-5GPa": {"delta_g": entry(-8.91, -0.12, "meV/atom")},
        "lattice": {"a": entry(2.91, 2.949, "Å", (2.95, 0.002)), "c": entry(4.6, 4.68, "Å")},
        "elastic_constants": {
            f"C{i} 300 K": entry(130.0, 160.0 - 0.1 * i, "GPa", (160.0, 1.0)) for i in range(1, 25)
        },
    }
    run_data["summary"]["deviations"] = {
        "lattice": {"first_sigma": 20.0, "last_sigma": 0.5},
        "elastic_constants": {"first_sigma": 30.0, "last_sigma": 1.429},
    }


def test_observables_stand_beside_their_targets(write, run_data):
    _with_observables(run_data)
    text = table(write(run_data), width=120)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "lattice, as trained" in lines
    assert "a, Å (target 2.9500(20)) 2.910(50) 2.949(50) -20.0 → -0.5 σ" in lines
    assert "c, Å 4.600(50) 4.680(50)" in lines
    assert not any("delta_g" in line for line in lines)
    assert "as trained: values in the first and the last update of a loss, not sampled afresh" in lines


def test_of_a_loss_with_many_targets_the_worst_are_shown(write, run_data):
    _with_observables(run_data)
    lines = [" ".join(line.split()) for line in table(write(run_data), width=120).splitlines()]
    first = lines.index("elastic_constants, as trained")
    assert lines[first + 1 : first + 6] == [
        "r.m.s. deviation, σ 30 1.43",
        "C24 300 K, GPa (target 160.0(1.0)) 130.000(50) 157.600(50) -30.0 → -2.4 σ",
        "C23 300 K, GPa (target 160.0(1.0)) 130.000(50) 157.700(50) -30.0 → -2.3 σ",
        "C22 300 K, GPa (target 160.0(1.0)) 130.000(50) 157.800(50) -30.0 → -2.2 σ",
        "21 others are in summary.json",
    ]


def test_what_was_measured_after_training_is_the_verdict(write, run_data):
    """Training ended at 2.9490(500) of a target 2.9500(20); new frames say 2.9480(10), then noise."""
    _with_observables(run_data)
    lattice = run_data["summary"]["measured"]["lattice"]
    lattice["a"]["after"] = {"value": 2.948, "se": 0.001, "unit": "Å"}
    run_data["summary"]["deviations"]["lattice"]["after_sigma"] = 1.0
    text = table(write(run_data), width=120)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "lattice" in lines
    assert "a, Å (target 2.9500(20)) 2.910(50) 2.9480(10) -20.0 → -1.0 σ" in lines
    assert "targets    2 of 2 met on new frames of the refined potential\n" in text
    assert "does not decide" not in text

    lattice["a"]["after"] = {"value": 2.95, "se": 0.03, "unit": "Å"}
    text = table(write(run_data), width=200)
    assert "targets    1 of 2 met on new frames of the refined potential\n" in text
    wanted = "lattice: a = 2.950(30) Å does not decide about its target 2.9500(20) Å; more sampling.frames"
    assert wanted in text


def test_a_run_without_observables_says_nothing_of_them(run_folder):
    assert "as trained" not in table(run_folder)


@pytest.mark.parametrize("seconds", [(12.2, "12 s"), (150, "2 min 30 s"), (7200, "2 h 0 min 0 s")])
def test_durations(write, run_data, seconds):
    run_data["summary"]["wall_time_s"] = seconds[0]
    assert f"wall time  {seconds[1]}\n" in table(write(run_data))


def test_a_run_without_transitions_or_replay(write, run_data):
    run_data["summary"] |= {"transitions": [], "replay": {"before": None, "after": None}, "converged": False}
    text = table(write(run_data))
    assert "held-out" not in text
    assert "all steps used" in text
