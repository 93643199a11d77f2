"""Files with faults, by the hundred and through every door: each is read or refused, and that is all."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "worker.py"
DOORS = ("configs", "tables", "frames", "structures", "phonons", "initials", "models", "runs")
SEED = int(os.environ.get("MLIP_REFINE_TEST_SEED", "0"))
HANGS = 100.0
"""Seconds of processor time after which a process that says nothing is stopped; a reader that Python can stop
has 60."""

WAITS = 1000.0
"""Seconds after which it is stopped in any case; a reader that Python can stop has 600."""


def processor_seconds(pid: int) -> float:
    """Seconds that the processors have worked for a process, 0 when it is gone: a busy machine is no hang."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def read_faulty(door: str, first: int, last: int, folder: Path) -> Iterator[tuple[str, str]]:
    """Read mutated files in a process of their own, and give what was done to each and what came of it."""
    while first < last:
        command = [sys.executable, str(WORKER), door, str(SEED), str(first), str(last), str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        heard = [time.monotonic(), 0.0]

        def stop_a_hang(process: subprocess.Popen[str] = process, heard: list[float] = heard) -> None:
            while process.poll() is None:
                now = time.monotonic(), processor_seconds(process.pid)
                if now[0] - heard[0] > WAITS or now[1] - heard[1] > HANGS:
                    process.kill()
                time.sleep(0.5)

        threading.Thread(target=stop_a_hang, daemon=True).start()
        what = None
        for line in process.stdout:
            heard[:] = time.monotonic(), processor_seconds(process.pid)
            said = json.loads(line)
            if "what" in said:
                first, what = said["k"] + 1, f"{door} {said['k']}: {said['what']}"
            else:
                yield what, said["came"]
                what = None
        errors = process.stderr.read()
        if process.wait() == 0:
            return
        # A crash before the first file is the worker's own.
        assert what is not None, errors
        yield what, f"crash {process.returncode} {errors[-300:]}"


def wrong(door: str, first: int, last: int, folder: Path) -> list[str]:
    came = list(read_faulty(door, first, last, folder))
    assert len(came) == last - first
    return [f"{what}: {outcome}" for what, outcome in came if outcome not in {"accepted", "refused"}]


@pytest.mark.parametrize("door", ["configs", "frames", "structures"])
def test_files_with_faults_are_read_or_refused(door, tmp_path):
    assert wrong(door, 0, 15, tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_many_files_with_faults_are_read_or_refused(door, tmp_path):
    assert wrong(door, 0, 150, tmp_path) == []
