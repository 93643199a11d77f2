"""Figures are written from result files, without pyplot's global state."""

import subprocess
import sys

import matplotlib.image
import pytest

from mlip_refine.errors import InputError
from mlip_refine.report import write_figures


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
