"""Free energies, observables and replay in one run: from the config to the refined checkpoint."""

import json
import math
from functools import partial

import pytest

from mlip_refine.errors import InputError
from mlip_refine.losses import FreeEnergyDifference
from mlip_refine.workflows.finetune import finetune
from mlip_refine.workflows.finetune.run import prepare

STATE = {"temperature": 1150.0, "pressure": 0.0}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tiny_in):
    """Configs of tiny runs below one folder, whose files are made once."""
    return partial(tiny_in, tmp_path_factory.mktemp("runs"))


def _with(tiny, *nodes: dict, **changes):
    """The tiny run with further losses."""
    return tiny(losses=[dict(loss) for loss in tiny().losses] + list(nodes), **changes)


@pytest.mark.slow
def test_a_run_matches_free_energy_pressure_and_replay(tiny):
    """The pressure shares the frames of hcp; the volume those of bcc, whose cell moves."""
    pressure = {"type": "pressure", "phase": "hcp", **STATE, "uncertainty": "5 GPa", "weight": 0.5}
    volume = {"type": "volume", "phase": "bcc", **STATE, "target": 17.5, "uncertainty": 1.0}
    curve = {
        "type": "radial_distribution",
        "name": "g",
        "phase": "bcc",
        **STATE,
        "largest": "4 Å",
        "bins": 4,
        "target": [0, 0, 1, 1],
        "uncertainty": 1,
    }
    changes = {"name": "all", "training": {"steps": 2}, "sampling": {"ensemble": "npt"}}
    result = finetune(_with(tiny, pressure, volume, curve, **changes))
    lines = [json.loads(line) for line in (result.folder / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert set(line["n_eff"]) == {"hcp-1150K-0GPa", "bcc-1150K-0GPa"}
        found = line["diagnostics"]
        assert {"low", "pressure", "volume", "g"} == set(found)
        for name, label, unit in (("pressure", "pressure", "GPa"), ("volume", "volume", "Å³/atom")):
            assert found[name][label]["unit"] == unit
            assert math.isfinite(found[name][label]["value"])
            assert found[name][label]["se"] > 0
        losses = line["losses"]
        assert losses["pressure"] == pytest.approx((found["pressure"]["pressure"]["value"] / 5) ** 2)
        assert losses["g"] == pytest.approx(found["g"]["rms"]["value"] ** 2)
        replay = sum(value for name, value in losses.items() if name.startswith("replay."))
        total = losses["low"] + 0.1 * replay + 0.5 * losses["pressure"] + losses["volume"] + losses["g"]
        assert losses["total"] == pytest.approx(total)
        assert line["gradient_norm"] > 0
    assert result.potential.hash != result.summary.initial_model_hash
    # Afterwards everything is measured on new frames, and judged by that.
    measured = result.summary.measured
    for name, label in (("pressure", "pressure"), ("volume", "volume"), ("g", "rms")):
        course = measured[name][label]
        assert course.after.se > 0
        assert course.after != course.last
    assert set(result.summary.verdicts) == {"low, delta_g", "pressure, pressure", "volume, volume"}
    assert result.summary.notes == ()


@pytest.mark.slow
def test_a_loss_on_an_observable_needs_no_free_energy(tiny):
    losses = [{"type": "volume", "phase": "bcc", **STATE, "target": 18.5, "uncertainty": 0.05}]
    result = finetune(
        tiny(losses=losses, replay=None, name="volume", training={"steps": 2}, sampling={"ensemble": "npt"})
    )
    lines = [json.loads(line) for line in (result.folder / "log.jsonl").read_text().splitlines()]
    assert lines[1]["losses"]["volume"] != lines[0]["losses"]["volume"]
    assert result.summary.transitions == ()


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"type": "lattice", "phase": "hcp", "target": 3, "uncertainty": 1}, r"expected 2 \(a, c\)"),
        ({"type": "density", "phase": "bcc", "table": "titanium-bcc-latice"}, "no such experimental table"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_sampled(tiny, node, message):
    config = _with(tiny, {**node, **STATE})
    with pytest.raises(InputError, match=message):
        finetune(config)
    assert not config.run_folder.exists()


def test_losses_that_share_states_share_state_points(tiny):
    between = {"from": "hcp", "to": "bcc", **STATE, "uncertainty": 1}
    nodes = [{"type": kind, **between, "target": 1} for kind in ("enthalpy_difference",)]
    run = prepare(_with(tiny, *nodes))
    (matched,) = (loss for loss in run.losses if isinstance(loss, FreeEnergyDifference))
    assert set(run.points) == set(matched.sources)
    assert all(set(loss.sources) <= set(run.points) for loss in run.losses)
