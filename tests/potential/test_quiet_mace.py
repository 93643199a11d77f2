"""What the libraries below print and warn about does not reach a user of the Python API."""

import importlib.metadata
import subprocess
import sys
import warnings

LOADED = """
import tempfile
from pathlib import Path
from ase.build import bulk
from mlip_refine import Potential, ase_calculator

potential = Potential.load("titanium-compact")
file, _ = potential.frozen_copy().save(Path(tempfile.mkdtemp()), "copy")
ase_calculator(file)
"""


def test_loading_copying_saving_and_opening_in_ase_say_nothing():
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_room_itself_and_the_names_of_models_need_no_torch():
    code = "import sys, mlip_refine.potential.model_files as m; m.resolve_model('titanium-compact', m.Path())"
    check = f"{code}; sys.exit(bool({{'torch', 'mace', 'e3nn', 'ase'}} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_graphs_need_no_mace():
    code = "import sys; from mlip_refine.potential import Graphs; sys.exit('mace' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_version_of_mace_that_was_not_tested_is_named(monkeypatch):
    from mlip_refine.potential import quiet_mace

    for found, warned in (("0.3.14", False), ("0.3.16", False), ("0.3.17", True), ("0.4.0.dev1", True)):
        monkeypatch.setattr(importlib.metadata, "version", lambda _, found=found: found)
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("always")
            importlib.reload(quiet_mace)
        assert any(f"mace-torch {found} is newer than 0.3.16" in str(w.message) for w in shown) is warned
