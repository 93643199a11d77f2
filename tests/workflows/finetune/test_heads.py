"""A model with two heads: one is trained, and what that did to the other is measured."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from phonopy import Phonopy
from phonopy.structure.atoms import PhonopyAtoms
from rich.console import Console

from mlip_refine.config import config_from_dict
from mlip_refine.errors import InputError
from mlip_refine.potential import Potential
from mlip_refine.potential.checkpoints.architecture import build_module, read_architecture
from mlip_refine.potential.checkpoints.module_tree import node_of_module
from mlip_refine.potential.checkpoints.unpickle import load_module
from mlip_refine.potential.model_files import resolve_model
from mlip_refine.workflows.finetune import finetune
from mlip_refine.workflows.finetune.heads import MOST_STRUCTURES, displaced_crystals, head_drifts
from mlip_refine.workflows.finetune.records import read_summary
from mlip_refine.workflows.finetune.run import prepare
from mlip_refine.workflows.finetune.tables import print_summary


@pytest.fixture(scope="module")
def two_heads(tmp_path_factory):
    """The embedded model with its head twice, the second with another zero of energy, as a file."""
    one = load_module(resolve_model("titanium-compact", Path())).double()
    architecture = read_architecture(node_of_module(one), "titanium-compact")
    shapes = {"heads": ["pbe", "scan"], "energies_shape": [2, 1], "scale_shape": [2], "shift_shape": [2]}
    module = build_module(architecture.model_copy(update=shapes), torch.float64)
    own, given = module.state_dict(), one.state_dict()
    n = len(given["readouts.1.linear_2.weight"])
    with torch.no_grad():
        for name, values in given.items():
            if name == "readouts.0.linear.weight":
                own[name].copy_(values.repeat_interleave(2))
            elif name == "readouts.1.linear_1.weight":
                own[name].copy_(values.view(-1, n).repeat(1, 2).flatten())
            elif name == "readouts.1.linear_2.weight":  # e3nn divides by the root of the inputs
                own[name].copy_(2**0.5 * values.repeat(2).repeat_interleave(2))
            elif name.startswith(("scale_shift.", "atomic_energies_fn.")):
                own[name].copy_(values.reshape(-1, 1).expand(2, 1).reshape(own[name].shape))
            elif own[name].shape == values.shape:
                own[name].copy_(values)
        module.atomic_energies_fn.atomic_energies[1] += 1.0
    path = tmp_path_factory.mktemp("models") / "two.model"
    torch.save(module, path)
    return path


def test_the_drift_of_other_heads_is_that_of_their_forces(two_heads):
    initial, refined = (Potential.load(str(two_heads), head="pbe") for _ in range(2))
    with torch.no_grad():
        for parameter in refined.trainable_parameters().values():
            parameter.mul_(1.01)
    crystals = displaced_crystals(initial, [bulk("Ti", "hcp", a=2.93, c=4.65), bulk("Ti", "bcc", a=3.26)])
    drifts = head_drifts(initial, refined, crystals)
    assert list(drifts) == ["scan"]
    embedded = Potential.load("titanium-compact")
    one = embedded.evaluate(embedded.graphs.collate(crystals), ("energy", "forces"))
    two = initial.evaluate(initial.graphs.collate(crystals), ("energy", "forces"))
    assert all(torch.allclose(one[name], two[name], atol=1e-12) for name in one)  # the model is what it says

    forces, energies = [], []
    for potential in (initial, refined):
        other = Potential.from_module(potential.module, head="scan")
        found = other.evaluate(other.graphs.collate(crystals), ("energy", "forces"))
        forces.append(found["forces"].detach().numpy())
        energies.append(found["energy"].detach().numpy() / [2, 1])
    drift = drifts["scan"]
    assert drift.forces_meV_per_A == pytest.approx(1e3 * np.sqrt(np.mean((forces[1] - forces[0]) ** 2)))
    assert drift.forces_before_meV_per_A == pytest.approx(1e3 * np.sqrt(np.mean(forces[0] ** 2)))
    assert drift.energy_meV_per_atom == pytest.approx(
        1e3 * np.sqrt(np.mean((energies[1] - energies[0]) ** 2))
    )
    assert drift.n_structures == 2

    many = head_drifts(initial, initial, [crystals[1]] * 100)["scan"]
    assert many.n_structures <= MOST_STRUCTURES
    assert many.forces_meV_per_A == 0
    one = Potential.load("titanium-compact")
    assert head_drifts(one, one, displaced_crystals(one, [bulk("Ti", "bcc", a=3.26)])) == {}
    assert head_drifts(one, one, []) == {}
    assert len(displaced_crystals(one, [bulk("Ti", "bcc", a=3.26)] * 100)) <= MOST_STRUCTURES


def test_a_head_must_be_named(two_heads, tiny):
    with pytest.raises(InputError, match=r"several heads.*one of pbe, scan") as caught:
        prepare(tiny(potential={"model": str(two_heads)}))
    assert "config.yaml" in str(caught.value) or "potential.head" in str(caught.value)


def test_a_run_on_phonons_alone_measures_the_drift_of_heads_on_its_supercells(
    two_heads, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    unit = bulk("Ti", "hcp", a=2.93, c=4.65)
    cell = PhonopyAtoms(numbers=unit.numbers, cell=unit.cell.array, positions=unit.positions)
    phonon = Phonopy(cell, np.diag([2, 2, 2]), primitive_matrix=np.eye(3), log_level=0)
    phonon.generate_displacements(distance=0.01)
    model = Potential.load("titanium-compact")
    at_rest, *moved = (
        Atoms(c.symbols, c.positions, cell=c.cell, pbc=True)
        for c in (phonon.supercell, *phonon.supercells_with_displacements)
    )
    phonon.forces = [1.2 * forces for forces in model.evaluate_atoms(moved).forces]
    phonon.save(tmp_path / "phonopy_params.yaml")

    loss = {"type": "phonon_hvp", "data": "phonopy_params.yaml", "split": None, "batch_size": 1}
    result = finetune(
        config_from_dict(
            {
                "name": "phonons-alone",
                "device": "cpu",
                "potential": {"model": str(two_heads), "head": "scan"},
                "losses": [loss],
                "training": {"steps": 2, "learning_rate": 1e-3},
                "output": {"folder": str(tmp_path / "runs"), "figures": False},
            },
            base=tmp_path,
        )
    )
    drift = result.summary.other_heads["pbe"]
    initial, refined = (Potential.load(str(p), head="pbe") for p in (two_heads, result.model))
    crystal = displaced_crystals(initial, [at_rest])
    forces = [
        p.evaluate(p.graphs.collate(crystal), ("forces",))["forces"].detach() for p in (initial, refined)
    ]
    change = 1e3 * float((forces[1] - forces[0]).square().mean().sqrt())
    assert drift.n_structures == 1
    assert drift.forces_meV_per_A == pytest.approx(change, rel=1e-6)
    assert change > 0


@pytest.mark.slow
def test_a_run_names_its_head_and_the_drift_of_the_others(two_heads, tiny):
    result = finetune(tiny(potential={"model": str(two_heads), "head": "scan"}))
    summary = read_summary(result.folder)
    assert summary.head == "scan"
    assert summary.other_heads["pbe"].forces_meV_per_A > 0
    printed = io.StringIO()
    print_summary(Console(file=printed, width=200), result.folder)
    assert "not trained (it was scan)" in printed.getvalue()
    assert Potential.load(str(result.safetensors), head="pbe").heads == ["pbe", "scan"]
