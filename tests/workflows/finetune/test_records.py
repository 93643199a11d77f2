"""Result files are read whole or refused with their place."""

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
    assert "stress_mae_gpa" not in summary.errors_before


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
    del run_data["summary"]["transitions"][0]["delta_g_after_mev_per_atom_se"]
    with pytest.raises(InputError, match=r"lacks a key.*delta_g_after_mev_per_atom_se"):
        read_summary(write(run_data))


def test_a_file_that_is_no_text_is_refused(run_folder):
    (run_folder / "log.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        read_log(run_folder)
