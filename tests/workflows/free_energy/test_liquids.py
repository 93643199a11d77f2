"""Liquids through `free-energy`: a run on an ideal gas with an exact answer, its file, and a later run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase.build import bulk

import mlip_refine
from mlip_refine import testing
from mlip_refine.config import Config, config_from_dict
from mlip_refine.errors import InputError
from mlip_refine.losses import FreeEnergyDifference, loss_specs
from mlip_refine.quantities import GPA, KB, MEV
from mlip_refine.workflows import from_config
from mlip_refine.workflows.free_energy import run as workflow
from mlip_refine.workflows.free_energy.differences import in_result_cells, read_initial, require_paths
from mlip_refine.workflows.free_energy.records import LIMIT, FreeEnergyResult

GAS = testing.IdealGas([18], 0.1)

TEMPERATURE, PRESSURE = 1000.0, 0.5


def _config(folder: Path) -> Config:
    """Two liquids of different size: both are the same ideal gas, and nothing has to be judged."""
    small, large = bulk("Ar", "fcc", a=5.43, cubic=True) * (2, 2, 2), bulk("Ar", "bcc", a=4.31, cubic=True)
    ase.io.write(folder / "small.extxyz", small)
    ase.io.write(folder / "large.extxyz", large * (3, 3, 3))
    melt = {"temperature": 1100.0, "duration": "0.8 ps"}
    return config_from_dict(
        {
            "name": "gas",
            "device": "cpu",
            "potential": {"model": "titanium-compact"},
            "phases": {
                "fcc": {"file": "small.extxyz"},
                "bcc": {"file": "large.extxyz"},
                "small": {"melt": {"from": "fcc", **melt}, "identity": "none"},
                "large": {"melt": {"from": "bcc", **melt}, "identity": "none"},
            },
            "losses": [
                {
                    "type": "free_energy_difference",
                    "name": "pair",
                    "from": "small",
                    "to": "large",
                    "temperature": TEMPERATURE,
                    "pressure": PRESSURE,
                }
            ],
            "sampling": {
                "timestep": "5 fs",
                "friction": 10.0,
                "barostat_time": "200 fs",
                "dtype": "float64",
                "min_effective_frames": 1.0,
                "guards": {"max_temperature_ratio": 20.0},
            },
            "free_energy": {
                "replicas": 4,
                "equilibration": "0.3 ps",
                "production": "1 ps",
                "fit": "0.8 ps",
                "interval": "40 fs",
                "max_error": None,
                "liquid": {"strength": 1.0, "sigma": 1.7, "windows": 4, "cell": "3 ps", "fluid_steps": 300},
            },
            "output": {"folder": str(folder), "figures": False},
        },
        base=folder,
    )


def _loss(config: Config) -> FreeEnergyDifference:
    (spec,) = loss_specs(config.losses)
    loss = FreeEnergyDifference(spec.name, spec.weight, spec.options)
    assert isinstance(loss, FreeEnergyDifference)
    return loss


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, FreeEnergyResult]:
    """A run, and what it found."""
    config = _config(tmp_path_factory.mktemp("gas"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workflow, "load_potential", lambda _: GAS)
        found = mlip_refine.free_energies(config)["pair"]
        calls = GAS.calls
        (config.run_folder / "initial-pair.json").unlink()
        # Every stage is in the store, those of melting too.
        assert mlip_refine.free_energies(config, resume=True) == {"pair": found}
        assert GAS.calls == calls
    return config, found


@pytest.mark.statistical
def test_two_cells_of_one_gas_have_no_difference(finished: tuple[Config, FreeEnergyResult]) -> None:
    """Molten, in mean cells, along both ladders, less the terms of 32 and 54 atoms: μ = kT ln(P Λ³/kT)."""
    _, result = finished
    assert result.convention == LIMIT
    small, large = result.from_, result.to
    assert (small.kind, large.kind) == ("liquid", "liquid")
    assert (len(small.numbers), len(large.numbers)) == (32, 54)
    kt = KB * TEMPERATURE / MEV
    for phase in (small, large):
        n, fluid = len(phase.numbers), phase.liquid
        volume = abs(np.linalg.det(np.array(phase.cell))) / n
        assert volume == pytest.approx(KB * TEMPERATURE / (PRESSURE * GPA), rel=0.15)
        assert phase.size_term is not None
        # ½ ln(2πN) of the ideal gas.
        exact = kt / n * 0.5 * np.log(2 * np.pi * n)
        assert abs(phase.size_term.value - exact) < testing.sigma_bound(3) * phase.size_term.se
        assert fluid is not None
        assert (fluid.strength, fluid.sigma_A) == (1.0, [[1.7]])
        assert len(fluid.windows) == len(fluid.closest_A) == 4
        assert (fluid.strengths[0], fluid.strengths[-1]) == (0.0, 1.0)
        assert fluid.excess.value > 0.2 * kt
    assert result.delta_g.se < 0.05 * kt
    assert abs(result.delta_g.value) < testing.sigma_bound(3) * result.delta_g.se


def test_a_later_run_starts_from_the_frame_of_the_file(
    finished: tuple[Config, FreeEnergyResult], tmp_path: Path
) -> None:
    config, result = finished
    loss, path = _loss(config), config.run_folder / "initial-pair.json"
    points = from_config.state_points(config, loss.sources, GAS, 1)
    assert read_initial(path, loss, points, GAS, 5.0) == result
    moved = in_result_cells(points, loss, result)[loss.phase_to].atoms
    np.testing.assert_allclose(moved.cell.array, np.array(result.to.cell))
    found = moved.get_scaled_positions(wrap=False)
    np.testing.assert_allclose(found, np.array(result.to.scaled_positions), atol=1e-9)
    data = json.loads(path.read_text())
    data["to"]["kind"] = "crystal"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"kind of large differs; found crystal, expected liquid"):
        read_initial(other, loss, points, GAS, 5.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"identity": "none"}, r"the free energy of 'large', which may be anything; found identity none"),
        ({"cell_freedom": "fixed"}, r"needs the compressibility of the liquid 'large'; found cell_freedom"),
    ],
)
def test_a_path_begins_at_a_crystal_or_a_liquid(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config = _config(tmp_path)
    loss = _loss(config)
    points = from_config.state_points(config, loss.sources, GAS, 1)
    require_paths(loss, points)
    points[loss.phase_to] = replace(points[loss.phase_to], **change)
    with pytest.raises(InputError, match=message):
        require_paths(loss, points)
