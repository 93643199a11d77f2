"""SIGKILL and signals at any moment: the run goes on with --resume and ends with the same bits."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlip_refine.config import Config, config_from_dict, dump_config

KILLS = int(os.environ.get("MLIP_REFINE_TEST_KILLS", "3"))
"""Kills of the run of each verb."""

WATCHED = {
    "finetune": ("log.jsonl", "tiny.safetensors"),
    "md": ("md.json", "series.csv"),
    "free-energy": ("initial-low.json",),
    "elastic": ("elastic.json",),
    "phonons": ("phonons.json",),
}
"""Files of each verb that must be the same, bit for bit."""

HCP = {"prototype": "hcp", "element": "Ti", "n_atoms": 16, "a": 2.93, "c": 4.65}


def _config(verb: str, folder: Path, tiny_in: Callable[..., Config]) -> Config:
    """A run that takes some seconds after its imports."""
    if verb == "finetune":
        return tiny_in(folder, training={"steps": 6})
    if verb == "free-energy":
        state = {"temperature": 300.0, "pressure": 0.0}
        loss = {"type": "free_energy_difference", "name": "low", "from": "hcp", "to": "strained", **state}
        strained = HCP | {"a": 2.90, "c": 4.75, "cell_freedom": "fixed"}
        short = {"windows": 2, "replicas": 2, "fit": 800.0, "production": 600.0, "interval": 40.0}
        changes = {"free_energy": {**short, "equilibration": 40.0, "max_error": None}}
        return tiny_in(folder, phases={"strained": strained}, losses=[loss], **changes)
    sections: dict[str, Any] = {
        "md": {"temperature": 600, "duration": "2 ps", "equilibration": "0.5 ps", "interval": "10 fs"},
        "elastic": {"temperature": 300, "born_every": 5},
        "phonons": {"supercell": 9.0, "mesh": [6, 6, 6], "bands": False},
    }
    bcc = {"prototype": "bcc", "element": "Ti", "n_atoms": 16, "a": 3.25, "cell_freedom": "fixed"}
    return config_from_dict(
        {
            "name": "tiny",
            "device": "cpu",
            "potential": {"model": "titanium-compact"},
            "phases": {"hcp": HCP} if verb == "elastic" else {"hcp": HCP, "bcc": bcc},
            "sampling": {
                "timestep": "4 fs",
                "friction": "10 /ps",
                "frames": 40,
                "interval": "20 fs",
                "replicas": 1,
                "min_effective_frames": 1.0,
            },
            verb: sections[verb],
            "output": {"folder": str(folder / "runs"), "figures": False},
        }
    )


def _run(command: list[str], after: float | None, ending: signal.Signals) -> int | None:
    """Run, and send a signal after some seconds; the exit status, None where it had ended by itself."""
    process = subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, ending)
        _, errors = process.communicate()
        if process.returncode != 0:
            return process.returncode
        # It was done, and its memory was being given back.
    assert process.returncode == 0, errors.decode()[-2000:]
    return None


@pytest.mark.slow
@pytest.mark.parametrize("verb", WATCHED)
def test_killed_runs_end_in_the_same_place(verb: str, tiny_in: Callable[..., Config], tmp_path: Path) -> None:
    """Killed at random moments, and ended by the signal of a batch system, before they end by themselves."""
    random, contents, sent, seconds = np.random.default_rng(0), [], [], 0.0
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        config = _config(verb, folder, tiny_in)
        path = folder / "config.yaml"
        path.write_text(dump_config(config))
        command = [sys.executable, "-m", "mlip_refine", verb, str(path), "--resume"]
        if name == "killed":
            for k in range(KILLS):
                ending = signal.SIGTERM if k % 3 == 2 else signal.SIGKILL
                status = _run(command, float(random.uniform(0.3, 1.0)) * seconds, ending)
                if status is not None:
                    sent.append(ending)
                    # A signal that comes while the program is loaded ends it as it ends any program.
                    assert status in {-ending, 128 + ending}
        started = time.monotonic()
        assert _run(command, None, signal.SIGKILL) is None
        seconds = time.monotonic() - started
        found = [config.run_folder / file for file in WATCHED[verb]]
        contents.append([file.read_bytes() for file in found])
    assert sent
    assert contents[0] == contents[1]
