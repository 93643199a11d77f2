"""A whole run in seconds: sixteen atoms, a few frames, and free-energy files made up for the purpose."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms

from mlip_refine.config import Config, config_from_dict
from mlip_refine.losses import FreeEnergyDifference, loss_specs
from mlip_refine.potential import Potential
from mlip_refine.quantities import Measured
from mlip_refine.workflows.free_energy.records import FreeEnergyResult, PhaseFreeEnergy
from mlip_refine.workflows.from_config import crystal, load_potential

TRANSITIONS = {"low": (1150.0, 0.0, -1.5)}

WEIGHTS = {"energy_weight": 1.0, "forces_weight": 10.0, "stress_weight": 10.0}
"""Weights of replay: made-up labels have no errors to take them from."""


def _data(folder: Path) -> dict[str, Any]:
    losses: list[dict[str, Any]] = [
        {
            "type": "free_energy_difference",
            "name": name,
            "from": "hcp",
            "to": "bcc",
            "temperature": temperature,
            "pressure": pressure,
            "uncertainty": 0.5,
            "initial": f"initial/{name}.json",
        }
        for name, (temperature, pressure, _) in TRANSITIONS.items()
    ]
    losses.append({"type": "replay", "weight": 0.1, **WEIGHTS})
    return {
        "name": "tiny",
        "seed": 3,
        "device": "cpu",
        "potential": {"model": "titanium-compact", "default_dtype": "float64"},
        "phases": {
            # Sixteen atoms for a few femtoseconds do not settle the cell of hcp.
            "hcp": {
                "prototype": "hcp",
                "element": "Ti",
                "n_atoms": 16,
                "a": 2.95,
                "c": 4.68,
                "cell_freedom": "fixed",
            },
            "bcc": {"prototype": "bcc", "element": "Ti", "n_atoms": 16, "a": 3.27},
        },
        "losses": losses,
        "sampling": {
            "timestep": 4.0,
            "replicas": 2,
            "equilibration": 40.0,
            "interval": 20.0,
            "frames": 6,
            "min_effective_frames": 1.0,
            "n_eff_threshold": 0.985,
            "cell_equilibration": 48.0,
            "cell_iterations": 1,
            "dtype": "float64",
            "guards": {"max_displacement": 2.0, "max_temperature_ratio": 8.0},
        },
        "replay": {"train": "frames.extxyz", "valid": "frames.extxyz", "batch_size": 2, "trust_labels": True},
        "training": {"steps": 4, "learning_rate": 1e-3, "ema_decay": 0.5},
        "evaluation": {
            "replicas": 2,
            "equilibration": 20.0,
            "interval": 16.0,
            "frames": 16,
            "cell_iterations": 1,
        },
        "output": {"folder": str(folder / "runs"), "figures": False},
    }


def write_frames(path: Path) -> None:
    """Five rattled crystals of two atoms with made-up labels."""
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(5):
        atoms = Atoms("Ti2", [[0, 0, 0], [1.6, 1.6, 1.6]], cell=[3.25] * 3, pbc=True)
        atoms.positions += rng.normal(0, 0.05, (2, 3))
        atoms.info["REF_energy"] = -15.6 + 0.05 * rng.normal()
        forces = rng.normal(0, 0.3, 3)
        atoms.arrays["REF_forces"] = np.array([forces, -forces])
        atoms.info["REF_stress"] = np.diag(rng.normal(0, 0.01, 3)).ravel()
        frames.append(atoms)
    ase.io.write(path, frames, format="extxyz")


def _phase(config: Config, name: str) -> PhaseFreeEnergy:
    atoms = crystal(config, name)
    sites = np.round(atoms.get_scaled_positions(wrap=False), 12).tolist()
    return PhaseFreeEnergy(
        phase=name,
        numbers=atoms.numbers.tolist(),
        scaled_positions=sites,
        cell=atoms.cell.array.tolist(),
        gibbs=Measured(-7000.0, 0.1, "meV/atom"),
        overlap=0.9,
    )


def _initial(config: Config, potential: Potential, loss: FreeEnergyDifference) -> FreeEnergyResult:
    return FreeEnergyResult(
        model_hash=potential.hash,
        head=potential.head,
        temperature_K=loss.options.temperature,
        pressure_GPa=loss.options.pressure,
        n_atoms=16,
        delta_g=Measured(TRANSITIONS[loss.name][2], 0.2, "meV/atom"),
        from_=_phase(config, "hcp"),
        to=_phase(config, "bcc"),
        timestep_fs=config.sampling.timestep,
        settings={},
    )


def merged(data: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested changes of a config."""
    joined = dict(data)
    for key, value in changes.items():
        joined[key] = merged(joined[key], value) if isinstance(value, dict) and key in joined else value
    return joined


@pytest.fixture(scope="session")
def tiny_data() -> Callable[..., dict[str, Any]]:
    """The config of a tiny run as plain data, with nested changes."""
    return lambda folder, **changes: merged(_data(folder), changes)


@pytest.fixture(scope="session")
def tiny_in() -> Callable[..., Config]:
    """Configs of tiny runs below a folder, with the files that they name."""

    def make(folder: Path, **changes: Any) -> Config:
        config = config_from_dict(merged(_data(folder), changes), base=folder)
        if not (folder / "initial").exists():
            write_frames(folder / "frames.extxyz")
            (folder / "initial").mkdir()
            potential = load_potential(config)
            for spec in loss_specs(config.losses):
                if spec.type.loss_class is FreeEnergyDifference:
                    loss = FreeEnergyDifference(spec.name, spec.weight, spec.options)
                    _initial(config, potential, loss).write(folder / "initial" / f"{loss.name}.json")
        return config

    return make


@pytest.fixture
def tiny(tiny_in: Callable[..., Config], tmp_path: Path) -> Callable[..., Config]:
    """Configs of tiny runs below the test's folder."""
    return partial(tiny_in, tmp_path)
