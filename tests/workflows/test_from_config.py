"""From a config to crystals and state points: what cannot be meant is refused."""

import json
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase.build import bulk

from mlip_refine.config import config_from_dict, load_config
from mlip_refine.errors import InputError
from mlip_refine.losses import EnsembleSource
from mlip_refine.potential import Potential
from mlip_refine.training.replay import held_out_errors
from mlip_refine.workflows.from_config import crystal, load_potential, load_replay, state_points

PHASES = {
    "hcp": {"prototype": "hcp", "element": "Ti", "n_atoms": 16},
    "bcc": {"prototype": "bcc", "element": "Ti", "n_atoms": 16},
}


@pytest.fixture
def config():
    return config_from_dict({"name": "x", "potential": {"model": "titanium-compact"}, "phases": PHASES})


def test_a_cubic_phase_has_no_second_lattice_constant(config):
    """The a of hcp would make a bcc crystal that is compressed to 0.72 of its volume."""
    assert crystal(config, "bcc", (3.3,)).cell.lengths() == pytest.approx([6.6] * 3)
    assert crystal(config, "hcp", (2.95, 4.68)).cell.lengths() == pytest.approx([5.9, 5.9, 9.36])
    with pytest.raises(InputError, match=r"'bcc' is cubic(.|\n)*bcc with the lattice \[2.95, 4.68\]"):
        crystal(config, "bcc", (2.95, 4.68))


@pytest.mark.parametrize(
    ("lattice", "found"),
    [
        ((200.0, 300.0), "5.2e\\+06 Å³ per atom"),
        ((90_000.0, 90_000.0), "[0-9.e+]+ Å³ per atom"),
        ((0.5, 0.8), "0.0866 Å³ per atom"),
        ((0.39, 30.0), "two atoms 0.39 Å apart"),
        ((8.0, 13.0), "no neighbour within 5 Å, the cutoff of the model"),
    ],
)
def test_an_absurd_lattice_is_refused_before_anything_is_computed(config, lattice, found):
    source = EnsembleSource("hcp", 300.0, 0.0, lattice)
    with pytest.raises(InputError, match=f"too far apart, or too close, for a crystal; found {found}"):
        state_points(config, [source], load_potential(config), 1)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("model", "titanium-compct", "unknown model"),
        ("head", "pbe", "no head"),
        ("freeze", ["raedout*"], "matches no parameter"),
    ],
)
def test_a_potential_that_is_refused_names_line_or_key_of_the_config(tmp_path, key, value, problem):
    section = {"model": "titanium-compact", key: value}
    with pytest.raises(InputError, match=rf"^potential\.{key}: .*{problem}"):
        load_potential(config_from_dict({"name": "x", "potential": section}))
    path = tmp_path / "run.yaml"
    lines = [f"  {name}: {json.dumps(given)}" for name, given in section.items()]
    path.write_text("\n".join(["name: x", "potential:", *lines]))
    with pytest.raises(InputError, match=rf"run\.yaml:{3 + list(section).index(key)}: .*{problem}"):
        load_potential(load_config(path))


def test_a_potential_is_loaded_by_name_file_or_config(config, monkeypatch):
    calls = []
    monkeypatch.setattr(Potential, "load", lambda model, **options: calls.append((model, options)))
    path = Path("saved.safetensors")
    load_potential("medium-mpa-0", head="default", default_dtype="float32", freeze=["readouts*"])
    load_potential(path, device="cpu", trust_pickle=True)
    load_potential(config)
    load_potential(config, default_dtype="float32")
    defaults = {"base": None, "head": None, "default_dtype": "float64", "device": "auto", "freeze": ()}
    defaults["trust_pickle"] = False
    of_config = defaults | {"base": config.base}
    given = {"head": "default", "default_dtype": "float32", "freeze": ["readouts*"]}
    assert calls == [
        ("medium-mpa-0", defaults | given),
        ("saved.safetensors", defaults | {"device": "cpu", "trust_pickle": True}),
        ("titanium-compact", of_config),
        ("titanium-compact", of_config | {"default_dtype": "float32"}),
    ]


def test_an_argument_that_is_refused_is_named_as_such(config, monkeypatch):
    def refuse(*_, **__):
        raise InputError("no such head", where="head")

    monkeypatch.setattr(Potential, "load", refuse)
    for model, given, where in (
        ("medium", {}, "head"),
        (config, {"head": "pbe"}, "head"),
        (config, {}, "potential.head"),
    ):
        with pytest.raises(InputError, match=f"^{where}: no such head"):
            load_potential(model, **given)


def test_a_cell_that_is_held_is_another_state_than_one_that_moves(config):
    potential = load_potential(config)
    moving = EnsembleSource("hcp", 300.0, 0.0)
    held = EnsembleSource("hcp", 300.0, 0.0, strain=(0.0,) * 6)
    points = state_points(config, [moving, held, moving], potential, 1)
    assert len({point.name for point in points.values()}) == 2
    assert points[held].freedom == "fixed"
    np.testing.assert_allclose(points[held].atoms.cell, points[moving].atoms.cell)


def test_states_that_can_hardly_be_told_apart_are_refused(config):
    potential = load_potential(config)
    sources = [EnsembleSource("bcc", 300.0, 0.0, (a,)) for a in (3.3, 3.3 + 1e-15)]
    assert sources[0] != sources[1]
    with pytest.raises(InputError, match=r"two states have the name bcc-300K-0GPa-a3\.3"):
        state_points(config, sources, potential, 1)


def test_a_model_labels_structures_of_any_file(tmp_path):
    """`from: model` takes no labels from a file, neither good ones nor bad ones."""
    atoms = bulk("Ti", "hcp", a=2.95, c=4.7)
    atoms.rattle(0.05, seed=1)
    atoms.info |= {"REF_energy": np.nan, "energie": 3.0}
    for name in ("train.extxyz", "valid.extxyz"):
        ase.io.write(tmp_path / name, [atoms, atoms.repeat((2, 1, 1))])
    section = {"from": "model", "train": "train.extxyz", "valid": "valid.extxyz"}
    data = {"name": "x", "potential": {"model": "titanium-compact"}, "phases": PHASES, "replay": section}
    config = config_from_dict(data, base=tmp_path)
    potential = load_potential(config)
    replay = load_replay(config, potential)
    first, second = replay.buffer.frames
    assert second.energy == pytest.approx(2 * first.energy, rel=1e-6)
    assert float(first.forces.abs().max()) > 0.1
    assert held_out_errors(potential, replay.valid).forces_mae_mev_per_A < 1e-2
