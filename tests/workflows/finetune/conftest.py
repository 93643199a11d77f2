"""A small synthetic run folder: two transitions, three updates, replay."""

import json

import pytest

SOURCES = ("bcc-1005K-5GPa", "hcp-1005K-5GPa")


def measured(value, se, unit):
    return {"value": value, "se": se, "unit": unit}


def update(step):
    return {
        "step": step,
        "losses": {
            "total": 900.0 / (step + 1),
            "hcp-bcc-5GPa": 882.0 / (step + 1),
            "replay.energy": 0.01,
            "replay.forces": 1.5,
            "replay.stress": 0.06,
        },
        "diagnostics": {
            "hcp-bcc-5GPa": {
                "delta_g": measured(-8.91 / (step + 1), 0.23, "meV/atom"),
                "delta_s": measured(0.033, 0.004, "meV/atom/K"),
                "temperature": measured(1005.0, 0.0, "K"),
            }
        },
        "n_eff": dict.fromkeys(SOURCES, 1.0 - 0.2 * step),
        "resampled": [SOURCES[0]] if step == 2 else [],
        "gradient_norm": 3.0,
    }


def transition():
    return {
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
        "transition_temperature_before_K": None,
        "transition_temperature_before_K_se": None,
        "transition_temperature_after_K": 1001.4,
        "transition_temperature_after_K_se": 9.1,
        "notes": ["before: no transition temperature: it lies -310 K away"],
    }


def errors(factor):
    return {
        "energy_mae_mev_per_atom": 4.0 * factor,
        "forces_mae_mev_per_A": 97.36,
        "stress_mae_gpa": None,
        "n_frames": 100,
    }


def summary():
    return {
        "name": "tiny",
        "steps": 3,
        "converged": True,
        "transitions": [transition()],
        "replay": {"before": errors(1.0), "after": errors(1.05)},
        "wall_time_s": 3725.4,
    }


@pytest.fixture
def run_data():
    """What the files of the folder hold; change it and call `write`."""
    return {"log": [update(step) for step in range(3)], "summary": summary()}


@pytest.fixture
def write(tmp_path):
    """Write data as a run folder."""

    def write(data):
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in data["log"]))
        (tmp_path / "summary.json").write_text(json.dumps(data["summary"]))
        return tmp_path

    return write


@pytest.fixture
def run_folder(write, run_data):
    """A complete run folder."""
    return write(run_data)
