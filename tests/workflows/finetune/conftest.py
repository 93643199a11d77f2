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
        "n_atoms_to": 54,
        "convention": "cells of N atoms",
        "temperature_K": 1005.0,
        "pressure_GPa": 5.0,
        "target": measured(0.0, 0.3, "meV/atom"),
        "delta_g_before": measured(-8.91, 0.24, "meV/atom"),
        "delta_g_after": measured(-0.12, 0.3, "meV/atom"),
        "delta_h_before": measured(11.0, 5.0, "meV/atom"),
        "delta_h_after": measured(33.0, 0.9, "meV/atom"),
        "transition_temperature_before": None,
        "transition_temperature_after": measured(1001.4, 9.1, "K"),
        "notes": ["before: no transition temperature: it lies -310 K away"],
    }


def errors(factor):
    return {
        "energy_mae": measured(4.0 * factor, None, "meV/atom"),
        "forces_mae": measured(97.36, None, "meV/Å"),
        "stress_mae": None,
        "n_frames": 100,
    }


def summary():
    return {
        "format": "mlip_refine summary 2",
        "name": "tiny",
        "model_hash": "b" * 64,
        "initial_model_hash": "a" * 64,
        "head": "Default",
        "other_heads": {},
        "seed": 0,
        "device": "cpu",
        "steps": 3,
        "converged": True,
        "transitions": [transition()],
        "phases": [],
        "replay": {"before": errors(1.0), "after": errors(1.05)},
        "measured": {},
        "deviations": {},
        "notes": [],
        "packages": {},
        "energy_shift_eV": None,
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
