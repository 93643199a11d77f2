"""Result files are read whole or refused with their place."""

import math

import pytest

from mlip_refine.errors import InputError
from mlip_refine.quantities import Measured
from mlip_refine.workflows.finetune.records import read_log, read_summary


def test_the_log_keeps_values_errors_and_units(run_folder):
    log = read_log(run_folder)
    assert [u.step for u in log] == [0, 1, 2]
    assert log[0].diagnostics["hcp-bcc-5GPa"]["delta_g"] == Measured(-8.91, 0.23, "meV/atom")
    assert log[2].resampled == ("bcc-1005K-5GPa",)


def test_the_summary_keeps_refused_temperatures_as_none(run_folder):
    summary = read_summary(run_folder)
    (transition,) = summary.transitions
    assert transition.transition_before is None
    assert transition.transition_after == Measured(1001.4, 9.1, "K")
    assert summary.replay.before.stress is None


@pytest.mark.parametrize(("name", "read"), [("log.jsonl", read_log), ("summary.json", read_summary)])
def test_a_missing_file_is_named(tmp_path, name, read):
    with pytest.raises(InputError, match=rf"{name}: the result file is missing"):
        read(tmp_path)


def test_an_empty_log_is_refused(run_folder):
    (run_folder / "log.jsonl").write_text("")
    with pytest.raises(InputError, match="the log is empty"):
        read_log(run_folder)


@pytest.mark.parametrize("line", ['{"step": 3, "los', "[]", "7", '{"step": 3}', '{"step": null}'])
def test_a_bad_line_of_the_log_is_named(run_folder, line):
    with (run_folder / "log.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(InputError, match=r"log\.jsonl:4: this line is no update"):
        read_log(run_folder)


@pytest.mark.parametrize("text", ["{", "[]", "null", '"run"'])
def test_something_else_than_a_summary_is_refused(run_folder, text):
    (run_folder / "summary.json").write_text(text)
    with pytest.raises(InputError, match=r"summary\.json: this is no summary"):
        read_summary(run_folder)


def test_a_missing_key_of_the_summary_is_named(write, run_data):
    del run_data["summary"]["transitions"][0]["delta_g_after"]["se"]
    with pytest.raises(InputError, match=r"lacks a key.*delta_g_after\.se"):
        read_summary(write(run_data))


def first_format() -> dict:
    """A summary as earlier versions wrote it: units in the names, standard errors as `_se`."""
    errors = {"energy_mae_mev_per_atom": 4.0, "forces_mae_mev_per_A": 97.36, "stress_mae_gpa": None}
    transition = {
        "name": "hcp-bcc-5GPa",
        "from": "hcp",
        "to": "bcc",
        "n_atoms": 54,
        "temperature_K": 1005.0,
        "pressure_GPa": 5.0,
        "target_mev_per_atom": 0.0,
        "delta_g_before_mev_per_atom": -8.91,
        "delta_g_before_mev_per_atom_se": 0.24,
        "delta_g_after_mev_per_atom": -0.12,
        "delta_g_after_mev_per_atom_se": 0.3,
        "delta_h_before_mev_per_atom": 11.0,
        "delta_h_before_mev_per_atom_se": 5.0,
        "delta_h_after_mev_per_atom": 33.0,
        "delta_h_after_mev_per_atom_se": 0.9,
        "transition_temperature_before_K": None,
        "transition_temperature_before_K_se": None,
        "transition_temperature_after_K": 1001.4,
        "transition_temperature_after_K_se": 9.1,
        "notes": ["before: no transition temperature: it lies -310 K away"],
    }
    phase = {
        "phase": "hcp",
        "temperature_K": 1005.0,
        "pressure_GPa": 5.0,
        "gibbs_change_ev": 0.5,
        "gibbs_change_ev_se": 0.01,
        "overlap": 0.6,
        "cell_before_A": [[3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 3.0]],
        "cell_after_A": [[3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 3.1]],
    }
    first, last = {"first": 2.9, "first_se": 0.02}, {"last": 2.94, "last_se": None}
    target = {"target": 2.95, "target_uncertainty": 0.01}
    return {
        "format": "mlip_refine summary 1",
        "name": "tiny",
        "model_hash": "b" * 64,
        "initial_model_hash": "a" * 64,
        "seed": 3,
        "device": "cpu",
        "steps": 3,
        "converged": True,
        "transitions": [transition],
        "phases": [phase],
        "replay": {"before": errors | {"n_frames": 100}, "after": None},
        "measured": {
            "lattice": {
                "a": first | last | {"unit": "Å"} | target,
                "validation": {"unit": "", "delivered": 0.5, "delivered_se": 0.0},
            }
        },
        "deviations": {"lattice": {"first_sigma": 5.0, "last_sigma": 1.0}},
        "packages": {"ase": "3.26.0"},
        "energy_shift_ev": {"Ti": -0.02},
        "wall_time_s": 3725.4,
    }


def test_a_summary_of_the_first_format_is_read(write, run_data):
    summary = read_summary(write(run_data | {"summary": first_format()}))
    (transition,) = summary.transitions
    assert transition.before == Measured(-8.91, 0.24, "meV/atom")
    assert transition.delta_h_after == Measured(33.0, 0.9, "meV/atom")
    assert (transition.transition_before, transition.transition_after.unit) == (None, "K")
    assert (transition.target.value, math.isnan(transition.target.se)) == (0.0, True)
    assert summary.phases[0].gibbs_change == Measured(0.5, 0.01, "eV")
    assert (summary.replay.before.energy.value, summary.replay.before.forces.unit) == (4.0, "meV/Å")
    assert (summary.replay.before.stress, summary.replay.after) == (None, None)
    course = summary.measured["lattice"]["a"]
    assert (course.first, course.target) == (Measured(2.9, 0.02, "Å"), Measured(2.95, 0.01, "Å"))
    assert (course.last.value, math.isnan(course.last.se)) == (2.94, True)
    assert summary.measured["lattice"]["validation"].delivered == Measured(0.5, 0.0, "")
    assert summary.deviations["lattice"].last_sigma == 1.0
    assert (summary.energy_shift_eV, summary.wall_time_s) == ({"Ti": -0.02}, 3725.4)


def test_a_missing_key_of_the_first_format_is_named(write, run_data):
    data = first_format()
    del data["transitions"][0]["delta_g_after_mev_per_atom_se"]
    with pytest.raises(InputError, match=r"lacks a key.*delta_g_after_mev_per_atom_se"):
        read_summary(write(run_data | {"summary": data}))


def test_a_summary_comes_back_as_it_was(write, run_data):
    """What is read can be written again, without a change."""
    summary = read_summary(write(run_data))
    assert read_summary(write(run_data | {"summary": summary.as_json()})) == summary
    assert summary.as_json() == run_data["summary"]


def test_a_file_that_is_no_text_is_refused(run_folder):
    (run_folder / "log.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        read_log(run_folder)
