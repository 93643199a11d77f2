"""`free-energy` as a whole, on sixteen atoms: it needs nothing that only a training needs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlip_refine.config import Config, load_config
from mlip_refine.errors import InputError
from mlip_refine.workflows.finetune.run import prepare
from mlip_refine.workflows.free_energy import free_energies
from mlip_refine.workflows.free_energy.records import FreeEnergyResult

STATE = {"temperature": 300.0, "pressure": 0.0}
CHANGES: dict[str, Any] = {
    # Two crystals that are stable in cells that are held: a few femtoseconds do not find one.
    "phases": {
        "strained": {
            "prototype": "hcp",
            "element": "Ti",
            "n_atoms": 16,
            "a": 2.90,
            "c": 4.75,
            "cell_freedom": "fixed",
        }
    },
    "losses": [{"type": "free_energy_difference", "name": "low", "from": "hcp", "to": "strained", **STATE}],
    "free_energy": {
        "windows": 2,
        "replicas": 2,
        "fit": 800.0,
        "equilibration": 40.0,
        "production": 240.0,
        "interval": 40.0,
        "max_error": None,
    },
}


@pytest.fixture(scope="module")
def short(tmp_path_factory: Any, tiny_in: Callable[..., Config]) -> Callable[..., Config]:
    """Configs of short calculations below one folder."""
    folder = tmp_path_factory.mktemp("free-energy")
    return lambda **changes: tiny_in(folder, **(CHANGES | changes))


@pytest.fixture(scope="module")
def finished(short: Any) -> tuple[Path, dict[str, FreeEnergyResult]]:
    """A calculation with a frozen model that keeps no frames; the files of replay are absent."""
    config = short(
        name="frozen",
        potential={"freeze": ["*"]},
        replay={"train": "absent.extxyz", "valid": "absent.extxyz"},
        output={"keep_frames": False},
    )
    return config.run_folder, free_energies(config)


def test_a_frozen_model_without_replay_files_is_enough(finished: Any) -> None:
    _, results = finished
    delta_g = results["low"].delta_g
    assert (delta_g.unit, results["low"].to.phase, results["low"].n_atoms) == ("meV/atom", "strained", 16)
    assert 0 < delta_g.se < 5
    assert abs(delta_g.value) < 100


def test_frames_are_not_kept_where_not_wanted(finished: Any) -> None:
    folder, _ = finished
    assert {path.name for path in folder.iterdir()} == {
        *("config.yaml", "initial-low.json", "provenance.json", "log.txt"),
    }


def test_a_finished_calculation_is_read_again(finished: Any) -> None:
    folder, results = finished
    assert free_energies(load_config(folder / "config.yaml"), resume=True) == results


def test_finetune_starts_from_the_file(finished: Any, short: Any) -> None:
    folder, results = finished
    loss = CHANGES["losses"][0] | {"initial": str(folder / "initial-low.json")}
    run = prepare(short(name="start", losses=[loss]))
    assert run.given == results


def test_nothing_to_compute_is_refused(short: Any) -> None:
    config = short(name="nothing", losses=[{"type": "replay"}])
    with pytest.raises(InputError, match="no loss free_energy_difference") as caught:
        free_energies(config)
    assert "from, to and temperature" in str(caught.value)
    assert not config.run_folder.exists()
