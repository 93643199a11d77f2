"""SIGKILL at any moment: the run goes on with --resume and ends with the same bits."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlip_refine.config import Config, dump_config

KILLED_AFTER = (7.0, 8.5, 10.0, 11.0, 12.0)


def _command(config: Config, folder: Path) -> list[str]:
    path = folder / "config.yaml"
    path.write_text(dump_config(config))
    return [sys.executable, "-m", "mlip_refine", "finetune", str(path), "--resume"]


def _killed(command: list[str], after: float) -> bool:
    """Run for a while, then kill; whether it was still running."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        return process.wait(after) != 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


@pytest.mark.slow
def test_killed_runs_end_in_the_same_place(tiny_in: Callable[..., Config], tmp_path: Path) -> None:
    ends, kills = [], []
    for name, delays in (("whole", ()), ("killed", KILLED_AFTER)):
        folder = tmp_path / name
        folder.mkdir()
        config = tiny_in(folder, training={"steps": 6})
        command = _command(config, folder)
        kills += [_killed(command, after) for after in delays]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        log = (config.run_folder / "log.jsonl").read_text()
        ends.append((log, (config.run_folder / "tiny.safetensors").read_bytes()))
    assert sum(kills) >= 2, "the delays must meet the run while it works"
    assert ends[0] == ends[1]
