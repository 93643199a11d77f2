"""What the libraries below print and warn about does not reach a user of the Python API."""

import subprocess
import sys

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
