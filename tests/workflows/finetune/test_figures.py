"""Figures are written from result files, without pyplot's global state."""

import subprocess
import sys

import matplotlib.image
import pytest

from mlip_refine.errors import InputError
from mlip_refine.workflows.finetune import figures
from mlip_refine.workflows.finetune.figures import write_figures
from mlip_refine.workflows.finetune.records import read_log, read_summary


def test_all_figures_are_written_and_show_something(run_folder):
    paths = write_figures(run_folder)
    assert [p.name for p in paths] == ["delta_g.png", "n_eff.png", "replay.png"]
    for path in paths:
        pixels = matplotlib.image.imread(path)
        assert pixels.shape[:2] == (800, 1280)
        assert (pixels[..., :3].min(axis=-1) < 0.5).sum() > 1000


def test_figures_without_data_are_left_out(write, run_data):
    run_data["summary"]["transitions"] = []
    for line in run_data["log"]:
        line["losses"], line["n_eff"], line["resampled"] = {"total": 1.0}, {}, []
    assert write_figures(write(run_data)) == []


def test_observables_with_targets_have_a_panel_for_each_kind(write, run_data):
    """C11 at two temperatures share one, C33 has its own; what has no target has none."""
    entry = {
        name: {"value": value, "se": 2.0, "unit": "GPa"}
        for name, value in (("first", 150.0), ("last", 160.0))
    }
    target = {"target": {"value": 162.0, "se": 1.0, "unit": "GPa"}}
    names = ("C11 300 K", "C11 900 K", "C33 300 K")
    run_data["summary"]["measured"] = {
        "elastic": dict.fromkeys(names, entry | target) | {"spread": entry},
    }
    for i, line in enumerate(run_data["log"]):
        value = {"value": 150.0 + 5 * i, "se": 2.0, "unit": "GPa"}
        line["diagnostics"]["elastic"] = dict.fromkeys((*names, "spread"), value)
    folder = write(run_data)
    figure = figures.observables_figure(read_log(folder), read_summary(folder))
    titles = [axes.get_legend().get_title().get_text() for axes in figure.axes]
    assert titles == ["elastic: C11", "elastic: C33"]
    labels = [axes.get_legend_handles_labels()[1] for axes in figure.axes]
    assert labels == [["300 K", "900 K", "target"], ["300 K", "target"]]
    course, target_line = figure.axes[1].get_lines()[:2]
    assert list(course.get_ydata()) == [150.0, 155.0, 160.0]
    assert set(target_line.get_ydata()) == {162.0}
    assert "observables.png" in [path.name for path in write_figures(folder)]


def test_more_than_all_stored_frames_may_count(write, run_data):
    """Frames of earlier references count, too: nothing is cut off above 100 %."""
    run_data["log"][1]["n_eff"]["bcc-1005K-5GPa"] = 1.5
    folder = write(run_data)
    (axes,) = figures.n_eff_figure(read_log(folder)).axes
    assert axes.get_ylim()[1] > 150.0


def test_phonon_losses_have_a_curve_with_their_validation(write, run_data):
    values = {0: 0.5, 2: 0.8}
    for line in run_data["log"]:
        line["losses"]["hvp"] = 0.3
        line["diagnostics"]["hvp"] = {"relative error": {"value": 5.0, "se": 0.1, "unit": "%"}}
        if line["step"] in values:
            value = {"value": values[line["step"]], "se": 0.1, "unit": ""}
            line["diagnostics"]["hvp"]["validation, loss"] = value
    delivered = {"delivered": {"value": 0.9, "se": 0.1, "unit": ""}}
    run_data["summary"]["measured"] = {"hvp": {"relative error": {}, "validation, loss": delivered}}
    folder = write(run_data)
    (axes,) = figures.losses_figure(read_log(folder), read_summary(folder)).axes
    batch, validation, before = axes.get_lines()
    assert batch.get_xydata().tolist() == [[0.0, 0.3], [1.0, 0.3], [2.0, 0.3]]
    assert validation.get_xydata().tolist() == [[0.0, 0.5], [2.0, 0.8], [3.0, 0.9]]
    assert set(before.get_ydata()) == {0.5}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "hvp, batch",
        "validation",
        "before training",
    ]
    assert "losses.png" in [path.name for path in write_figures(folder)]


def test_every_line_of_a_figure_is_in_its_legend(write, run_data):
    folder = write(run_data)
    for figure in (
        figures.delta_g_figure(read_log(folder), read_summary(folder)),
        figures.n_eff_figure(read_log(folder)),
    ):
        (axes,) = figure.axes
        shown = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.get_lines()}
        named, _ = axes.get_legend_handles_labels()
        colours = {handle.get_color() for handle in named}
        assert {colour for colour, *_ in shown} <= colours


def test_one_update_and_a_part_that_vanishes(write, run_data):
    run_data["log"] = run_data["log"][:1]
    run_data["log"][0]["losses"]["replay.energy"] = 0.0
    assert len(write_figures(write(run_data))) == 3


def test_a_run_without_summary_is_refused(run_folder):
    (run_folder / "summary.json").unlink()
    with pytest.raises(InputError, match=r"summary\.json"):
        write_figures(run_folder)
    assert not list(run_folder.glob("*.png"))


def test_a_figure_that_cannot_be_written_is_refused(run_folder):
    (run_folder / "n_eff.png").mkdir()
    with pytest.raises(InputError, match=r"n_eff\.png: the figure cannot be written"):
        write_figures(run_folder)


def test_the_report_loads_neither_pyplot_nor_mace():
    code = "import sys, mlip_refine.report; sys.exit(bool({'matplotlib.pyplot', 'mace'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
