"""Figures of phonons are written from plain data."""

import math

import matplotlib.image
import numpy as np
import pytest

from mlip_refine.crystals.phonons.bands import BandPath, Bands
from mlip_refine.crystals.phonons.dos import DensityOfStates
from mlip_refine.errors import InputError
from mlip_refine.workflows.phonons import figures
from mlip_refine.workflows.phonons.figures import draw_bands, draw_expansion, draw_parity
from mlip_refine.workflows.phonons.records import file_of_crystal

BLUE, ORANGE, PINK = (
    [int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in ("#0072B2", "#D55E00", "#CC79A7")
)


def _bands(scale: float = 1.0, lowest: float = 0.0):
    q = np.linspace(0, 0.5, 21)
    points = tuple(np.outer(q, axis) for axis in np.eye(3)[:2])
    line = np.sin(np.pi * q)[:, None] * scale * np.array([2.0, 3.0, 5.0]) + lowest
    path = BandPath((("G", "X"), ("U", "Y")), points, (q, 0.5 + q))
    return Bands(path, (line, line[::-1])).as_json()


def _density(scale: float = 1.0):
    x = np.linspace(-0.5, 6, 100)
    return DensityOfStates(x, np.exp(-((x - 4 * scale) ** 2))).as_json()


def _expansion(factor: float = 1.0):
    t = [0.0, 300.0, 600.0]
    names = ("expansion_per_K", "heat_capacity_kB_per_atom", "gibbs_eV_per_atom", "entropy_kB_per_atom")
    data = {name: [0.0, 2e-5, 3e-5] for name in names}
    data |= {
        "temperatures_K": t,
        "volume_A3_per_atom": [17.0, 17.1, 17.2 * factor],
        "bulk_modulus_GPa": [110.0, 105, 99],
    }
    data |= {"pressure_GPa": 0.0, "gruneisen": [None, 1.2, 1.2], "lattice": {"a": [2.9, 2.91, 2.92]}}
    return data | {
        "linear_expansion_per_K": {"a": [0.0, 7e-6, 1e-5]},
        "volumes_A3_per_atom": [16.0, 17.0, 18.0],
        "energies_eV_per_atom": [-7.0, -7.1, -7.05],
    }


def _pixels(path):
    return matplotlib.image.imread(path)[..., :3]


def _holds(pixels, colour) -> int:
    return int((np.abs(pixels - colour).max(axis=-1) < 0.02).sum())


def test_bands_show_reference_models_and_density(tmp_path):
    bands = {"reference": _bands(), "before": _bands(0.8), "after": _bands(0.98)}
    densities = {"reference": _density(), "before": _density(0.8), "after": _density(0.98)}
    pixels = _pixels(draw_bands(tmp_path / "both.png", bands, densities, "mp-1"))
    alone = _pixels(draw_bands(tmp_path / "alone.png", bands))
    right = slice(int(0.85 * pixels.shape[1]), None)
    assert all(_holds(one, colour) > 300 for one in (pixels, alone) for colour in (BLUE, ORANGE))
    assert _holds(pixels[:, right], BLUE) > 100


def test_only_imaginary_frequencies_are_shaded(tmp_path):
    shade = 0.12 * np.array(PINK) + 0.88
    stable = _pixels(draw_bands(tmp_path / "stable.png", {"reference": _bands()}))
    unstable = _pixels(draw_bands(tmp_path / "unstable.png", {"reference": _bands(lowest=-1.0)}))
    # Soft edges of lines have any colour.
    assert _holds(unstable, shade) > 20_000
    assert _holds(stable, shade) < 2_000


def test_bands_of_two_paths_are_refused(tmp_path):
    other = _bands() | {"ticks": [[0.0, "G"], [0.5, "X"], [1.0, "Y"]]}
    with pytest.raises(InputError, match="2 paths"):
        draw_bands(tmp_path / "x.png", {"reference": _bands(), "model": other})
    with pytest.raises(InputError, match="0 paths"):
        draw_bands(tmp_path / "x.png", {})


def test_a_material_may_have_any_name(tmp_path):
    """Neither formulas of matplotlib nor the limit of file names end a run after everything is computed."""
    for name in ("x$\\foo$", "$", "../../x", "x" * 300, "µ" * 300, "~"):
        path = file_of_crystal(tmp_path, name, "relaxed", "-bands.png")
        assert path.parent == tmp_path
        assert draw_bands(path, {"reference": _bands()}, title=name[:40]).exists()
    assert len({file_of_crystal(tmp_path, "x" * n, "relaxed", ".json") for n in (300, 301)}) == 2


def test_parity_counts_materials_that_both_know(tmp_path, monkeypatch):
    reference = np.linspace(1, 10, 30)
    values = {"before": [*(0.9 * reference[:-1]), None], "after": [*(0.99 * reference[:-1]), None]}
    data = {
        name: {"reference": reference.tolist(), "models": values}
        for name in ("max_THz", "entropy_J_K_mol", "free_energy_kJ_mol")
    }
    labels = []
    keep = matplotlib.axes.Axes.plot
    monkeypatch.setattr(
        matplotlib.axes.Axes, "plot", lambda *a, **k: (labels.append(k.get("label")), keep(*a, **k))[1]
    )
    pixels = _pixels(draw_parity(tmp_path / "parity.png", data))
    assert pixels.shape[0] > 1000
    error = np.mean(0.1 * reference[:-1])
    assert labels[0] == f"before, mean error {error:.3g} (29)"
    with pytest.raises(InputError, match="not a value for every material"):
        draw_parity(
            tmp_path / "x.png", {"entropy_J_K_mol": {"reference": [1.0, 2.0], "models": {"a": [1.0]}}}
        )
    with pytest.raises(InputError, match="nothing to draw"):
        draw_parity(tmp_path / "x.png", {"mass": {}})


def test_expansion_of_models_and_what_was_measured(tmp_path):
    models = {"before": _expansion(), "after": _expansion(1.01)}
    path = draw_expansion(tmp_path / "x.png", models, {"volume_A3_per_atom": [[300.0, 17.15]]})
    pixels = _pixels(path)
    assert pixels.shape[:2] == (1280, 1600)
    assert _holds(pixels, BLUE) > 500
    assert _holds(pixels, ORANGE) > 200
    with pytest.raises(InputError, match="nothing to draw"):
        draw_expansion(tmp_path / "x.png", {})


def test_a_figure_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        draw_bands(tmp_path / "none" / "x.png", {"reference": _bands()})


def test_parity_has_equal_axes_that_hold_every_point(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure) or path)
    values = {
        "reference": [1.0, 2.0, None],
        "models": {"before": [4.0, 0.5, 9.0], "after": [1.0, math.nan, 2.0]},
    }
    alike = {"reference": [3.0], "models": {"model": [3.0]}}
    draw_parity(tmp_path / "parity.png", {"max_THz": values, "entropy_J_K_mol": alike})
    for axes, lowest, highest in zip(drawn[0].axes, (0.5, 3.0), (9.0, 3.0), strict=True):
        assert axes.get_xlim() == axes.get_ylim()
        assert axes.get_xlim()[0] < lowest <= highest < axes.get_xlim()[1]
        assert axes.get_aspect() == 1.0


def test_a_legend_of_bands_names_every_model_once(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure) or path)
    draw_bands(tmp_path / "x.png", {"reference": _bands(lowest=-1.0), "model": _bands()})
    texts = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert texts == ["reference", "model", "imaginary"]
