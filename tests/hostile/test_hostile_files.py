"""Every file that somebody made to do harm is read or refused in time, and nothing else happens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "hostile_files.py"
SLOWEST = 60.0

HARMLESS = {"phonons: laughs", "config: merges", "structure: CIF without end"}
"""Files that may be read as well: what they ask for turns out to be little."""


@pytest.mark.slow
def test_hostile_files_are_refused(tmp_path):
    """In one process, whose memory is limited: a crash or a hang would end it before the last file."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAM.parents[2])}
    command = [sys.executable, str(PROGRAM), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=7200)
    said = [json.loads(line) for line in done.stdout.splitlines()]
    came = {line["name"]: line for line in said if "came" in line}
    assert done.returncode == 0, (said[-1:], done.stderr[-2000:])
    assert len(came) >= 100
    for name, line in came.items():
        allowed = {"refused", "accepted"} if name in HARMLESS else {"refused"}
        assert line["came"] in allowed, line
        assert line["seconds"] < SLOWEST, line
