"""The Python door: every name resolves, and importing the package costs nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import mlip_refine
from mlip_refine.config import Config, load_config

PROJECT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", mlip_refine.__all__)
def test_every_name_resolves(name):
    assert getattr(mlip_refine, name) is not None
    assert name in dir(mlip_refine)


def test_names_are_those_of_the_rooms():
    assert mlip_refine.Config is Config
    assert mlip_refine.load_config is load_config


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'mlip_refine' has no attribute 'fine_tune'"):
        _ = mlip_refine.fine_tune
    with pytest.raises(ImportError):
        exec("from mlip_refine import fine_tune")


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, mlip_refine; sys.exit(bool({'torch', 'mace', 'ase', 'pydantic'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_module_runs_as_the_command_line():
    command = [sys.executable, "-W", "ignore", "-m", "mlip_refine", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "finetune" in done.stdout


def test_the_notebook_is_code_without_outputs():
    notebook = json.loads((PROJECT / "notebooks" / "quickstart.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            compile("".join(cell["source"]), "quickstart.ipynb", "exec")
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
            for line in "".join(cell["source"]).splitlines():
                if line.startswith("from mlip_refine"):
                    exec(line)
